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
