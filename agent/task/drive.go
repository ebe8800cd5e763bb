package task

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// drive brings a task to its end, or as far as it can get: until ctx ends, the
// task ends, or it is paused before it began.
func (m *Manager) drive(ctx context.Context, id string) {
	d := &driver{m: m, id: id, log: follower{path: m.o.Dir.Log(id)}}
	tick := time.NewTicker(m.o.Poll)
	defer tick.Stop()
	for {
		wait, err := d.step(ctx)
		if err != nil {
			m.failed(id, err)
		}
		t, changed, gerr := m.Get(id)
		if gerr != nil || t.State.Ended() || t.State == Pending && t.Paused {
			m.forget()
			return
		}
		var look <-chan time.Time = tick.C
		if wait > 0 {
			look = time.After(wait)
		} else if err == nil && (t.State == Cancelling) == d.stopped {
			changed = nil // only the worker can bring news
		}
		select {
		case <-ctx.Done():
			return
		case <-look:
		case <-changed:
		}
	}
}

// driver is the driving of one task.
type driver struct {
	m       *Manager
	id      string
	log     follower
	stage   Stage
	taken   bool // what was to be frozen is
	stopped bool // the worker was asked to end
}

// step does what is to be done next. It is to be called again after wait, or
// after a poll if that is 0.
func (d *driver) step(ctx context.Context) (wait time.Duration, err error) {
	t, _, err := d.m.Get(d.id)
	if err != nil || t.State.Ended() {
		return 0, err
	}
	pid, err := d.m.o.Dir.Worker(d.id)
	if err != nil {
		return 0, err
	}
	if pid != 0 {
		return 0, d.attend(ctx, t)
	}
	res, err := d.m.o.Dir.result(d.id)
	if err == nil && res != nil && open(t) {
		// The worker may have ended between the two looks: its log is whole now.
		if err := d.follow(t); err != nil {
			return 0, err
		}
		return d.settle(res)
	}
	switch {
	case t.State == Cancelling:
		_, uerr := d.m.update(d.id, func(t *Task) error {
			t.close("cancelled")
			t.State, t.Error = Cancelled, &Failure{Code: CodeCancelled, Message: "cancelled"}
			return nil
		})
		return 0, errors.Join(err, uerr)
	case open(t) && (err != nil || d.begun()):
		why := "cut short: the worker was killed, or the machine went down"
		if err != nil {
			why = err.Error()
		}
		return d.interrupted(why)
	case t.Paused:
		return 0, nil
	}
	return d.launch(ctx, t)
}

// open reports whether the last attempt has no end yet.
func open(t Task) bool {
	n := len(t.Attempts)
	return n > 0 && t.Attempts[n-1].Ended.IsZero()
}

// close ends the last attempt.
func (t *Task) close(outcome string) {
	if n := len(t.Attempts); n > 0 && t.Attempts[n-1].Ended.IsZero() {
		t.Attempts[n-1].Ended, t.Attempts[n-1].Outcome = time.Now().UTC(), outcome
	}
}

// begun reports whether a worker has begun: its log is there.
func (d *driver) begun() bool {
	_, err := os.Lstat(d.log.path)
	return !errors.Is(err, fs.ErrNotExist)
}

// launch begins an attempt. It is on disk before the worker is started, so that
// no worker is ever unknown.
func (d *driver) launch(ctx context.Context, t Task) (time.Duration, error) {
	lock, err := d.m.o.Dir.Lock(d.id)
	if err != nil {
		return 0, err // a worker has just begun
	}
	err = d.m.o.Dir.clean(d.id)
	lock.Close()
	if err != nil {
		return 0, err
	}
	d.log, d.stage, d.taken, d.stopped = follower{path: d.log.path}, Preparing, true, false
	t, err = d.m.update(d.id, func(t *Task) error {
		if t.State != Pending && t.State != Bundling && t.State != Storing || t.Paused {
			return fmt.Errorf("%w: task %s is %s", ErrState, t.ID, t.State)
		}
		if !open(*t) {
			t.Attempts = append(t.Attempts, Attempt{Started: time.Now().UTC()})
		}
		t.State, t.Progress, t.Warnings = Bundling, Progress{}, 0
		return nil
	})
	if err != nil {
		if errors.Is(err, ErrState) {
			return 0, nil // cancelled or paused in this moment
		}
		return 0, err
	}
	limits := d.m.o.Limits
	if t.Request.Limits != nil {
		limits = t.Request.Limits.Or(limits)
	}
	volume := t.Request.Volume
	if volume == "" {
		volume = "/"
	}
	err = d.m.o.Launcher.Launch(ctx, Job{
		ID: d.id, Volume: volume, Limits: limits, Description: fmt.Sprintf("Instar: %s %s (%s)", t.Request.Kind, t.Request.Name, d.id),
	})
	if err == nil || ctx.Err() != nil {
		// A pause found no worker to freeze until this one had the lock.
		if now, _, gerr := d.m.Get(d.id); gerr == nil && now.Paused {
			d.taken = false
		}
		return 0, nil
	}
	if pid, werr := d.m.o.Dir.Worker(d.id); werr == nil && pid != 0 {
		return 0, nil
	}
	if n := len(t.Attempts); n < d.m.o.Attempts {
		_, uerr := d.m.update(d.id, func(t *Task) error {
			t.close("the worker could not be started: " + err.Error())
			t.unlessCancelled(Pending, nil)
			return nil
		})
		return d.m.o.Delay, errors.Join(err, uerr)
	}
	_, uerr := d.m.update(d.id, func(t *Task) error {
		t.close(err.Error())
		t.unlessCancelled(Failed, &Failure{Code: CodeLaunch, Message: "the worker could not be started: " + err.Error()})
		return nil
	})
	return 0, uerr
}

// unlessCancelled is what becomes of a task whose attempt came to nothing: s,
// unless it was to be cancelled meanwhile, which it then is.
func (t *Task) unlessCancelled(s State, why *Failure) {
	if t.State == Cancelling {
		s, why = Cancelled, &Failure{Code: CodeCancelled, Message: "cancelled"}
	}
	t.State, t.Error = s, why
}

// attend looks after a task whose worker lives.
func (d *driver) attend(ctx context.Context, t Task) error {
	if err := d.follow(t); err != nil {
		return err
	}
	if t.State == Cancelling && !d.stopped {
		if err := d.m.o.Launcher.Stop(ctx, d.id); err != nil {
			return fmt.Errorf("stopping task %s: %w", d.id, err)
		}
		d.stopped = true
	}
	if d.taken || t.State == Cancelling {
		return nil
	}
	// The agent that was before this one may have died between what it noted and
	// what it did.
	do := d.m.o.Launcher.Thaw
	if t.Paused {
		do = d.m.o.Launcher.Freeze
	}
	if err := do(ctx, d.id); err != nil {
		return err
	}
	d.taken = true
	return nil
}

// follow takes what the worker told since.
func (d *driver) follow(t Task) error {
	var lines []Line
	if err := d.log.next(func(l Line) { lines = append(lines, l) }); err != nil {
		return fmt.Errorf("following task %s: %w", d.id, err)
	}
	if len(lines) == 0 {
		return nil
	}
	before, stage := t.State, d.stage
	for _, l := range lines {
		t.take(l, &stage)
		if d.m.o.Told != nil && (l.Type == "warning" || l.Type == "error") {
			d.m.o.Told(t, l)
		}
	}
	d.stage = stage
	d.m.see(d.id, func(now *Task) { now.Progress, now.Warnings = t.Progress, t.Warnings })
	if before == Cancelling || stage == "" || stage.state() == before {
		return nil
	}
	_, err := d.m.update(d.id, func(t *Task) error {
		if t.State != Cancelling {
			t.State = stage.state()
		}
		return nil
	})
	return err
}

// settle ends a task whose worker has ended and said how.
func (d *driver) settle(res *WorkResult) (time.Duration, error) {
	const interrupted = 255 // the exit status of a command that was told to end
	t, _, err := d.m.Get(d.id)
	if err != nil {
		return 0, err
	}
	if res.Failure != nil && res.Exit == interrupted && t.State != Cancelling {
		return d.interrupted("cut short: the worker was told to end, as when the machine goes down")
	}
	_, err = d.m.update(d.id, func(t *Task) error {
		switch {
		case res.Result != nil:
			t.close("done")
			t.State, t.Result, t.Error, t.Progress.Percent = Complete, res.Result, nil, 100
		case t.State == Cancelling:
			t.close("cancelled")
			t.State, t.Error = Cancelled, &Failure{Code: CodeCancelled, Message: "cancelled", Exit: res.Exit}
		default:
			t.close(res.Failure.Message)
			t.State, t.Error = Failed, res.Failure
		}
		return nil
	})
	return 0, err
}

// interrupted begins an image's capture again: what it has stored is found and
// used. A bundle's keys went with its worker, so it is not resumed, and said
// not to be.
func (d *driver) interrupted(why string) (time.Duration, error) {
	again := false
	t, err := d.m.update(d.id, func(t *Task) error {
		t.close(why)
		again = t.Request.Kind == CreateImage && len(t.Attempts) < d.m.o.Attempts
		switch {
		case t.State == Cancelling:
			t.State, t.Error = Cancelled, &Failure{Code: CodeCancelled, Message: "cancelled"}
		case again:
			t.State = Pending
		case t.Request.Kind == CreateImage:
			t.State, t.Error = Failed, &Failure{
				Code: CodeInterrupted, Message: fmt.Sprintf("cut short %d times; the last time: %s", len(t.Attempts), why),
				Hint: "What it has stored is used by the next capture of this image.",
			}
		default:
			t.State, t.Error = Failed, &Failure{
				Code: CodeInterrupted, Message: why + "; a bundle is not resumed: nothing was published",
				Hint: "Start it again. Parts that were stored are no part of any bundle; the same name replaces them.",
			}
		}
		return nil
	})
	if err != nil || t.State != Pending || len(t.Attempts) < 2 {
		return 0, err
	}
	return d.m.o.Delay, nil // not the first time: give the machine a rest
}
