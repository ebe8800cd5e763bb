package task_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/task"
)

func TestTask(t *testing.T) {
	b := newBench(t, task.Options{})
	id := b.start(task.CreateImage, "read warn wait store")
	half := b.await(id, "half read", func(t task.Task) bool { return t.Progress.Percent > 5 && t.Warnings == 1 })
	if half.Progress.Percent < 40 || half.Progress.Percent > 60 || half.Progress.Total != 100 || half.State != task.Bundling || half.By.UID != 7 {
		t.Errorf("half through it is %+v", half)
	}
	b.let(id)
	end := b.ended(id)
	if end.State != task.Complete || end.Result == nil || end.Result.BytesAdded != 7 || end.Progress.Percent != 100 || end.Ended.IsZero() || len(end.Attempts) != 1 {
		t.Errorf("%+v", end)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if got := fmt.Sprint(b.states[id]); got != "[pending bundling complete]" && got != "[pending bundling storing complete]" {
		t.Errorf("the states were %s", got)
	}
	if len(b.told) != 1 || b.told[0] != "/f: careful" {
		t.Errorf("told %q", b.told)
	}
}

func TestOutcomes(t *testing.T) {
	b := newBench(t, task.Options{Running: 3, Attempts: 3})
	for _, c := range []struct {
		kind   task.Kind
		words  string
		state  task.State
		code   string
		tries  int
		change bool
	}{
		{task.CreateImage, "read changed", task.Complete, "", 1, true},
		{task.CreateImage, "fail", task.Failed, task.CodeCapture, 1, false},
		{task.CreateImage, "read die-once", task.Complete, "", 2, false},
		{task.CreateImage, "die", task.Failed, task.CodeInterrupted, 3, false},
	} {
		got := b.ended(b.start(c.kind, c.words))
		if got.State != c.state || len(got.Attempts) != c.tries || (got.Result != nil && got.Result.Changed) {
			t.Errorf("%q: %+v", c.words, got)
		}
		if c.code != "" && (got.Error == nil || got.Error.Code != c.code) {
			t.Errorf("%q: %+v, want %s", c.words, got.Error, c.code)
		}
		for _, a := range got.Attempts {
			if a.Outcome == "" || a.Ended.IsZero() {
				t.Errorf("%q: an attempt has no end: %+v", c.words, got.Attempts)
			}
		}
	}
}

// TestBundleIsNotResumed: a bundle's keys go with its worker, and the task says
// that nothing was published.
func TestBundleIsNotResumed(t *testing.T) {
	b := newBench(t, task.Options{})
	r := task.Request{Kind: task.Bundle, Name: "x"}
	tk, _, err := b.m.Start(r, task.Caller{})
	if err != nil {
		t.Fatal(err)
	}
	// The worker has nothing to wait for: it is killed before it begins by a
	// state that says it was under way when the machine went down.
	b.ended(tk.ID)
	b.end()
	old, err := b.dir.Load(tk.ID)
	if err != nil {
		t.Fatal(err)
	}
	old.State, old.Ended, old.Result, old.Attempts[0].Ended, old.Attempts[0].Outcome = task.Bundling, time.Time{}, nil, time.Time{}, ""
	if err := errors.Join(b.dir.Save(old), os.Remove(filepath.Join(string(b.dir), tk.ID+".result"))); err != nil {
		t.Fatal(err)
	}
	b.begin(task.Options{})
	got := b.ended(tk.ID)
	if got.State != task.Failed || got.Error.Code != task.CodeInterrupted || !strings.Contains(got.Error.Message, "not resumed") || len(got.Attempts) != 1 {
		t.Errorf("%+v %+v", got, got.Error)
	}
}

// TestAgentRestarts: workers go on while no agent runs, and the next one takes
// up where they are, or finds what they left.
func TestAgentRestarts(t *testing.T) {
	b := newBench(t, task.Options{Running: 2})
	during, after := b.start(task.CreateImage, "read wait store"), b.start(task.CreateImage, "read wait store")
	for _, id := range []string{during, after} {
		b.await(id, "half read", func(t task.Task) bool { return t.Progress.Percent > 5 })
	}
	pid, err := b.dir.Worker(after)
	if err != nil || pid <= 0 {
		t.Fatal(pid, err)
	}
	b.stop()
	b.let(during)
	for p := 1; p != 0; { // until that worker has ended
		if p, err = b.dir.Worker(during); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	b.begin(task.Options{Running: 2})
	if got := b.ended(during); got.State != task.Complete || len(got.Attempts) != 1 {
		t.Errorf("ended while no agent was there: %+v", got)
	}
	// The progress is read anew from what the worker wrote.
	b.await(after, "followed again", func(t task.Task) bool { return t.Progress.Percent > 5 })
	if now, err := b.dir.Worker(after); err != nil || now != pid {
		t.Errorf("the worker is %d, %v, and was %d", now, err, pid)
	}
	b.let(after)
	if got := b.ended(after); got.State != task.Complete || len(got.Attempts) != 1 {
		t.Errorf("after the restart: %+v", got)
	}
}

// TestKilledWorkerAndAgent is a reboot: both are gone, and the capture is begun
// again.
func TestKilledWorkerAndAgent(t *testing.T) {
	b := newBench(t, task.Options{})
	id := b.start(task.CreateImage, "read wait store")
	b.await(id, "half read", func(t task.Task) bool { return t.Progress.Percent > 5 })
	b.end()
	for p := 1; p != 0; {
		p, _ = b.dir.Worker(id)
		time.Sleep(5 * time.Millisecond)
	}
	b.begin(task.Options{})
	b.await(id, "begun again", func(t task.Task) bool { return len(t.Attempts) == 2 })
	b.let(id)
	if got := b.ended(id); got.State != task.Complete || !strings.Contains(got.Attempts[0].Outcome, "cut short") {
		t.Errorf("%+v", got)
	}
}

func TestCancel(t *testing.T) {
	b := newBench(t, task.Options{})
	running, waiting := b.start(task.CreateImage, "read wait"), b.start(task.CreateImage, "read")
	b.await(running, "under way", func(t task.Task) bool { return t.Progress.Percent > 5 })
	if got, err := b.m.Cancel(waiting); err != nil || got.State != task.Cancelled {
		t.Errorf("cancelling what waits: %v, %v", got.State, err)
	}
	// A task that stands still can be cancelled too.
	if _, err := b.m.Pause(t.Context(), running); err != nil {
		t.Fatal(err)
	}
	if got, err := b.m.Cancel(running); err != nil || got.State != task.Cancelling {
		t.Errorf("cancelling what runs: %v, %v", got.State, err)
	}
	if got := b.ended(running); got.State != task.Cancelled || got.Error.Code != task.CodeCancelled || len(got.Attempts) != 1 {
		t.Errorf("%+v", got)
	}
	if _, err := b.m.Cancel(running); !errors.Is(err, task.ErrState) {
		t.Errorf("cancelling what ended: %v", err)
	}
	if _, err := b.m.Cancel("bun-00000000000000000"); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("cancelling nothing: %v", err)
	}
}

func TestIdleClasses(t *testing.T) {
	b := newBench(t, task.Options{})
	id := b.start(task.CreateImage, "read wait")
	b.await(id, "under way", func(t task.Task) bool { return t.Progress.Percent > 5 })
	pid, err := b.dir.Worker(id)
	if err != nil {
		t.Fatal(err)
	}
	tids, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		var n int
		if _, err := fmt.Sscan(tid.Name(), &n); err != nil {
			t.Fatal(err)
		}
		attr, err := unix.SchedGetAttr(n, 0)
		if err != nil || attr.Policy != unix.SCHED_IDLE {
			t.Errorf("thread %d is of policy %+v, %v", n, attr, err)
		}
		const whoProcess = 1
		if prio, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, whoProcess, uintptr(n), 0); errno != 0 || prio>>13 != 3 {
			t.Errorf("thread %d is of I/O class %d, %v", n, prio>>13, errno)
		}
	}
	b.let(id)
	b.ended(id)
}

func TestTokens(t *testing.T) {
	b := newBench(t, task.Options{Keep: 1})
	r := task.Request{Kind: task.CreateImage, Name: "x", Description: "read", ClientToken: "t"}
	first, fresh, err := b.m.Start(r, task.Caller{UID: 1})
	if err != nil || !fresh {
		t.Fatal(err)
	}
	again, fresh, err := b.m.Start(r, task.Caller{UID: 1})
	if err != nil || fresh || again.ID != first.ID {
		t.Errorf("the same request: %s, %t, %v; want %s", again.ID, fresh, err, first.ID)
	}
	if other, fresh, err := b.m.Start(r, task.Caller{UID: 2}); err != nil || !fresh || other.ID == first.ID {
		t.Errorf("another user's token: %v, %v", fresh, err)
	}
	r.Full = true
	if _, _, err := b.m.Start(r, task.Caller{UID: 1}); !errors.Is(err, task.ErrToken) {
		t.Errorf("another request: %v", err)
	}
	// What ended is forgotten, the oldest first.
	for range 3 {
		b.ended(b.start(task.CreateImage, "read"))
	}
	for n := 0; n != 1; {
		n = len(b.m.List())
		time.Sleep(5 * time.Millisecond)
	}
	names, err := os.ReadDir(string(b.dir))
	if err != nil || len(names) > 4 {
		t.Errorf("files are left: %v, %v", names, err)
	}
}

func TestFull(t *testing.T) {
	b := newBench(t, task.Options{Waiting: 2})
	id := b.start(task.CreateImage, "read wait")
	b.await(id, "under way", in(task.Bundling))
	rest := []string{b.start(task.CreateImage, "read"), b.start(task.CreateImage, "read")}
	if _, _, err := b.m.Start(task.Request{Kind: task.CreateImage, Name: "x"}, task.Caller{}); !errors.Is(err, task.ErrFull) {
		t.Errorf("a task too many: %v", err)
	}
	b.let(id)
	b.ended(id)
	for _, id := range rest { // else their workers begin in a directory that is being removed
		b.ended(id)
	}
}

// deaf is a launcher that cannot start anything.
type deaf struct{ task.Launcher }

func (deaf) Launch(context.Context, task.Job) error { return errors.New("systemd does not answer") }

func TestNothingStarts(t *testing.T) {
	b := newBench(t, task.Options{Launcher: deaf{}, Attempts: 2})
	got := b.ended(b.start(task.CreateImage, "read"))
	if got.State != task.Failed || got.Error.Code != task.CodeLaunch || len(got.Attempts) != 2 || !strings.Contains(got.Error.Message, "does not answer") {
		t.Errorf("%+v %+v", got, got.Error)
	}
}

// late is a launcher that says no only after something happened.
type late struct {
	task.Launcher
	asked, answer chan struct{}
}

func (l late) Launch(context.Context, task.Job) error {
	l.asked <- struct{}{}
	<-l.answer
	return errors.New("systemd does not answer")
}

// TestCancelledWhileStarting: what is cancelled before its worker said that it
// is there does not begin again, nor fail.
func TestCancelledWhileStarting(t *testing.T) {
	for _, attempts := range []int{1, 3} {
		l := late{asked: make(chan struct{}, 8), answer: make(chan struct{})}
		b := newBench(t, task.Options{Launcher: l, Attempts: attempts})
		id := b.start(task.CreateImage, "read")
		<-l.asked
		if got, err := b.m.Cancel(id); err != nil || got.State != task.Cancelling {
			t.Fatalf("%v, %v", got.State, err)
		}
		close(l.answer)
		if got := b.ended(id); got.State != task.Cancelled || got.Error.Code != task.CodeCancelled || len(got.Attempts) != 1 {
			t.Errorf("of %d attempts: %+v %+v", attempts, got, got.Error)
		}
		b.end()
	}
}

func TestTwoAgents(t *testing.T) {
	dir, err := task.OpenDir(filepath.Join(t.TempDir(), "tasks"))
	if err != nil {
		t.Fatal(err)
	}
	one, err := dir.Alone()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dir.Alone(); err == nil {
		t.Error("two agents have one directory")
	}
	one.Close()
	two, err := dir.Alone()
	if err != nil {
		t.Fatal(err)
	}
	two.Close()
}
