// Package tasks proves the built program's agent as a whole: with a systemd and
// a logind that run real processes, real filesystems that are frozen, and
// captures that are killed.
package tasks

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/fakesystemd"
)

// TestPausedUpload: a request that breaks off because its task stood still is
// made again.
func TestPausedUpload(t *testing.T) {
	t.Parallel() // it waits most of the time
	h := newHost(t, "--launcher", "child")
	h.hasty.Store(true)
	id := h.start(task.Request{Limits: &task.Limits{UploadRate: 512 << 10, Foreground: true}})
	h.await(id, "reading", reading)
	for range 2 {
		_, err := h.client.Pause(t.Context(), id)
		must(t, err)
		// The agent may not have read yet what was told before the pause.
		var before, after task.Task
		for same := 0; same < 5; { // seconds: more than twice what the server waits for
			before = after
			time.Sleep(time.Second)
			after, err = h.client.Show(t.Context(), id)
			must(t, err)
			if same++; after.Progress.Done != before.Progress.Done {
				same = 0
			}
			if !after.Paused || after.State.Ended() {
				break
			}
		}
		if !after.Paused || after.State.Ended() {
			t.Errorf("it went on from %+v to %+v", before.Progress, after)
		}
		_, err = h.client.Resume(t.Context(), id)
		must(t, err)
		time.Sleep(time.Second)
	}
	if got := h.await(id, "ended", ended); got.State != task.Complete || len(got.Attempts) != 1 {
		t.Errorf("%+v %+v", got, got.Error)
	}
}

// TestKilledCaptureGoesOn: an image's capture that was killed with its agent is
// begun again and uses what it has stored.
func TestKilledCaptureGoesOn(t *testing.T) {
	t.Parallel() // it waits most of the time
	h := newHost(t, "--launcher", "child")
	id := h.start(task.Request{Limits: &task.Limits{UploadRate: 1 << 20}})
	h.await(id, "reading", reading)
	h.kill()
	for _, pid := range h.processes() {
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
	h.run()
	if got := h.await(id, "ended", ended); got.State != task.Complete || len(got.Attempts) != 2 || !strings.Contains(got.Attempts[0].Outcome, "cut short") {
		t.Errorf("%+v %+v", got, got.Error)
	}
}

// TestSecrets looks for the secret key's bytes wherever the agent leaves any.
func TestSecrets(t *testing.T) {
	s := fakesystemd.Start(t)
	for _, launcher := range []string{"child", "systemd"} {
		t.Run(launcher, func(t *testing.T) {
			h := newHost(t, "--launcher", launcher)
			if launcher == "systemd" {
				must(t, os.WriteFile(filepath.Join(h.top, "etc", "agent.yaml"), []byte("secret-key-file: "+filepath.Join(h.top, "etc", "secret")+"\nlimits: {upload-rate: 65536}\n"), 0o600))
				h.kill()
				h.run()
			}
			id := h.start(task.Request{})
			h.await(id, "reading", reading)
			pids := h.processes()
			if len(pids) < 2 {
				t.Fatalf("processes: %v", pids)
			}
			// While they stand still no file comes or goes.
			for _, pid := range pids {
				must(t, unix.Kill(pid, unix.SIGSTOP))
				for {
					stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
					must(t, err)
					if i := bytes.LastIndexByte(stat, ')'); bytes.HasPrefix(stat[i:], []byte(") T")) {
						break
					}
					time.Sleep(time.Millisecond)
				}
			}
			sees := func(what string, data []byte, err error) {
				t.Helper()
				must(t, err)
				if bytes.Contains(data, []byte(secret)) {
					t.Errorf("the secret key is in %s", what)
				}
			}
			for _, pid := range pids {
				for _, f := range []string{"environ", "cmdline"} {
					data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, f))
					sees(f, data, err)
				}
			}
			must(t, filepath.WalkDir(h.top, func(path string, d os.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() || path == filepath.Join(h.top, "etc", "secret") {
					return err
				}
				data, err := os.ReadFile(path)
				sees(path, data, err)
				if info, err := d.Info(); err == nil && strings.HasPrefix(path, filepath.Join(h.top, "agent")) && info.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s is for everybody: %s", path, info.Mode())
				}
				return nil
			}))
			for _, pid := range pids {
				must(t, unix.Kill(pid, unix.SIGCONT))
			}
			sees("the agent's log", []byte(h.log.String()), nil)
			unit := systemd.TaskUnit(id)
			for _, p := range []string{"ExecStart", "Environment", "LoadCredential", "Description"} {
				sees(p, fmt.Append(nil, s.Property(unit, p)), nil)
			}
			if launcher == "systemd" && s.Property(unit, "LoadCredential") == nil {
				t.Error("no credential is handed over")
			}
			_, err := h.client.Cancel(t.Context(), id)
			must(t, err)
			if got := h.await(id, "ended", ended); got.State != task.Cancelled {
				t.Errorf("%+v", got)
			}
		})
	}
}

// TestService: what systemd is told, and the socket it hands over.
func TestService(t *testing.T) {
	dir := t.TempDir()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	must(t, err)
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	t.Setenv("WATCHDOG_USEC", "400000")
	next := func() string {
		must(t, notify.SetReadDeadline(time.Now().Add(2*time.Minute)))
		buf := make([]byte, 4096)
		n, err := notify.Read(buf)
		must(t, err)
		return string(buf[:n])
	}
	until := func(ok func(string) bool) {
		t.Helper()
		var all []string
		for begun := time.Now(); time.Since(begun) < 2*time.Minute; {
			all = append(all, next())
			if ok(all[len(all)-1]) {
				return
			}
		}
		t.Fatalf("told only %q", all)
	}
	h := newHost(t, "--launcher", "child")
	until(func(s string) bool { return strings.HasPrefix(s, "READY=1\nSTATUS=idle") })
	until(func(s string) bool { return s == "WATCHDOG=1" })
	id := h.start(task.Request{}) // a minute at least
	until(func(s string) bool {
		return strings.HasPrefix(s, "STATUS=web ") && strings.HasSuffix(s, "%") && !strings.HasSuffix(s, " 0%")
	})

	// An agent that hangs is not vouched for, and one that goes on is.
	must(t, h.cmd.Process.Signal(unix.SIGSTOP))
	for quiet := false; !quiet; { // what was sent before is read
		must(t, notify.SetReadDeadline(time.Now().Add(2*time.Second)))
		_, err := notify.Read(make([]byte, 4096))
		quiet = err != nil
	}
	must(t, h.cmd.Process.Signal(unix.SIGCONT))
	until(func(s string) bool { return s == "WATCHDOG=1" })
	_, err = h.client.Cancel(t.Context(), id)
	must(t, err)
	until(func(s string) bool { return strings.HasPrefix(s, "STATUS=idle; last: web cancelled at ") })
	must(t, h.cmd.Process.Signal(unix.SIGTERM))
	until(func(s string) bool { return s == "STOPPING=1" })
	must(t, h.cmd.Wait())

	// The socket is systemd's: it outlives the agent.
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "given.sock"), Net: "unix"})
	must(t, err)
	defer ln.Close()
	f, err := ln.File()
	must(t, err)
	defer f.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"`, "sh", h.program, "agent", "run", "--socket", h.socket+".other", "--state", filepath.Join(h.top, "agent"))
	cmd.Env, cmd.ExtraFiles = h.env, []*os.File{f}
	must(t, cmd.Start())
	given := server.NewClient(filepath.Join(dir, "given.sock"))
	all, err := given.List(t.Context())
	if err != nil || len(all) != 1 || all[0].ID != id {
		t.Errorf("over systemd's socket: %v, %v", all, err)
	}
	must(t, cmd.Process.Signal(unix.SIGTERM))
	must(t, cmd.Wait())
	if _, err := os.Stat(filepath.Join(dir, "given.sock")); err != nil {
		t.Errorf("systemd's socket is gone: %v", err)
	}
	if _, err := os.Stat(h.socket + ".other"); err == nil {
		t.Error("another socket was made")
	}
}
