package tasks

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/task"
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

func ended(t task.Task) bool { return t.State.Ended() }

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

// held waits until a task's capture reads, for which all stands still. Looking
// whether a filesystem is frozen freezes it for a moment: not before that.
func (h *host) held(id string, still func() bool) {
	h.t.Helper()
	h.await(id, "reading", func(t task.Task) bool { return t.Progress.Quiesced && reading(t) })
	if !still() {
		h.t.Fatal("nothing stands still")
	}
}
