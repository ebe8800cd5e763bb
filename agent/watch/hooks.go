package watch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Event is what hooks are told of: the first argument they get.
type Event string

// The events.
const (
	Success Event = "success" // a task is complete
	Failure Event = "failure" // a task failed, or was cancelled
	Warning Event = "notice"  // metadata gave notice of an interruption
)

// Limits of hooks.
const (
	// DefaultHookTimeout is how long one hook may take.
	DefaultHookTimeout = time.Minute
	maxHookOutput      = 64 << 10 // bytes of one hook's output that are kept
	maxFact            = 4096     // bytes of one fact
)

// HooksDir is where hooks lie by default.
const HooksDir = "/etc/instar/hooks.d"

// Hooks are the executables of a directory, run in the order of their names
// when something happened. They get the event as their argument and its facts
// as INSTAR_… in an environment that has PATH beside them and nothing else; no
// fact is a secret.
type Hooks struct {
	Dir     string        // "": HooksDir
	Timeout time.Duration // for each hook; 0: DefaultHookTimeout
	Output  io.Writer     // what hooks print; nil: nowhere
	// Report is told what was run, and with warn set what was not or failed.
	Report func(line string, warn bool)
}

// Run runs all hooks, also those after one that failed, and waits for them.
// Its error names those that failed. A directory that is not there has none.
func (h *Hooks) Run(ctx context.Context, event Event, facts map[string]string) error {
	dir := h.Dir
	if dir == "" {
		dir = HooksDir
	}
	files, err := h.list(dir)
	if err != nil {
		return fmt.Errorf("hooks: %w", err)
	}
	env := environment(event, facts)
	var errs []error
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if err := h.one(ctx, f, event, env); err != nil {
			err = fmt.Errorf("hook %s on %s: %w", f, event, err)
			h.report(true, "%v", err)
			errs = append(errs, err)
			continue
		}
		h.report(false, "hook %s on %s: done", f, event)
	}
	return errors.Join(errs...)
}

func (h *Hooks) report(warn bool, format string, args ...any) {
	if h.Report != nil {
		h.Report(fmt.Sprintf(format, args...), warn)
	}
}

// list is the hooks of dir. A file that others than its owner root may change
// would let them act as root: it is left aside, and said.
func (h *Hooks) list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted by name
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := trusted(dir); err != nil {
		return nil, fmt.Errorf("none is run: %w", err)
	}
	var files []string
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~") || strings.Contains(name, ".dpkg-") || strings.HasSuffix(name, ".rpmsave") || strings.HasSuffix(name, ".rpmnew") {
			continue // what editors and package managers leave
		}
		file := filepath.Join(dir, name)
		st, err := os.Stat(file)
		if err != nil {
			h.report(true, "hook %s is not run: %v", file, err)
			continue
		}
		if !st.Mode().IsRegular() || st.Mode().Perm()&0o111 == 0 {
			continue
		}
		if err := trusted(file); err != nil {
			h.report(true, "hook is not run: %v", err)
			continue
		}
		files = append(files, file)
	}
	return files, nil
}

// trusted says why others than the process's user may change what lies at name.
func trusted(name string) error {
	st, err := os.Stat(name)
	if err != nil {
		return err
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s belongs to user %d with mode %v: others may change it", name, owner, st.Mode().Perm())
	}
	return nil
}

// environment is what hooks see.
func environment(event Event, facts map[string]string) []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "INSTAR_EVENT=" + string(event)}
	for k, v := range facts {
		if v == "" {
			continue
		}
		v = strings.ToValidUTF8(strings.Map(func(r rune) rune {
			if r == 0 {
				return ' '
			}
			return r
		}, v), "?")
		if len(v) > maxFact {
			v = strings.ToValidUTF8(v[:maxFact], "")
		}
		env = append(env, "INSTAR_"+strings.ToUpper(strings.ReplaceAll(k, "-", "_"))+"="+v)
	}
	slices.Sort(env)
	return env
}

// one runs one hook in a process group of its own, which ends with it.
func (h *Hooks) one(ctx context.Context, file string, event Event, env []string) error {
	timeout := h.Timeout
	if timeout <= 0 {
		timeout = DefaultHookTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, file, string(event))
	cmd.Env, cmd.Dir = env, "/"
	out := &capped{to: h.Output, left: maxHookOutput}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	// A child that kept the output open ends with the group.
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if cmd.Process != nil {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	switch {
	case ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("killed after %v", timeout)
	case errors.Is(err, exec.ErrWaitDelay):
		return nil // it ended well; what it left running did not
	}
	return err
}

// capped passes on so many bytes and drops the rest.
type capped struct {
	mu   sync.Mutex
	to   io.Writer
	left int
}

func (c *capped) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := min(len(p), c.left); n > 0 && c.to != nil {
		c.left -= n
		if _, err := c.to.Write(p[:n]); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}
