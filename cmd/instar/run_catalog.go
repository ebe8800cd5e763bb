package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
)

// call is in whose name something is done.
func (a *app) call(account string, signer keys.Signer) (catalog.Call, error) {
	c := catalog.Call{Account: strings.ReplaceAll(a.setting("account_id", "--account", account), "-", "")}
	if c.Account == "" {
		return c, withHint(usagef("missing option --account"), "account_id in the configuration, or EC2_USER_ID, is whose images are changed.")
	}
	if err := catalog.CheckAccount(c.Account); err != nil {
		return c, usagef("--account %q: an account has 12 digits", c.Account)
	}
	if signer != nil {
		c.By = keys.Fingerprint(signer.Public())
	}
	return c, nil
}

// inCatalog opens a catalog, for changes too if change is set, and does something
// in it.
func (a *app) inCatalog(ctx context.Context, o *imageStore, sign string, change bool, do func(k *openedCatalog) error) (err error) {
	k, err := a.openCatalog(ctx, o, sign, change)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	return explainCatalog(do(k))
}

// inAccount does something in a catalog in the name of an account.
func (a *app) inAccount(ctx context.Context, o *catalogOptions, do func(k *openedCatalog, call catalog.Call) error) error {
	return a.inCatalog(ctx, &o.imageStore, o.sign, true, func(k *openedCatalog) error {
		call, err := a.call(o.account, k.signer)
		if err != nil {
			return err
		}
		return do(k, call)
	})
}

// lookAs reads a catalog as an account does.
func (a *app) lookAs(ctx context.Context, o *catalogOptions, do func(k *openedCatalog, v *catalog.View, account string) error) error {
	call, err := a.call(o.account, nil)
	if err != nil {
		return err
	}
	return a.inCatalog(ctx, &o.imageStore, "", false, func(k *openedCatalog) error {
		v, err := k.View(ctx)
		if err != nil {
			return err
		}
		return do(k, v, call.Account)
	})
}

// explainCatalog adds what to do, where nobody has said it.
func explainCatalog(err error) error {
	var said *exitError
	switch {
	case errors.As(err, &said) && said.hint != "":
		return err
	case errors.Is(err, catalog.ErrNoCatalog):
		return withHint(&exitError{code: exitFile, err: err}, "\"instar catalog create REGION\" makes one.")
	case errors.Is(err, catalog.ErrStale):
		return withHint(err, "Nobody has renewed it, or somebody hides the newest. If it is the newest, \"instar catalog renew --lapsed\" renews it.")
	case errors.Is(err, catalog.ErrClock):
		return withHint(err, "If it is right, another machine's was ahead when it changed the catalog: \"instar catalog renew --lapsed\" makes the next state by this one.")
	case errors.Is(err, catalog.ErrRollback), errors.Is(err, catalog.ErrForked):
		return withHint(err, "The store shows an older catalog than this machine has seen: an older copy was put back, or somebody hides the newest.\nIf it was you who put an older copy back, \"instar catalog forget\" has it believed.")
	case errors.Is(err, keys.ErrUntrusted):
		return withHint(err, "A line in allowed_signers lets a key sign for the catalog: REGION namespaces=\"instar-catalog\" KEY, and each reader needs it.")
	}
	return err
}

// findImage finds a registered image by id, NAME or ACCOUNT/NAME. A plain name is
// one of the account's own: anybody may give an image of his the same, for whoever
// does not look whose it is.
func findImage(ctx context.Context, v *catalog.View, account, ref string) (*catalog.Image, error) {
	if strings.HasPrefix(ref, "ami-") || strings.HasPrefix(ref, "aki-") || strings.HasPrefix(ref, "ari-") {
		if catalog.CheckID(ref) == nil {
			m, err := v.Image(ctx, ref)
			if err == nil && m == nil {
				err = failf(exitFile, "there is no image %s", ref)
			}
			return m, err
		}
	}
	name := ref
	const whose = "Another account's image is named by its id, or ACCOUNT/NAME."
	if owner, rest, ok := strings.Cut(ref, "/"); ok && catalog.CheckAccount(owner) == nil {
		account, name = owner, rest
	}
	if account == "" {
		return nil, withHint(failf(exitFile, "no account is known whose image %s would be", shown(ref)),
			"account_id in the configuration, or EC2_USER_ID, says who you are. "+whose)
	}
	m, err := v.ByName(ctx, account, name)
	if err == nil && m == nil {
		err = withHint(failf(exitFile, "account %s has no image registered as %s", account, shown(name)), whose)
	}
	return m, err
}

// changeImage opens the catalog and makes a change to one image, in the name of
// its owner.
func (a *app) changeImage(ctx context.Context, o *catalogOptions, ref string, f func(k *openedCatalog, call catalog.Call, m *catalog.Image) error) error {
	return a.inCatalog(ctx, &o.imageStore, o.sign, true, func(k *openedCatalog) error {
		v, err := k.View(ctx)
		if err != nil {
			return err
		}
		account := strings.ReplaceAll(a.setting("account_id", "--account", o.account), "-", "")
		m, err := findImage(ctx, v, account, ref)
		if err != nil {
			return err
		}
		if o.account != "" && m.Owner != account {
			return failf(exitUsage, "the image %s is account %s's", m.ID, m.Owner)
		}
		return f(k, catalog.Call{Account: m.Owner, By: keys.Fingerprint(k.signer.Public())}, m)
	})
}

func (a *app) changed(m *catalog.Image, done, format string, args ...any) error {
	return a.ui.Result("changed", m.ID+" "+fmt.Sprintf(format, args...), ui.Fields{"image_id": m.ID, "name": m.Name, "change": done})
}

func tagsOf(l []string) (catalog.Tags, error) {
	t := catalog.Tags{}
	for _, s := range l {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, usagef("tag %q: write KEY=VALUE", s)
		}
		t[k] = v
	}
	return t, nil
}

func runCatalogShow(ctx context.Context, a *app, o *imageStore) error {
	return a.inCatalog(ctx, o, "", false, func(k *openedCatalog) error { return a.showCatalog(ctx, k) })
}

func (a *app) showCatalog(ctx context.Context, k *openedCatalog) error {
	var v *catalog.View
	states := map[catalog.State]int{}
	accounts := 0
	err := k.Read(ctx, func(now *catalog.View) error {
		v, accounts = now, 0
		clear(states)
		for m, err := range v.Images(ctx) {
			if err != nil {
				return err
			}
			states[m.State]++
		}
		for _, err := range v.Accounts(ctx) {
			if err != nil {
				return err
			}
			accounts++
		}
		return nil
	})
	if err != nil {
		return err
	}
	text := fmt.Sprintf("region       %s\nchange       %d, %s\nsigned by    %s\nimages       %d available, %d pending, %d disabled, %d failed, %d deregistered\naccounts     %d noted",
		v.Region(), v.Sequence(), stamp(v.Changed()), v.Signer(), states[catalog.Available], states[catalog.Pending], states[catalog.Disabled],
		states[catalog.Failed], states[catalog.Deregistered], accounts)
	f := ui.Fields{
		"region": v.Region(), "sequence": v.Sequence(), "changed": v.Changed(), "signer": v.Signer(), "root": v.Root().String(), "images": states, "accounts": accounts,
	}
	if e := v.Expires(); !e.IsZero() {
		text, f["expires"] = text+"\nexpires      "+stamp(e), e
	}
	return a.ui.Result("catalog", text, f)
}

func runCatalogGC(ctx context.Context, a *app, o *imageStore, sign string, dry bool) error {
	return a.inCatalog(ctx, o, sign, !dry, func(k *openedCatalog) error {
		r, err := k.Collect(ctx, dry)
		if err != nil {
			return err
		}
		word := "deleted"
		if dry {
			word = "would delete"
		}
		return a.ui.Result("collected", fmt.Sprintf("%s %s, %s", word, plural(r.Objects, "object"), ui.Size(r.Bytes)), ui.Fields{"objects": r.Objects, "bytes": r.Bytes, "tokens": r.Tokens, "dry_run": dry})
	})
}

func runCatalogForget(ctx context.Context, a *app, o *imageStore) error {
	return a.inCatalog(ctx, o, "", false, func(k *openedCatalog) error {
		ok, err := a.confirm(ctx, fmt.Sprintf("Forget what this machine has seen of the catalog of %s, and accept an older state?", k.Catalog))
		if err != nil {
			return err
		}
		if !ok {
			return failf(exitPrompt, "nothing was forgotten")
		}
		if err := k.Forget(); err != nil {
			return err
		}
		return a.ui.Result("forgotten", "Forgot what was seen of the catalog", ui.Fields{"store": k.Catalog.String()})
	})
}
