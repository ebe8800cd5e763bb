// Package task is the agent's work: captures that were asked for, each with a
// state that outlives the process, the machine's power and the agent itself.
//
// In go requests; out come tasks whose state is on disk before it is told to
// anybody. A task is done by a worker, a process of its own that a [Launcher]
// starts, freezes and stops; the worker tells what it does in a file that is
// followed, and its end in another. So the agent may be killed and started
// again while workers run: it takes up where it was.
// The package touches one directory, and what the launcher does.
package task

import (
	"errors"
	"time"
)

// Kind is what a task makes.
type Kind string

// The kinds of tasks.
const (
	Bundle      Kind = "bundle"       // an EC2 bundle, as "instar bundle-vol" makes it
	CreateImage Kind = "create-image" // an Instar image
)

// State is how far a task got, in the words of EC2's bundle tasks.
type State string

// The states of a task. EC2 has no word for a task that was cancelled.
const (
	Pending    State = "pending"    // waits for its turn, or to be begun again
	Bundling   State = "bundling"   // is reading and storing
	Storing    State = "storing"    // everything is read; what is left is stored and published
	Cancelling State = "cancelling" // was told to end
	Complete   State = "complete"   // published
	Failed     State = "failed"     // Error says why
	Cancelled  State = "cancelled"
)

// States lists all states.
func States() []State {
	return []State{Pending, Bundling, Storing, Cancelling, Complete, Failed, Cancelled}
}

// Ended reports whether nothing more will happen.
func (s State) Ended() bool { return s == Complete || s == Failed || s == Cancelled }

// Errors of a [Manager]. They are wrapped by errors that say more.
var (
	ErrNotFound = errors.New("no such task")
	ErrRequest  = errors.New("the request cannot be meant")
	ErrToken    = errors.New("the client token was used for another request")
	ErrState    = errors.New("not in this state of the task")
	ErrFull     = errors.New("too many tasks wait")
)

// Task is what is known of one task.
type Task struct {
	// ID is "bun-" and 17 hexadecimal digits, as EC2's bundle tasks have it.
	ID      string  `json:"id"`
	Request Request `json:"request"`
	State   State   `json:"state"`
	// Paused says that it is frozen, or will not be begun, until it is resumed.
	Paused bool `json:"paused,omitempty"`
	// By is who asked for it.
	By      Caller    `json:"by"`
	Created time.Time `json:"created"`
	Updated time.Time `json:"updated"`
	// Ended is zero for a task that goes on.
	Ended    time.Time `json:"ended,omitzero"`
	Progress Progress  `json:"progress"`
	// Attempts are the times it was begun; there is more than one if it was cut short.
	Attempts []Attempt `json:"attempts,omitempty"`
	Warnings int       `json:"warnings,omitempty"` // what the capture warned of, each a line of the journal
	Error    *Failure  `json:"error,omitempty"`
	Result   *Result   `json:"result,omitempty"`
}

// Caller is who asked over the socket, by the kernel's word.
type Caller struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	PID int32  `json:"pid,omitempty"`
}

// Progress is how far the work got. It is not kept over a restart, but
// read anew from what the worker wrote.
type Progress struct {
	Phase       string `json:"phase,omitempty"`        // "capturing /"
	Done        int64  `json:"done"`                   // bytes of the phase
	Total       int64  `json:"total,omitempty"`        // bytes, 0 if not known
	Percent     int    `json:"percent"`                // of the whole task, never less than before within an attempt
	Rate        int64  `json:"rate,omitempty"`         // bytes a second
	SecondsLeft int64  `json:"seconds-left,omitempty"` // of the phase
	Quiesced    bool   `json:"quiesced,omitempty"`     // units are stopped or frozen for it now
}

// Attempt is one time the work was begun.
type Attempt struct {
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	Outcome string    `json:"outcome,omitempty"` // "" while it goes on
}

// Failure is why a task failed.
type Failure struct {
	Code    string `json:"code"` // one of the Code constants
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	Exit    int    `json:"exit,omitempty"` // the worker's exit status, as in its manual page
}

// Codes of failures.
const (
	CodeCapture     = "Server.CaptureFailed"
	CodeInterrupted = "Server.Interrupted" // the worker was killed, or the machine went down
	CodeLaunch      = "Server.LaunchFailed"
	CodeCancelled   = "Client.Cancelled"
)

// Result is what a task published.
type Result struct {
	Manifest     string `json:"manifest"` // an image's digest, a bundle's manifest
	Location     string `json:"location"`
	Sequence     uint64 `json:"sequence,omitempty"`
	Size         int64  `json:"size,omitempty"`          // bytes of the disk
	BytesRead    int64  `json:"bytes-read,omitempty"`    // of files
	BytesAdded   int64  `json:"bytes-added,omitempty"`   // of objects stored
	Changed      bool   `json:"changed,omitempty"`       // files changed while they were read
	Kernel       string `json:"kernel,omitempty"`        // its release
	FilesRead    int64  `json:"files-read,omitempty"`    //
	FilesSkipped int64  `json:"files-skipped,omitempty"` // unchanged since the parent
	Pruned       int    `json:"pruned,omitempty"`        // older images that retention removed
}
