// Package resident keeps the server of a lazily filled root alive: from before
// the root is mounted until all of it is on the local disk, through the change
// of roots, a shutdown, and its own death.
//
// There are two processes. The keeper starts the server, and starts it again if
// it ends before its work is done; the server answers the requests of a kernel's
// nbd device, fills the disk meanwhile, and at the end puts the disk in the nbd
// device's place below the mapped devices and takes the nbd device away. Then
// both end.
//
// In go the open files of [Files] and, as bytes that this package does not look
// into, a configuration; what changes is the kernel's nbd and mapped devices.
// Both processes see nothing of the filesystem once the root has changed but
// /proc, their working directory: all they need is open.
package resident

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Name is the first word of both processes' command line. Who shuts a system
// down leaves processes alone whose name begins with '@': systemd's convention
// for what a root lies on.
const Name = "@instar-root"

// Roles, the second word.
const (
	roleKeep  = "keep"
	roleServe = "serve"
	roleAgain = "serve-again" // the device is connected: reconnect
	// The same after a signal to end: the system ends, or did not after all.
	roleEnding = "serve-ending"
	roleCalm   = "serve-calm"
)

// Files are what is open in the processes, from descriptor 3 on in this order.
type Files struct {
	Config  *os.File // a memfd with the configuration
	Disk    *os.File // the local disk: read and write, O_DIRECT
	Control *os.File // dm.ControlPath
	Session *os.File // a memfd that outlives the server
	Spared  *os.File // a file of a tmpfs that is to list both processes' ids, a line each
	ready   *os.File // a pipe: how the first start went
}

func (f Files) list() []*os.File {
	return []*os.File{f.Config, f.Disk, f.Control, f.Session, f.Spared, f.ready}
}

// inherited are the files of a process that [Start] or the keeper began.
func inherited() Files {
	names := []string{"configuration", "disk", "device mapper", "session", "list of those to spare", "ready"}
	var list []*os.File
	for i, n := range names {
		unix.CloseOnExec(3 + i)
		list = append(list, os.NewFile(uintptr(3+i), n))
	}
	return Files{list[0], list[1], list[2], list[3], list[4], list[5]}
}

// Memory makes an anonymous file with the given content, for Files.
func Memory(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(content, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("making a file in memory: %w", err)
	}
	return f, nil
}

// ioFlusher is PR_SET_IO_FLUSHER: who has it never waits, for memory, for
// writes that it would have to answer itself. Children have it too.
const ioFlusher = 57

// Process is the keeper as its starter sees it.
type Process struct{ p *os.Process }

// Stop ends both processes, whose nbd device is the caller's to disconnect.
func (p *Process) Stop() {
	unix.Kill(-p.p.Pid, unix.SIGKILL) // a session, and group, of its own
	p.p.Wait()
}

// Start starts the keeper, and it the server, from this very executable, whose
// main must call [Main] when [Called]. log is their standard error: /dev/kmsg.
// It returns when the device is connected, or the reason why that cannot be.
func Start(ctx context.Context, f Files, log *os.File) (*Process, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	told, ready, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer told.Close()
	defer ready.Close()
	f.ready = ready
	cmd := command("/proc/self/exe", roleKeep, f)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Dir = null, log, log, "/proc"
	if err := startFlusher(cmd); err != nil {
		return nil, fmt.Errorf("starting the root's server: %w", err)
	}
	p := &Process{cmd.Process}
	ready.Close()
	stop := context.AfterFunc(ctx, func() { told.SetReadDeadline(time.Now()) })
	defer stop()
	buf := make([]byte, 4096)
	n, err := told.Read(buf)
	if string(buf[:n]) == readyWord {
		return p, nil
	}
	p.Stop()
	switch {
	case n > 0:
		return nil, fmt.Errorf("the root's server: %s", buf[:n])
	case ctx.Err() != nil:
		return nil, fmt.Errorf("the root's server is not ready: %w", ctx.Err())
	}
	return nil, fmt.Errorf("the root's server ended: %w", err)
}

const readyWord = "ready"

func command(program, role string, f Files) *exec.Cmd {
	return &exec.Cmd{
		Path: program, Args: []string{Name, role}, Env: []string{}, ExtraFiles: f.list(),
		SysProcAttr: &syscall.SysProcAttr{Setsid: role == roleKeep},
	}
}

// startFlusher starts a process that is an I/O flusher from its first
// instruction on.
func startFlusher(cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := unix.PrctlRetInt(ioFlusher+1, 0, 0, 0, 0)
	if err == nil && before == 0 {
		if err := unix.Prctl(ioFlusher, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("becoming an I/O flusher: %w", err)
		}
		defer unix.Prctl(ioFlusher, 0, 0, 0, 0)
	}
	return cmd.Start()
}

// Called tells whether this process is to be [Main].
func Called() bool { return len(os.Args) == 2 && os.Args[0] == Name }

// Main is the main function of both processes. serve is the server's: it is
// given the configuration and says when it is [Server.Ready]. log is standard
// error.
func Main(ctx context.Context, serve func(context.Context, *Server) error) error {
	f := inherited()
	if err := harden(); err != nil {
		return err
	}
	switch role := os.Args[1]; role {
	case roleKeep:
		return keep(ctx, f)
	case roleServe, roleAgain, roleEnding, roleCalm:
		s := &Server{Files: f, again: role != roleServe, ending: role == roleEnding, calm: role == roleCalm}
		err := serve(ctx, s)
		if err != nil && role == roleServe && !s.connected {
			f.ready.WriteString(strings.ReplaceAll(err.Error(), "\n", "; "))
			os.Exit(exitNotConnected)
		}
		return err
	default:
		return fmt.Errorf("%s: unknown role %q", Name, role)
	}
}

// harden makes a process that the root depends on independent of the root and
// of a shortage of memory.
func harden() error {
	// What is not read yet is not read later from a disk that waits for us.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("locking memory: %w", err)
	}
	if err := os.WriteFile("self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return fmt.Errorf("asking not to be killed for memory: %w", err)
	}
	return keepGoing()
}

// spare lists processes as ones that a system's end spares, instead of those
// before. That it fails does no harm to who is killed and started again.
func (f Files) spare(pids ...int) {
	var text []byte
	for _, pid := range pids {
		text = fmt.Appendf(text, "%d\n", pid)
	}
	_, err := f.Spared.WriteAt(text, 0)
	if err = errors.Join(err, f.Spared.Truncate(int64(len(text)))); err != nil {
		fmt.Fprintf(os.Stderr, "<4>instar: root: warning: listing the server's processes: %v\n", err)
	}
}

// Pauses of the keeper between a server's end and its next start.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = 5 * time.Second
)

// exitNotConnected is the status of a server that found at its first start that
// it cannot do its work. Any other end but success means to start it again.
const exitNotConnected = 3

// keep runs servers until one has done its work.
func keep(ctx context.Context, f Files) error {
	role, pause := roleServe, firstPause
	var end ending
	go end.prepare()
	for {
		started := time.Now()
		cmd := command("self/exe", role, f)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		err := startFlusher(cmd)
		if f.ready != os.Stdin {
			f.ready.Close() // only the first server is waited for
			f.ready = os.Stdin
		}
		if err == nil {
			f.spare(os.Getpid(), cmd.Process.Pid)
			err = cmd.Wait()
		}
		if err == nil {
			f.spare()
			return nil
		}
		if role == roleServe && cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == exitNotConnected {
			return err
		}
		fmt.Fprintf(os.Stderr, "<4>instar: root: the server ended (%v): starting it again\n", err)
		if time.Since(started) > time.Minute {
			pause = firstPause
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
		role = end.role()
	}
}
