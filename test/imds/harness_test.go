// Package imds proves the metadata server with real clients and real networks:
// the program runs in private network namespaces, where 169.254.169.254 is
// ours, and cloud-init, the AWS SDKs and scripts find it there by themselves.
package imds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// instar is the program under test, built once.
var instar string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Getenv("INSTAR_TEST_SDK") != "" {
		return sdkMain() // this program again, as a client in a namespace
	}
	dir, err := os.MkdirTemp("", "instar-imds")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	instar = filepath.Join(dir, "instar")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", instar, "../../cmd/instar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building instar: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// netns is a network namespace.
type netns struct{ name string }

var names = struct {
	sync.Mutex
	n int
}{}

// newNetns makes a namespace whose loopback is up. It is removed at the end.
func newNetns(t testing.TB) netns {
	t.Helper()
	names.Lock()
	names.n++
	ns := netns{fmt.Sprintf("imds%d-%d", os.Getpid(), names.n)}
	names.Unlock()
	sh(t, "ip", "netns", "add", ns.name)
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", ns.name).CombinedOutput(); err != nil {
			t.Errorf("removing %s: %v %s", ns.name, err, out)
		}
	})
	ns.ip(t, "link", "set", "lo", "up")
	return ns
}

func sh(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// ip runs ip(8) in the namespace.
func (ns netns) ip(t testing.TB, args ...string) {
	t.Helper()
	sh(t, append([]string{"ip", "-n", ns.name}, args...)...)
}

// command runs a program in the namespace, with nothing of our environment
// that could lead it elsewhere.
func (ns netns) command(ctx context.Context, env []string, args ...string) *exec.Cmd {
	if ns.name != "" { // "" is where the tests run
		args = append([]string{"ip", "netns", "exec", ns.name}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", "LC_ALL=C.UTF-8"}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// run runs a program in the namespace and returns what it printed on standard
// output; it must end well.
func (ns netns) run(t testing.TB, env []string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := ns.command(ctx, env, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, tail(out.String()), tail(errs.String()))
	}
	return out.String()
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

// curl makes a request and returns "STATUS BODY", or "error N" where curl
// could not (28: no answer in 20 seconds, or in those of a later --max-time).
func (ns netns) curl(t testing.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := ns.command(ctx, nil, append([]string{"curl", "-gsS", "--noproxy", "*", "--max-time", "20", "-w", "\n%{http_code}"}, args...)...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Sprintf("error %d", exit.ExitCode())
	} else if err != nil {
		t.Fatal(err)
	}
	i := strings.LastIndexByte(string(out), '\n')
	return string(out[i+1:]) + " " + string(out[:i])
}

// service is a metadata server at work in a namespace.
type service struct {
	ns      netns
	dir     string // records are in dir/instances
	control string
	access  string // the log's path
	cmd     *exec.Cmd
	env     []string
}

// serve starts the program with the records given as file name: text.
func serve(t testing.TB, ns netns, records map[string]string, args ...string) *service {
	t.Helper()
	s := &service{ns: ns, dir: t.TempDir()}
	s.control, s.access = filepath.Join(s.dir, "ctl.sock"), filepath.Join(s.dir, "access.log")
	if err := os.Mkdir(filepath.Join(s.dir, "instances"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range records {
		s.write(t, name, text)
	}
	s.start(t, args...)
	return s
}

// start runs the program, and kills it at the end of the test.
func (s *service) start(t testing.TB, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s.cmd = s.ns.command(ctx, s.env, append([]string{
		instar, "metadata", "serve", "--instances", filepath.Join(s.dir, "instances"),
		"--state", filepath.Join(s.dir, "state"), "--control", s.control, "--access-log", s.access,
	}, args...)...)
	log, err := os.Create(filepath.Join(s.dir, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		s.cmd.Wait()
		log.Close()
		if t.Failed() {
			for _, f := range []string{log.Name(), s.access} {
				b, err := os.ReadFile(f)
				t.Logf("%s: %v\n%s", filepath.Base(f), err, tail(string(b)))
			}
		}
	})
	for i := 0; ; i++ {
		out, err := exec.Command(instar, "metadata", "ctl", "status", "--control", s.control).CombinedOutput()
		if err == nil {
			return
		}
		if i == 2000 {
			t.Fatalf("the server does not start: %s", out)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ctl runs a control command.
func (s *service) ctl(t testing.TB, args ...string) string {
	t.Helper()
	return sh(t, append([]string{instar, "metadata", "ctl", "--control", s.control}, args...)...)
}

func (s *service) write(t testing.TB, name, text string) {
	t.Helper()
	path := filepath.Join(s.dir, "instances", name)
	if err := os.WriteFile(path+".tmp", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

// log returns the access log once it holds what is wanted, or will not any more:
// lines are written a moment late.
func (s *service) log(t testing.TB, want ...string) string {
	t.Helper()
	time.Sleep(400 * time.Millisecond)
	for limit := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		b, err := os.ReadFile(s.access)
		if err != nil {
			t.Fatal(err)
		}
		lacks := slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(string(b), w) })
		if !lacks || time.Now().After(limit) {
			return string(b)
		}
	}
}

// link joins two namespaces with a pair of interfaces.
func link(t testing.TB, a netns, aName string, b netns, bName string) {
	t.Helper()
	a.ip(t, "link", "add", aName, "type", "veth", "peer", "name", bName, "netns", b.name)
	a.ip(t, "link", "set", aName, "up")
	b.ip(t, "link", "set", bName, "up")
}

// unpack unpacks one of Debian's packages, without installing it, and returns
// the directory.
func unpack(t testing.TB, pkg string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "instar", "debs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	pattern := filepath.Join(dir, pkg+"_*.deb")
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) == 0 {
		tmp := t.TempDir()
		download := exec.Command("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg)
		download.Dir = tmp
		if derr := download.Run(); derr != nil { // the lists may be old or absent
			sh(t, "apt-get", "-q", "update")
			download = exec.Command("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg)
			download.Dir = tmp
			if out, derr := download.CombinedOutput(); derr != nil {
				t.Fatalf("downloading Debian's %s: %v\n%s", pkg, derr, out)
			}
		}
		got, gerr := filepath.Glob(filepath.Join(tmp, "*.deb"))
		if gerr != nil || len(got) != 1 {
			t.Fatalf("downloading Debian's %s gave %v, %v", pkg, got, gerr)
		}
		sh(t, "cp", got[0], filepath.Join(dir, filepath.Base(got[0])))
		found, err = filepath.Glob(pattern)
	}
	if err != nil || len(found) == 0 {
		t.Fatalf("no package %s: %v", pkg, err)
	}
	to := t.TempDir()
	sh(t, "dpkg", "-x", found[len(found)-1], to)
	return to
}
