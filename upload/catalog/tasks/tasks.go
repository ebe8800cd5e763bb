// Package tasks keeps what a catalog asks of agents as objects in the store
// both can reach: bundle that instance, make an image of this one. The two
// never talk to each other.
//
// What goes in: a request, signed by the catalog's server, and what an agent
// says of its progress. What comes out: tasks, whose requests are verified
// before they are returned to an agent. The package reads and writes below
// [Prefix] of the store and does not log.
//
// Format, version 1. A task is two objects, I being the instance's id and T the
// task's:
//
//	catalog/tasks/I/T/request   an armored SSHSIG signature by namespace
//	                            "instar-task", a newline, and the JSON of a
//	                            [Request], over whose bytes the signature is.
//	                            Written once.
//	catalog/tasks/I/T/status    the JSON of a [Status]. Changed only by
//	                            conditional put: of all who take a task, one
//	                            gets it.
//
// Whoever may write the bucket can forge a status, which is believed for what
// is shown and nothing else: an image becomes available when its own signature
// is good. A request he can neither make nor change. He can put an old one back:
// requests expire, and an agent remembers those it ran. He can withhold requests,
// and stop what an agent does by a status that is not the agent's: what is in the
// store he could delete as well.
//
// An agent that took a task is its only one, for good: it is told apart by what it
// writes as Status.Agent, which no other writes. It says how the task goes at least
// every [Beat]; a task whose agent says nothing for [Silence] is ended by the
// catalog's servers ([Queue.Lapse]). Expiry and silence are by the clocks of agents
// and servers, which S3's signatures hold to a quarter of an hour.
package tasks

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"
)

// Prefix is that of the keys of all tasks.
const Prefix = "catalog/tasks/"

// Namespace is what requests are signed for. The principal in the
// allowed_signers file is the id of the instance that is to obey.
const Namespace = "instar-task"

// Kind is what is to be done.
type Kind string

// The kinds of task.
const (
	BundleInstance Kind = "bundle-instance" // an EC2 bundle, to Bucket and Prefix
	CreateImage    Kind = "create-image"    // an Instar image, under Name
)

// Request says what is to be done. It never changes.
type Request struct {
	Version  int    `json:"version"` // of the format: 1
	ID       string `json:"id"`      // "bun-" or "img-", 17 hex digits
	Kind     Kind   `json:"kind"`
	Instance string `json:"instance"` // who is to do it
	Account  string `json:"account"`  // who asked

	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"` // not begun after that

	// Of a bundle: where to.
	Bucket string `json:"bucket,omitempty"`
	Prefix string `json:"prefix,omitempty"`

	// Of an image: the id it has in the catalog, the name it is to have in the
	// store, and what people are shown.
	ImageID     string `json:"image-id,omitempty"`
	Name        string `json:"name,omitempty"`
	Description string `json:"description,omitempty"`
	// NoReboot is as the caller said. An agent captures the running system
	// either way.
	NoReboot bool `json:"no-reboot,omitempty"`
}

// State is how far a task is, in EC2's words; Cancelled is shown to EC2's
// clients as failed.
type State string

// The states of a task.
const (
	Pending    State = "pending"  // nobody took it yet
	Bundling   State = "bundling" // an agent reads the volume
	Storing    State = "storing"  // the last of it is being stored
	Cancelling State = "cancelling"
	Complete   State = "complete"
	Failed     State = "failed"
	Cancelled  State = "cancelled"
)

// Ended says that the state is the last.
func (s State) Ended() bool { return s == Complete || s == Failed || s == Cancelled }

func (s State) known() bool {
	switch s {
	case Pending, Bundling, Storing, Cancelling, Complete, Failed, Cancelled:
		return true
	}
	return false
}

// Status is how a task goes. All of it is the agent's word.
type Status struct {
	State    State     `json:"state"`
	Progress int       `json:"progress"`          // percent, 0 to 100
	Agent    string    `json:"agent,omitempty"`   // who took it: a text that nobody else uses, nor for another task
	Started  time.Time `json:"started,omitzero"`  // when it was taken
	Updated  time.Time `json:"updated"`           // when this was written
	Code     string    `json:"code,omitempty"`    // of a task that failed, one word
	Message  string    `json:"message,omitempty"` // why, for people

	// Of a complete task: the bundle's manifest as BUCKET/KEY, or the image's
	// version in the store as NAME@DIGEST; and of an image that digest, the
	// SHA-256 of its manifest in hex.
	Manifest string `json:"manifest,omitempty"`
	Digest   string `json:"digest,omitempty"`
}

// Task is a request and how it goes.
type Task struct {
	Request
	Status
	etag string // of the status
}

// How often an agent says something of a task it took, at least, and after how
// long a silence the task is given up.
const (
	Beat    = 5 * time.Minute
	Silence = time.Hour
)

// Codes of tasks that [Queue.Lapse] ended.
const (
	CodeUnreachable = "Client.InstanceUnreachable" // no agent took it in time
	CodeSilent      = "Server.AgentSilent"         // one did, and was not heard of again
)

// Errors that a caller may branch on.
var (
	ErrNotFound = errors.New("no such task")
	ErrTaken    = errors.New("another agent has the task")
	ErrCancel   = errors.New("the task is to be cancelled")  // stop, then Update to Cancelled
	ErrEnded    = errors.New("the task has ended")           // nothing about it changes any more
	ErrRequest  = errors.New("not a request to be followed") // malformed, expired, or not signed by who may
	ErrStatus   = errors.New("not the status of a task")     // malformed: whoever may write the bucket can put anything there
)

// Lengths beyond which nothing is read, in bytes.
const (
	maxObject  = 64 << 10
	maxText    = 1024 // of a message or description
	maxWaiting = 1000 // tasks of an instance that are looked at
)

var (
	taskID     = regexp.MustCompile(`^(bun|img)-[0-9a-f]{17}$`)
	statusCode = regexp.MustCompile(`^[A-Za-z0-9.]{0,64}$`)
	instanceID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
)

// ValidInstance says whether an instance's id can be asked anything: 1 to 128
// letters, digits, '-', '_' and '.', the first of them a letter or digit.
func ValidInstance(id string) bool { return instanceID.MatchString(id) && !strings.Contains(id, "..") }

func (r *Request) check() error {
	switch {
	case r.Version != 1:
		return fmt.Errorf("%w: version %d, this program knows 1", ErrRequest, r.Version)
	case !taskID.MatchString(r.ID):
		return fmt.Errorf("%w: %q is no task's id", ErrRequest, r.ID)
	case !ValidInstance(r.Instance):
		return fmt.Errorf("%w: %q is no instance's id", ErrRequest, r.Instance)
	case r.Created.IsZero() || !r.Expires.After(r.Created):
		return fmt.Errorf("%w: it expires at %s and was made at %s", ErrRequest, r.Expires, r.Created)
	case len(r.Description) > maxText || !utf8.ValidString(r.Description):
		return fmt.Errorf("%w: its description is no text of at most %d bytes", ErrRequest, maxText)
	}
	switch r.Kind {
	case BundleInstance:
		if r.Bucket == "" || r.Prefix == "" || strings.ContainsAny(r.Bucket, "/\\") {
			return fmt.Errorf("%w: a bundle needs a bucket and a prefix, it has %q and %q", ErrRequest, r.Bucket, r.Prefix)
		}
	case CreateImage:
		if r.ImageID == "" || r.Name == "" {
			return fmt.Errorf("%w: an image needs an id and a name, it has %q and %q", ErrRequest, r.ImageID, r.Name)
		}
	default:
		return fmt.Errorf("%w: its kind is %q, known are %s and %s", ErrRequest, r.Kind, BundleInstance, CreateImage)
	}
	return nil
}
