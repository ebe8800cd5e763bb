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

	"github.com/instar-image/instar/agent/task"
)

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
