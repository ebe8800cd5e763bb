package task

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrWorked is wrapped by [Dir.Lock] where another worker has the task.
var ErrWorked = errors.New("another worker has this task")

// Lock makes the caller the task's worker until the file is closed or its
// process ends, however it ends: the kernel gives the lock back.
func (d Dir) Lock(id string) (*os.File, error) {
	f, err := os.OpenFile(d.path(id, lockSuffix), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking task %s: %w", id, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("task %s: %w", id, ErrWorked)
		}
		return nil, fmt.Errorf("locking task %s: %w", id, err)
	}
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking task %s: %w", id, err)
		}
	}
	return f, nil
}

// Worker is the process that has the task's lock; 0 if none has.
func (d Dir) Worker(id string) (pid int, err error) {
	f, err := os.OpenFile(d.path(id, lockSuffix), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("looking for the worker of task %s: %w", id, err)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		return 0, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return 0, fmt.Errorf("looking for the worker of task %s: %w", id, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0, fmt.Errorf("looking for the worker of task %s: %w", id, err)
	}
	pid, err = strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid <= 0 {
		return -1, nil // it has just taken the lock, or this is not its file
	}
	return pid, nil
}

// Alone makes the caller the only one that runs the tasks of the directory,
// until the file is closed or its process ends.
func (d Dir) Alone() (*os.File, error) {
	f, err := os.OpenFile(string(d)+"/agent.lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the tasks' directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking the tasks' directory %s: another agent has it: %w", d, err)
	}
	return f, nil
}
