package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/boot"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

type bootOptions struct {
	stage, metadata, user, wait, root string
}

func newAgentBoot(a *app) *cobra.Command {
	var o bootOptions
	const test = "agent-boot"
	names := make([]string, 0, len(boot.Stages()))
	for _, s := range boot.Stages() {
		names = append(names, string(s))
	}
	cmd := a.command("boot", "make this machine its instance's own, in stages", `
Does for a machine that started without Instar's initrd what that initrd does:
asks instance metadata (version 2: with tokens, past any proxy) who this is and
makes the machine that instance. systemd runs the stages when the machine
starts, from units that "instar agent install --boot" writes:

  network    waits for metadata; fresh machine-id and SSH host keys for a new
             instance, hostname, facts in /run/instar/instance.json
  keys       authorized_keys of the login user in step with metadata: adds what
             is missing, withdraws what came from metadata and is there no more.
             It may be repeated at any time; a timer does
  userdata   the user data, at most once per instance: what was cut short is
             shown as interrupted and not begun again
  final      tells on the console how it went, and the host keys' fingerprints

What the initrd has done is not done again. Where cloud-init is installed and
enabled it stays in charge, and only the facts are written.`, `
  instar agent boot --stage network --wait 2m
  instar agent boot --stage keys --user admin
  instar agent boot status
  instar agent boot adopt`, func(ctx context.Context) error { return runAgentBoot(ctx, a, &o) })
	cmd.Args = knownCommand
	f := flagsOf(cmd)
	f.choice(cmd, &o.stage, names, "stage", "", "`STAGE` to run: "+strings.Join(names, ", "), ofUs, test)
	o.where(cmd, test, true)
	cmd.AddCommand(newAgentBootStatus(a), newAgentBootAdopt(a))
	return cmd
}

func (o *bootOptions) where(cmd *cobra.Command, test string, asks bool) {
	f := flagsOf(cmd)
	if asks {
		f.text(&o.metadata, "metadata", "", "`URL` of the metadata service; default what the initrd asked, else http://169.254.169.254", ofUs, test)
		f.text(&o.wait, "wait", "", "how `LONG` to wait for metadata to answer, as 90s or 2m; default 60s", ofUs, test)
	}
	if asks && cmd.Name() == "boot" {
		f.text(&o.user, "user", "", "login `USER` whose authorized_keys metadata's keys are for; default the one the initrd was told, else root", ofUs, test)
	}
	f.text(&o.root, "root", "", "work on the root in `DIR`ectory, not on the running system", ofUs, test)
	completeFiles(cmd, "root")
}

// options are the library's.
func (o *bootOptions) options(a *app) (boot.Options, error) {
	wait := time.Minute
	if o.wait != "" {
		var err error
		if wait, err = time.ParseDuration(o.wait); err != nil || wait < 0 {
			return boot.Options{}, usagef("--wait %q: write 90s or 2m", o.wait)
		}
	}
	if o.root != "" {
		if err := isDir(o.root, "--root"); err != nil {
			return boot.Options{}, err
		}
	}
	return boot.Options{
		Root: o.root, Endpoint: o.metadata, User: o.user, Wait: wait, Output: a.stdout,
		Report: func(line string, warn bool) {
			if warn {
				a.ui.Warn(line, nil)
				return
			}
			a.ui.Say("%s", line)
		},
	}, nil
}

func runAgentBoot(ctx context.Context, a *app, o *bootOptions) error {
	if err := need(o.stage, "--stage"); err != nil {
		return err
	}
	bo, err := o.options(a)
	if err != nil {
		return err
	}
	return boot.Run(ctx, bo, boot.Stage(o.stage))
}

func newAgentBootStatus(a *app) *cobra.Command {
	var o bootOptions
	const test = "agent-boot"
	cmd := a.command("status", "show what was done for this machine's instance", `
Shows which instance this machine is, how far its user data got (finished,
failed, interrupted, or started if it runs now), what else was done once, and
which SSH keys came from metadata. It asks nobody, waits for nobody and changes
nothing.`, `
  instar agent boot status
  instar agent boot status --json`, func(context.Context) error { return runAgentBootStatus(a, &o) })
	o.where(cmd, test, false)
	return cmd
}

func runAgentBootStatus(a *app, o *bootOptions) error {
	bo, err := o.options(a)
	if err != nil {
		return err
	}
	s, err := boot.ReadStatus(bo)
	if err != nil {
		return err
	}
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-11s %s\n", name, fmt.Sprintf(format, args...))
	}
	or := func(s, other string) string {
		if s == "" {
			return other
		}
		return shown(s)
	}
	line("instance", "%s", or(s.Instance, "not known: no boot asked metadata, and no initrd of Instar's did"))
	if s.CloudInit {
		line("cloud-init", "is in charge of keys, hostname and user data")
	}
	line("user data", "%s", or(s.UserData, "none ran"))
	steps := make([]ui.Fields, 0, len(s.Steps))
	for _, st := range s.Steps {
		text := fmt.Sprintf("%s %s, %s", st.Name, st.State, stamp(st.Time))
		if st.Note != "" {
			text += " (" + shown(st.Note) + ")"
		}
		line("step", "%s", text)
		steps = append(steps, ui.Fields{"step": st.Name, "state": st.State, "time": st.Time, "note": st.Note})
	}
	for _, user := range slices.Sorted(maps.Keys(s.Keys)) {
		for _, k := range s.Keys[user] {
			line("key", "%s: %s", user, shown(k))
		}
	}
	for _, k := range s.HostKeys {
		line("host key", "%s", k)
	}
	return a.ui.Result("boot", strings.TrimSuffix(b.String(), "\n"), ui.Fields{
		"instance": s.Instance, "cloud_init": s.CloudInit, "user_data": s.UserData, "steps": steps, "keys": s.Keys, "host_keys": s.HostKeys,
	})
}

func newAgentBootAdopt(a *app) *cobra.Command {
	var o bootOptions
	const test = "agent-boot"
	cmd := a.command("adopt", "record that this machine, as it is, is its instance's", `
For a machine that is in use already: records for its instance id that host
keys were made and user data ran, so that the next boots do neither. Images
made of it do both for the instances they become.`, `
  instar agent boot adopt`, func(ctx context.Context) error {
		bo, err := o.options(a)
		if err != nil {
			return err
		}
		id, err := boot.Adopt(ctx, bo)
		if err != nil {
			return err
		}
		return a.ui.Result("adopted", "This machine is instance "+id+" as it stands", ui.Fields{"instance": id})
	})
	o.where(cmd, test, true)
	return cmd
}
