package task

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// ReadyFD is the descriptor a worker that is a plain child writes a byte to
// when it has the task's lock; [ReadyEnv] is set then.
const (
	ReadyFD  = 3
	ReadyEnv = "INSTAR_READY_FD"
)

// Children runs workers as plain children, each in a session of its own: where
// there is no systemd. They outlive the agent, as units do. Of the limits, the
// worker's own (classes of CPU and disk, upload rate) hold; cgroups are systemd's.
type Children struct {
	Dir Dir
	// Command is the worker's, to which the job's arguments are added, and
	// --idle if it is to step back.
	Command []string
	// Env is its environment.
	Env []string
	// Stderr is where it says what has no place in its log.
	Stderr *os.File
	// Grace is how long a worker has to end before it is killed, default 90 s.
	Grace time.Duration
}

// Launch starts a worker.
func (c *Children) Launch(ctx context.Context, j Job) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("starting the worker of task %s: %w", j.ID, err)
	}
	defer r.Close()
	args := append([]string(nil), c.Command[1:]...)
	if !j.Limits.Foreground {
		args = append(args, "--idle")
	}
	cmd := exec.Command(c.Command[0], append(args, j.Args()...)...)
	cmd.Env = append(append([]string(nil), c.Env...), fmt.Sprintf("%s=%d", ReadyEnv, ReadyFD))
	cmd.Stderr = c.Stderr
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("starting the worker of task %s: %w", j.ID, err)
	}
	go func() { _ = cmd.Wait() }() // how it ended, its result says
	stop := context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Now()) })
	defer stop()
	switch _, err := io.ReadFull(r, make([]byte, 1)); {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF):
		if pid, err := c.Dir.Worker(j.ID); err == nil && pid != 0 {
			return nil // another one has it
		}
		return fmt.Errorf("the worker of task %s ended before it began", j.ID)
	default:
		return fmt.Errorf("waiting for the worker of task %s: %w", j.ID, err)
	}
}

// Stop asks the worker to end.
func (c *Children) Stop(ctx context.Context, id string) error {
	if err := c.signal(id, unix.SIGTERM); err != nil {
		return err
	}
	if err := c.signal(id, unix.SIGCONT); err != nil {
		return err
	}
	grace := c.Grace
	if grace == 0 {
		grace = 90 * time.Second
	}
	pid, err := c.Dir.Worker(id)
	if err != nil || pid <= 0 {
		return err
	}
	time.AfterFunc(grace, func() {
		if now, err := c.Dir.Worker(id); err == nil && now == pid {
			_ = c.signal(id, unix.SIGKILL)
		}
	})
	return nil
}

// Freeze stops the worker and its children.
func (c *Children) Freeze(ctx context.Context, id string) error {
	if err := c.signal(id, unix.SIGSTOP); err != nil {
		return err
	}
	for ctx.Err() == nil { // a signal takes effect a moment later
		pid, err := c.Dir.Worker(id)
		if err != nil || pid <= 0 {
			return err
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("stopping the worker of task %s: %w", id, err)
		}
		if i := bytes.LastIndex(stat, []byte(") ")); i >= 0 && i+2 < len(stat) && stat[i+2] == 'T' {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}

// Thaw lets them go on.
func (c *Children) Thaw(_ context.Context, id string) error { return c.signal(id, unix.SIGCONT) }

// signal reaches the worker's session, which is its process group as well.
func (c *Children) signal(id string, sig unix.Signal) error {
	pid, err := c.Dir.Worker(id)
	if err != nil || pid <= 0 {
		return err
	}
	if err := unix.Kill(-pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling the worker of task %s: %w", id, err)
	}
	return nil
}
