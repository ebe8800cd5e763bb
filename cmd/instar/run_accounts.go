package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
)

func runAccountsSet(ctx context.Context, a *app, o *accountsOptions, id string) error {
	acc := catalog.Account{ID: strings.ReplaceAll(id, "-", ""), Alias: o.alias}
	if catalog.CheckAccount(acc.ID) != nil {
		return usagef("account %q: it has 12 digits", id)
	}
	if len(o.keys) > 0 {
		l, err := a.recipientsOf(o.keys)
		if err != nil {
			return err
		}
		for _, r := range l {
			acc.Recipients = append(acc.Recipients, r.String())
		}
	}
	return a.inCatalog(ctx, &o.imageStore, o.sign, true, func(k *openedCatalog) error {
		if err := k.SetAccount(ctx, acc); err != nil {
			return err
		}
		return a.showAccount(&acc)
	})
}

func (a *app) showAccount(acc *catalog.Account) error {
	text := acc.ID
	if acc.Alias != "" {
		text += "  " + acc.Alias
	}
	return a.ui.Result("account", fmt.Sprintf("%s  %s", text, plural(len(acc.Recipients), "key")), ui.Fields{"account": acc.ID, "alias": acc.Alias, "recipients": acc.Recipients})
}

func runAccountsList(ctx context.Context, a *app, o *accountsOptions) error {
	return a.inCatalog(ctx, &o.imageStore, "", false, func(k *openedCatalog) error {
		v, err := k.View(ctx)
		if err != nil {
			return err
		}
		for acc, err := range v.Accounts(ctx) {
			if err != nil {
				return err
			}
			if err := a.showAccount(acc); err != nil {
				return err
			}
		}
		return nil
	})
}

func runAccountsRemove(ctx context.Context, a *app, o *accountsOptions, id string) error {
	return a.inCatalog(ctx, &o.imageStore, o.sign, true, func(k *openedCatalog) error {
		was, err := k.RemoveAccount(ctx, strings.ReplaceAll(id, "-", ""))
		if err != nil {
			return err
		}
		text := "forgot what was noted of " + shown(id)
		if !was {
			text = "nothing was noted of " + shown(id)
		}
		return a.ui.Result("removed", text, ui.Fields{"account": id, "was": was})
	})
}
