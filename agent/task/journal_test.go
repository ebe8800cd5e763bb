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
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/sysfault"
)

// inProcess runs workers in the agent's own process, so that a kill takes both.
type inProcess struct{ dir task.Dir }

func (l inProcess) Launch(_ context.Context, j task.Job) error {
	lock, err := l.dir.Lock(j.ID)
	if err != nil {
		return err
	}
	defer lock.Close()
	out, err := l.dir.Output(j.ID, nil)
	if err != nil {
		return err
	}
	err = errors.Join(out.Tell(task.Line{Type: "stage", Stage: task.Reading, Phase: "capturing /", Total: 10}), out.Close())
	return errors.Join(err, l.dir.SaveResult(j.ID, &task.WorkResult{Result: &task.Result{Manifest: j.ID, Location: "l"}}))
}

func (inProcess) Stop(context.Context, string) error   { return nil }
func (inProcess) Freeze(context.Context, string) error { return nil }
func (inProcess) Thaw(context.Context, string) error   { return nil }

// agent takes two tasks and cancels a third, and tells each time what it has
// acknowledged. It is killed meanwhile.
func agent(path string) error {
	dir, err := task.OpenDir(path)
	if err != nil {
		return err
	}
	m, damaged, err := task.Open(task.Options{Dir: dir, Launcher: inProcess{dir}, Poll: time.Millisecond, Delay: time.Millisecond})
	if err != nil || len(damaged) > 0 {
		return errors.Join(append(damaged, err)...)
	}
	start := func(name string) (string, error) {
		t, _, err := m.Start(task.Request{Kind: task.CreateImage, Name: name}, task.Caller{})
		if err == nil {
			fmt.Println("taken", t.ID)
		}
		return t.ID, err
	}
	var ids []string
	for _, n := range []string{"one", "two"} {
		id, err := start(n)
		if err != nil {
			return err
		}
		ids = append(ids, id)
	}
	third, err := start("three")
	if err != nil {
		return err
	}
	if _, err := m.Cancel(third); err != nil {
		return err
	}
	fmt.Println("cancelled", third)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go m.Run(ctx)
	for _, id := range ids {
		for {
			t, changed, err := m.Get(id)
			if err != nil {
				return err
			}
			if t.State.Ended() {
				fmt.Println(t.State, id)
				break
			}
			<-changed
		}
	}
	return nil
}

// check looks at what is left of an agent that said something and was killed,
// and lets another one bring everything to its end.
func check(t *testing.T, path, said string, op sysfault.Op) {
	t.Helper()
	dir, err := task.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	m, damaged, err := task.Open(task.Options{Dir: dir, Launcher: inProcess{dir}, Poll: time.Millisecond, Delay: time.Millisecond})
	if err != nil || len(damaged) > 0 {
		t.Fatalf("killed before %v: %v %v", op, damaged, err)
	}
	for line := range strings.Lines(said) {
		word, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		got, _, err := m.Get(id)
		if err != nil {
			t.Errorf("killed before %v: %s was acknowledged (%s): %v", op, id, word, err)
			continue
		}
		if want := task.State(word); word != "taken" && got.State != want {
			t.Errorf("killed before %v: %s was told to be %s and is %s", op, id, word, got.State)
		}
		if got.State == task.Complete && (got.Result == nil || got.Result.Manifest != id) {
			t.Errorf("killed before %v: complete without its result: %+v", op, got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = m.Run(ctx) }()
	defer func() { cancel(); <-done }()
	limit := time.After(5 * time.Minute)
	for _, tk := range m.List() {
		for {
			got, changed, err := m.Get(tk.ID)
			if err != nil {
				t.Fatal(err)
			}
			if got.State.Ended() {
				if got.State == task.Failed {
					t.Errorf("killed before %v: %s failed: %+v", op, tk.ID, got.Error)
				}
				break
			}
			select {
			case <-changed:
			case <-limit:
				t.Fatalf("killed before %v: %s does not end: %+v", op, tk.ID, got)
			}
		}
	}
}

// TestKilledAtEveryOperation kills an agent before each of its operations on files.
func TestKilledAtEveryOperation(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	points := 0
	for at := 1; ; at++ {
		path := filepath.Join(t.TempDir(), "tasks")
		r := sysfault.Run(t, sysfault.Fault{Dir: filepath.Dir(path), At: at}, []string{modeEnv + "=agent"}, self, path)
		if !r.Hit {
			if r.Code != 0 {
				t.Fatalf("not killed, but %d: %s", r.Code, r.Stderr)
			}
			break
		}
		points++
		check(t, path, r.Stdout, r.Failed)
	}
	if points < 40 {
		t.Errorf("only %d points", points)
	}
	t.Logf("%d points", points)
}

// TestEveryPowerCut does the same with a filesystem that loses its power in
// that moment: what was not durable is gone.
func TestEveryPowerCut(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 16<<20)); err != nil {
		t.Fatal(err)
	}
	loopfs.Run(t, "mkfs.ext4", "-q", "-F", image)
	for at := 1; ; at++ {
		root := loopfs.Mount(t, image)
		path := filepath.Join(root, fmt.Sprint(at), "tasks")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		loopfs.Run(t, "sync", "-f", root) // of this filesystem alone
		r := sysfault.Run(t, sysfault.Fault{Dir: filepath.Dir(path), At: at}, []string{modeEnv + "=agent"}, self, path)
		cut(t, root)
		loopfs.Unmount(t, root)
		root = loopfs.Mount(t, image)
		path = filepath.Join(root, fmt.Sprint(at), "tasks")
		check(t, path, r.Stdout, r.Failed)
		loopfs.Unmount(t, root)
		if !r.Hit {
			if r.Code != 0 {
				t.Fatalf("not killed, but %d: %s", r.Code, r.Stderr)
			}
			return
		}
	}
}

// cut takes a filesystem's power: what is only in memory is lost.
func cut(t *testing.T, root string) {
	t.Helper()
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN
		noLogFlush = 2
	)
	dir, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), shutdown, noLogFlush); err != nil {
		t.Fatal(err)
	}
}

// TestDiskFull: a request that cannot be kept is not acknowledged, and nothing
// of it is left.
func TestDiskFull(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for at := 1; at <= 12; at++ {
		path := filepath.Join(t.TempDir(), "tasks")
		r := sysfault.Run(t, sysfault.Fault{
			Dir: path, At: at, From: true, Errno: unix.ENOSPC, Only: func(op sysfault.Op) bool { return op.Call == "write" || op.Call == "openat" || op.Call == "fsync" },
		}, []string{modeEnv + "=agent"}, self, path)
		if !r.Hit {
			break
		}
		if r.Code == 0 {
			t.Errorf("a full disk from operation %d on was not noticed", at)
		}
		check(t, path, r.Stdout, r.Failed)
	}
}

func TestDamagedTask(t *testing.T) {
	dir, err := task.OpenDir(filepath.Join(t.TempDir(), "tasks"))
	if err != nil {
		t.Fatal(err)
	}
	const id = "bun-0123456789abcdef0"
	for name, text := range map[string]string{
		"cut off": `{"id":"` + id, "another's": `{"id":"bun-00000000000000000","request":{"kind":"bundle","name":"x"},"state":"pending"}`,
		"unknown state":  `{"id":"` + id + `","request":{"kind":"bundle","name":"x"},"state":"dancing"}`,
		"unknown member": `{"id":"` + id + `","request":{"kind":"bundle","name":"x"},"state":"pending","x":1}`,
		"two values":     `{"id":"` + id + `","request":{"kind":"bundle","name":"x"},"state":"pending"} {}`,
		"no request":     `{"id":"` + id + `","state":"pending"}`,
		"too long":       strings.Repeat(" ", 2<<20),
	} {
		file := filepath.Join(string(dir), id+".json")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		tasks, damaged, err := dir.LoadAll()
		if err != nil || len(tasks) != 0 || len(damaged) != 1 {
			t.Errorf("%s: %d tasks, %v, %v", name, len(tasks), damaged, err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("%s: the file was changed", name)
		}
	}
}
