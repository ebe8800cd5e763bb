// Package instar runs the built program in tests, as an operator would: in a
// process of its own, with a clean environment.
package instar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/test/loopfs"
)

// Account is the user id of the bundles tests make.
const Account = "111122223333"

// Exit codes, as the manual pages list them.
const (
	OK        = 0
	Usage     = 1
	File      = 2
	S3        = 3
	Trust     = 4
	Changed   = 24
	Interrupt = 255
)

// Instar is the program and what its runs have in common.
type Instar struct {
	Program string
	Home    string
	Env     []string // in addition to PATH and HOME
	Keys    Keys
}

// Keys are files with throw-away keys made by openssl.
type Keys struct {
	Dir                                  string
	UserKey, UserCert, CloudKey, CloudPK string // CloudPK is the cloud's certificate
}

// Result is how a run ended.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// New builds the program, unless $INSTAR_BIN names one, and makes keys.
func New(t testing.TB, env ...string) *Instar {
	t.Helper()
	i := &Instar{Program: os.Getenv("INSTAR_BIN"), Home: t.TempDir(), Env: env}
	if i.Program == "" {
		i.Program = Build(t, runtime.GOARCH)
	}
	i.Keys = MakeKeys(t, t.TempDir())
	return i
}

// Build builds the static program for an architecture and returns its path.
func Build(t testing.TB, arch string) string {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("cannot tell where the module is")
	}
	program := filepath.Join(t.TempDir(), "instar")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-o", program, "./cmd/instar")
	cmd.Dir = filepath.Join(filepath.Dir(file), "..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building instar for %s: %v\n%s", arch, err, out)
	}
	return program
}

// MakeKeys makes the user's and the cloud's RSA keys and certificates in dir.
func MakeKeys(t testing.TB, dir string) Keys {
	t.Helper()
	k := Keys{
		Dir: dir, UserKey: filepath.Join(dir, "user-pk.pem"), UserCert: filepath.Join(dir, "user-cert.pem"),
		CloudKey: filepath.Join(dir, "ec2-pk.pem"), CloudPK: filepath.Join(dir, "ec2-cert.pem"),
	}
	for _, pair := range [][2]string{{k.UserKey, k.UserCert}, {k.CloudKey, k.CloudPK}} {
		loopfs.Run(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256", "-days", "3650",
			"-subj", "/CN=instar test", "-keyout", pair[0], "-out", pair[1])
	}
	return k
}

// Bundling is the options every bundling command takes.
func (i *Instar) Bundling() []string {
	return []string{"-k", i.Keys.UserKey, "-c", i.Keys.UserCert, "--ec2cert", i.Keys.CloudPK, "-u", Account, "-r", "x86_64"}
}

// With returns an Instar with a larger environment.
func (i *Instar) With(env ...string) *Instar {
	c := *i
	c.Env = append(append([]string(nil), i.Env...), env...)
	return &c
}

// Environ is the environment of a run.
func (i *Instar) Environ() []string {
	return append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + i.Home, "LANG=C.UTF-8", "AWS_EC2_METADATA_DISABLED=true",
		// The machine's own keys and memory are none of a test's business.
		"INSTAR_ETC=" + filepath.Join(i.Home, "etc"), "INSTAR_STATE=" + filepath.Join(i.Home, "state"),
	}, i.Env...)
}

// Command is a run that is not started yet.
func (i *Instar) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, i.Program, args...)
	cmd.Env = i.Environ()
	cmd.Dir = i.Home
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// Run runs a command to its end.
func (i *Instar) Run(t testing.TB, args ...string) Result {
	t.Helper()
	// A deadlock must fail the test that meets it, with the program's stacks.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := i.Command(ctx, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v\n%.4000s", i.line(args), err, stderr.String())
	}
	return Result{Code: cmd.ProcessState.ExitCode(), Stdout: stdout.String(), Stderr: stderr.String()}
}

// Want runs a command that must end with the given exit code.
func (i *Instar) Want(t testing.TB, code int, args ...string) Result {
	t.Helper()
	r := i.Run(t, args...)
	if r.Code != code {
		t.Fatalf("%s: exit code %d, want %d\n%s", i.line(args), r.Code, code, r)
	}
	return r
}

func (i *Instar) line(args []string) string { return "instar " + strings.Join(args, " ") }

func (r Result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %.2000s\nstderr: %.4000s", r.Code, r.Stdout, r.Stderr)
}
