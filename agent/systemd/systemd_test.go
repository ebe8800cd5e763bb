package systemd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/fakesystemd"
)

func TestUnits(t *testing.T) {
	s := fakesystemd.Start(t)
	c, err := systemd.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := t.Context()
	s.Declare("app.service", "db.service")
	if err := errors.Join(c.Stop(ctx, "app.service"), c.Freeze(ctx, "db.service"), c.Freeze(ctx, "db.service")); err != nil {
		t.Fatal(err)
	}
	if s.State("app.service") != "inactive" || s.State("db.service") != "frozen" {
		t.Errorf("app is %s, db %s", s.State("app.service"), s.State("db.service"))
	}
	if err := errors.Join(c.Thaw(ctx, "db.service"), c.Thaw(ctx, "db.service"), c.Start(ctx, "app.service"), c.Reload(ctx)); err != nil {
		t.Fatal(err)
	}
	if s.State("app.service") != "active" || s.State("db.service") != "active" {
		t.Errorf("app is %s, db %s", s.State("app.service"), s.State("db.service"))
	}
	// What nobody knows need not be stopped, and cannot be started.
	if err := errors.Join(c.Stop(ctx, "none.service"), c.Freeze(ctx, "none.service"), c.Thaw(ctx, "none.service")); err != nil {
		t.Error(err)
	}
	if err := c.Start(ctx, "none.service"); err == nil {
		t.Error("a unit that is not there was started")
	}
}

// cutter is a bus's socket in the test's hands: cut breaks all connections.
func cutter(t *testing.T, bus string) (cut func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bus")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	var mu sync.Mutex
	var all []net.Conn
	cut = func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range all {
			c.Close()
		}
		all = nil
	}
	t.Cleanup(cut)
	go func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", bus)
			if err != nil {
				in.Close()
				return
			}
			mu.Lock()
			all = append(all, in, out)
			mu.Unlock()
			for _, p := range [][2]net.Conn{{in, out}, {out, in}} {
				go func() {
					_, _ = io.Copy(p[0], p[1])
					p[0].Close()
				}()
			}
		}
	}()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+path)
	return cut
}

// TestConnectionBreaks: who waits is told, and the next who asks has a new one.
func TestConnectionBreaks(t *testing.T) {
	s := fakesystemd.Start(t)
	bus, _, _ := strings.Cut(strings.TrimPrefix(s.Address, "unix:path="), ",")
	cut := cutter(t, bus)
	c, err := systemd.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s.Declare("app.service")
	ctx, cancel := context.WithCancel(t.Context())
	if state, err := c.Active(ctx, "app.service"); err != nil || state != "active" {
		t.Fatal(state, err)
	}
	cut()
	for { // that it broke is noticed a moment later
		if state, err := c.Active(ctx, "app.service"); err == nil && state == "active" {
			break
		}
	}
	cancel() // the connection does not end with the call that made it
	if err := c.Freeze(t.Context(), "app.service"); err != nil || s.State("app.service") != "frozen" {
		t.Errorf("%v, app is %s", err, s.State("app.service"))
	}
	slow := worker(t, "exec sleep 1000\n") // never says that it is ready
	ended := make(chan error, 1)
	go func() {
		ended <- c.Run(t.Context(), "slow.service", systemd.Prop("Type", "notify"), systemd.Prop("ExecStart", systemd.Exec(slow)))
	}()
	for s.PID("slow.service") == 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := c.Active(t.Context(), "slow.service"); err != nil { // what was answered before has arrived
		t.Fatal(err)
	}
	cut()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "broke") {
		t.Errorf("a job that nothing was heard of any more: %v", err)
	}
}

func TestInhibit(t *testing.T) {
	s := fakesystemd.Start(t)
	f, err := systemd.Inhibit(t.Context(), "shutdown:sleep", "publishing web", "block")
	if err != nil {
		t.Fatal(err)
	}
	if held := s.Held(); len(held) != 1 || held[0] != "shutdown:sleep|Instar|publishing web|block" {
		t.Errorf("held: %q", held)
	}
	if len(s.Held()) != 1 {
		t.Error("let go too early")
	}
	f.Close()
	for len(s.Held()) > 0 {
		time.Sleep(time.Millisecond)
	}
}

// worker writes a script that behaves as a worker's process does.
func worker(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "worker")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestLauncher: a task's unit gets its limits, its credential and its words,
// and is frozen, thawed and stopped.
func TestLauncher(t *testing.T) {
	s := fakesystemd.Start(t)
	c, err := systemd.Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	program := worker(t, "systemd-notify --ready --pid=parent 2>/dev/null || systemd-notify --ready\nexec sleep 1000\n")
	u := &systemd.Units{Conn: c, Command: []string{program, "--state", "/s"}, Env: []string{"HOME=/root"}, SecretKeyFile: "/etc/key", Encrypted: true}
	j := task.Job{ID: "bun-0123456789abcdef0", Description: "d", Volume: "/srv", Limits: task.Limits{CPUWeight: 10, CPUQuota: 50, IOWeight: 20, ReadRate: 1 << 20, UploadRate: 1 << 21, Memory: 1 << 30}}
	if err := u.Launch(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	if err := u.Launch(t.Context(), j); err != nil {
		t.Errorf("a second time: %v", err)
	}
	name := systemd.TaskUnit(j.ID)
	pid := s.PID(name)
	if pid == 0 {
		t.Fatalf("no process: %v", s.Calls())
	}
	for property, want := range map[string]any{
		"CPUWeight": uint64(10), "CPUQuotaPerSecUSec": uint64(500000), "IOWeight": uint64(20), "MemoryHigh": uint64(1 << 30), "Slice": "instar.slice",
		"Type": "notify", "CPUSchedulingPolicy": int32(unix.SCHED_IDLE), "IOSchedulingClass": int32(3), "NoNewPrivileges": true,
	} {
		if got := s.Property(name, property); got != want {
			t.Errorf("%s is %v, want %v", property, got, want)
		}
	}
	if got, ok := s.Property(name, "IOReadBandwidthMax").([][]any); !ok || got[0][0] != "/srv" || got[0][1] != uint64(1<<20) {
		t.Errorf("IOReadBandwidthMax is %v", s.Property(name, "IOReadBandwidthMax"))
	}
	if got, ok := s.Property(name, "LoadCredentialEncrypted").([][]any); !ok || got[0][0] != "secret-key" || got[0][1] != "/etc/key" {
		t.Errorf("LoadCredentialEncrypted is %v", s.Property(name, "LoadCredentialEncrypted"))
	}
	if argv, ok := s.Property(name, "ExecStart").([][]any); !ok || !slices.Equal(argv[0][1].([]string), []string{program, "--state", "/s", "--limit-rate", "2097152", j.ID}) {
		t.Errorf("ExecStart is %v", s.Property(name, "ExecStart"))
	}
	ctx := t.Context()
	if err := u.Freeze(ctx, j.ID); err != nil || s.State(name) != "frozen" {
		t.Errorf("freeze: %s, %v", s.State(name), err)
	}
	// Stopping thaws: what stands still cannot end.
	if err := u.Stop(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	for s.State(name) != "inactive" {
		time.Sleep(time.Millisecond)
	}
	if err := errors.Join(u.Stop(ctx, "bun-00000000000000000"), u.Freeze(ctx, j.ID), u.Thaw(ctx, j.ID)); err != nil {
		t.Errorf("of units that are gone: %v", err)
	}
	// A worker that ends before it has its task was not launched.
	u.Command = []string{worker(t, "exit 1\n")}
	if err := u.Launch(ctx, task.Job{ID: "bun-00000000000000000"}); err == nil {
		t.Error("a worker that cannot begin was launched")
	}
}

// TestUnitFiles compares the units that are shipped for packagers with those
// that are installed.
func TestUnitFiles(t *testing.T) {
	for _, u := range systemd.AgentUnits("/usr/local/bin/instar") {
		got, err := os.ReadFile("../../docs/systemd/" + u.Name)
		if os.Getenv("INSTAR_UPDATE") != "" {
			got, err = []byte(u.Text), os.WriteFile("../../docs/systemd/"+u.Name, []byte(u.Text), 0o644)
		}
		if err != nil || string(got) != u.Text {
			t.Errorf("docs/systemd/%s is not what is installed (%v): INSTAR_UPDATE=1 go test ./agent/systemd -run TestUnitFiles", u.Name, err)
		}
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"/usr/bin/instar": "/usr/bin/instar", "/a b": `"/a b"`, "100%": "100%%", "$HOME": "$$HOME", "": `""`, `a"b`: `"a\"b"`, "a\nb": `"a\nb"`,
	} {
		if got := systemd.Quote(in); got != want {
			t.Errorf("%q is quoted as %s, want %s", in, got, want)
		}
	}
}
