package catalog

import (
	"context"

	"github.com/instar-image/instar/bundle/keys"
)

// SetAccount says what the catalog knows of an account: its alias, and the
// public keys that Instar images shared with it are wrapped for. Recipients are
// spelled as [keys.Recipient] does. Whoever may sign for the catalog may do it.
func (c *Catalog) SetAccount(ctx context.Context, a Account) error {
	if err := CheckAccount(a.ID); err != nil {
		return err
	}
	for i, text := range a.Recipients {
		r, err := keys.ParseRecipient(text)
		if err != nil {
			return &Error{Code: CodeParameterValue, Message: "A key of account " + a.ID + " is not usable", Err: err}
		}
		a.Recipients[i] = r.String()
	}
	a.Recipients = sortedSet(a.Recipients)
	return c.Update(ctx, func(t *Tx) error {
		n := a
		n.Created = t.Now()
		old, err := t.Account(ctx, a.ID)
		if err != nil {
			return err
		}
		if old != nil {
			n.Created = old.Created
		}
		return t.PutAccount(ctx, &n)
	})
}

// RemoveAccount forgets an account's alias and keys. Its images and permissions
// stay. It tells whether anything was known of it.
func (c *Catalog) RemoveAccount(ctx context.Context, id string) (was bool, err error) {
	err = c.Update(ctx, func(t *Tx) error {
		a, err := t.Account(ctx, id)
		was = a != nil
		if err != nil || a == nil {
			return err
		}
		t.DeleteAccount(a)
		return nil
	})
	return was, err
}
