package task_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/sysfault"
)

// modeEnv makes the test binary a worker ("work"), or an agent that is to be
// killed at any of its operations ("agent").
const modeEnv = "INSTAR_TASK_TEST"

func TestMain(m *testing.M) {
	sysfault.Helper()
	switch os.Getenv(modeEnv) {
	case "work":
		args := os.Args[1:] // DIR [--idle] ID
		if err := work(task.Dir(args[0]), args[len(args)-1], args[1] == "--idle"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case "agent":
		if err := agent(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// script is what a test's worker does: the words of the request's description.
func script(out *task.Output, dir task.Dir, t *task.Task) (*task.WorkResult, error) {
	ok := &task.WorkResult{Result: &task.Result{Manifest: "m", Location: "l", BytesAdded: 7}}
	for _, word := range strings.Fields(t.Request.Description) {
		var err error
		switch word {
		case "read":
			err = errors.Join(out.Tell(task.Line{Type: "stage", Stage: task.Reading, Phase: "capturing /", Total: 100}),
				out.Tell(task.Line{Type: "progress", Phase: "capturing /", Done: 50}))
		case "store":
			err = out.Tell(task.Line{Type: "stage", Stage: task.Publishing, Phase: "publishing x"})
		case "quiesce":
			yes := true
			err = out.Tell(task.Line{Type: "quiesce", Quiesced: &yes})
		case "warn":
			err = out.Tell(task.Line{Type: "warning", Message: "careful", Path: "/f"})
		case "wait": // until there is a file ID.go
			for _, serr := os.Stat(filepath.Join(string(dir), "..", t.ID+".go")); serr != nil; _, serr = os.Stat(filepath.Join(string(dir), "..", t.ID+".go")) {
				time.Sleep(5 * time.Millisecond)
			}
		case "changed":
			ok.Exit = 24
		case "fail":
			return &task.WorkResult{Exit: 3, Failure: &task.Failure{Code: task.CodeCapture, Message: "no store", Exit: 3}}, nil
		case "die":
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		case "die-once":
			if len(t.Attempts) == 1 {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return ok, nil
}

// work is a worker.
func work(dir task.Dir, id string, idle bool) error {
	lock, err := dir.Lock(id)
	if err != nil {
		return err
	}
	defer lock.Close()
	t, err := dir.Load(id)
	if err != nil {
		return err
	}
	if idle {
		if err := task.StepBack(); err != nil {
			return err
		}
	}
	out, err := dir.Output(id, nil)
	if err != nil {
		return err
	}
	if err := task.Ready(); err != nil {
		return err
	}
	ctx, stop := signalled()
	defer stop()
	done := make(chan *task.WorkResult, 1)
	go func() {
		r, err := script(out, dir, t)
		if err != nil {
			r = &task.WorkResult{Exit: 254, Failure: &task.Failure{Code: task.CodeCapture, Message: err.Error()}}
		}
		done <- r
	}()
	select {
	case r := <-done:
		return dir.SaveResult(id, r)
	case <-ctx.Done():
		return dir.SaveResult(id, &task.WorkResult{Exit: 255, Failure: &task.Failure{Code: task.CodeCapture, Message: "interrupted", Exit: 255}})
	}
}

// bench is an agent under test with workers that are processes.
type bench struct {
	t    *testing.T
	dir  task.Dir
	m    *task.Manager
	stop func()

	mu     sync.Mutex
	states map[string][]task.State // as told, without repetitions
	told   []string
}

func newBench(t *testing.T, o task.Options) *bench {
	t.Helper()
	dir, err := task.OpenDir(filepath.Join(t.TempDir(), "tasks"))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, states: map[string][]task.State{}}
	t.Cleanup(func() { b.end() })
	b.begin(o)
	return b
}

func (b *bench) begin(o task.Options) {
	b.t.Helper()
	self, err := os.Executable()
	if err != nil {
		b.t.Fatal(err)
	}
	o.Dir = b.dir
	if o.Launcher == nil {
		o.Launcher = &task.Children{Dir: b.dir, Command: []string{self, string(b.dir)}, Env: append(os.Environ(), modeEnv+"=work"), Stderr: os.Stderr}
	}
	o.Poll, o.Delay = 10*time.Millisecond, time.Millisecond
	o.Changed = func(t task.Task) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if s := b.states[t.ID]; len(s) == 0 || s[len(s)-1] != t.State {
			b.states[t.ID] = append(s, t.State)
		}
	}
	o.Told = func(t task.Task, l task.Line) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.told = append(b.told, l.Text())
	}
	o.Failed = func(id string, err error) { b.t.Logf("%s: %v", id, err) }
	m, damaged, err := task.Open(o)
	if err != nil || len(damaged) > 0 {
		b.t.Fatal(err, damaged)
	}
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = m.Run(ctx)
	}()
	b.m, b.stop = m, func() { cancel(); <-done }
}

// end stops the agent, as it were by a kill, and workers that are left.
func (b *bench) end() {
	b.stop()
	for _, t := range b.m.List() {
		if pid, err := b.dir.Worker(t.ID); err == nil && pid > 0 {
			_ = unix.Kill(-pid, unix.SIGKILL)
		}
	}
}

// start starts a task that is scripted.
func (b *bench) start(kind task.Kind, words string) string {
	b.t.Helper()
	r := task.Request{Kind: kind, Name: "x", Description: words}
	t, fresh, err := b.m.Start(r, task.Caller{UID: 7})
	if err != nil || !fresh {
		b.t.Fatal(err, fresh)
	}
	return t.ID
}

// await waits until a task is as asked.
func (b *bench) await(id, what string, ok func(task.Task) bool) task.Task {
	b.t.Helper()
	limit := time.After(2 * time.Minute)
	for {
		t, changed, err := b.m.Get(id)
		if err != nil {
			b.t.Fatal(err)
		}
		if ok(t) {
			return t
		}
		select {
		case <-changed:
		case <-limit:
			text, _ := json.Marshal(t)
			b.t.Fatalf("it is never %s: %s", what, text)
		}
	}
}

func (b *bench) ended(id string) task.Task {
	b.t.Helper()
	return b.await(id, "ended", func(t task.Task) bool { return t.State.Ended() })
}

// let lets a worker that waits go on.
func (b *bench) let(id string) {
	if err := os.WriteFile(filepath.Join(string(b.dir), "..", id+".go"), nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func in(s task.State) func(task.Task) bool { return func(t task.Task) bool { return t.State == s } }

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

// stopped reports whether a process stands still.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	return strings.HasPrefix(rest, "T")
}

func TestPause(t *testing.T) {
	b := newBench(t, task.Options{})
	id, next := b.start(task.CreateImage, "read wait store"), b.start(task.CreateImage, "read")
	b.await(id, "under way", func(t task.Task) bool { return t.Progress.Percent > 5 })
	pid, err := b.dir.Worker(id)
	if err != nil || pid <= 0 {
		t.Fatal(pid, err)
	}
	if got, err := b.m.Pause(t.Context(), id); err != nil || !got.Paused || !stopped(t, pid) {
		t.Fatalf("paused: %+v, %v, standing still %t", got, err, stopped(t, pid))
	}
	b.let(id) // it would end now
	// A restart of the agent does not set it going, nor begin it anew.
	b.stop()
	b.begin(task.Options{})
	if got := b.await(id, "there", func(t task.Task) bool { return t.Progress.Percent > 5 }); !got.Paused || !stopped(t, pid) || got.State.Ended() {
		t.Errorf("after a restart: %+v", got)
	}
	if got, err := b.m.Resume(t.Context(), id); err != nil || got.Paused {
		t.Errorf("resumed: %+v, %v", got, err)
	}
	if got := b.ended(id); got.State != task.Complete || len(got.Attempts) != 1 {
		t.Errorf("%+v", got)
	}
	b.ended(next)

	// What waits does not begin while it is paused.
	first := b.start(task.CreateImage, "read wait")
	b.await(first, "under way", func(t task.Task) bool { return t.Progress.Percent > 5 })
	second := b.start(task.CreateImage, "read")
	if _, err := b.m.Pause(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	b.let(first)
	b.ended(first)
	third := b.start(task.CreateImage, "read")
	b.ended(third)
	if got, _, err := b.m.Get(second); err != nil || got.State != task.Pending {
		t.Errorf("a paused task has begun: %+v, %v", got, err)
	}
	if _, err := b.m.Resume(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	b.ended(second)

	// While units stand still for it, it must not.
	fourth := b.start(task.CreateImage, "quiesce wait")
	b.await(fourth, "quiesced", func(t task.Task) bool { return t.Progress.Quiesced })
	if _, err := b.m.Pause(t.Context(), fourth); !errors.Is(err, task.ErrState) {
		t.Errorf("pausing while units stand still: %v", err)
	}
	b.let(fourth)
	b.ended(fourth)
	if _, err := b.m.Pause(t.Context(), fourth); !errors.Is(err, task.ErrState) {
		t.Errorf("pausing what ended: %v", err)
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

// reluctant freezes a worker and says that it could not.
type reluctant struct {
	task.Launcher
	ctx chan error // how the context fared in which it was asked
}

func (r reluctant) Freeze(ctx context.Context, id string) error {
	err := r.Launcher.Freeze(ctx, id)
	r.ctx <- ctx.Err()
	return errors.Join(err, errors.New("it took too long"))
}

// slow is a launcher that begins when it is let.
type slow struct {
	task.Launcher
	asked, answer chan struct{}
}

func (l slow) Launch(ctx context.Context, j task.Job) error {
	l.asked <- struct{}{}
	<-l.answer
	return l.Launcher.Launch(ctx, j)
}

// TestPausedWhileStarting: what is paused before its worker is there stands
// still when it is.
func TestPausedWhileStarting(t *testing.T) {
	l := slow{asked: make(chan struct{}, 8), answer: make(chan struct{})}
	b := launchedBy(t, func(children *task.Children) task.Launcher { l.Launcher = children; return l })
	id := b.start(task.CreateImage, "wait")
	<-l.asked
	if got, err := b.m.Pause(t.Context(), id); err != nil || !got.Paused {
		t.Fatalf("%+v, %v", got, err)
	}
	close(l.answer)
	limit := time.Now().Add(2 * time.Minute)
	for pid, err := 0, error(nil); pid <= 0 || !stopped(t, pid); time.Sleep(5 * time.Millisecond) {
		if pid, err = b.dir.Worker(id); err != nil || time.Now().After(limit) {
			t.Fatalf("the worker, process %d, goes on: %v", pid, err)
		}
	}
	if got, err := b.m.Resume(t.Context(), id); err != nil || got.Paused {
		t.Errorf("resumed: %+v, %v", got, err)
	}
	b.let(id)
	if got := b.ended(id); got.State != task.Complete || len(got.Attempts) != 1 {
		t.Errorf("%+v", got)
	}
}

// launchedBy is a bench whose launcher is made of the usual one.
func launchedBy(t *testing.T, of func(*task.Children) task.Launcher) *bench {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := task.OpenDir(filepath.Join(t.TempDir(), "tasks"))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, states: map[string][]task.State{}}
	t.Cleanup(func() { b.end() })
	b.begin(task.Options{Launcher: of(&task.Children{Dir: dir, Command: []string{self, string(dir)}, Env: append(os.Environ(), modeEnv+"=work"), Stderr: os.Stderr})})
	return b
}

// TestPauseThatFails leaves nothing standing still that counts as running, and
// does not hang on who asked for it.
func TestPauseThatFails(t *testing.T) {
	r := reluctant{ctx: make(chan error, 1)}
	b := launchedBy(t, func(children *task.Children) task.Launcher { r.Launcher = children; return r })
	id := b.start(task.CreateImage, "read wait store")
	b.await(id, "under way", func(t task.Task) bool { return t.Progress.Percent > 5 })
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	got, err := b.m.Pause(gone, id)
	if err == nil || !strings.Contains(err.Error(), "took too long") || got.Paused {
		t.Errorf("a pause that failed: %+v, %v", got, err)
	}
	if err := <-r.ctx; err != nil {
		t.Errorf("freezing hung on the request: %v", err)
	}
	b.let(id)
	if got := b.ended(id); got.State != task.Complete || len(got.Attempts) != 1 {
		t.Errorf("%+v", got)
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
