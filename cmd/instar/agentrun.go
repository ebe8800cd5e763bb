package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/quiesce"
	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/settings"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/internal/serving"
)

type agentRunOptions struct {
	agentPlaces
	settings, launcher string
}

func newAgentRun(a *app) *cobra.Command {
	o := agentRunOptions{agentPlaces: newAgentPlaces(), launcher: "auto"}
	cmd := a.command("run", "run the agent", `
Takes requests on its socket and does them, one after the other, until it is
stopped. Each capture is a process of its own: under systemd a transient unit,
instar-task-ID.service, with the CPU and disk limits that were asked for, else a
plain child. Captures go on when the agent is stopped or killed, and the next
agent takes up where they are. One that was cut short, by a kill or the
machine's end, is begun again: what it has stored is used.

With tasks-from in agent.yaml it takes BundleInstance and CreateImage requests
of a catalog too, as far as the settings allow; without, it asks nobody.

Under systemd it tells readiness, what it does and that it is alive, and takes
the socket that systemd hands over. docs/agent.md describes /etc/instar/agent.yaml,
the requests and the units.`, `
  instar agent run
  instar agent run --socket ./agent.sock --state ./agent --launcher child`,
		func(ctx context.Context) error { return runAgent(ctx, a, &o) })
	f := flagsOf(cmd)
	const test = "agent"
	f.text(&o.socket, "socket", "", "listen at `PATH`, unless systemd hands over a socket", ofUs, test)
	f.text(&o.state, "state", "", "keep tasks in `DIR`", ofUs, test)
	f.text(&o.settings, "settings", "", "read `FILE` instead of /etc/instar/agent.yaml", ofUs, test)
	f.choice(cmd, &o.launcher, []string{"auto", "systemd", "child"}, "launcher", "", "`HOW` captures are started: systemd (transient units), child (plain processes), auto (default: systemd where it runs)", ofUs, test)
	completeFiles(cmd, "state")
	completeFiles(cmd, "settings", "yaml")
	return cmd
}

func runAgent(ctx context.Context, a *app, o *agentRunOptions) (err error) {
	log := a.ui.Log()
	path := o.settings
	if path == "" {
		path = filepath.Join(a.etc(), settings.File)
	}
	set, err := settings.Read(path)
	if err != nil {
		return failf(exitUsage, "%w", err)
	}
	dir, err := task.OpenDir(o.tasks())
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	one, err := dir.Alone()
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	defer one.Close()
	if err := dir.Tidy(); err != nil {
		return failf(exitFile, "%w", err)
	}
	if !systemd.Running() { // which ends a guard's standstill by itself
		if err := quiesce.Sweep(ctx, filepath.Join(filepath.Dir(o.socket), "quiesce"), connectUnits); err != nil {
			log.Error().Err(err).Msg("something may stand still that has neither its capture nor its guard any more")
		}
	}
	launcher, done, err := a.launcher(ctx, o, dir, set, path)
	if err != nil {
		return err
	}
	defer done()
	watched, err := a.watchTasks(o, set, path, launcher, log)
	if err != nil {
		return err
	}
	notify := serving.NewNotifier(log)
	m, damaged, err := task.Open(task.Options{
		Dir: dir, Launcher: launcher, Limits: set.Limits, Quiesce: set.Quiesce, Running: set.Running, Keep: set.Keep,
		Changed: func(t task.Task) { logTask(log, t); watched.changed(t) },
		Told: func(t task.Task, l task.Line) {
			if t.Warnings <= maxToldWarnings {
				log.Warn().Str("task", t.ID).Str("image", t.Request.Name).Msg(l.Text())
			}
		},
		Failed: func(id string, err error) { log.Error().Str("task", id).Err(err).Msg("will be tried again") },
	})
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	for _, d := range damaged {
		log.Error().Err(d).Msg("a task cannot be read and is left alone")
	}
	watched.Restore(m.List())
	lns, err := server.Listen(ctx, o.socket)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	srv := server.New(server.Options{
		Manager: m, Policy: server.Policy{AdminGroup: set.AdminGroup, ViewGroup: set.ViewGroup}, Version: version, Log: log,
		Metrics: watched.Metrics(), Health: watched.Health(),
	})
	var parts []serving.Part
	if at := set.MetricsListen; at != "" {
		p, err := serving.Admin{Metrics: watched.Metrics(), Health: watched.Health()}.Listen(ctx, at, log)
		if err != nil {
			return errors.Join(failf(exitFile, "metrics-listen: %w", err), closeAll(lns))
		}
		parts = append(parts, p)
	}
	return serving.Run(ctx, serving.Options{
		Parts: parts, Notifier: notify, Status: summary(m.List()),
		Alive: func(ctx context.Context) error { return alive(ctx, m, lns[0]) },
		Beside: []func(context.Context) error{
			m.Run, watched.run,
			func(ctx context.Context) error { return srv.Serve(ctx, lns...) },
			func(ctx context.Context) error { return tellStatus(ctx, m, notify) },
			func(ctx context.Context) error {
				return a.runOrders(ctx, o, set, path, lns[0].Addr().String(), launcher, log)
			},
		},
		Ready: func() {
			log.Info().Str("socket", lns[0].Addr().String()).Str("state", o.state).Msg("taking requests")
		},
	})
}

// maxToldWarnings is how many of a task's warnings the agent's log repeats; its
// own log has all.
const maxToldWarnings = 100

// launcher is how workers are started.
func (a *app) launcher(ctx context.Context, o *agentRunOptions, dir task.Dir, set *settings.Settings, settingsFile string) (task.Launcher, func(), error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	command := []string{self, "agent", "work", "--state", o.state, "--settings", settingsFile, "--runtime", filepath.Dir(o.socket)}
	if a.configFile != "" {
		command = append(command, "--config", a.configFile)
	}
	if o.launcher == "systemd" || o.launcher == "auto" && systemd.Running() {
		conn, err := systemd.Connect(ctx)
		if err != nil {
			return nil, nil, failf(exitOther, "%w", err)
		}
		l := &systemd.Units{Conn: conn, Command: command, SecretKeyFile: set.SecretKeyFile, Encrypted: set.Encrypted, Env: workerEnv(a.getenv)}
		return l, conn.Close, nil
	}
	if set.Encrypted {
		return nil, nil, usagef("secret-key-encrypted: it is systemd that decrypts credentials, and it does not run here")
	}
	if set.SecretKeyFile != "" {
		command = append(command, "--secret-key-file", set.SecretKeyFile)
	}
	return &task.Children{Dir: dir, Command: command, Env: withoutService(os.Environ()), Stderr: os.Stderr}, func() {}, nil
}

// workerEnv are the variables that a worker under systemd gets from the agent:
// those that say where things are. Secrets are not handed on like this.
func workerEnv(getenv func(string) string) []string {
	env := []string{"HOME=/root"}
	for _, n := range []string{
		"INSTAR_ETC", "INSTAR_STATE", "INSTAR_CONFIG", "INSTAR_STORE", "TMPDIR", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY",
		"AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_EC2_METADATA_DISABLED", "AWS_REGION", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3",
	} {
		if v := getenv(n); v != "" && !strings.Contains(v, "\n") {
			env = append(env, n+"="+v)
		}
	}
	return env
}

// withoutService leaves out of an environment what systemd says to the agent
// alone.
func withoutService(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "JOURNAL_STREAM", "INVOCATION_ID"}, name)
	})
}

// alive proves that the agent works: its loop answers, and so does its socket.
func alive(ctx context.Context, m *task.Manager, ln net.Listener) error {
	if err := m.Ping(ctx); err != nil {
		return err
	}
	return server.NewClient(ln.Addr().String()).Alive(ctx)
}

// logTask writes what became of a task.
func logTask(log zerolog.Logger, t task.Task) {
	e := log.Info()
	if t.State == task.Failed {
		e = log.Error()
	}
	e = e.Str("task", t.ID).Str("image", t.Request.Name).Str("kind", string(t.Request.Kind)).Str("state", string(t.State)).Int("percent", t.Progress.Percent)
	if n := len(t.Attempts); n > 1 {
		e = e.Int("attempt", n)
	}
	if t.Error != nil {
		e = e.Str("code", t.Error.Code).Str("reason", t.Error.Message)
	}
	if t.Result != nil {
		e = e.Str("manifest", t.Result.Manifest).Int64("bytes_added", t.Result.BytesAdded)
	}
	e.Msg("task is " + string(t.State))
}

// tellStatus keeps systemd's status line true.
func tellStatus(ctx context.Context, m *task.Manager, n *serving.Notifier) error {
	if !n.Told() {
		return nil
	}
	for {
		news := m.News()
		n.Status(summary(m.List()))
		select {
		case <-ctx.Done():
			return nil
		case <-news:
		}
		select { // bytes are counted every second; that is more often than anybody looks
		case <-ctx.Done():
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

// summary says in a line what an agent does.
func summary(all []task.Task) string {
	waiting := 0
	var running []string
	var last *task.Task
	for i := range all {
		t := &all[i]
		switch {
		case t.State == task.Pending:
			waiting++
		case !t.State.Ended():
			s := fmt.Sprintf("%s %s %d%%", t.Request.Name, t.State, t.Progress.Percent)
			if t.Paused {
				s += " (paused)"
			}
			running = append(running, s)
		case last == nil || t.Ended.After(last.Ended):
			last = t
		}
	}
	s := strings.Join(running, ", ")
	if s == "" {
		s = "idle"
		if last != nil {
			s += fmt.Sprintf("; last: %s %s at %s", last.Request.Name, last.State, last.Ended.Local().Format(time.DateTime))
		}
	}
	if waiting > 0 {
		s += fmt.Sprintf("; %d waiting", waiting)
	}
	return s
}
