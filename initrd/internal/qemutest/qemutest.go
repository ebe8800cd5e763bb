// Package qemutest boots a kernel and an initrd in QEMU for tests: by
// emulation, which runs everywhere alike.
package qemutest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Limit ends a guest that hangs. It is no measure of anything.
const Limit = 8 * time.Minute

// Init builds cmd/instar-init and returns the path of the executable.
func Init(t testing.TB) string {
	t.Helper()
	return Program(t, "github.com/instar-image/instar/cmd/instar-init")
}

// Program is BuildProgram for a program that several tests run: it is built once.
// The package's TestMain calls [Remove] at the end.
func Program(t testing.TB, pkg string) string {
	t.Helper()
	programs.Lock()
	defer programs.Unlock()
	if name, ok := programs.built[pkg]; ok {
		return name
	}
	if programs.dir == "" {
		dir, err := os.MkdirTemp("", "instar-programs-*")
		if err != nil {
			t.Fatal(err)
		}
		programs.dir, programs.built = dir, make(map[string]string)
	}
	name := filepath.Join(programs.dir, strconv.Itoa(len(programs.built)))
	if err := build(name, runtime.GOARCH, pkg); err != "" {
		t.Fatal(err)
	}
	programs.built[pkg] = name
	return name
}

// programs are of the test process: one build serves all its tests.
var programs struct {
	sync.Mutex
	dir   string
	built map[string]string // by package
}

// Remove removes what Init and Program left.
func Remove() {
	programs.Lock()
	defer programs.Unlock()
	if programs.dir != "" {
		os.RemoveAll(programs.dir)
	}
}

func build(out, arch, pkg string) string {
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch, "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "building " + pkg + ": " + err.Error() + "\n" + string(text)
	}
	return ""
}

// BuildProgram builds a static program from a package, by its path or a
// directory seen from the test's.
func BuildProgram(t testing.TB, pkg string) string {
	t.Helper()
	return BuildProgramFor(t, runtime.GOARCH, pkg)
}

// BuildProgramFor is BuildProgram for another architecture.
func BuildProgramFor(t testing.TB, arch, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	if err := build(out, arch, pkg); err != "" {
		t.Fatal(err)
	}
	return out
}

// Guest is a machine to run.
type Guest struct {
	Kernel, Initrd string
	Append         string   // kernel parameters, beside the console
	Args           []string // further arguments of QEMU: disks, network
	Memory         string   // default 512
}

// Args of a guest's network on QEMU's own router: the host is 10.0.2.2 and
// fec0::2 in it.
func UserNet() []string {
	return []string{"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile="}
}

// Disk is the argument pair for a raw disk image.
func Disk(file string) []string {
	return []string{"-drive", "file=" + file + ",format=raw,if=virtio,cache=unsafe"}
}

// emulated are parameters for an emulated processor: without what is wrong in it
// (package launch says what), without self-tests, and without what guards one
// kernel from what runs beside it.
const emulated = "no_timer_check quiet clearcpuid=141 panic=-1 cryptomgr.notests mitigations=off nokaslr "

// Run runs the guest until it powers off and returns what its console showed.
// stop, if not nil, is asked with every piece of output and kills the machine
// without warning when it says so.
func Run(t testing.TB, g Guest, stop func(console []byte) bool) string {
	t.Helper()
	return run(t, g, &console{stop: stop}, nil)
}

func run(t testing.TB, g Guest, out *console, cut <-chan struct{}) string {
	t.Helper()
	memory := g.Memory
	if memory == "" {
		memory = "512"
	}
	ctx, cancel := context.WithTimeout(t.Context(), Limit)
	defer cancel()
	args := append([]string{
		// Page tables of four levels cost an emulated processor less than of five.
		"-accel", "tcg", "-cpu", "max,la57=off", "-m", memory, "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
		"-kernel", unpacked(t, g.Kernel), "-initrd", g.Initrd, "-append", "console=ttyS0 " + emulated + g.Append,
	}, g.Args...)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	out.kill = func() { cmd.Process.Kill() }
	cmd.Stdout, cmd.Stderr = out, out
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatalf("qemu: %v", err)
	}
	wasCut := make(chan bool, 1)
	ended := make(chan struct{})
	go func() {
		select {
		case <-cut:
			out.kill()
			wasCut <- true
		case <-ended:
			wasCut <- false
		}
	}()
	err := cmd.Wait()
	close(ended)
	t.Logf("a guest of %.1f s, %.1f s of CPU", time.Since(began).Seconds(), (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds())
	text := strings.ReplaceAll(out.text.String(), "\r", "")
	if <-wasCut || out.stopped {
		return text
	}
	if err != nil {
		t.Fatalf("qemu: %v\n%s", err, text)
	}
	return text
}

// RunUntil is Run, and cuts the guest's power when cut is closed.
func RunUntil(t testing.TB, g Guest, cut <-chan struct{}, stop func(console []byte) bool) string {
	t.Helper()
	return run(t, g, &console{stop: stop}, cut)
}

// console collects output. os/exec writes to it from one goroutine, since
// standard output and error are the same.
type console struct {
	text    bytes.Buffer // not embedded: its ReadFrom would pass Write by
	stop    func([]byte) bool
	kill    func()
	stopped bool
}

func (c *console) Write(p []byte) (int, error) {
	n, err := c.text.Write(p)
	if c.stop != nil && !c.stopped && c.stop(c.text.Bytes()) {
		c.stopped = true
		c.kill()
	}
	return n, err
}
