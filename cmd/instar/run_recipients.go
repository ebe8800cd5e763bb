package main

import (
	"context"
	"errors"
	"slices"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

// recipientText shows a key as people can tell it from others: post-quantum
// keys have two thousand characters.
func recipientText(r images.Recipient) string {
	text := r.Key
	if len(text) > 100 {
		text = text[:48] + "..." + text[len(text)-16:]
	}
	if r.Comment != "" {
		text += " (" + shown(r.Comment) + ")"
	}
	return text
}

// recipientsOf reads what KEY arguments name.
func (a *app) recipientsOf(args []string) ([]*keys.Recipient, error) {
	var all []*keys.Recipient
	for _, arg := range args {
		r, err := recipients(arg, a.getenv("HOME"))
		if err != nil {
			return nil, err
		}
		all = append(all, r...)
	}
	if len(all) == 0 {
		return nil, usagef("missing argument: KEY")
	}
	return all, nil
}

// recipientsTarget is what the recipients commands are about: an image, or the
// domain when --creators is given.
type recipientsTarget struct {
	*openedStore
	image  *images.Image
	domain string
	rest   []string
}

func (a *app) recipientsTarget(ctx context.Context, o *recipientsOptions, args []string) (*recipientsTarget, error) {
	t := &recipientsTarget{rest: args}
	if !o.creators {
		if len(args) == 0 {
			return nil, usagef("missing argument: IMAGE, or the option --creators")
		}
		if o.domain != "" || o.sign != "" {
			return nil, usagef("--domain and --sign go with --creators")
		}
		t.rest = args[1:]
	} else if o.maxAge != "" || o.atLeast != 0 {
		return nil, usagef("--max-age and --at-least are about images: they do not go with --creators")
	} else if t.domain = a.setting("domain", "--domain", o.domain); t.domain == "" {
		t.domain = defaultDomain
	}
	s, err := a.readImages(ctx, &o.imageStore)
	if err != nil {
		return nil, err
	}
	t.openedStore = s
	if !o.creators {
		if t.image, err = a.resolve(ctx, s, args[0], &o.fresh); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return t, nil
}

// list is who the store says can open it.
func (t *recipientsTarget) list(ctx context.Context) ([]images.Recipient, error) {
	if t.image != nil {
		return t.image.Recipients(ctx)
	}
	d, err := t.Domain(ctx, t.domain, images.DomainOptions{})
	if err != nil {
		return nil, err
	}
	return d.Creators, nil
}

func runRecipientsList(ctx context.Context, a *app, o *recipientsOptions, args []string) error {
	t, err := a.recipientsTarget(ctx, o, args)
	if err != nil {
		return err
	}
	defer t.Close()
	if len(t.rest) > 0 {
		return usagef("unexpected argument %q", t.rest[0])
	}
	list, err := t.list(ctx)
	if err != nil {
		return err
	}
	for _, r := range list {
		if err := a.ui.Result("recipient", recipientText(r), ui.Fields{"recipient": r.Key, "comment": r.Comment}); err != nil {
			return err
		}
	}
	return nil
}

func runRecipientsAdd(ctx context.Context, a *app, o *recipientsOptions, args []string) error {
	return changeRecipients(ctx, a, o, args, "added", func(t *recipientsTarget, signer keys.Signer, r *keys.Recipient) error {
		if t.image != nil {
			return t.image.AddRecipient(ctx, r)
		}
		return t.AddCreator(ctx, t.domain, r, signer)
	})
}

func runRecipientsRemove(ctx context.Context, a *app, o *recipientsOptions, args []string) error {
	return changeRecipients(ctx, a, o, args, "removed", func(t *recipientsTarget, signer keys.Signer, r *keys.Recipient) error {
		if t.image != nil {
			return t.image.RemoveRecipient(ctx, r.String())
		}
		return t.RemoveCreator(ctx, t.domain, r.String(), signer)
	})
}

func changeRecipients(ctx context.Context, a *app, o *recipientsOptions, args []string, done string, change func(*recipientsTarget, keys.Signer, *keys.Recipient) error) error {
	t, err := a.recipientsTarget(ctx, o, args)
	if err != nil {
		return err
	}
	defer t.Close()
	list, err := a.recipientsOf(t.rest)
	if err != nil {
		return err
	}
	before, err := t.list(ctx)
	if err != nil {
		return err
	}
	var signer keys.Signer
	if o.creators {
		if signer, err = a.signer(ctx, &o.imageStore, o.sign); err != nil {
			return err
		}
	}
	for _, r := range list {
		is := slices.ContainsFunc(before, func(b images.Recipient) bool { return b.Key == r.String() })
		if is == (done == "added") {
			say := " is one already"
			if !is {
				say = " is none"
			}
			if err := a.ui.Result("recipient", recipientText(images.Recipient{Key: r.String()})+say, ui.Fields{"recipient": r.String(), "change": ""}); err != nil {
				return err
			}
			continue
		}
		if err := change(t, signer, r); err != nil {
			return err
		}
		shown := images.Recipient{Key: r.String(), Comment: r.Comment()}
		if err := a.ui.Result("recipient", done+" "+recipientText(shown), ui.Fields{"recipient": r.String(), "comment": r.Comment(), "change": done}); err != nil {
			return err
		}
	}
	if done == "removed" {
		a.ui.Say("note: who has read it before may have kept a copy")
	}
	return nil
}
