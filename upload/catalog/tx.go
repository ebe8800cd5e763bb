package catalog

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"
)

// Tx is a change being made: a state, and what becomes of it. It is good only
// within the function given to [Catalog.Update].
type Tx struct {
	Lookup
	view    *View
	earlier map[string]*entry // changes of the same commit, by others
	own     map[string]*entry // nil: deleted
	renew   bool
	at      time.Time
}

func newTx(v *View, earlier map[string]*entry, at time.Time) *Tx {
	t := &Tx{view: v, earlier: earlier, own: map[string]*entry{}, at: at}
	t.Lookup = Lookup{t}
	return t
}

// Now is the time of the change, UTC, whole seconds.
func (t *Tx) Now() time.Time { return t.at }

// Region is the catalog's.
func (t *Tx) Region() string { return t.view.Region() }

// changed is what the commit has put under key.
func (t *Tx) changed(key string) (*entry, bool) {
	if e, ok := t.own[key]; ok {
		return e, true
	}
	e, ok := t.earlier[key]
	return e, ok
}

func (t *Tx) entry(ctx context.Context, key string) (*entry, error) {
	if e, ok := t.changed(key); ok {
		return e, nil
	}
	return t.view.entry(ctx, key)
}

func (t *Tx) scan(ctx context.Context, prefix string) iter.Seq2[*entry, error] {
	return func(yield func(*entry, error) bool) {
		// In order: the state's, with the changed ones in their places.
		put := map[string]*entry{}
		for _, m := range []map[string]*entry{t.earlier, t.own} {
			for k, e := range m {
				if strings.HasPrefix(k, prefix) {
					put[k] = e
				}
			}
		}
		order := slices.Sorted(maps.Keys(put))
		for e, err := range t.view.scan(ctx, prefix) {
			if err != nil {
				yield(nil, err)
				return
			}
			for len(order) > 0 && order[0] < e.Key {
				if n := put[order[0]]; n != nil && !yield(n, nil) {
					return
				}
				order = order[1:]
			}
			if len(order) > 0 && order[0] == e.Key {
				continue // its turn comes
			}
			if !yield(e, nil) {
				return
			}
		}
		for _, k := range order {
			if n := put[k]; n != nil && !yield(n, nil) {
				return
			}
		}
	}
}

// set puts an entry under its key; it must be right.
func (t *Tx) set(e *entry) error {
	if err := e.check(); err != nil {
		return &Error{Code: CodeParameterValue, Message: "the catalog does not take that", Err: err}
	}
	b, err := encodeJSON(e)
	if err != nil {
		return err
	}
	if len(b) > maxEntry {
		return refuse(CodeParameterValue, "the record would have %d bytes, more than %d", len(b), maxEntry)
	}
	t.own[e.Key] = e
	return nil
}

func (t *Tx) delete(key string) { t.own[key] = nil }

// touch makes a commit of it even if nothing changes.
func (t *Tx) touch() { t.renew = true }

// PutImage puts a record, new or changed, and keeps names and locations in
// step. It says InvalidAMIName.Duplicate if another registered image of the
// owner has the name. The record must not be changed afterwards.
func (t *Tx) PutImage(ctx context.Context, m *Image) error {
	old, err := t.Image(ctx, m.ID)
	if err != nil {
		return err
	}
	if old != nil && old.State == Deregistered {
		return refuse(CodeAMIUnavailable, "The image id %q is no longer available", m.ID)
	}
	if old != nil && (old.Owner != m.Owner || m.Revision <= old.Revision) {
		return fmt.Errorf("image %s: revision %d of %s cannot follow revision %d of %s", m.ID, m.Revision, m.Owner, old.Revision, old.Owner)
	}
	if old != nil && old.State != Deregistered {
		if old.Name != "" {
			t.delete(nameKey(old.Owner, old.Name))
		}
		if old.Location != "" {
			t.delete(atPrefix(old.Location) + old.ID)
		}
	}
	if m.State != Deregistered {
		if m.Name != "" {
			has, err := t.ByName(ctx, m.Owner, m.Name)
			if err != nil {
				return err
			}
			if has != nil && has.ID != m.ID {
				return refuse(CodeAMINameDuplicate, "AMI name %s is already in use by AMI %s", m.Name, has.ID)
			}
			if err := t.set(&entry{Key: nameKey(m.Owner, m.Name), Ref: m.ID}); err != nil {
				return err
			}
		}
		if m.Location != "" {
			if err := t.set(&entry{Key: atPrefix(m.Location) + m.ID, Ref: m.ID}); err != nil {
				return err
			}
		}
	}
	return t.set(&entry{Key: imageKey(m.ID), Image: m})
}

// Change puts the next revision of a record: change is given a copy, which gets
// a line of history. by says who did it in account's name.
func (t *Tx) Change(ctx context.Context, m *Image, call Call, action, detail string, change func(*Image) error) (*Image, error) {
	n := m.Clone()
	if err := change(n); err != nil {
		return nil, err
	}
	n.Revision++
	n.History = append(n.History, Change{Time: t.at, Revision: n.Revision, Action: action, Account: call.Account, By: call.By, Detail: oneLine(detail, 512)})
	if len(n.History) > maxHistory {
		n.History = slices.Delete(n.History, 1, 2) // the first says where it came from
	}
	return n, t.PutImage(ctx, n)
}

// PutKeyPair puts a key pair, new or with other tags.
func (t *Tx) PutKeyPair(ctx context.Context, k *KeyPair) error {
	has, err := t.KeyPair(ctx, k.Owner, k.Name)
	if err != nil {
		return err
	}
	if has != nil && has.ID != k.ID {
		return refuse(CodeKeyDuplicate, "The keypair '%s' already exists.", k.Name)
	}
	if err := t.set(&entry{Key: keyPairID + k.ID, Ref: k.Owner + "/" + k.Name}); err != nil {
		return err
	}
	return t.set(&entry{Key: pairKey(k.Owner, k.Name), KeyPair: k})
}

// DeleteKeyPair removes a key pair.
func (t *Tx) DeleteKeyPair(k *KeyPair) {
	t.delete(keyPairID + k.ID)
	t.delete(pairKey(k.Owner, k.Name))
}

// PutAccount puts what is known of an account. Its alias must be nobody else's.
func (t *Tx) PutAccount(ctx context.Context, a *Account) error {
	old, err := t.Account(ctx, a.ID)
	if err != nil {
		return err
	}
	if old != nil && old.Alias != "" {
		t.delete(keyAlias + old.Alias)
	}
	if a.Alias != "" {
		has, err := t.AccountByAlias(ctx, a.Alias)
		if err != nil {
			return err
		}
		if has != nil && has.ID != a.ID {
			return refuse(CodeParameterValue, "The alias %s is that of account %s", a.Alias, has.ID)
		}
		if err := t.set(&entry{Key: keyAlias + a.Alias, Ref: a.ID}); err != nil {
			return err
		}
	}
	return t.set(&entry{Key: keyAccount + a.ID, Account: a})
}

// DeleteAccount forgets an account. Its images stay.
func (t *Tx) DeleteAccount(a *Account) {
	if a.Alias != "" {
		t.delete(keyAlias + a.Alias)
	}
	t.delete(keyAccount + a.ID)
}

// Token finds out whether a request with a client token was carried out before:
// then result is what it led to, and only if digest, that of all that was asked
// for, is the same; else IdempotentParameterMismatch. A token is remembered
// with [Tx.PutToken]; one of "" never is.
func (t *Tx) Token(ctx context.Context, account, action, token, digest string) (result string, ok bool, err error) {
	if token == "" {
		return "", false, nil
	}
	has, err := t.token(ctx, account, action, token)
	if err != nil || has == nil {
		return "", false, err
	}
	if has.Digest != digest {
		return "", false, refuse(CodeIdempotent, "The request uses the same client token as a previous, but non-identical request.")
	}
	return has.Result, true, nil
}

// PutToken remembers what a request with a client token led to. Tokens are
// forgotten after a week, at the earliest.
func (t *Tx) PutToken(account, action, token, digest, result string) error {
	if token == "" {
		return nil
	}
	if len(token) > 64 {
		return refuse(CodeParameterValue, "The client token has %d characters, more than 64", len(token))
	}
	return t.set(&entry{Key: tokenKey(account, action, token), Token: &Token{Digest: digest, Result: result, Created: t.at}})
}

func oneLine(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if checkText("", string(r), 0, 8) != nil {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most-3], "") + "…"
	}
	return s
}
