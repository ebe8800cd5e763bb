// Package tasks proves the built program's agent as a whole: with a systemd and
// a logind that run real processes, real filesystems that are frozen, and
// captures that are killed.
package tasks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/fakesystemd"
	"github.com/instar-image/instar/test/loopfs"
)

// built is the program, built once for all tests.
var built = sync.OnceValues(func() (string, error) {
	if p := os.Getenv("INSTAR_BIN"); p != "" {
		return p, nil
	}
	dir, err := os.MkdirTemp("", "instar-agent-")
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "instar")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-o", program, "github.com/instar-image/instar/cmd/instar")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building instar: %w\n%s", err, out)
	}
	return program, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if os.Getenv("INSTAR_BIN") == "" {
		if p, err := built(); err == nil {
			os.RemoveAll(filepath.Dir(p))
		}
	}
	os.Exit(code)
}

const secret = "s3cr3t+n0b0dy/sees"

// host is a machine with an agent.
type host struct {
	t       *testing.T
	program string
	top     string
	socket  string
	store   *httptest.Server
	hasty   atomic.Bool // the store hangs up on who stands still in the middle of a request
	env     []string
	args    []string
	cmd     *exec.Cmd
	log     logFile
	client  *server.Client
}

// logFile is what the agent says: a file, for workers have it too and outlive
// the agent.
type logFile string

func (l logFile) String() string {
	data, err := os.ReadFile(string(l))
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// hasty gives out connections that are broken off when nothing comes for two seconds.
type hasty struct {
	net.Listener
	on *atomic.Bool
}

func (l hasty) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return hastyConn{c, l.on}, err
}

type hastyConn struct {
	net.Conn
	on *atomic.Bool
}

func (c hastyConn) Read(p []byte) (int, error) {
	if c.on.Load() {
		if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return 0, err
		}
	}
	return c.Conn.Read(p)
}

// newHost makes a machine whose captures go to a server of S3 and are slow
// enough to be met: about a minute for what it has, unless the limit is raised.
func newHost(t *testing.T, args ...string) *host {
	t.Helper()
	program, err := built()
	if err != nil {
		t.Fatal(err)
	}
	backend := s3mem.New()
	if err := backend.CreateBucket("images"); err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, program: program, top: t.TempDir(), args: args}
	h.log = logFile(filepath.Join(h.top, "log"))
	h.store = httptest.NewUnstartedServer(gofakes3.New(backend).Server())
	h.store.Listener = hasty{h.store.Listener, &h.hasty}
	h.store.Start()
	t.Cleanup(h.store.Close)
	h.socket = filepath.Join(h.top, "run", "agent.sock")
	h.client = server.NewClient(h.socket)
	for _, d := range []string{"etc", "vol", "tmp", "run"} {
		must(t, os.Mkdir(filepath.Join(h.top, d), 0o700))
	}
	for i := range 16 {
		h.file("vol", fmt.Sprintf("f%d", i), 256<<10)
	}
	must(t, os.WriteFile(filepath.Join(h.top, "etc", "secret"), []byte(secret+"\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(h.top, "etc", "agent.yaml"), []byte("limits: {upload-rate: 65536}\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(h.top, "etc", "config.yaml"), fmt.Appendf(nil,
		"endpoint: %s\nregion: us-east-1\naccess_key_id: AKIDEXAMPLE\nsecret_key_file: %s\nstore: s3://images/fleet\n", h.store.URL, filepath.Join(h.top, "etc", "secret")), 0o600))
	h.env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + h.top, "INSTAR_ETC=" + filepath.Join(h.top, "etc"), "INSTAR_STATE=" + filepath.Join(h.top, "state"),
		"TMPDIR=" + filepath.Join(h.top, "tmp"), "AWS_EC2_METADATA_DISABLED=true",
	}
	for _, n := range []string{"DBUS_SYSTEM_BUS_ADDRESS", "NOTIFY_SOCKET", "WATCHDOG_USEC"} {
		if v := os.Getenv(n); v != "" {
			h.env = append(h.env, n+"="+v)
		}
	}
	t.Cleanup(h.killAll)
	h.run()
	return h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// file makes a file of random bytes.
func (h *host) file(dir, name string, size int) {
	h.t.Helper()
	loopfs.Run(h.t, "sh", "-c", fmt.Sprintf("head -c %d /dev/urandom > %s", size, filepath.Join(h.top, dir, name)))
}

// run starts the agent.
func (h *host) run() {
	h.t.Helper()
	h.cmd = exec.Command(h.program, append([]string{"agent", "run", "--socket", h.socket, "--state", filepath.Join(h.top, "agent")}, h.args...)...)
	log, err := os.OpenFile(string(h.log), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(h.t, err)
	defer log.Close()
	h.cmd.Env, h.cmd.Stderr = h.env, log
	h.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	must(h.t, h.cmd.Start())
	for h.client.Alive(context.Background()) != nil {
		if h.cmd.Process.Signal(unix.Signal(0)) != nil {
			h.t.Fatalf("the agent ended: %s", h.log)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// fill fills a filesystem with so much that reading it waits for the slow store.
func fill(t *testing.T, dir string) {
	t.Helper()
	loopfs.Run(t, "sh", "-c", "for i in $(seq 96); do head -c 1048576 /dev/urandom > "+dir+"/$i; done; sync -f "+dir)
}

func (h *host) kill() {
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

// killAll ends the agent and what its tasks run, and waits for their ends: what
// they have open keeps filesystems busy.
func (h *host) killAll() {
	h.kill()
	for pids := h.processes(); len(pids) > 0; pids = h.processes() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if h.t.Failed() {
		h.t.Logf("the agent's log:\n%s", h.log)
		logs, _ := filepath.Glob(filepath.Join(h.top, "agent/tasks/*.log"))
		for _, l := range logs {
			data, _ := os.ReadFile(l)
			h.t.Logf("%s:\n%s", l, data)
		}
	}
}

// processes are those of this host's program: agent, workers, guards.
func (h *host) processes(words ...string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		line, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || !bytes.Contains(line, []byte(h.top)) || !bytes.HasPrefix(line, []byte(h.program+"\x00")) {
			continue
		}
		if slices.ContainsFunc(words, func(w string) bool { return !bytes.Contains(line, []byte("\x00"+w+"\x00")) }) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(d))
		pids = append(pids, pid)
	}
	return pids
}

// start starts a capture of a directory.
func (h *host) start(r task.Request) string {
	h.t.Helper()
	r.Kind, r.NoKernel = task.CreateImage, true
	if r.Name == "" {
		r.Name = "web"
	}
	if r.Volume == "" {
		r.Volume = filepath.Join(h.top, "vol")
	}
	tk, err := h.client.Start(h.t.Context(), r)
	must(h.t, err)
	return tk.ID
}

// fast are limits under which a capture takes no time.
func fast() *task.Limits { return &task.Limits{UploadRate: -1} }

// slow are limits under which it takes minutes, but not for want of a CPU.
func slow() *task.Limits { return &task.Limits{UploadRate: 65536, Foreground: true} }

// await waits until a task is as asked.
func (h *host) await(id, what string, ok func(task.Task) bool) task.Task {
	h.t.Helper()
	limit := time.Now().Add(3 * time.Minute)
	for {
		tk, err := h.client.Show(h.t.Context(), id)
		must(h.t, err)
		if ok(tk) {
			return tk
		}
		if time.Now().After(limit) || tk.State.Ended() {
			h.t.Fatalf("it is never %s: %+v %+v", what, tk, tk.Error)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func reading(t task.Task) bool { return t.Progress.Percent > 5 }
func ended(t task.Task) bool   { return t.State.Ended() }

// soon waits for something that must be so within ten seconds, on a machine that
// has time for it, and tells if it took longer.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	begun := time.Now()
	for !ok() {
		if time.Since(begun) > time.Minute {
			t.Fatalf("after a minute not: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if took := time.Since(begun); took > 10*time.Second {
		t.Logf("only after %s: %s", took, what)
	}
}

// frozen reports whether a filesystem is frozen: freezing it again is refused.
func frozen(t *testing.T, mount string) bool {
	t.Helper()
	const fiFreeze, fiThaw = 0xc0045877, 0xc0045878
	d, err := os.Open(mount)
	must(t, err)
	defer d.Close()
	switch err := unix.IoctlSetInt(int(d.Fd()), fiFreeze, 0); {
	case errors.Is(err, unix.EBUSY):
		return true
	case err != nil:
		t.Fatal(err)
	}
	// Somebody else may thaw it in this moment, to be safe.
	if err := unix.IoctlSetInt(int(d.Fd()), fiThaw, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	return false
}

// TestStandstill: what was made to stand still goes on within ten seconds,
// whoever is killed meanwhile.
func TestStandstill(t *testing.T) {
	s := fakesystemd.Start(t)
	s.Declare("app.service", "db.service")
	data := loopfs.Make(t, "ext4", 200<<20)
	h := newHost(t, "--launcher", "systemd")
	r := task.Request{Volume: data, Limits: slow(), Quiesce: &task.Quiesce{Stop: []string{"app.service", "none.service"}, Freeze: []string{"db.service"}, Filesystems: []string{data}}}
	fill(t, data)
	still := func() bool {
		return s.State("app.service") == "inactive" && s.State("db.service") == "frozen" && frozen(t, data)
	}
	goes := func() bool {
		return s.State("app.service") == "active" && s.State("db.service") == "active" && !frozen(t, data)
	}
	if !goes() {
		t.Fatal("it stands still before anything was asked for")
	}
	guards := func() []string {
		return slices.DeleteFunc(s.Units("instar-guard-"), func(n string) bool { return s.PID(n) == 0 })
	}

	t.Run("kill the capture", func(t *testing.T) {
		id := h.start(r)
		h.held(id, still)
		must(t, unix.Kill(s.PID(systemd.TaskUnit(id)), unix.SIGKILL))
		soon(t, "everything goes on", goes)
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
		soon(t, "everything goes on", goes)
	})
	t.Run("kill the guard", func(t *testing.T) {
		id := h.start(r)
		h.held(id, still)
		must(t, unix.Kill(s.PID(guards()[0]), unix.SIGKILL))
		soon(t, "everything goes on", goes)
		// The capture goes on too, and says so.
		h.await(id, "warned", func(t task.Task) bool { return t.Warnings > 0 && !t.Progress.Quiesced })
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
		soon(t, "everything goes on", goes)
	})
	t.Run("kill both", func(t *testing.T) {
		id := h.start(r)
		h.held(id, still)
		guard := s.PID(guards()[0])
		must(t, errors.Join(unix.Kill(guard, unix.SIGKILL), unix.Kill(s.PID(systemd.TaskUnit(id)), unix.SIGKILL)))
		soon(t, "everything goes on", goes)
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
		soon(t, "everything goes on", goes)
	})
	t.Run("too long", func(t *testing.T) {
		long := r
		q := *r.Quiesce
		q.Limit = task.Span(3 * time.Second)
		long.Quiesce = &q
		before := len(s.Calls())
		id := h.start(long)
		soon(t, "everything stands still and goes on", func() bool {
			calls := s.Calls()[before:]
			order := []int{
				slices.Index(calls, "StopUnit app.service"), slices.Index(calls, "FreezeUnit db.service"),
				slices.Index(calls, "ThawUnit db.service"), slices.Index(calls, "StartUnit app.service"),
			}
			return slices.IsSorted(order) && order[0] >= 0
		})
		soon(t, "everything goes on", goes)
		h.await(id, "warned", func(t task.Task) bool { return t.Warnings > 0 && !t.Progress.Quiesced && !t.State.Ended() })
		if _, err := h.client.Pause(t.Context(), id); err != nil {
			t.Errorf("pausing when nothing stands still any more: %v", err)
		}
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
	})
	t.Run("all goes well", func(t *testing.T) {
		before := len(s.Calls())
		well := r
		well.Limits = fast()
		id := h.start(well)
		if got := h.await(id, "ended", ended); got.State != task.Complete || got.Warnings != 0 {
			t.Fatalf("%+v %+v", got, got.Error)
		}
		if !goes() {
			t.Error("something stands still")
		}
		soon(t, "shutdown is allowed again", func() bool { return len(s.Held()) == 0 })
		calls := s.Calls()[before:]
		at := func(call string) int { return slices.Index(calls, call) }
		published := slices.IndexFunc(calls, func(c string) bool {
			return strings.HasPrefix(c, "Inhibit shutdown:sleep|Instar|publishing web|block")
		})
		released := slices.IndexFunc(calls, func(c string) bool { return strings.HasPrefix(c, "released shutdown:sleep|Instar") })
		order := []int{at("StopUnit app.service"), at("FreezeUnit db.service"), at("ThawUnit db.service"), at("StartUnit app.service"), published, released}
		if !slices.IsSorted(order) || order[0] < 0 || at("StartUnit none.service") >= 0 {
			t.Errorf("%v in %q", order, calls)
		}
	})
	t.Run("not what it writes to", func(t *testing.T) {
		bad := r
		bad.Quiesce = &task.Quiesce{Filesystems: []string{"/"}}
		if got := h.await(h.start(bad), "ended", ended); got.State != task.Failed || !strings.Contains(got.Error.Message, "is not frozen") {
			t.Errorf("%+v %+v", got, got.Error)
		}
	})
	if left, err := filepath.Glob(filepath.Join(h.top, "run/quiesce/*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// held waits until a task's capture reads, for which all stands still. Looking
// whether a filesystem is frozen freezes it for a moment: not before that.
func (h *host) held(id string, still func() bool) {
	h.t.Helper()
	h.await(id, "reading", func(t task.Task) bool { return t.Progress.Quiesced && reading(t) })
	if !still() {
		h.t.Fatal("nothing stands still")
	}
}

// TestStandstillWithoutSystemd: two processes watch over each other, and the
// agent over both.
func TestStandstillWithoutSystemd(t *testing.T) {
	t.Parallel() // it waits most of the time
	data := loopfs.Make(t, "ext4", 200<<20)
	h := newHost(t, "--launcher", "child")
	fill(t, data)
	r := task.Request{Volume: data, Limits: slow(), Quiesce: &task.Quiesce{Filesystems: []string{data}}}
	still := func() bool { return frozen(t, data) }
	goes := func() bool { return !frozen(t, data) }
	for _, kill := range [][]string{{"work"}, {"guard"}} {
		id := h.start(r)
		h.held(id, still)
		for _, pid := range h.processes("agent", kill[0]) {
			must(t, unix.Kill(pid, unix.SIGKILL))
		}
		soon(t, "go on after a kill of "+kill[0], goes)
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
	}
	// Longer than ten seconds nothing is frozen, however slow the capture is.
	id := h.start(r)
	h.held(id, still)
	begun := time.Now()
	for still() {
		time.Sleep(20 * time.Millisecond)
	}
	if took := time.Since(begun); took > time.Minute { // for minutes without that limit
		t.Errorf("frozen for %s", took)
	}
	h.await(id, "warned", func(t task.Task) bool { return t.Warnings > 0 })
	_, err := h.client.Cancel(t.Context(), id)
	must(t, err)
	h.await(id, "ended", ended)
	// All of them are killed: the next agent lets it go.
	id = h.start(r)
	h.held(id, still)
	h.cmd.Process.Signal(unix.SIGSTOP)
	for _, pid := range append(h.processes("agent", "guard"), h.processes("agent", "work")...) {
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
	h.kill()
	h.run()
	soon(t, "go on after a restart", goes)
	_, err = h.client.Cancel(t.Context(), id)
	must(t, err)
	h.await(id, "ended", ended)
}

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
