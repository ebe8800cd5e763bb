package serving_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rs/zerolog"

	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/test/livelog"
)

// takeEnv makes the test binary a service that takes systemd's sockets, of the
// networks it names, and says what it got.
const takeEnv = "INSTAR_SERVING_TEST_TAKE"

func TestMain(m *testing.M) {
	if networks := os.Getenv(takeEnv); networks != "" {
		given, err := serving.Activated(strings.Fields(networks)...)
		for _, g := range given {
			fmt.Println(g.Name, g.Addr())
			g.Close()
		}
		fmt.Println(err, os.Getenv("LISTEN_FDS"))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// take has a process take sockets as systemd hands them over.
func take(t *testing.T, networks, names string, files ...*os.File) string {
	t.Helper()
	// LISTEN_PID is the process's own: a shell sets it and becomes the service.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), takeEnv+"="+networks, fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+names)
	cmd.ExtraFiles = files
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestActivated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	tcp, _ := listen(t)
	local, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	datagrams, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	file := func(f *os.File, err error) *os.File {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	defer tcp.Close()
	defer local.Close()
	defer datagrams.Close()
	atTCP, atPath, atUDP := file(tcp.(*net.TCPListener).File()), file(local.(*net.UnixListener).File()), file(datagrams.(*net.UDPConn).File())

	want := fmt.Sprintf("web %v\nlocal %s\n<nil> \n", tcp.Addr(), path)
	if got := take(t, "tcp unix", "web:local", atTCP, atPath); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("systemd's socket did not outlive the service: %v", err)
	}
	if got := take(t, "tcp", "", atTCP); got != fmt.Sprintf("LISTEN_FD_3 %v\n<nil> \n", tcp.Addr()) {
		t.Errorf("without a name: %q", got)
	}
	if got := take(t, "tcp", "web:local", atTCP, atPath); !strings.HasPrefix(got, "taking systemd's sockets: local: ") || !strings.Contains(got, "of network unix") {
		t.Errorf("a socket of another network: %q", got)
	}
	if got := take(t, "tcp unix", "web:local", atUDP, atPath); !strings.HasPrefix(got, "taking systemd's sockets: web: ") {
		t.Errorf("a socket for datagrams: %q", got)
	}
	if given, err := serving.Activated("tcp"); err != nil || len(given) > 0 {
		t.Errorf("nothing was handed over, and came %v, %v", given, err)
	}
}

func TestUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, mode := range []fs.FileMode{0o600, 0o660, 0o666} {
		ln, err := serving.Unix(t.Context(), path, mode)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			t.Errorf("mode %v: %v, %v", mode, st.Mode(), err)
		}
		if _, err := serving.Unix(t.Context(), path, mode); err == nil || !strings.Contains(err.Error(), "somebody serves at") {
			t.Errorf("a second server: %v", err)
		}
		ln.(*net.UnixListener).SetUnlinkOnClose(false) // as by a kill: the next finds it
		ln.Close()
	}
	ln, err := serving.Unix(t.Context(), path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := serving.Unix(t.Context(), path, 0o600); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("in the place of a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the file: %q, %v", b, err)
	}
}

// TestGate: who is let in is counted until he goes, and others are closed.
func TestGate(t *testing.T) {
	ln, _ := listen(t)
	var crowd serving.Crowd[string]
	refused := make(chan struct{}, 1)
	gate := &serving.Gate{Listener: ln, Admit: func(c net.Conn) net.Conn {
		if !crowd.Enter("you", 1, 5) {
			refused <- struct{}{}
			return nil
		}
		return serving.OnClose(c, func() { crowd.Leave("you") })
	}}
	accepted := make(chan net.Conn)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := gate.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	second := dial()
	<-refused
	if _, err := second.Read(make([]byte, 1)); err == nil {
		t.Error("who was not let in is still there")
	}
	first.Close()
	first.Close() // once is counted
	dial()
	(<-accepted).Close()
	ln.Close()
	if err := <-ended; err == nil {
		t.Error("no error")
	}
}

func TestCrowd(t *testing.T) {
	var c serving.Crowd[string]
	for i, e := range []struct {
		who  string
		most int
		in   bool
	}{{"a", 2, true}, {"a", 2, true}, {"a", 2, false}, {"", 1, true}, {"", 1, false}, {"b", 2, true}, {"b", 2, true}, {"c", 2, false}} {
		if got := c.Enter(e.who, e.most, 5); got != e.in {
			t.Errorf("%d: %q enters: %v", i, e.who, got)
		}
	}
	c.Leave("a")
	if !c.Enter("c", 2, 5) {
		t.Error("a place that was left is not free")
	}
	for _, who := range []string{"a", "b", "b", "c", ""} {
		c.Leave(who)
	}
	if !c.Enter("a", 1, 1) {
		t.Error("not all places are free again")
	}
}

func TestAdmin(t *testing.T) {
	var l livelog.Log
	var stale atomic.Bool
	page := func(body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) })
	}
	plain, err := serving.Admin{Metrics: page("figures"), Ready: func(context.Context) error {
		if stale.Load() {
			return errors.New("old records are served")
		}
		return nil
	}}.Listen(t.Context(), "127.0.0.1:0", zerolog.New(&l))
	if err != nil {
		t.Fatal(err)
	}
	taken := plain.Listener.Addr().String()
	if _, err := (serving.Admin{}).Listen(t.Context(), taken, zerolog.Nop()); err == nil || !strings.Contains(err.Error(), "for metrics and health") {
		t.Errorf("at an address that is taken: %v", err)
	}
	ln, _ := listen(t)
	own := serving.Admin{Metrics: page("figures"), Health: page("poorly")}.Part(ln, zerolog.Nop())
	stop, ended := run(t, serving.Options{Parts: []serving.Part{plain, own}})
	expect := func(p serving.Part, path string, status int, body string) {
		t.Helper()
		code, got, err := get("http://" + p.Listener.Addr().String() + path)
		if err != nil || code != status || strings.TrimSpace(got) != body {
			t.Errorf("%s: %d %q, %v; want %d %q", path, code, got, err, status, body)
		}
	}
	expect(plain, "/metrics", 200, "figures")
	expect(plain, "/healthz", 200, "ok")
	expect(plain, "/readyz", 200, "ok")
	expect(own, "/healthz", 200, "poorly")
	expect(own, "/readyz", 200, "ok")
	stale.Store(true)
	expect(plain, "/readyz", 503, "old records are served")
	expect(plain, "/healthz", 200, "ok")
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestRemarks: a handler that panics is in the log, a handshake that fails is
// not in the way.
func TestRemarks(t *testing.T) {
	var l livelog.Log
	ln, at := listen(t)
	srv := serving.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("a mistake of ours") }), serving.Limits{}, zerolog.New(&l))
	stop, ended := run(t, serving.Options{Parts: []serving.Part{{Server: srv, Listener: ln}}})
	if _, _, err := get(at); err == nil {
		t.Error("the panic was answered")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	srv.ErrorLog.Print("http: TLS handshake error from 192.0.2.1:1: EOF")
	for _, line := range strings.Split(strings.TrimSpace(l.String()), "\n") {
		want := `"level":"warn"`
		if strings.Contains(line, "handshake") {
			want = `"level":"debug"`
		}
		if !strings.Contains(line, want) {
			t.Errorf("in the log: %s", line)
		}
	}
	if got := l.String(); !strings.Contains(got, "a mistake of ours") || !strings.Contains(got, "handshake") {
		t.Errorf("the log: %s", got)
	}
}
