package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
)

func runImagesTag(ctx context.Context, a *app, o *tagOptions, ref string, tags []string) error {
	put, err := tagsOf(tags)
	if err != nil {
		return err
	}
	if len(put) == 0 && len(o.remove) == 0 {
		return usagef("missing argument: KEY=VALUE, or --remove KEY")
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if len(put) > 0 {
			if err := k.SetTags(ctx, call, []string{m.ID}, put); err != nil {
				return err
			}
		}
		if len(o.remove) > 0 {
			var which []catalog.TagMatch
			for _, key := range o.remove {
				which = append(which, catalog.TagMatch{Key: key})
			}
			if err := k.DeleteTags(ctx, call, []string{m.ID}, which); err != nil {
				return err
			}
		}
		return a.changed(m, "tagged", "is tagged")
	})
}

func runImagesShare(ctx context.Context, a *app, o *shareOptions, ref string) error {
	if len(o.with) == 0 && len(o.withdraw) == 0 && !o.public && !o.private && !o.reset {
		return usagef("nothing to do: --with, --withdraw, --public, --private or --reset")
	}
	if o.public && o.private || o.reset && (len(o.with) > 0 || len(o.withdraw) > 0 || o.public || o.private) {
		return usagef("--public and --private exclude each other, and --reset all others")
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		add := catalog.Permissions{Public: o.public, Accounts: o.with}
		remove := catalog.Permissions{Public: o.private, Accounts: o.withdraw}
		if o.reset {
			remove = catalog.Permissions{Public: true, Accounts: m.LaunchAccounts, Orgs: m.LaunchOrgs, OrgUnits: m.LaunchOrgUnits}
		}
		s, err := k.Share(ctx, call, m.ID, add, remove, o.flag)
		if err != nil {
			if s != nil && len(s.Keyless) > 0 {
				return withHint(err, "\"instar accounts set %s --key FILE\" notes one; --flag-only shares without.", s.Keyless[0])
			}
			return explainKeys(err)
		}
		n := s.Image
		if len(s.Removed) > 0 || len(o.withdraw) > 0 || o.reset {
			a.ui.Say("note: what an account has read, or opened, before cannot be taken back: it may have kept a copy")
		}
		if s.KeyKept {
			a.ui.Say("note: the last key the image is wrapped for stays: without it nobody could open it")
		}
		if o.public && m.Kind == catalog.KindInstar {
			a.ui.Say("note: everybody may launch it now, but the image opens only for its recipients' keys")
		}
		return a.ui.Result("shared", m.ID+" may be launched by "+permissionText(n), ui.Fields{
			"image_id": m.ID, "public": n.Public, "accounts": n.LaunchAccounts, "keys_added": s.Wrapped, "keys_removed": s.Removed,
		})
	})
}

func permissionText(m *catalog.Image) string {
	who := []string{"its owner " + m.Owner}
	if m.Public {
		who = append(who, "everybody")
	}
	return strings.Join(slices.Concat(who, m.LaunchAccounts, m.LaunchOrgs, m.LaunchOrgUnits), ", ")
}

func runImagesDeprecate(ctx context.Context, a *app, o *deprecateOptions, ref string) error {
	at := time.Now()
	switch {
	case o.never && o.at != "":
		return usagef("--at and --never exclude each other")
	case o.never:
		at = time.Time{}
	case o.at != "":
		t, err := time.Parse(time.RFC3339, o.at)
		if err != nil {
			span, serr := parseSpan(o.at)
			if serr != nil {
				return usagef("--at %q: neither a time as 2027-01-15T08:00:00Z nor a span as 30d", o.at)
			}
			t = at.Add(span)
		}
		at = t
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if err := k.SetDeprecation(ctx, call, m.ID, at); err != nil {
			return err
		}
		if o.never {
			return a.changed(m, "deprecation", "is not deprecated")
		}
		return a.changed(m, "deprecation", "is deprecated from %s on", stamp(at))
	})
}

func runImagesProtect(ctx context.Context, a *app, o *protectOptions, ref string) error {
	if o.off && o.cooldown {
		return usagef("--off and --cooldown exclude each other")
	}
	return a.changeImage(ctx, &o.catalogOptions, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		text, err := k.SetProtection(ctx, call, m.ID, !o.off, o.cooldown)
		if err != nil {
			return err
		}
		return a.changed(m, "protection", "deregistration protection: %s", text)
	})
}

func runImagesDisable(ctx context.Context, a *app, o *catalogOptions, ref string) error {
	return a.changeImage(ctx, o, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if err := k.SetEnabled(ctx, call, m.ID, false); err != nil {
			return err
		}
		return a.changed(m, "disabled", "is disabled")
	})
}

func runImagesEnable(ctx context.Context, a *app, o *catalogOptions, ref string) error {
	return a.changeImage(ctx, o, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		if err := k.SetEnabled(ctx, call, m.ID, true); err != nil {
			return err
		}
		return a.changed(m, "enabled", "is enabled")
	})
}

func runImagesDeregister(ctx context.Context, a *app, o *catalogOptions, ref string) error {
	return a.changeImage(ctx, o, ref, func(k *openedCatalog, call catalog.Call, m *catalog.Image) error {
		ok, err := a.confirm(ctx, fmt.Sprintf("Deregister image %s (%s)? Its id is never used again.", m.ID, m.Name))
		if err != nil {
			return err
		}
		if !ok {
			return failf(exitPrompt, "nothing was deregistered")
		}
		if err := k.Deregister(ctx, call, m.ID); err != nil {
			return err
		}
		return a.changed(m, "deregistered", "is deregistered; what lies at %s stays until it is deleted", shown(m.Location))
	})
}
