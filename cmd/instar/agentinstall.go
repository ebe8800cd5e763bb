package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/boot"
	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/agent/watch"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

type agentInstallOptions struct {
	root, program        string
	boot, notices        bool
	metadata, user, sync string
}

func newAgentInstall(a *app) *cobra.Command {
	var o agentInstallOptions
	cmd := a.command("install", "make the agent a service of this machine", `
Writes the agent's units to /etc/systemd/system, enables and starts them:
instar-agent.socket and instar-agent.service, which start "instar agent run".
With --boot those that make a machine its instance's own when it starts as well
("instar agent boot"): they are for machines that boot as instances, and give
this one new SSH host keys if metadata says it is another instance than before;
"instar agent boot adopt" says that it is the same. With --notices the service
that watches for the machine's interruption too ("instar agent notices").

Run again it brings the units up to date. With --root nothing is started: that
is for images. Units that somebody else wrote are left alone.`, `
  instar agent install
  instar agent install --boot --user admin
  instar agent install --root /mnt/image --program /usr/bin/instar`,
		func(ctx context.Context) error { return runAgentInstall(ctx, a, &o) })
	f := flagsOf(cmd)
	const test = "agent-install"
	f.text(&o.root, "root", "", "write below `DIR`ectory, and start nothing", ofUs, test)
	f.text(&o.program, "program", "", "the units run `PATH`; default this program", ofUs, test)
	f.yes(&o.boot, "boot", "", "install the units of \"agent boot\" too", ofUs, test)
	f.yes(&o.notices, "notices", "", "watch for notices of an interruption, as \"agent notices\" does", ofUs, test)
	f.text(&o.metadata, "metadata", "", "with --boot: `URL` of the metadata service", ofUs, test)
	f.text(&o.user, "user", "", "with --boot: login `USER` whose authorized_keys metadata's keys are for", ofUs, test)
	f.text(&o.sync, "sync-keys", "", "with --boot: compare keys with metadata every `TIME`; default 5m, 0 only at boot", ofUs, test)
	completeFiles(cmd, "root")
	return cmd
}

func runAgentInstall(ctx context.Context, a *app, o *agentInstallOptions) error {
	program := o.program
	if program == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		program = self
	}
	if !filepath.IsAbs(program) {
		return usagef("--program %q: give an absolute path", program)
	}
	if err := systemd.CheckProgram(program); err != nil {
		return usagef("--program: %w", err)
	}
	if err := isFile(filepath.Join(o.root, program), "--program"); err != nil {
		return err
	}
	units := systemd.AgentUnits(program)
	for _, u := range watch.Units(program) {
		if !u.Enable || o.notices {
			units = append(units, u)
		}
	}
	if o.boot {
		uo := boot.UnitOptions{Program: program, Endpoint: o.metadata, User: o.user, Wait: time.Minute, Sync: 5 * time.Minute}
		if o.sync != "" {
			d, err := time.ParseDuration(o.sync)
			if err != nil || d < 0 || d > 0 && d < time.Minute {
				return usagef("--sync-keys %q: 0, or at least a minute, as 5m", o.sync)
			}
			uo.Sync = d
		}
		units = append(units, boot.Units(uo)...)
	} else if o.metadata != "" || o.user != "" || o.sync != "" {
		return usagef("--metadata, --user and --sync-keys go with --boot")
	}
	if o.root == "" && !systemd.Running() {
		return withHint(failf(exitOther, "systemd does not run here"), "--root DIR writes the units for a system that is not running; \"instar agent run\" runs the agent without systemd.")
	}
	if err := systemd.InstallFiles(o.root, units); err != nil {
		return failf(exitFile, "%w", err)
	}
	var names []string
	for _, u := range units {
		names = append(names, u.Name)
	}
	if o.root == "" {
		c, err := systemd.Connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		// Stopped first: an agent that runs is the old program.
		err = errors.Join(c.Reload(ctx), c.Stop(ctx, systemd.AgentService), c.Start(ctx, systemd.AgentSocket), c.Start(ctx, systemd.AgentService))
		for _, u := range units {
			// Not the units of booting: that is over.
			if u.Enable && (strings.HasSuffix(u.Name, ".timer") || u.Name == watch.NoticesUnit) {
				err = errors.Join(err, c.Stop(ctx, u.Name), c.Start(ctx, u.Name))
			}
		}
		if err != nil {
			return failf(exitOther, "the units are installed; %w", err)
		}
	}
	return a.ui.Result("installed", "Installed "+strings.Join(names, ", "), ui.Fields{"units": names})
}

func newAgentUninstall(a *app) *cobra.Command {
	var root string
	var purge bool
	cmd := a.command("uninstall", "remove the agent's units", `
Stops what "instar agent install" started and removes the units it wrote. The
tasks' history in /var/lib/instar/agent stays unless --purge is given; images,
keys and settings always stay. While tasks are under way nothing is removed.`, `
  instar agent uninstall
  instar agent uninstall --purge`,
		func(ctx context.Context) error { return runAgentUninstall(ctx, a, root, purge) })
	f := flagsOf(cmd)
	const test = "agent-install"
	f.text(&root, "root", "", "remove below `DIR`ectory, and stop nothing", ofUs, test)
	f.yes(&purge, "purge", "", "remove the tasks' history as well", ofUs, test)
	completeFiles(cmd, "root")
	return cmd
}

func runAgentUninstall(ctx context.Context, a *app, root string, purge bool) error {
	names, err := systemd.Installed(root)
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	state := filepath.Join(root, agentState)
	if root == "" && systemd.Running() {
		all, err := server.NewClient(server.DefaultSocket).List(ctx)
		if err == nil && slices.ContainsFunc(all, func(t task.Task) bool { return !t.State.Ended() }) {
			return withHint(failf(exitOther, "tasks are under way"), "\"instar agent ctl list\" shows them, \"instar agent ctl cancel ID\" ends one.")
		}
		c, err := systemd.Connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		for _, n := range names { // timers and the socket first, so that nothing is started meanwhile
			if !strings.HasSuffix(n, ".service") {
				err = errors.Join(err, c.Stop(ctx, n))
			}
		}
		for _, n := range names {
			if strings.HasSuffix(n, ".service") && !strings.Contains(n, "@") {
				err = errors.Join(err, c.Stop(ctx, n))
			}
		}
		err = errors.Join(err, systemd.RemoveFiles(root, names), c.Reload(ctx))
		if err != nil {
			return err
		}
	} else if err := systemd.RemoveFiles(root, names); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return failf(exitFile, "%w", err)
	}
	if purge {
		if err := os.RemoveAll(state); err != nil {
			return failf(exitFile, "removing the tasks' history: %w", err)
		}
	}
	m := a.schedules()
	if root != "" {
		m.Root = root
	}
	left, err := m.List()
	if err != nil {
		a.ui.Warn(err.Error(), nil)
	}
	for _, s := range left {
		a.ui.Warn(fmt.Sprintf("the schedule %s stays and finds no agent: \"instar agent schedule remove %s\" ends it", s.Name, s.Name), ui.Fields{"schedule": s.Name})
	}
	text := "Removed " + strings.Join(names, ", ")
	if len(names) == 0 {
		text = "No units of the agent are installed"
	}
	if _, err := os.Stat(state); err == nil {
		text += fmt.Sprintf("\nThe tasks' history stays in %s", state)
	}
	return a.ui.Result("uninstalled", text, ui.Fields{"units": names})
}
