// Package quiesce makes units and filesystems stand still around a capture, and
// go on after it whatever becomes of who captures.
//
// In go names of units and mount points; out comes a moment in which they stand
// still. Two processes keep it. The guard does it and undoes it: when the
// capture says so, when the capture's process is gone, and when it took too
// long. What is to be undone is written down before it is done, in a directory
// that does not outlive the system (as the standstill does not), so that
// whoever comes after a guard that was killed can undo it: systemd does by the
// guard's ExecStopPost=, and else the capture itself.
// The package touches that directory, the filesystems named, and units through
// the interface it is given.
package quiesce

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Units is what systemd does with units. Start and Stop return when it is done;
// freezing what is frozen, and thawing what is not, is no error.
type Units interface {
	Active(ctx context.Context, unit string) (string, error)
	Start(ctx context.Context, unit string) error
	Stop(ctx context.Context, unit string) error
	Freeze(ctx context.Context, unit string) error
	Thaw(ctx context.Context, unit string) error
}

// Connect makes a connection to what manages units; done closes it.
type Connect func(ctx context.Context) (u Units, done func(), err error)

// Limits of a standstill.
const (
	// FreezeLimit is how long a filesystem is frozen at most.
	FreezeLimit = 10 * time.Second
	// DefaultLimit is how long units stand still at most, unless asked otherwise.
	DefaultLimit = 10 * time.Minute
)

// Plan is what is to stand still.
type Plan struct {
	Stop        []string      `json:"stop,omitempty"`
	Freeze      []string      `json:"freeze,omitempty"`
	Filesystems []string      `json:"filesystems,omitempty"` // mount points
	Limit       time.Duration `json:"limit"`                 // 0: DefaultLimit
}

// record is what is written down: what is to be undone.
type record struct {
	Plan
}

// recordPath is where the record of a standstill is.
func recordPath(dir, id string) string { return filepath.Join(dir, id+".quiesced") }

func (r *record) write(dir, id string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := recordPath(dir, id)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("writing down what is to be undone: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil { // in memory: there is no disk it had to be on
		return fmt.Errorf("writing down what is to be undone: %w", err)
	}
	return nil
}

// maxRecord bounds a record, in bytes.
const maxRecord = 1 << 20

func readRecord(dir, id string) (*record, error) {
	path := recordPath(dir, id)
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxRecord {
		return nil, fmt.Errorf("%s is no record of what is to be undone", path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &r, nil
}

// hold makes everything stand still, units first, filesystems last; freezing is
// called before the first of these. After an error some of it may stand still:
// undo follows in any case.
func hold(ctx context.Context, dir, id string, p Plan, connect Connect, freezing func()) error {
	r := record{Plan: Plan{Limit: p.Limit}}
	var u Units
	if len(p.Stop)+len(p.Freeze) > 0 {
		var done func()
		var err error
		if u, done, err = connect(ctx); err != nil {
			return fmt.Errorf("making units stand still: %w", err)
		}
		defer done()
	}
	// What does not run now is not to run after.
	for _, l := range []struct{ from, to *[]string }{{&p.Stop, &r.Stop}, {&p.Freeze, &r.Freeze}} {
		for _, name := range *l.from {
			state, err := u.Active(ctx, name)
			if err != nil {
				return err
			}
			if state == "active" || state == "activating" || state == "reloading" {
				*l.to = append(*l.to, name)
			}
		}
	}
	if err := r.write(dir, id); err != nil {
		return err
	}
	for _, name := range r.Stop {
		if err := u.Stop(ctx, name); err != nil {
			return err
		}
	}
	for _, name := range r.Freeze {
		if err := u.Freeze(ctx, name); err != nil {
			return err
		}
	}
	for _, m := range p.Filesystems { // so that what is frozen first waits little for the others
		if err := flush(m); err != nil {
			return err
		}
	}
	begun := time.Now()
	if len(p.Filesystems) > 0 {
		freezing()
	}
	for _, m := range p.Filesystems {
		if err := ctx.Err(); err != nil {
			return err
		}
		r.Filesystems = append(r.Filesystems, m)
		if err := r.write(dir, id); err != nil {
			return err
		}
		if err := freeze(m); err != nil {
			if errors.Is(err, unix.EBUSY) { // by somebody else, whose it stays
				r.Filesystems = r.Filesystems[:len(r.Filesystems)-1]
				err = errors.Join(fmt.Errorf("%s is frozen already", m), r.write(dir, id))
			}
			return err
		}
		if time.Since(begun) > FreezeLimit {
			return fmt.Errorf("freezing took more than %s: too much is written meanwhile", FreezeLimit)
		}
	}
	return nil
}

// undoTries is how often undoing is tried before it is given up.
const undoTries = 20

// Undo lets everything go on that a record says stands still: filesystems
// first, for units may need them. That there is no record is no error.
// It can be done twice, and by several at once.
//
// A unit that systemd answers for and that would not start all the same, often
// tried, is in the error and no longer in the record: it is its operator's then.
func Undo(ctx context.Context, dir, id string, connect Connect) error {
	r, err := readRecord(dir, id)
	if errors.Is(err, fs.ErrNotExist) {
		return forget(dir, id)
	}
	if err != nil {
		return fmt.Errorf("undoing a standstill: %w", err)
	}
	err = thawAll(r.Filesystems)
	if err == nil {
		r.Filesystems = nil
	}
	errs := []error{err}
	for try := 1; len(r.Stop)+len(r.Freeze) > 0; try++ {
		answered, err := undoUnits(ctx, r, connect)
		if err != nil && try < undoTries && ctx.Err() == nil {
			time.Sleep(250 * time.Millisecond) // systemd may be busy with what else went wrong
			continue
		}
		errs = append(errs, err)
		if answered {
			r.Stop = nil
		}
		break
	}
	if len(r.Stop)+len(r.Freeze)+len(r.Filesystems) > 0 {
		errs = append(errs, r.write(dir, id))
	} else {
		errs = append(errs, forget(dir, id))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("undoing a standstill: %w", err)
	}
	return nil
}

// forget removes what is written down of a standstill, the record first.
func forget(dir, id string) error {
	for _, path := range []string{recordPath(dir, id), recordPath(dir, id) + ".new", planPath(dir, id), socketPath(dir, id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("undoing a standstill: %w", err)
		}
	}
	return nil
}

// undoUnits lets units go on and leaves in the record those that do not.
// answered tells whether systemd said so of all of these.
func undoUnits(ctx context.Context, r *record, connect Connect) (answered bool, err error) {
	u, done, err := connect(ctx)
	if err != nil {
		return false, err
	}
	defer done()
	answered = true
	var errs []error
	undo := func(names []string, do func(context.Context, string) error) []string {
		var left []string
		for _, name := range slices.Backward(names) {
			if err := do(ctx, name); err != nil {
				errs = append(errs, err)
				left = append(left, name)
				if _, aerr := u.Active(ctx, name); aerr != nil || ctx.Err() != nil {
					answered = false
				}
			}
		}
		slices.Reverse(left)
		return left
	}
	r.Freeze = undo(r.Freeze, u.Thaw)
	r.Stop = undo(r.Stop, u.Start)
	return answered, errors.Join(errs...)
}

// Sweep undoes what is written down and has no guard any more.
func Sweep(ctx context.Context, dir string, connect Connect) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.quiesced"))
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		id := filepath.Base(n[:len(n)-len(".quiesced")])
		if c, err := dial(ctx, dir, id); err == nil {
			c.Close() // a guard that has somebody hangs up on others
			continue
		}
		errs = append(errs, Undo(ctx, dir, id, connect))
	}
	return errors.Join(errs...)
}
