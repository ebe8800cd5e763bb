package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/metadata/server"
)

// timeSource reads times as operators write them.
type timeSource func() time.Time

// parse reads RFC 3339, "+5m" from now, or "" for now.
func (now timeSource) parse(s string) (time.Time, error) {
	if s == "" {
		return now().UTC().Truncate(time.Second), nil
	}
	if d, ok := strings.CutPrefix(s, "+"); ok {
		after, err := time.ParseDuration(d)
		return now().Add(after).UTC().Truncate(time.Second), err
	}
	return time.Parse(time.RFC3339, s)
}

// newMetadataCtl makes the commands that steer a running metadata server.
func newMetadataCtl(a *app) *cobra.Command {
	socket := metadataControl
	ctl := branch("ctl", "see and steer a running metadata server", `
Talks to a running metadata server over its control socket. Who may write to
the socket may steer the server: file permissions decide that.`, `
  instar metadata ctl list
  instar metadata ctl event i-0abc spot terminate +2m
  instar metadata ctl event i-0abc clear spot
  instar metadata ctl revoke i-0abc
  instar metadata ctl reload`)
	p := flags{ctl.PersistentFlags()}
	p.text(&socket, "control", "", "the server's control socket, a `PATH`", ofUs, "metadata-serve")

	// add adds a subcommand of n arguments, or with n < 0 of at least -n.
	add := func(use, short string, n int, run func(context.Context, *server.Client, []string) error) {
		cmd := a.command(use, short, "Talks to a running metadata server over its control socket:\n"+short+".", "  instar metadata ctl "+use, nil)
		cmd.Args = exactArgs(a, n, fmt.Sprintf("usage: metadata ctl %s", use))
		if n < 0 {
			cmd.Args = func(_ *cobra.Command, args []string) error {
				if len(args) < -n && !a.manual && !a.showVersion {
					return usagef("usage: metadata ctl %s", use)
				}
				return nil
			}
		}
		cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 || n == 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			list, err := server.NewClient(socket).List(cmd.Context())
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			ids := make([]string, len(list))
			for i, s := range list {
				ids[i] = s.ID
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		}
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			err := run(cmd.Context(), server.NewClient(socket), args)
			if err != nil {
				return failf(exitMetadata, "%w", err)
			}
			return nil
		}
		ctl.AddCommand(cmd)
	}
	add("status", "show how the server is", 0, func(ctx context.Context, c *server.Client, _ []string) error {
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		return a.printStatus(s)
	})
	add("list", "list the instances", 0, func(ctx context.Context, c *server.Client, _ []string) error {
		list, err := c.List(ctx)
		if err != nil {
			return err
		}
		for _, s := range list {
			var where []string
			for _, addr := range s.Addresses {
				where = append(where, addr.String())
			}
			if s.Listener != "" {
				where = append(where, "@"+s.Listener)
			}
			text := strings.Join([]string{s.ID, strings.Join(where, ","), s.Hostname, dash(strings.Join(s.Events, ",")), dash(s.Ticket)}, "\t")
			if err := a.ui.Result("instance", text, ui.Fields{"instance": s}); err != nil {
				return err
			}
		}
		return nil
	})
	add("show ID", "show an instance, without its secrets", 1, func(ctx context.Context, c *server.Client, args []string) error {
		d, err := c.Show(ctx, args[0])
		return a.printDetail(d, err)
	})
	add("event ID EVENT …", "set or clear an event: spot ACTION TIME, rebalance [TIME], lifecycle STATE, maintenance CODE TIME [DESCRIPTION], clear [KIND …]", -2,
		func(ctx context.Context, c *server.Client, args []string) error {
			change, err := parseEvent(time.Now, args[1:])
			if err != nil {
				return usagef("%w", err)
			}
			d, err := c.SetEvents(ctx, args[0], change)
			return a.printDetail(d, err)
		})
	add("revoke ID", "make all tokens of an instance invalid", 1, func(ctx context.Context, c *server.Client, args []string) error {
		d, err := c.Revoke(ctx, args[0])
		return a.printDetail(d, err)
	})
	add("ticket ID withdraw|renew", "end an instance's launch ticket, or make it good again", 2, func(ctx context.Context, c *server.Client, args []string) error {
		var d server.Detail
		var err error
		switch args[1] {
		case "withdraw":
			d, err = c.WithdrawTicket(ctx, args[0])
		case "renew":
			d, err = c.RenewTicket(ctx, args[0])
		default:
			return usagef("usage: metadata ctl ticket ID withdraw|renew")
		}
		return a.printDetail(d, err)
	})
	add("reload", "read the records anew", 0, func(ctx context.Context, c *server.Client, _ []string) error {
		s, err := c.Reload(ctx)
		if err != nil {
			return err
		}
		return a.printStatus(s)
	})
	return ctl
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) printStatus(s server.Status) error {
	text := fmt.Sprintf("%d instances, up since %s", s.Instances, s.Started.Local().Format(time.DateTime))
	for _, l := range s.Listeners {
		text += "\nlistening: " + l
	}
	if s.ReloadFail != "" {
		text += "\nlast reload failed, records of before are served:\n" + s.ReloadFail
	}
	return a.ui.Result("status", text, ui.Fields{"status": s})
}

func (a *app) printDetail(d server.Detail, err error) error {
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("showing instance %s: %w", d.ID, err)
	}
	return a.ui.Result("instance", string(b), ui.Fields{"instance": d})
}
