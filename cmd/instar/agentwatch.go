package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/schedule"
	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/settings"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/agent/watch"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// How an agent's tasks are watched: figures and hooks.

// taskWatch is told of every change of a task.
type taskWatch struct {
	*watch.Watch
	log   zerolog.Logger
	hooks string                                     // their directory
	start func(ctx context.Context, id string) error // runs the hooks of a task that ended
	ended chan string
}

// maxEnded is how many ends wait for their hooks.
const maxEnded = 1000

func (a *app) watchTasks(o *agentRunOptions, set *settings.Settings, settingsFile string, launcher task.Launcher, log zerolog.Logger) (*taskWatch, error) {
	w := &taskWatch{
		Watch: watch.New(watch.Options{Version: version, MaxAge: time.Duration(set.MaxAge)}),
		log:   log, hooks: a.hooksDir(set), ended: make(chan string, maxEnded),
	}
	if u, ok := launcher.(*systemd.Units); ok {
		w.start = func(ctx context.Context, id string) error { return u.Conn.Start(ctx, watch.HooksUnit(id)) }
		return w, nil
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	w.start = func(ctx context.Context, id string) error {
		cmd := exec.CommandContext(ctx, self, "agent", "hooks", id, "--state", o.state, "--settings", settingsFile)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		return cmd.Run()
	}
	return w, nil
}

// hooksDir is where hooks lie.
func (a *app) hooksDir(set *settings.Settings) string {
	if set.Hooks.Dir != "" {
		return set.Hooks.Dir
	}
	return filepath.Join(a.etc(), filepath.Base(watch.HooksDir))
}

// changed takes a task; it does not block.
func (w *taskWatch) changed(t task.Task) {
	w.Changed(t)
	if !t.State.Ended() {
		return
	}
	select {
	case w.ended <- t.ID:
	default:
		w.log.Error().Str("task", t.ID).Msg("hooks are not run: too many tasks ended while others ran")
	}
}

// run starts hooks, one task's after the other's.
func (w *taskWatch) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case id := <-w.ended:
			if there, err := os.ReadDir(w.hooks); err != nil || len(there) == 0 {
				continue
			}
			if err := w.start(ctx, id); err != nil && ctx.Err() == nil {
				w.log.Error().Str("task", id).Err(err).Msg("hooks")
			}
		}
	}
}

type agentHooksOptions struct {
	agentPlaces
	settings string
}

// settingsOf reads the agent's settings.
func (a *app) settingsOf(file string) (*settings.Settings, error) {
	if file == "" {
		file = filepath.Join(a.etc(), settings.File)
	}
	set, err := settings.Read(file)
	if err != nil {
		return nil, failf(exitUsage, "%w", err)
	}
	return set, nil
}

// hooksOf are the hooks of the settings, which tell what they do.
func (a *app) hooksOf(set *settings.Settings) *watch.Hooks {
	return &watch.Hooks{
		Dir: a.hooksDir(set), Timeout: time.Duration(set.Hooks.Timeout), Output: a.stdout,
		Report: func(line string, warn bool) {
			if warn {
				a.ui.Warn(line, nil)
				return
			}
			a.ui.Say("%s", line)
		},
	}
}

// newAgentHooks is the command that a task's end starts.
func newAgentHooks(a *app) *cobra.Command {
	o := agentHooksOptions{agentPlaces: newAgentPlaces()}
	const test = "agent-watch"
	cmd := a.named("hooks ID", "run the hooks for a task that ended", `
Runs the executables of the hooks' directory for a task that ended, with success
or failure as their argument. It is the agent that starts it.`, "", 1, 1, func(ctx context.Context, args []string) error {
		set, err := a.settingsOf(o.settings)
		if err != nil {
			return err
		}
		t, err := task.Dir(o.tasks()).Load(args[0])
		if err != nil {
			return failf(exitFile, "%w", err)
		}
		if !t.State.Ended() {
			return failf(exitUsage, "task %s is %s: hooks are run when it has ended", t.ID, t.State)
		}
		event := watch.Failure
		if t.State == task.Complete {
			event = watch.Success
		}
		return a.hooksOf(set).Run(ctx, event, watch.Facts(*t))
	})
	cmd.Hidden = true
	f := flagsOf(cmd)
	f.text(&o.state, "state", "", "the agent's `DIR`", ofUs, test)
	f.text(&o.settings, "settings", "", "the agent's settings `FILE`", ofUs, test)
	return cmd
}

type noticesOptions struct {
	socket, settings string
}

func newAgentNotices(a *app) *cobra.Command {
	o := noticesOptions{socket: server.DefaultSocket}
	const test = "agent-watch"
	cmd := a.command("notices", "watch for notices of an interruption, and capture once more", `
Asks instance metadata every few seconds whether the machine is to be
interrupted: a spot instance's end, two minutes ahead; scheduled maintenance. On
a notice it runs the hooks, with notice as their argument, and has the agent
make the capture of the schedule that notices: schedule: in agent.yaml names,
once more, without stepping back behind others.

It is a service of its own, which "instar agent install --notices" enables: the
agent itself asks nobody and sleeps.`, `
  instar agent notices`, func(ctx context.Context) error { return runAgentNotices(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.socket, "socket", "", "the agent's socket, a `PATH`", ofUs, test)
	f.text(&o.settings, "settings", "", "read `FILE` instead of /etc/instar/agent.yaml", ofUs, test)
	completeFiles(cmd, "settings", "yaml")
	return cmd
}

func runAgentNotices(ctx context.Context, a *app, o *noticesOptions) error {
	set, err := a.settingsOf(o.settings)
	if err != nil {
		return err
	}
	var last *schedule.Schedule
	if n := set.Notices.Schedule; n != "" {
		if last, err = a.schedules().Get(n); err != nil {
			return scheduleError(err)
		}
	}
	hooks := a.hooksOf(set)
	client := server.NewClient(o.socket)
	told := make(map[string]bool) // hooks, of these notices
	err = watch.WatchNotices(ctx, watch.NoticeOptions{
		Endpoint: set.Notices.Metadata, Interval: time.Duration(set.Notices.Interval), Kinds: set.Notices.Kinds,
		Report: hooks.Report,
		OnNotice: func(ctx context.Context, n watch.Notice) error {
			facts := n.Facts()
			var err error
			if last != nil {
				r := last.Request
				r.Schedule = last.Name
				// A notice that is seen again after a restart is the same task.
				r.ClientToken = n.ID
				if n.Kind == watch.Spot {
					r.Limits = &task.Limits{CPUWeight: 10000, IOWeight: 10000, CPUQuota: -1, ReadShare: -1, ReadRate: -1, UploadRate: -1, Memory: -1, Foreground: true}
				}
				var t task.Task
				if t, err = client.Start(ctx, r); err == nil {
					facts["task"] = t.ID
					err = a.ui.Result("task", t.ID, ui.Fields{"task": t, "notice": n})
				}
			}
			if !told[n.ID] {
				told[n.ID] = true
				// That a hook failed is said, and no reason to tell all again.
				_ = hooks.Run(ctx, watch.Warning, facts)
			}
			return err
		},
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
