package catalog

import (
	"context"
	"iter"
	"strings"
)

// source is a state of the catalog, perhaps with changes not made yet.
type source interface {
	entry(ctx context.Context, key string) (*entry, error)
	scan(ctx context.Context, prefix string) iter.Seq2[*entry, error]
}

// Lookup is what [View] and [Tx] have in common. What is looked for and is not
// there is nil without an error.
type Lookup struct{ s source }

// Image is the record of an image, deregistered ones included.
func (l Lookup) Image(ctx context.Context, id string) (*Image, error) {
	e, err := l.s.entry(ctx, imageKey(id))
	if err != nil || e == nil {
		return nil, err
	}
	return e.Image, nil
}

// Images are all records, by id, deregistered ones included.
func (l Lookup) Images(ctx context.Context) iter.Seq2[*Image, error] {
	return values(l.s.scan(ctx, keyImage), func(e *entry) *Image { return e.Image })
}

// ByName is the registered image of that name.
func (l Lookup) ByName(ctx context.Context, owner, name string) (*Image, error) {
	e, err := l.s.entry(ctx, nameKey(owner, name))
	if err != nil || e == nil {
		return nil, err
	}
	return l.Image(ctx, e.Ref)
}

// At are the registered images of a location, by id.
func (l Lookup) At(ctx context.Context, location string) ([]*Image, error) {
	var all []*Image
	for e, err := range l.s.scan(ctx, atPrefix(location)) {
		if err != nil {
			return nil, err
		}
		m, err := l.Image(ctx, e.Ref)
		if err != nil {
			return nil, err
		}
		if m != nil {
			all = append(all, m)
		}
	}
	return all, nil
}

// KeyPair is an account's key pair of that name.
func (l Lookup) KeyPair(ctx context.Context, owner, name string) (*KeyPair, error) {
	e, err := l.s.entry(ctx, pairKey(owner, name))
	if err != nil || e == nil {
		return nil, err
	}
	return e.KeyPair, nil
}

// KeyPairByID is the key pair of that id ("key-…"), whosever it is.
func (l Lookup) KeyPairByID(ctx context.Context, id string) (*KeyPair, error) {
	e, err := l.s.entry(ctx, keyPairID+id)
	if err != nil || e == nil {
		return nil, err
	}
	owner, name, _ := strings.Cut(e.Ref, "/")
	return l.KeyPair(ctx, owner, name)
}

// KeyPairs are an account's key pairs, by name.
func (l Lookup) KeyPairs(ctx context.Context, owner string) iter.Seq2[*KeyPair, error] {
	return values(l.s.scan(ctx, pairKey(owner, "")), func(e *entry) *KeyPair { return e.KeyPair })
}

// Account is what is known of an account.
func (l Lookup) Account(ctx context.Context, id string) (*Account, error) {
	e, err := l.s.entry(ctx, keyAccount+id)
	if err != nil || e == nil {
		return nil, err
	}
	return e.Account, nil
}

// AccountByAlias is the account of that alias.
func (l Lookup) AccountByAlias(ctx context.Context, alias string) (*Account, error) {
	e, err := l.s.entry(ctx, keyAlias+alias)
	if err != nil || e == nil {
		return nil, err
	}
	return l.Account(ctx, e.Ref)
}

// Accounts are all accounts that anything is known of, by id.
func (l Lookup) Accounts(ctx context.Context) iter.Seq2[*Account, error] {
	return values(l.s.scan(ctx, keyAccount), func(e *entry) *Account { return e.Account })
}

// Claims are the deletions under way.
func (l Lookup) Claims(ctx context.Context) iter.Seq2[*Claim, error] {
	return values(l.s.scan(ctx, keyClaim), func(e *entry) *Claim { return e.Claim })
}

func (l Lookup) claim(ctx context.Context, location string) (*Claim, error) {
	e, err := l.s.entry(ctx, claimKey(location))
	if err != nil || e == nil {
		return nil, err
	}
	return e.Claim, nil
}

func (l Lookup) token(ctx context.Context, owner, action, token string) (*Token, error) {
	e, err := l.s.entry(ctx, tokenKey(owner, action, token))
	if err != nil || e == nil {
		return nil, err
	}
	return e.Token, nil
}

func values[T any](entries iter.Seq2[*entry, error], of func(*entry) T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for e, err := range entries {
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			if !yield(of(e), nil) {
				return
			}
		}
	}
}
