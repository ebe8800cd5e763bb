package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
)

// leastSpan is the shortest time for which a state may be taken for the newest:
// servers look every few seconds, and clocks differ.
const leastSpan = time.Hour

// catalogSpan reads --expires.
func catalogSpan(text string) (time.Duration, error) {
	span, err := parseSpan(text)
	if err != nil {
		return 0, usagef("--expires: %w", err)
	}
	if text != "" && span < leastSpan {
		return 0, usagef("--expires %s: it is 1h or more", text)
	}
	return span, nil
}

type catalogRenewOptions struct {
	imageStore
	sign, expires string
	never, lapsed bool
}

func newCatalogRenew(a *app) *cobra.Command {
	var o catalogRenewOptions
	const test = "catalog-renew"
	cmd := a.command("renew", "sign the newest state of a catalog again", `
Signs the newest state of the catalog again, with this machine's key or the one
of --sign, so that readers take it for the newest for as long again as it was
made for; --expires changes that, and --never ends it. "catalog serve" does it by
itself.

A state that has expired nobody can tell from an old one that a store shows
again: --lapsed renews it all the same, if you know that it is the newest.`, `
  instar catalog renew --store s3://images/fleet
  instar catalog renew --store s3://images/fleet --expires 7d`,
		func(ctx context.Context) error { return runCatalogRenew(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.expires, "expires", "", "each state is good for `TIME`, 1h or more, from now on: 7d", ofUs, test)
	f.yes(&o.never, "never", "", "states do not expire from now on", ofUs, test)
	f.yes(&o.lapsed, "lapsed", "", "renew a state that has expired, too", ofUs, test)
	f.sign(&o.sign, test)
	o.imageStore.add(a, cmd, test)
	return cmd
}

func runCatalogRenew(ctx context.Context, a *app, o *catalogRenewOptions) (err error) {
	span, err := catalogSpan(o.expires)
	if err != nil {
		return err
	}
	if o.never {
		if span > 0 {
			return usagef("--expires and --never exclude each other")
		}
		span = -1
	}
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true, func(c *catalog.Options) { c.Expires, c.Lapsed = span, o.lapsed })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	if err := k.Renew(ctx); err != nil {
		return explainCatalog(err)
	}
	v, err := k.View(ctx)
	if err != nil {
		return explainCatalog(err)
	}
	text, f := "renewed; it does not expire", ui.Fields{"region": v.Region(), "sequence": v.Sequence()}
	if e := v.Expires(); !e.IsZero() {
		text, f["expires"] = "renewed until "+stamp(e), e
	}
	return a.ui.Result("renewed", text, f)
}
