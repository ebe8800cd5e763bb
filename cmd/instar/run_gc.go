package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

func runGC(ctx context.Context, a *app, o *gcOptions) error {
	g := images.GCOptions{Versions: o.versions, DryRun: o.dryRun, Grace: -1}
	if o.grace != "0" {
		var err error
		if g.Grace, err = parseSpan(o.grace); err != nil {
			return usagef("--grace: %w", err)
		}
	}
	if o.repack < 0 || o.repack > 100 {
		return usagef("--repack %d: a percentage is from 1 to 100", o.repack)
	}
	if o.domain != "" && o.repack == 0 {
		return usagef("--domain goes with --repack")
	}
	s, err := a.collectImages(ctx, o, &g)
	if err != nil {
		return err
	}
	defer s.Close()
	if g.Registered, err = a.registered(ctx, &o.imageStore, s.Objects()); err != nil {
		return err
	}
	bar := a.ui.Progress("collecting", 0)
	rep, err := s.GC(ctx, g)
	bar.End()
	if rep != nil {
		if serr := a.showGC(rep, o.dryRun); serr != nil {
			return errors.Join(err, serr)
		}
	}
	if errors.Is(err, images.ErrBlocked) {
		return withHint(&exitError{code: exitTrust, err: err}, "\"instar verify\" and \"instar repair\" tell more; delete the object, or the image it is of, if it is not wanted.")
	}
	return err
}

// collectImages opens the store; keys are needed only to repack.
func (a *app) collectImages(ctx context.Context, o *gcOptions, g *images.GCOptions) (*openedStore, error) {
	if o.repack == 0 {
		if len(o.identities) > 0 || o.signers != "" {
			return nil, usagef("--identity and --signers go with --repack: nothing else needs a key")
		}
		objects, err := a.openImages(ctx, &o.imageStore, false)
		if err != nil {
			return nil, err
		}
		s, err := images.Open(objects, images.Options{State: a.stateDir()})
		if err != nil {
			return nil, errors.Join(err, objects.Close())
		}
		return &openedStore{s, objects.Close}, nil
	}
	s, err := a.readImages(ctx, &o.imageStore)
	if err != nil {
		return nil, err
	}
	name := a.setting("domain", "--domain", o.domain)
	if name == "" {
		name = defaultDomain
	}
	d, err := s.Domain(ctx, name, images.DomainOptions{})
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	owner, err := a.machineKeys(&o.imageStore, "", false).Owner()
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	g.Repack = &images.Repack{Below: o.repack, Domain: d, Owner: chunked.Key(owner)}
	return s, nil
}

func (a *app) showGC(r *images.GCReport, dry bool) error {
	var b strings.Builder
	done := func(would, did string) string {
		if dry {
			return would
		}
		return did
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	sum := func(l []images.Collected) (t int64) {
		for _, c := range l {
			t += c.Size
		}
		return t
	}
	line("in use", "%d objects, %s, by %d versions of %d images", r.Live.Objects, ui.Size(r.Live.Bytes), r.Manifests, r.Images)
	for _, n := range r.Running {
		line("under way", "a capture of %s", n)
	}
	if r.DeadRuns > 0 {
		line("dead", "%d captures that were interrupted", r.DeadRuns)
	}
	for _, w := range r.Withdrawn {
		line(done("would drop", "dropped"), "%s, which was never published", w)
	}
	line(done("would delete", "deleted"), "%d objects, %s", len(r.Swept), ui.Size(sum(r.Swept)))
	line(done("would mark", "marked"), "%d objects, %s: they go after the grace, if nothing refers to them then", len(r.Condemned), ui.Size(sum(r.Condemned)))
	if r.Waiting.Objects > 0 {
		line("waiting", "%d objects, %s, marked before", r.Waiting.Objects, ui.Size(r.Waiting.Bytes))
	}
	if len(r.Spared) > 0 {
		line("spared", "%d objects, in use after all", len(r.Spared))
	}
	for _, p := range r.Repacked {
		if p.Error != nil {
			line("left", "pack %s: %v", p.Pack.String()[:digits], p.Error)
			continue
		}
		line(done("would repack", "repacked"), "pack %s: %s of %s in use", p.Pack.String()[:digits], ui.Size(p.Used), ui.Size(p.Size))
	}
	for _, u := range r.Unreadable {
		line("closed", "%s: no key of this machine opens it, so its packs stay as they are", u)
	}
	if r.OldVersions.Objects > 0 {
		line("versions", "%d old versions of objects, %s, %s", r.OldVersions.Objects, ui.Size(r.OldVersions.Bytes), done("would be removed", "removed"))
	}
	locked := make([]string, len(r.Locked))
	for i, e := range r.Locked {
		locked[i] = e.Error()
		line("locked", "%v", e)
	}
	f := ui.Fields{
		"dry_run": dry, "images": r.Images, "manifests": r.Manifests, "live": r.Live, "running": listed(r.Running), "dead_runs": r.DeadRuns,
		"withdrawn": listed(r.Withdrawn), "swept": listed(r.Swept), "condemned": listed(r.Condemned), "waiting": r.Waiting, "spared": listed(r.Spared),
		"repacked": len(r.Repacked), "unreadable": listed(r.Unreadable), "old_versions": r.OldVersions, "locked": locked,
	}
	if !r.Next.IsZero() {
		line("next", "something can go from %s on", r.Next.UTC().Format(time.RFC3339))
		f["next"] = r.Next
	}
	return a.ui.Result("collected", strings.TrimSuffix(b.String(), "\n"), f)
}

// listed is l as JSON has it: a list without elements is one.
func listed[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}
