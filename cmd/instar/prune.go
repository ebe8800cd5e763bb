package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/retention"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// keep are the options that say which versions of an image are kept.
type keep struct{ retention.Policy }

func (o *keep) add(cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.number(&o.Last, "keep-last", "", "keep the newest `N` versions", ofUs, test)
	f.number(&o.Daily, "keep-daily", "", "keep the newest version of each of the newest `N` days that have one", ofUs, test)
	f.number(&o.Weekly, "keep-weekly", "", "the same of `N` weeks, from Monday", ofUs, test)
	f.number(&o.Monthly, "keep-monthly", "", "the same of `N` months", ofUs, test)
	f.number(&o.Yearly, "keep-yearly", "", "the same of `N` years", ofUs, test)
	f.list(&o.Keep, "keep-described", "", "keep every version whose description matches `PATTERN`, as 'release *'; may be repeated", ofUs, test)
}

// policy is what the options say; nil if they say nothing.
func (o *keep) policy() (*retention.Policy, error) {
	if o.Zero() {
		return nil, nil
	}
	if err := o.Check(); err != nil {
		return nil, usagef("%w", err)
	}
	return &o.Policy, nil
}

type pruneOptions struct {
	imageStore
	keep
	sign   string
	dryRun bool
}

func newImagesPrune(a *app) *cobra.Command {
	var o pruneOptions
	const test = "images-prune"
	cmd := a.named("prune IMAGE", "delete the versions of an image that a retention does not keep", `
Deletes versions of an image, the oldest first, that none of the --keep options
keeps. Days, weeks, months and years are those of UTC in which a version was
made, and those without one do not count: a machine that captured nothing for a
year loses nothing. The newest version always stays. "instar gc" gives back the
room.

An agent's schedule does the same after each capture. Nothing is deleted if the
image's head or one of its manifests cannot be verified.`, `
  instar images prune web-1 --keep-last 3 --keep-daily 7 --keep-monthly 12 --dry-run --store s3://images/fleet
  instar images prune web-1 --keep-daily 30 --keep-described 'release *' --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesPrune(ctx, a, &o, args[0]) })
	o.keep.add(cmd, test)
	f := flagsOf(cmd)
	f.yes(&o.dryRun, "dry-run", "", "show what would be deleted and what kept, and why; delete nothing", ofUs, test)
	f.sign(&o.sign, test)
	o.imageStore.add(a, cmd, test)
	return cmd
}

func runImagesPrune(ctx context.Context, a *app, o *pruneOptions, image string) error {
	policy, err := o.policy()
	if err != nil {
		return err
	}
	if policy == nil {
		return usagef("nothing says what to keep: give --keep-last, --keep-daily, --keep-weekly, --keep-monthly or --keep-yearly")
	}
	s, err := a.browseImages(ctx, &o.imageStore)
	if err != nil {
		return err
	}
	defer s.Close()
	plan, err := retention.Prune(ctx, s, image, *policy, nil, retention.PruneOptions{DryRun: true})
	if err != nil {
		return err
	}
	if len(plan.Decisions) == 0 {
		return failf(exitFile, "there is no image %s in %s", image, s)
	}
	var showErr error
	show := func(d retention.Decision) {
		f := ui.Fields{"image": image, "manifest": d.ID, "created": d.Created, "description": d.Description, "removed": d.Removed(), "reasons": d.Reasons}
		what := "keep    " + strings.Join(d.Reasons, ", ")
		if d.Removed() {
			what, f["reasons"] = "delete", []string{}
		}
		if err := a.ui.Result("version", fmt.Sprintf("%s@%s  %s  %s", image, d.ID[:digits], stamp(d.Created), what), f); err != nil && showErr == nil {
			showErr = err
		}
	}
	done := func(p *retention.Pruned, verb string) error {
		text := fmt.Sprintf("%s of %s %s, %d kept", plural(p.Removed, "version"), image, verb, p.Kept)
		return a.ui.Result("pruned", text, ui.Fields{"image": image, "removed": p.Removed, "kept": p.Kept, "dry_run": o.dryRun})
	}
	if o.dryRun || plan.Removed == 0 {
		for _, d := range plan.Decisions {
			show(d)
		}
		return errors.Join(showErr, done(plan, "would be deleted"))
	}
	signer, err := a.signer(ctx, &o.imageStore, o.sign)
	if err != nil {
		return err
	}
	ok, err := a.confirm(ctx, fmt.Sprintf("Delete %s of image %s from %s?", plural(plan.Removed, "version"), image, s))
	if err != nil {
		return err
	}
	if !ok {
		return failf(exitPrompt, "nothing was deleted")
	}
	p, err := retention.Prune(ctx, s, image, *policy, signer, retention.PruneOptions{Report: show})
	if err != nil {
		return explainImage(err)
	}
	return errors.Join(showErr, done(p, "deleted"))
}
