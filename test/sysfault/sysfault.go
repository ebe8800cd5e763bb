// Package sysfault runs a program and, at an exact point of its work on files,
// kills it or makes the operation fail.
//
// The kernel's seccomp notification stops the program at each system call that
// changes a file or a directory, in whatever thread; those below one directory
// are counted. So a test can try every point in turn until none is left, which
// counters kept by thread (strace's) cannot. It needs root and Linux 5.9.
package sysfault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Fault says what happens to which operation.
type Fault struct {
	Dir   string        // operations on files below it count
	At    int           // counted from 1; 0 for none
	Errno unix.Errno    // what the operation fails with; 0 kills the program before it
	From  bool          // all operations from At on fail, as on a full disk
	Only  func(Op) bool // if set, only these operations count
	Limit time.Duration // the program is killed after it (5 minutes if 0), which fails the test
}

// Op is an operation of the program.
type Op struct {
	Call string // "write", "renameat", ...
	Path string // the file it is on, or the new name
}

// Result is how the program ended.
type Result struct {
	Code           int // exit code; -1 if killed
	Stdout, Stderr string
	Ops            []Op // all that counted
	Hit            bool // the fault happened
	Failed         Op   // the operation it happened to, the last one with Fault.From
}

// calls are the system calls that change files, and which argument names the file.
var calls = map[int]struct {
	name string
	fd   int // argument with the open file, or -1
	dir  int // argument with the directory, its path in the next one
}{
	unix.SYS_WRITE:           {"write", 0, -1},
	unix.SYS_PWRITE64:        {"pwrite", 0, -1},
	unix.SYS_WRITEV:          {"writev", 0, -1},
	unix.SYS_PWRITEV:         {"pwritev", 0, -1},
	unix.SYS_FSYNC:           {"fsync", 0, -1},
	unix.SYS_FDATASYNC:       {"fdatasync", 0, -1},
	unix.SYS_SYNC_FILE_RANGE: {"sync_file_range", 0, -1},
	unix.SYS_FTRUNCATE:       {"ftruncate", 0, -1},
	unix.SYS_FALLOCATE:       {"fallocate", 0, -1},
	unix.SYS_FCHMOD:          {"fchmod", 0, -1},
	unix.SYS_COPY_FILE_RANGE: {"copy_file_range", 2, -1},
	unix.SYS_SENDFILE:        {"sendfile", 0, -1},
	unix.SYS_SPLICE:          {"splice", 2, -1},
	unix.SYS_OPENAT:          {"openat", -1, 0},
	unix.SYS_MKDIRAT:         {"mkdirat", -1, 0},
	unix.SYS_MKNODAT:         {"mknodat", -1, 0},
	unix.SYS_UNLINKAT:        {"unlinkat", -1, 0},
	unix.SYS_RENAMEAT:        {"renameat", -1, 2},
	unix.SYS_RENAMEAT2:       {"renameat2", -1, 2},
	unix.SYS_LINKAT:          {"linkat", -1, 2},
	unix.SYS_SYMLINKAT:       {"symlinkat", -1, 1},
	unix.SYS_FCHMODAT:        {"fchmodat", -1, 0},
}

// Run runs a program under a fault. The environment is the test's and env.
func Run(t testing.TB, f Fault, env []string, program string, args ...string) Result {
	t.Helper()
	r, err := run(f, env, program, args)
	if err != nil {
		t.Fatalf("running %s under a fault: %v", program, err)
	}
	return r
}

func run(f Fault, env []string, program string, args []string) (Result, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Result{}, err
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()

	self, err := os.Executable()
	if err != nil {
		return Result{}, err
	}
	cmd := exec.Command(self, append([]string{program}, args...)...)
	cmd.Env = append(append(os.Environ(), env...), helperEnv+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Minute
	if err := cmd.Start(); err != nil {
		return Result{}, err
	}
	theirs.Close()
	listener, err := receive(pair[0])
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return Result{}, fmt.Errorf("%w: %s", err, stderr.String())
	}
	defer unix.Close(listener)

	limit := f.Limit
	if limit == 0 {
		limit = 5 * time.Minute
	}
	s := &supervisor{fault: f, listener: listener, pid: cmd.Process.Pid, until: time.Now().Add(limit)}
	serveErr := s.serve()
	if serveErr != nil {
		_ = unix.Kill(-s.pid, unix.SIGKILL)
	}
	waitErr := cmd.Wait()
	var exit *exec.ExitError
	if waitErr != nil && !errors.As(waitErr, &exit) {
		return Result{}, waitErr
	}
	if serveErr != nil {
		return Result{}, fmt.Errorf("%w\n%s", serveErr, stderr.String())
	}
	return Result{
		Code: cmd.ProcessState.ExitCode(), Stdout: stdout.String(), Stderr: stderr.String(),
		Ops: s.ops, Hit: s.hit, Failed: s.failed,
	}, nil
}

type supervisor struct {
	fault    Fault
	listener int
	pid      int
	until    time.Time
	ops      []Op
	hit      bool
	failed   Op
}

// serve answers the kernel's notifications until the program has ended.
func (s *supervisor) serve() error {
	for {
		left := time.Until(s.until)
		if left <= 0 {
			return errors.New("the program did not end in time")
		}
		fds := []unix.PollFd{{Fd: int32(s.listener), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR) || n == 0:
			continue
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		case fds[0].Revents&unix.POLLIN == 0:
			return nil // no task has the filter any more
		}
		if err := s.one(); err != nil {
			return err
		}
	}
}

// one decides about one system call.
func (s *supervisor) one() error {
	var req notification
	if err := ioctl(s.listener, notifRecv, &req); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			return nil // the caller died
		}
		return fmt.Errorf("receiving a notification: %w", err)
	}
	res := response{id: req.id, flags: flagContinue}
	if op, ok := s.operation(&req); ok {
		s.ops = append(s.ops, op)
		n := len(s.ops)
		if n == s.fault.At || s.fault.From && s.fault.At > 0 && n > s.fault.At {
			s.hit, s.failed = true, op
			if s.fault.Errno == 0 {
				// With what it started: a child may be the one that stands still.
				return unix.Kill(-s.pid, unix.SIGKILL)
			}
			res.flags, res.errno = 0, -int32(s.fault.Errno)
		}
	}
	if err := ioctl(s.listener, notifSend, &res); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("answering a notification: %w", err)
	}
	return nil
}

// operation tells what a call is about, and whether it counts. The thread
// stands still meanwhile.
func (s *supervisor) operation(req *notification) (Op, bool) {
	c, ok := calls[int(req.nr)]
	if !ok {
		return Op{}, false
	}
	op := Op{Call: c.name}
	proc := fmt.Sprintf("/proc/%d/", req.pid)
	if c.fd >= 0 {
		op.Path, _ = os.Readlink(fmt.Sprintf("%sfd/%d", proc, int32(req.args[c.fd])))
	} else {
		path := readString(proc+"mem", req.args[c.dir+1])
		if !strings.HasPrefix(path, "/") {
			link := "cwd"
			if fd := int32(req.args[c.dir]); fd != unix.AT_FDCWD {
				link = fmt.Sprintf("fd/%d", fd)
			}
			base, _ := os.Readlink(proc + link)
			path = base + "/" + path
		}
		op.Path = path
	}
	if !strings.HasPrefix(op.Path, s.fault.Dir+"/") && op.Path != s.fault.Dir {
		return Op{}, false
	}
	return op, s.fault.Only == nil || s.fault.Only(op)
}

// readString reads a string of the stopped thread's memory.
func readString(mem string, addr uint64) string {
	f, err := os.Open(mem)
	if err != nil {
		return ""
	}
	defer f.Close()
	// A string may end just before memory that is not there.
	buf := make([]byte, 4096)
	n, _ := f.ReadAt(buf[:4096-addr%4096], int64(addr))
	if i := bytes.IndexByte(buf[:n], 0); i >= 0 {
		return string(buf[:i])
	}
	m, _ := f.ReadAt(buf[n:], int64(addr)+int64(n))
	s, _, _ := bytes.Cut(buf[:n+m], []byte{0})
	return string(s)
}
