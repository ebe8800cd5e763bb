package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/schedule"
	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

func newAgentSchedule(a *app) *cobra.Command {
	cmd := branch("schedule", "have the agent capture this machine again and again", `
Schedules are timers of systemd's: "systemctl list-timers" shows them too, and
calendars are written as in systemd.time(7). Each run starts a task at the
agent. What retention (the --keep options) does not keep of the image's older
versions is deleted after each complete capture.`, `
  instar agent schedule add create-image nightly --on '*-*-* 03:00' --jitter 30m --name web-1 --keep-daily 7 --keep-monthly 12
  instar agent schedule list
  instar agent schedule run-now nightly
  instar agent schedule remove nightly`)
	add := branch("add", "make a schedule", "Makes a schedule: of images or of EC2 bundles.",
		"  instar agent schedule add create-image nightly --on daily --name web-1")
	add.Args = nothingElse("schedule add makes schedules of bundle or create-image, not of %q")
	add.AddCommand(newScheduleAdd(a, task.CreateImage), newScheduleAdd(a, task.Bundle))
	cmd.AddCommand(add, newScheduleList(a))
	for _, v := range []struct {
		name, short, long string
		run               func(context.Context, *app, *schedule.Manager, string) error
	}{
		{"show", "show a schedule and when it is due", `
Shows what a schedule captures, when it ran last and when it is due next.`, runScheduleShow},
		{"remove", "end a schedule", `
Ends a schedule: its units are removed. A capture that runs goes on, and images
stay.`, runScheduleRemove},
		{"run-now", "run a schedule once, now", `
Has a schedule's service run once, whenever it is due, and waits until the agent
has the task: "instar agent ctl list" shows it.`, runScheduleNow},
	} {
		c := a.named(v.name+" NAME", v.short, v.long, "  instar agent schedule "+v.name+" nightly", 1, 1, func(ctx context.Context, args []string) error {
			return v.run(ctx, a, a.schedules(), args[0])
		})
		c.ValidArgsFunction = func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			if len(args) == 0 {
				all, _ := a.schedules().List() // what cannot be read is not offered
				for _, s := range all {
					names = append(names, s.Name)
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		}
		cmd.AddCommand(c)
	}
	cmd.AddCommand(newScheduleTrigger(a))
	return cmd
}

// schedules are this machine's. INSTAR_ROOT is for those who prepare a root
// directory: its systemd is not running yet.
func (a *app) schedules() *schedule.Manager {
	program, err := os.Executable()
	if err != nil {
		program = "/usr/local/bin/instar"
	}
	m := &schedule.Manager{Program: program, Systemd: schedule.Systemctl{}}
	if root := a.getenv("INSTAR_ROOT"); root != "" {
		m.Root, m.Systemd = root, schedule.Offline{Root: root}
	}
	return m
}

func newScheduleAdd(a *app, kind task.Kind) *cobra.Command {
	o := requestOptions{r: task.Request{Kind: kind}}
	var (
		on        []string
		jitter    string
		noCatchUp bool
		replace   bool
		program   string
	)
	what, eg := "images", "  instar agent schedule add create-image nightly --on '*-*-* 03:00' --jitter 30m --name web-1 --store s3://images/fleet --keep-daily 7"
	if kind == task.Bundle {
		what, eg = "EC2 bundles", "  instar agent schedule add bundle weekly --on weekly --name web-1 --store images/web-1 --user 111122223333 --privatekey /etc/instar/pk.pem --cert /etc/instar/cert.pem"
	}
	cmd := a.named(string(kind)+" NAME", "make a schedule of "+what, `
Makes a schedule NAME of `+what+`, from now on and at every start of the machine.
A run that was due while the machine was off is made up for when it starts. A
run that finds the schedule's last capture still going on is left out. The other
options are those of "instar agent ctl start `+string(kind)+`".`, eg, 1, 1, func(ctx context.Context, args []string) error {
		if len(on) == 0 {
			return usagef("missing option --on")
		}
		r, err := o.request()
		if err != nil {
			return err
		}
		s := schedule.Schedule{Name: args[0], Calendar: on, CatchUp: !noCatchUp, Request: r}
		if jitter != "" {
			if err := s.Jitter.UnmarshalText([]byte(jitter)); err != nil {
				return usagef("--jitter: %w", err)
			}
		}
		m := a.schedules()
		if program != "" {
			if !filepath.IsAbs(program) {
				return usagef("--program %q: give an absolute path", program)
			}
			m.Program = program
		}
		if err := m.Add(ctx, s, replace); err != nil {
			return scheduleError(err)
		}
		return a.showSchedule(ctx, m, s, true)
	})
	const test = "agent-schedule"
	f := flagsOf(cmd)
	f.add((*words)(&on), "on", "", "`CALENDAR` expression as in systemd.time(7): daily, 'Mon..Fri 03:00', '*-*-1,15 4:30'; may be repeated", ofUs, test)
	f.text(&jitter, "jitter", "", "delay the runs by up to `TIME`, by the same each time: 30m", ofUs, test)
	f.yes(&noCatchUp, "no-catch-up", "", "leave out what was due while the machine was off", ofUs, test)
	f.yes(&replace, "update", "", "put it in the place of a schedule of the same name", ofUs, test)
	f.text(&program, "program", "", "the schedule's service runs `PATH`; default this program", ofUs, test)
	o.add(cmd, "agent")
	return cmd
}

// words is an option that may be given several times; commas are its own.
type words []string

func (v *words) String() string     { return strings.Join(*v, "; ") }
func (v *words) Type() string       { return "string" }
func (v *words) Set(s string) error { *v = append(*v, s); return nil }

// scheduleError gives an error of the schedules' an exit code.
func scheduleError(err error) error {
	switch {
	case errors.Is(err, schedule.ErrSchedule), errors.Is(err, task.ErrRequest), errors.Is(err, systemd.ErrHidden):
		return usagef("%w", err)
	case errors.Is(err, schedule.ErrExists):
		return withHint(failf(exitFile, "%w", err), "--update puts the new one in its place.")
	case errors.Is(err, schedule.ErrNone):
		return failf(exitFile, "%w", err)
	}
	return err
}

func newScheduleList(a *app) *cobra.Command {
	return a.command("list", "list the schedules", `
Lists the schedules: the name, the calendar, when it ran last and when it is due
next, and what is captured.`, "  instar agent schedule list", func(ctx context.Context) error {
		m := a.schedules()
		all, err := m.List()
		for _, s := range all {
			if err := a.showSchedule(ctx, m, s, true); err != nil {
				return err
			}
		}
		return err
	})
}

// showSchedule prints a schedule, in a line or whole.
func (a *app) showSchedule(ctx context.Context, m *schedule.Manager, s schedule.Schedule, line bool) error {
	f := ui.Fields{"schedule": s}
	next, last, err := m.Systemd.Times(ctx, schedule.Timer(s.Name))
	due := "unknown"
	switch {
	case err != nil:
		f["error"] = err.Error()
	case next.IsZero():
		due = "not"
	default:
		due, f["next"] = stamp(next), next
	}
	ran := "never"
	if !last.IsZero() {
		ran, f["last"] = stamp(last), last
	}
	if line {
		return a.ui.Result("schedule", fmt.Sprintf("%s  %s  last: %s  next: %s  %s %s", s.Name, strings.Join(s.Calendar, "; "), ran, due, s.Request.Kind, s.Request.Name), f)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	text := string(b) + "\nlast run    " + ran + "\nnext due    " + due
	for _, c := range s.Calendar {
		if runs, err := m.Systemd.Calendar(ctx, c, 3); err == nil {
			text += "\n" + c + ": " + strings.Join(runs, ", ")
		}
	}
	return a.ui.Result("schedule", text, f)
}

func runScheduleShow(ctx context.Context, a *app, m *schedule.Manager, name string) error {
	s, err := m.Get(name)
	if err != nil {
		return scheduleError(err)
	}
	return a.showSchedule(ctx, m, *s, false)
}

func runScheduleRemove(ctx context.Context, a *app, m *schedule.Manager, name string) error {
	if err := m.Remove(ctx, name); err != nil {
		return scheduleError(err)
	}
	return a.ui.Result("removed", "Removed the schedule "+name, ui.Fields{"schedule": name})
}

func runScheduleNow(ctx context.Context, a *app, m *schedule.Manager, name string) error {
	if err := m.RunNow(ctx, name); err != nil {
		return scheduleError(err)
	}
	return a.ui.Result("started", "The schedule "+name+" has run", ui.Fields{"schedule": name})
}

// newScheduleTrigger is what a schedule's service runs.
func newScheduleTrigger(a *app) *cobra.Command {
	socket := server.DefaultSocket
	cmd := a.named("trigger NAME", "start a schedule's task at the agent", `
Starts the task of a schedule at the agent. It is the schedule's service that
runs it.`, "", 1, 1, func(ctx context.Context, args []string) error {
		s, err := a.schedules().Get(args[0])
		if err != nil {
			return scheduleError(err)
		}
		return ctlError(a.trigger(ctx, server.NewClient(socket), s), socket)
	})
	cmd.Hidden = true
	flagsOf(cmd).text(&socket, "socket", "", "the agent's socket, a `PATH`", ofUs, "agent-schedule")
	return cmd
}

// trigger starts a schedule's task, unless the one before goes on.
func (a *app) trigger(ctx context.Context, c *server.Client, s *schedule.Schedule) error {
	all, err := c.List(ctx)
	if err != nil {
		return err
	}
	for _, t := range all {
		if t.Request.Schedule == s.Name && !t.State.Ended() {
			a.ui.Warn(fmt.Sprintf("schedule %s: its task %s is still %s: this run is left out", s.Name, t.ID, t.State), ui.Fields{"task": t.ID})
			return nil
		}
	}
	r := s.Request
	r.Schedule = s.Name
	t, err := c.Start(ctx, r)
	if err != nil {
		return err
	}
	return a.ui.Result("task", t.ID, ui.Fields{"task": t})
}
