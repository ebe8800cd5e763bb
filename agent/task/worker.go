package task

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Args are the worker's arguments for the job, the task's ID last.
func (j Job) Args() []string {
	var args []string
	if j.Limits.UploadRate > 0 {
		args = append(args, "--limit-rate", strconv.FormatInt(j.Limits.UploadRate, 10))
	}
	if j.Limits.ReadShare > 0 {
		args = append(args, "--read-share", strconv.Itoa(j.Limits.ReadShare))
	}
	return append(args, j.ID)
}

// Output is a worker's log: an io.Writer for the lines of the command it runs,
// and its own. The lines' order is that of the calls, which may be concurrent.
type Output struct {
	mu   sync.Mutex
	f    *os.File
	line []byte
	seen func(kind string, line []byte)
}

// Output opens a worker's log, which shows that it has begun. Its lines are
// shown to seen, which must not write to it. The caller has the task's lock.
func (d Dir) Output(id string, seen func(kind string, line []byte)) (*Output, error) {
	f, err := os.OpenFile(d.Log(id), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of task %s: %w", id, err)
	}
	return &Output{f: f, seen: seen}, nil
}

// Write takes lines, in pieces of any size.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, b := range p {
		if len(o.line) <= maxLine {
			o.line = append(o.line, b)
		}
		if b != '\n' {
			continue
		}
		line := o.line
		o.line = nil
		var l Line
		if json.Unmarshal(line, &l) != nil || l.Type == "" {
			continue // no object of the command's: nobody would read it
		}
		if o.seen != nil {
			o.seen(l.Type, line)
		}
		if _, err := o.f.Write(line); err != nil {
			return 0, fmt.Errorf("writing the task's log: %w", err)
		}
	}
	return len(p), nil
}

// Tell writes a line of the worker's own.
func (o *Output) Tell(l Line) error {
	_, err := o.Write(encode(l))
	return err
}

// Close closes the log.
func (o *Output) Close() error { return o.f.Close() }

// Ready tells a launcher of the kind [Children] that the task is taken.
func Ready() error {
	fd, err := strconv.Atoi(os.Getenv(ReadyEnv))
	if err != nil {
		return nil // another kind of launcher
	}
	if err := os.Unsetenv(ReadyEnv); err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "ready")
	if f == nil {
		return fmt.Errorf("%s: descriptor %d is not open", ReadyEnv, fd)
	}
	_, err = f.Write([]byte{1})
	return errors.Join(err, f.Close())
}
