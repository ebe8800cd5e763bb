package task

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/internal/durable"
)

// Files of a task in the directory of an agent's tasks, each named by the task's ID.
const (
	taskSuffix   = ".json"   // the task; what was acknowledged is there
	logSuffix    = ".log"    // what the worker tells, a JSON object a line
	resultSuffix = ".result" // how the worker ended; written whole, last
	lockSuffix   = ".lock"   // locked by the worker as long as it lives
)

// Bounds of what is read back, in bytes.
const (
	maxTask   = 1 << 20
	maxResult = 1 << 20
)

var idPattern = regexp.MustCompile(`^bun-[0-9a-f]{17}$`)

// CheckID reports whether a text can be a task's ID.
func CheckID(id string) error {
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%w %q", ErrNotFound, id)
	}
	return nil
}

// Dir is the directory that holds an agent's tasks. Each is a file of its own
// that is replaced as a whole, so that no moment of a crash leaves half of one.
type Dir string

// OpenDir makes the directory if it is not there.
func OpenDir(path string) (Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return "", fmt.Errorf("making the tasks' directory: %w", err)
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return "", err
	}
	return Dir(path), nil
}

// leftAfter is how old a file is that nobody writes any more.
const leftAfter = time.Hour

// Tidy removes what a crash left of files that were never whole. Only the one
// that runs tasks calls it (see [Dir.Alone]). Workers of the agent before may be
// writing such files now: those of the last hour stay.
func (d Dir) Tidy() error {
	names, err := os.ReadDir(string(d))
	if err != nil {
		return fmt.Errorf("reading the tasks' directory: %w", err)
	}
	for _, n := range names {
		if !strings.HasPrefix(n.Name(), durable.Temp) {
			continue
		}
		st, err := n.Info()
		if err == nil && time.Since(st.ModTime()) > leftAfter {
			err = os.Remove(filepath.Join(string(d), n.Name()))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // its writer has made it whole
			return fmt.Errorf("removing what a crash left: %w", err)
		}
	}
	return nil
}

func (d Dir) path(id, suffix string) string { return filepath.Join(string(d), id+suffix) }

// Log is the file a task's worker tells what it does in.
func (d Dir) Log(id string) string { return d.path(id, logSuffix) }

// Save writes a task; when it returns without an error, the task is on disk.
func (d Dir) Save(t *Task) error {
	if err := durable.Replace(d.path(t.ID, taskSuffix), 0o600, encode(t)); err != nil {
		return fmt.Errorf("keeping task %s: %w", t.ID, err)
	}
	return nil
}

// Load reads one task. It wraps [ErrNotFound] if there is none.
func (d Dir) Load(id string) (*Task, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	data, err := durable.Read(d.path(id, taskSuffix), maxTask)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w %q", ErrNotFound, id)
	}
	if err != nil {
		return nil, fmt.Errorf("reading task %s: %w", id, err)
	}
	t, err := decodeTask(data)
	if err == nil && t.ID != id {
		err = fmt.Errorf("it says that it is %q", t.ID)
	}
	if err != nil {
		return nil, fmt.Errorf("reading task %s: %w", id, err)
	}
	return t, nil
}

// LoadAll reads all tasks, oldest first. Files that cannot be understood are
// left as they are and named in damaged.
func (d Dir) LoadAll() (tasks []*Task, damaged []error, err error) {
	names, err := os.ReadDir(string(d))
	if err != nil {
		return nil, nil, fmt.Errorf("reading the tasks: %w", err)
	}
	for _, n := range names {
		id, ok := strings.CutSuffix(n.Name(), taskSuffix)
		if !ok || !idPattern.MatchString(id) {
			continue
		}
		t, err := d.Load(id)
		if err != nil {
			damaged = append(damaged, err)
			continue
		}
		tasks = append(tasks, t)
	}
	slices.SortFunc(tasks, func(a, b *Task) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return tasks, damaged, nil
}

// Remove forgets a task, its own file last.
func (d Dir) Remove(id string) error {
	for _, s := range []string{logSuffix, resultSuffix, lockSuffix, taskSuffix} {
		if err := os.Remove(d.path(id, s)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forgetting task %s: %w", id, err)
		}
	}
	return durable.SyncDir(string(d))
}

// WorkResult is how a worker ended: exactly one of Failure and Result is set.
type WorkResult struct {
	Exit    int      `json:"exit"` // the exit status of the command it ran
	Failure *Failure `json:"failure,omitempty"`
	Result  *Result  `json:"result,omitempty"`
}

// SaveResult tells how the worker ended. It is the worker's last word.
func (d Dir) SaveResult(id string, r *WorkResult) error {
	if err := durable.Replace(d.path(id, resultSuffix), 0o600, encode(r)); err != nil {
		return fmt.Errorf("keeping the result of task %s: %w", id, err)
	}
	return nil
}

// result reads how a worker ended; nil if it did not, or did not say.
func (d Dir) result(id string) (*WorkResult, error) {
	data, err := durable.Read(d.path(id, resultSuffix), maxResult)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the result of task %s: %w", id, err)
	}
	var r WorkResult
	if err := strict(data, &r); err != nil {
		return nil, fmt.Errorf("reading the result of task %s: %w", id, err)
	}
	if (r.Failure == nil) == (r.Result == nil) {
		return nil, fmt.Errorf("reading the result of task %s: it is neither of a failure nor of a success", id)
	}
	return &r, nil
}

// clean makes way for another attempt: its log begins anew, and no result is there.
func (d Dir) clean(id string) error {
	for _, s := range []string{resultSuffix, logSuffix} {
		if err := os.Remove(d.path(id, s)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("beginning task %s: %w", id, err)
		}
	}
	return durable.SyncDir(string(d))
}

// strict reads one JSON value with no member that is not known.
func strict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// DecodeRequest reads a request as a caller sends it, and checks it.
func DecodeRequest(data []byte) (*Request, error) {
	var r Request
	if err := strict(data, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if err := r.Check(); err != nil {
		return nil, err
	}
	return &r, nil
}

// decodeTask reads a task as it was kept.
func decodeTask(data []byte) (*Task, error) {
	var t Task
	if err := strict(data, &t); err != nil {
		return nil, err
	}
	if err := CheckID(t.ID); err != nil {
		return nil, err
	}
	if !slices.Contains(States(), t.State) {
		return nil, fmt.Errorf("unknown state %q", t.State)
	}
	return &t, t.Request.Check()
}

// encode writes what is known to be writable.
func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic("task: internal error: a value that JSON cannot hold: " + err.Error())
	}
	return append(data, '\n')
}
