package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/server"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// newAgentCtl makes the commands that talk to a running agent.
func newAgentCtl(a *app) *cobra.Command {
	socket := server.DefaultSocket
	ctl := branch("ctl", "start, watch and steer the agent's tasks", `
Talks to a running agent over its socket. Root and the members of admin-group
in the agent's settings may do everything, those of view-group may look.`, `
  instar agent ctl start create-image --name web-1
  instar agent ctl list
  instar agent ctl progress bun-0123456789abcdef0
  instar agent ctl cancel bun-0123456789abcdef0`)
	p := flags{ctl.PersistentFlags()}
	p.text(&socket, "socket", "", "the agent's socket, a `PATH`", ofUs, "agent")
	client := func() *server.Client { return server.NewClient(socket) }
	ctl.AddCommand(newAgentStart(a, client))

	// add adds a subcommand of n arguments, the first of which is a task's.
	add := func(use, short, long string, n int, run func(context.Context, *server.Client, []string) error) {
		cmd := a.command(use, short, long, "  instar agent ctl "+use, nil)
		cmd.Args = exactArgs(a, n, "usage: agent ctl "+use)
		cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var ids []string
			if len(args) < n {
				all, _ := client().List(cmd.Context()) // no agent, no offers
				for _, t := range all {
					ids = append(ids, t.ID)
				}
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		}
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			return ctlError(run(cmd.Context(), client(), args), socket)
		}
		ctl.AddCommand(cmd)
	}
	add("status", "show how the agent is", `
Shows which version of the agent runs, since when, and how many tasks are in
which state.`, 0, func(ctx context.Context, c *server.Client, _ []string) error {
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		text := fmt.Sprintf("instar %s, up since %s", s.Version, s.Started.Local().Format(time.DateTime))
		for _, st := range task.States() {
			if n := s.Tasks[st]; n > 0 {
				text += fmt.Sprintf("\n%-10s %d", st, n)
			}
		}
		return a.ui.Result("status", text, ui.Fields{"status": s})
	})
	add("list", "list the tasks, oldest first", `
Lists the tasks, oldest first: the ID, the state with its percentage, what is
made under which name, and when it was asked for. Tasks that ended are
remembered for a while.`, 0, func(ctx context.Context, c *server.Client, _ []string) error {
		all, err := c.List(ctx)
		if err != nil {
			return err
		}
		for _, t := range all {
			text := fmt.Sprintf("%s  %-24s  %-12s  %s  %s", t.ID, stateText(t), t.Request.Kind, t.Created.Local().Format(time.DateTime), t.Request.Name)
			if err := a.ui.Result("task", text, ui.Fields{"task": t}); err != nil {
				return err
			}
		}
		return nil
	})
	add("show ID", "show a task", `
Shows all that is known of a task: the request, who made it, how often it was
begun, and what came of it.`, 1, func(ctx context.Context, c *server.Client, args []string) error {
		t, err := c.Show(ctx, args[0])
		if err != nil {
			return err
		}
		return a.printTask(t)
	})
	add("progress ID", "follow a task until it ends", `
Shows a task whenever it changes, until it has ended. The exit status is 0 if
it is complete then, else that of the capture.`, 1, func(ctx context.Context, c *server.Client, args []string) error {
		return a.followTask(ctx, c, args[0])
	})
	steer := func(use, short, long string, do func(*server.Client, context.Context, string) (task.Task, error)) {
		add(use+" ID", short, long, 1, func(ctx context.Context, c *server.Client, args []string) error {
			t, err := do(c, ctx, args[0])
			if err != nil {
				return err
			}
			return a.ui.Result("task", t.ID+"  "+stateText(t), ui.Fields{"task": t})
		})
	}
	steer("cancel", "end a task", `
Ends a task. What is stored of an image stays until garbage is collected and is
used by the next capture; nothing is published.`, (*server.Client).Cancel)
	steer("pause", "make a task stand still", `
Makes a task stand still until it is resumed, however long that is: requests to
the store that break off meanwhile are made again. A task is not paused while
units stand still for it.`, (*server.Client).Pause)
	steer("resume", "let a paused task go on", `
Lets a paused task go on.`, (*server.Client).Resume)
	return ctl
}

// stateText is a task's state for people.
func stateText(t task.Task) string {
	s := string(t.State)
	if !t.State.Ended() && t.State != task.Pending {
		s += fmt.Sprintf(" %d%%", t.Progress.Percent)
	}
	if t.Paused {
		s += " (paused)"
	}
	return s
}

func (a *app) printTask(t task.Task) error {
	b, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return fmt.Errorf("showing task %s: %w", t.ID, err)
	}
	return a.ui.Result("task", string(b), ui.Fields{"task": t})
}

// followTask shows a task until it ends.
func (a *app) followTask(ctx context.Context, c *server.Client, id string) error {
	last := ""
	var showErr error
	t, err := c.Follow(ctx, id, func(t task.Task) {
		text := t.ID + "  " + stateText(t)
		if t.Progress.Phase != "" && !t.State.Ended() {
			text += "  " + t.Progress.Phase
			if t.Progress.Total > 0 {
				text += fmt.Sprintf(", %s of %s", ui.Size(t.Progress.Done), ui.Size(t.Progress.Total))
			}
		}
		if text != last {
			last, showErr = text, a.ui.Result("task", text, ui.Fields{"task": t})
		}
	})
	switch {
	case err != nil:
		return err
	case showErr != nil:
		return showErr
	case t.State == task.Complete && !t.Result.Changed:
		return nil
	case t.State == task.Complete:
		return failf(exitChanged, "done, but files changed or could not be read meanwhile; the agent's log names them")
	case t.State == task.Cancelled:
		return failf(exitInterrupt, "task %s was cancelled", id)
	}
	code := t.Error.Exit
	if code == exitOK {
		code = exitOther
	}
	return &exitError{code: code, err: fmt.Errorf("task %s failed: %s", id, t.Error.Message), hint: t.Error.Hint}
}

// ctlError gives an error of the agent's an exit code.
func ctlError(err error, socket string) error {
	var e *server.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e):
		switch e.Status {
		case http.StatusNotFound:
			return failf(exitFile, "%w", err)
		case http.StatusBadRequest:
			return failf(exitUsage, "%w", err)
		}
		return failf(exitOther, "%w", err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return withHint(failf(exitFile, "no agent listens at %s", socket), "'systemctl status instar-agent' says how it is; 'instar agent install' installs it.")
	}
	return err
}

// newAgentStart makes the commands that start tasks.
func newAgentStart(a *app, client func() *server.Client) *cobra.Command {
	start := branch("start", "start a capture", "Starts a capture. Its ID is printed once the agent has it on disk.",
		"  instar agent ctl start create-image --name web-1")
	start.Args = nothingElse("start makes bundle or create-image, not %q")
	for _, k := range []struct {
		kind       task.Kind
		short, eg  string
		paragraphs string
	}{
		{task.CreateImage, "capture this machine into an image", "  instar agent ctl start create-image --name web-1 --store s3://images/fleet --wait", `
Has the agent capture this machine into an image, as "instar create-image" does
at once. What no option says is as config.yaml has it.`},
		{task.Bundle, "capture this machine into an EC2 bundle", "  instar agent ctl start bundle --name web-1 --store images/web-1 --user 111122223333 --privatekey /etc/instar/pk.pem --cert /etc/instar/cert.pem", `
Has the agent capture this machine into an EC2 bundle, as "instar bundle-vol"
does at once. What no option says is as config.yaml has it. A bundle that is cut
short is not resumed: the task says so.`},
	} {
		start.AddCommand(newAgentStartKind(a, client, k.kind, k.short, k.paragraphs, k.eg))
	}
	return start
}

func newAgentStartKind(a *app, client func() *server.Client, kind task.Kind, short, long, example string) *cobra.Command {
	o := requestOptions{r: task.Request{Kind: kind}}
	var wait, body bool
	cmd := a.command(string(kind), short, long+`

The limits replace the agent's own: weights are shares against others' 100,
--cpu-quota is in percent of one CPU. The units named by --stop and --freeze
stand still around the capture, the filesystems of --freeze-fs for at most 10
seconds; all of them go on when the task ends, however it ends.`, example, nil)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		r, err := o.request()
		if err != nil {
			return err
		}
		if body {
			b, err := json.MarshalIndent(r, "", "  ")
			if err != nil {
				return fmt.Errorf("showing the request: %w", err)
			}
			return a.ui.Result("request", string(b), ui.Fields{"request": r})
		}
		c := client()
		t, err := c.Start(cmd.Context(), r)
		if err != nil {
			return ctlError(err, c.Socket())
		}
		if err := a.ui.Result("task", t.ID, ui.Fields{"task": t}); err != nil || !wait {
			return err
		}
		return ctlError(a.followTask(cmd.Context(), c, t.ID), c.Socket())
	}
	const test = "agent"
	o.add(cmd, test)
	f := flagsOf(cmd)
	f.text(&o.r.Schedule, "schedule", "", "say that the schedule `NAME` asks", ofUs, test)
	f.text(&o.r.ClientToken, "client-token", "", "repeat a request safely: the same `TOKEN` is the same task", ofUs, test)
	f.yes(&wait, "wait", "", "follow the task until it ends, and exit as it does", ofUs, test)
	f.yes(&body, "show-request", "", "print the request as JSON and start nothing", ofUs, test)
	return cmd
}

// requestOptions are what a task is asked for with.
type requestOptions struct {
	r                  task.Request
	l                  task.Limits
	q                  task.Quiesce
	rate, read, memory int64
	limit              string
	kept               keep
}

// request is what the options say.
func (o *requestOptions) request() (task.Request, error) {
	r := o.r
	o.l.UploadRate, o.l.ReadRate, o.l.Memory = o.rate, o.read, o.memory
	if o.l != (task.Limits{}) {
		r.Limits = &o.l
	}
	if o.limit != "" {
		if err := o.q.Limit.UnmarshalText([]byte(o.limit)); err != nil {
			return r, usagef("--quiesce-limit: %w", err)
		}
	}
	switch {
	case !o.q.Zero():
		r.Quiesce = &o.q
	case o.limit != "":
		return r, usagef("--quiesce-limit goes with --stop, --freeze or --freeze-fs")
	}
	policy, err := o.kept.policy()
	if err != nil {
		return r, err
	}
	r.Retention = policy
	if err := r.Check(); err != nil {
		return r, usagef("%w", err)
	}
	return r, nil
}

func (o *requestOptions) add(cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	r, l, q := &o.r, &o.l, &o.q
	f.text(&r.Name, "name", "n", "`NAME` of the image, or of the bundle's files", ofUs, test)
	f.text(&r.Store, "store", "", "where it goes: an image's `STORE`, a bundle's BUCKET/PREFIX", ofUs, test)
	f.text(&r.Endpoint, "url", "", "`URL` of the S3 service", ofUs, test)
	f.text(&r.Region, "region", "", "`REGION` requests are signed for", ofUs, test)
	f.text(&r.Volume, "volume", "v", "capture the tree at `DIR`; default /", ofUs, test)
	f.list(&r.Exclude, "exclude", "e", "leave out `PATH,...`", ofUs, test)
	f.list(&r.Include, "include", "i", "keep `PATH,...` in although a rule leaves it out", ofUs, test)
	f.choice(cmd, &r.Architecture, []string{"x86_64", "arm64", "i386"}, "arch", "r", "`ARCH`itecture", ofUs, test)
	if r.Kind == task.CreateImage {
		f.text(&r.Description, "description", "", "`TEXT` about this version", ofUs, test)
		f.text(&r.Domain, "domain", "", "share stored pieces with the images of `DOMAIN`", ofUs, test)
		f.text(&r.Expires, "expires", "", "readers take this version for the newest no longer than `TIME`: 12h, 7d", ofUs, test)
		f.list(&r.Recipients, "recipient", "", "let `KEY` open the image", ofUs, test)
		f.yes(&r.Full, "full", "", "take no parent", ofUs, test)
		f.yes(&r.VerifyContent, "verify-content", "", "compare every file with the parent by content", ofUs, test)
		f.yes(&r.NoKernel, "no-kernel", "", "leave kernel and initrd out", ofUs, test)
		o.kept.add(cmd, test)
	} else {
		f.text(&r.PrivateKey, "privatekey", "k", "the user's RSA private key, `PEM`", ofUs, test)
		f.text(&r.Certificate, "cert", "c", "the user's certificate, `PEM`", ofUs, test)
		f.text(&r.EC2Cert, "ec2cert", "", "the cloud's certificate, `PEM`", ofUs, test)
		f.text(&r.User, "user", "u", "the user's `ACCOUNT` number", ofUs, test)
		f.text(&r.KernelID, "kernel", "", "`ID` of the kernel image", ofUs, test)
		f.text(&r.RamdiskID, "ramdisk", "", "`ID` of the ramdisk image", ofUs, test)
		f.yes(&r.Replace, "replace", "", "replace a bundle of the same name", ofUs, test)
	}
	f.number(&l.CPUWeight, "cpu-weight", "", "`SHARE` of CPUs that others want too", ofUs, test)
	f.number(&l.CPUQuota, "cpu-quota", "", "at most `PERCENT` of one CPU", ofUs, test)
	f.number(&l.IOWeight, "io-weight", "", "`SHARE` of disks that others want too", ofUs, test)
	f.number(&l.ReadShare, "read-share", "", "spend at most `PERCENT` of the time reading files", ofUs, test)
	f.size(&o.read, "read-rate", "", "read at most `SIZE` a second from the volume's disk", ofUs, test)
	f.size(&o.rate, "limit-rate", "", "send at most `SIZE` a second to the store", ofUs, test)
	f.size(&o.memory, "memory", "", "reclaim the capture's memory above `SIZE`", ofUs, test)
	f.yes(&l.Foreground, "foreground", "", "do not step back into the idle classes of CPU and disk", ofUs, test)
	f.list(&q.Stop, "stop", "", "stop `UNIT,...` before and start them after", ofUs, test)
	f.list(&q.Freeze, "freeze", "", "freeze the processes of `UNIT,...` meanwhile", ofUs, test)
	f.list(&q.Filesystems, "freeze-fs", "", "freeze the filesystems at `DIR,...` meanwhile, at most 10 seconds", ofUs, test)
	f.text(&o.limit, "quiesce-limit", "", "let them go on after `TIME` however far the capture is; default 10m", ofUs, test)
}
