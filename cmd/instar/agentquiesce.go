package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/quiesce"
	"github.com/instar-image/instar/agent/settings"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
)

// What stands still around a capture: the worker asks for it, a guard, which is
// a process of its own, does and undoes it.

// connectUnits connects to systemd for a standstill.
func connectUnits(ctx context.Context) (quiesce.Units, func(), error) {
	c, err := systemd.Connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	return c, c.Close, nil
}

// quiesce is what stands still for the task: what the request says, else the settings.
func (w *worker) quiesce() (*task.Quiesce, error) {
	if q := w.t.Request.Quiesce; q != nil {
		return q, nil
	}
	set, err := settings.Read(w.o.settings)
	if err != nil {
		return nil, err
	}
	return set.Quiesce, nil
}

// standStill makes stand still what the request or the settings name. A
// capture that cannot have that does not take place.
func (w *worker) standStill(ctx context.Context) {
	q, err := w.quiesce()
	if err != nil {
		w.cancel(err)
		return
	}
	switch {
	case q.Zero() || w.hold != nil:
		return
	case w.held:
		w.tell(task.Line{Type: "warning", Message: "the capture began once more: this time nothing stands still for it"})
		return
	}
	w.held = true
	writes := []string{string(w.dir), w.o.runtime, w.a.tempDir(), w.a.stateDir()}
	for _, l := range []struct{ asked, setting string }{{w.t.Request.Store, "store"}, {w.t.Request.Endpoint, "endpoint"}} {
		if l.asked == "" {
			l.asked = w.a.conf.Get(l.setting).Text
		}
		if dir := strings.TrimPrefix(l.asked, "file://"); filepath.IsAbs(dir) { // a store that is a directory
			writes = append(writes, dir)
		}
	}
	if err := quiesce.Safe(q.Filesystems, writes...); err != nil {
		w.cancel(err)
		return
	}
	// The guard's own name: a guard of an attempt before this one may not be through.
	id := fmt.Sprintf("%s-%d", w.t.ID, os.Getpid())
	plan := quiesce.Plan{Stop: q.Stop, Freeze: q.Freeze, Filesystems: q.Filesystems, Limit: time.Duration(q.Limit)}
	if plan.Limit == 0 {
		plan.Limit = quiesce.DefaultLimit
	}
	dir := filepath.Join(w.o.runtime, "quiesce")
	warn := func(text string) {
		w.tell(task.Line{Type: "warning", Message: text})
		w.quiesced(false)
	}
	// What others have left that were killed with their guards keeps nobody from a standstill.
	if err := quiesce.Sweep(ctx, dir, connectUnits); err != nil {
		w.tell(task.Line{Type: "warning", Message: "an earlier standstill: " + err.Error()})
	}
	w.quiesced(true)
	w.hold, err = quiesce.Begin(ctx, dir, id, plan, connectUnits, func(ctx context.Context) error { return startGuard(ctx, w.a, dir, id, plan.Limit) }, warn)
	if err != nil {
		w.quiesced(false)
		w.cancel(err)
	}
}

// quiesced tells whether something stands still.
func (w *worker) quiesced(yes bool) { w.tell(task.Line{Type: "quiesce", Quiesced: &yes}) }

// letGo lets everything go on.
func (w *worker) letGo() {
	if w.hold == nil {
		return
	}
	if err := w.hold.End(); err != nil {
		w.tell(task.Line{Type: "warning", Message: err.Error()})
	}
	w.hold = nil
	w.quiesced(false)
}

// startGuard starts a guard and returns when it waits for its capture.
func startGuard(ctx context.Context, a *app, dir, id string, limit time.Duration) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := []string{self, "agent", "guard", "--runtime", filepath.Dir(dir), id}
	if systemd.Running() || a.getenv("DBUS_SYSTEM_BUS_ADDRESS") != "" {
		c, err := systemd.Connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Run(ctx, systemd.GuardUnit(id), systemd.GuardProperties(argv, limit)...)
	}
	r, pipe, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", task.ReadyEnv, task.ReadyFD))
	cmd.Stderr = os.Stderr
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{pipe}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	pipe.Close()
	if err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	stop := context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Now()) })
	defer stop()
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		return fmt.Errorf("it ended before it began: %w", err)
	}
	return nil
}

// newAgentGuard is the command that a guard's unit runs.
func newAgentGuard(a *app) *cobra.Command {
	runtime := agentRuntime
	var undo bool
	cmd := a.command("guard ID", "keep and end a standstill around a capture", `
Makes units and filesystems stand still for a capture, and lets them go on when
it is through, was killed, or takes too long. It is a task's worker that starts it.`, "", nil)
	cmd.Hidden = true
	cmd.Args = exactArgs(a, 1, "usage: agent guard ID")
	f := flagsOf(cmd)
	f.text(&runtime, "runtime", "", "`DIR` for what does not outlive the system", ofUs, "agent")
	f.yes(&undo, "undo", "", "let go on what a guard that was killed has left", ofUs, "agent")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		dir := filepath.Join(runtime, "quiesce")
		if filepath.Base(args[0]) != args[0] {
			return usagef("%q is no standstill's ID", args[0])
		}
		if undo {
			return quiesce.Undo(cmd.Context(), dir, args[0], connectUnits)
		}
		return quiesce.Guard(cmd.Context(), dir, args[0], connectUnits, func() error {
			if err := task.Ready(); err != nil {
				return err
			}
			_, err := daemon.SdNotify(false, daemon.SdNotifyReady)
			return err
		})
	}
	return cmd
}
