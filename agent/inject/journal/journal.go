// Package journal remembers what was done to an instance, so that it is done
// at most once: a file of one JSON record a line in a directory of the root
// disk.
//
// A step is recorded as started, durably, before it begins and as finished or
// failed after. A step found started without an end was cut short: it is
// recorded as interrupted and never begun again for that instance.
// The package touches only its file and takes a lock on it, so that the
// initrd, the agent and a command line do not meet.
package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// State is how far a step got.
type State string

// States of a step. The zero value means that it was never begun.
const (
	Started     State = "started"
	Finished    State = "finished"
	Failed      State = "failed"
	Interrupted State = "interrupted"
)

// Record is one line of the file.
type Record struct {
	Time     time.Time `json:"time"`
	Instance string    `json:"instance"`
	Step     string    `json:"step"`
	State    State     `json:"state"`
	Note     string    `json:"note,omitempty"`
}

// ErrDamaged is wrapped where the file has a line, not its last, that cannot
// be understood: what was done is then unknown, and nothing is to be begun.
var ErrDamaged = errors.New("journal is damaged")

// ErrDone is wrapped by Begin for a step that was begun before.
var ErrDone = errors.New("done before")

// maxSize bounds the file read, in bytes.
const maxSize = 16 << 20

// Journal is an open, locked journal. It is not for concurrent use.
type Journal struct {
	f    *os.File
	now  func() time.Time
	all  []Record
	last map[[2]string]Record
}

// Open opens the journal in dir, which exists, making the file if absent, and
// waits for the lock that Close releases. Steps that were cut short are
// recorded as interrupted: whoever holds the lock knows that nobody runs them.
func Open(dir *os.File) (*Journal, error) {
	fd, err := unix.Openat(int(dir.Fd()), "journal", unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening journal in %s: %w", dir.Name(), err)
	}
	j := &Journal{
		f:    os.NewFile(uintptr(fd), filepath.Join(dir.Name(), "journal")),
		now:  time.Now,
		last: make(map[[2]string]Record),
	}
	if err := j.load(); err != nil {
		j.f.Close()
		return nil, fmt.Errorf("journal %s: %w", j.f.Name(), err)
	}
	if err := dir.Sync(); err != nil {
		j.f.Close()
		return nil, err
	}
	return j, nil
}

func (j *Journal) load() error {
	st, err := j.f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("not a regular file (%v)", st.Mode().Type())
	}
	if err := unix.Flock(int(j.f.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("locking: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(j.f, maxSize+1))
	if err != nil {
		return err
	}
	if len(data) > maxSize {
		return fmt.Errorf("%w: longer than %d bytes", ErrDamaged, maxSize)
	}
	records, torn, err := parse(data)
	if err != nil {
		return err
	}
	if torn > 0 {
		// A power cut while a line was appended: it never took effect.
		if err := j.f.Truncate(int64(len(data) - torn)); err != nil {
			return err
		}
	}
	for _, r := range records {
		j.remember(r)
	}
	for _, r := range j.all {
		if cur := j.last[[2]string{r.Instance, r.Step}]; cur.State == Started {
			if err := j.append(Record{Instance: cur.Instance, Step: cur.Step, State: Interrupted, Note: "begun " + cur.Time.UTC().Format(time.RFC3339) + " and cut short"}); err != nil {
				return err
			}
		}
	}
	return nil
}

// View is what a journal says, without being opened for writing.
type View struct {
	Records []Record // in the order they were written
	// Busy: somebody has the journal open. Steps that are started are then
	// being done; else they were interrupted.
	Busy bool
}

// Read looks at the journal in dir without waiting for its lock and without
// changing it. A journal that does not exist is empty.
func Read(dir *os.File) (View, error) {
	fd, err := unix.Openat(int(dir.Fd()), "journal", unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return View{}, nil
	}
	name := filepath.Join(dir.Name(), "journal")
	if err != nil {
		return View{}, fmt.Errorf("opening journal %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var v View
	st, err := f.Stat()
	switch {
	case err != nil:
		return v, err
	case !st.Mode().IsRegular():
		return v, fmt.Errorf("journal %s: not a regular file (%v)", name, st.Mode().Type())
	}
	switch err := unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		v.Busy = true
	case err != nil:
		return v, fmt.Errorf("locking journal %s: %w", name, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return v, err
	}
	if len(data) > maxSize {
		return v, fmt.Errorf("journal %s: %w: longer than %d bytes", name, ErrDamaged, maxSize)
	}
	if v.Records, _, err = parse(data); err != nil {
		return v, fmt.Errorf("journal %s: %w", name, err)
	}
	return v, nil
}

// Last is the newest record of each of the instance's steps, in the order the
// steps were begun. A step that nobody does and that has no end is Interrupted.
func (v View) Last(instance string) []Record {
	var steps []Record
	for _, r := range v.Records {
		if r.Instance != instance {
			continue
		}
		i := 0
		for i < len(steps) && steps[i].Step != r.Step {
			i++
		}
		if i == len(steps) {
			steps = append(steps, r)
		}
		steps[i] = r
	}
	for i := range steps {
		if steps[i].State == Started && !v.Busy {
			steps[i].State = Interrupted
		}
	}
	return steps
}

// parse splits the file into records; torn is the length of an unfinished
// last line.
func parse(data []byte) (records []Record, torn int, err error) {
	for n := 1; len(data) > 0; n++ {
		end := bytes.IndexByte(data, '\n')
		if end < 0 {
			return records, len(data), nil
		}
		var r Record
		dec := json.NewDecoder(bytes.NewReader(data[:end]))
		dec.DisallowUnknownFields()
		err := dec.Decode(&r)
		if err == nil && (r.Instance == "" || r.Step == "" || dec.More()) {
			err = errors.New("instance or step is missing, or more than one record")
		}
		switch r.State {
		case Started, Finished, Failed, Interrupted:
		default:
			if err == nil {
				err = fmt.Errorf("unknown state %q", r.State)
			}
		}
		if err != nil {
			return nil, 0, fmt.Errorf("%w: line %d: %w", ErrDamaged, n, err)
		}
		records = append(records, r)
		data = data[end+1:]
	}
	return records, 0, nil
}

func (j *Journal) remember(r Record) {
	j.all = append(j.all, r)
	j.last[[2]string{r.Instance, r.Step}] = r
}

func (j *Journal) append(r Record) error {
	r.Time = j.now().UTC()
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err := j.f.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	if _, err := j.f.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	if err := j.f.Sync(); err != nil {
		return fmt.Errorf("syncing: %w", err)
	}
	j.remember(r)
	return nil
}

// State tells how far the step of the instance got.
func (j *Journal) State(instance, step string) State {
	return j.last[[2]string{instance, step}].State
}

// Records lists all records in the order they were written.
func (j *Journal) Records() []Record { return j.all }

// Begin records that the step is started and returns once that is durable.
// Its error wraps ErrDone if the step was begun before, whatever came of it.
func (j *Journal) Begin(instance, step string) error {
	if s := j.State(instance, step); s != "" {
		return fmt.Errorf("step %s of instance %s: %w (%s)", step, instance, ErrDone, s)
	}
	return j.append(Record{Instance: instance, Step: step, State: Started})
}

// Again records a further start of a step that is safe to repeat.
func (j *Journal) Again(instance, step string) error {
	return j.append(Record{Instance: instance, Step: step, State: Started})
}

// End records how a started step ended: finished, or failed with a note that
// holds no secret.
func (j *Journal) End(instance, step string, failed bool, note string) error {
	state := Finished
	if failed {
		state = Failed
	}
	return j.append(Record{Instance: instance, Step: step, State: state, Note: note})
}

// Close releases the lock.
func (j *Journal) Close() error { return j.f.Close() }
