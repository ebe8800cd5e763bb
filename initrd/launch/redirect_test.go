package launch

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// redirected runs a shell script whose connections to the metadata address come
// to a handler that answers who called, and returns what it printed.
func redirected(t *testing.T, script string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	p, err := start(func(bool) *exec.Cmd {
		cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &out
		return cmd
	})
	if err != nil || p.refused != nil {
		t.Fatalf("starting: %v, redirection %v", err, p.refused)
	}
	guests := newPairs()
	var beside sync.WaitGroup
	beside.Go(func() {
		serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s asks %s for %s\n", r.RemoteAddr, r.Host, r.URL.Path)
		}), guests)
	})
	beside.Go(func() {
		if err := p.redirect(ctx, guests); err != nil {
			t.Error(err)
		}
	})
	err = <-p.ended
	cancel()
	beside.Wait()
	if err != nil {
		t.Errorf("%v\n%s", err, out.String())
	}
	return out.String()
}

const asUnprivileged = "INSTAR_LAUNCH_UNPRIVILEGED"

// TestRedirect asks for metadata where this machine has none: it is answered
// here, and other connections are what they were. It is repeated as nobody.
func TestRedirect(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "another server") }))
	defer other.Close()
	got := redirected(t, `set -e
for i in 1 2 3; do curl -sS -m 60 http://169.254.169.254/$i; done
curl -sS -m 60 "$1"
curl -sSg -m 60 'http://[fd00:ec2::254]/6'
(curl -sS -m 60 http://169.254.169.254/child) & wait`, other.URL)
	var want strings.Builder
	for _, path := range []string{"/1", "/2", "/3"} {
		fmt.Fprintf(&want, "127.0.0.1:0 asks 169.254.169.254 for %s\n", path)
	}
	want.WriteString("another server\n127.0.0.1:0 asks [fd00:ec2::254] for /6\n127.0.0.1:0 asks 169.254.169.254 for /child\n")
	if got != want.String() {
		t.Errorf("got\n%s\nwant\n%s", got, want.String())
	}
	if os.Getenv(asUnprivileged) != "" {
		if os.Geteuid() == 0 {
			t.Error("still root")
		}
		return
	}
	// A copy that nobody may read and run.
	program := filepath.Join(os.TempDir(), fmt.Sprintf("instar-launch-test-%d", os.Getpid()))
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(program)
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-test.run=^TestRedirect$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), asUnprivileged+"=1", "HOME=/")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestRedirect") {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

func TestStart(t *testing.T) {
	var cmd *exec.Cmd
	p, err := start(func(bool) *exec.Cmd {
		cmd = exec.Command("sleep", "1000")
		return cmd
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.redirect(ctx, newPairs()) }()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("a redirection that is cancelled: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := <-p.ended; err == nil {
		t.Error("a killed program ended well")
	}
	if _, err := start(func(bool) *exec.Cmd { return exec.Command("/no/such/program") }); err == nil {
		t.Error("a program that is not there was started")
	}
}
