package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
)

// ClaimLife is how long a deletion may take: after that it is taken for one that
// was killed, and keeps nobody from registering what lies there.
const ClaimLife = time.Hour

// Claim says that what lies at a location is being deleted: nothing is
// registered there until that has ended. Several may be at it.
type Claim struct {
	Location string    `json:"location"`
	Created  time.Time `json:"created"` // of the newest holder
	By       string    `json:"by,omitempty"`
	Holders  []Holder  `json:"holders,omitempty"`

	// Released is the sequence of the state in which the last holder went: who had
	// looked at the location before must look again.
	Released int64 `json:"released,omitempty"`
}

// Holder is a deletion under way.
type Holder struct {
	ID      string    `json:"id"` // 32 hex digits drawn at random
	Created time.Time `json:"created"`
}

func (c *Claim) check() error {
	if len(c.Holders) > maxHolders || c.Released < 0 || c.Released > maxNumber {
		return fmt.Errorf("a claim with %d holders, released by %d", len(c.Holders), c.Released)
	}
	for _, h := range c.Holders {
		if !isNonce(h.ID) {
			return errors.New("a holder's id is not 32 hex digits")
		}
		if err := checkTime("holder", h.Created); err != nil {
			return err
		}
	}
	return errors.Join(checkText("location", c.Location, 1, 2048), checkText("by", c.By, 0, 255), checkTime("created", c.Created))
}

// maxHolders is how many delete what lies at one location.
const maxHolders = 64

// alive are the holders that are not taken for dead.
func (c *Claim) alive(now time.Time) []Holder {
	var l []Holder
	for _, h := range c.Holders {
		if now.Sub(h.Created) < ClaimLife {
			l = append(l, h)
		}
	}
	return l
}

// Claim says that what lies at locations is about to be deleted, after which
// nothing is registered there until release is called, which must be when the
// deletion has ended, well or not; or until [ClaimLife] has passed. An image that is
// registered there, deregistered ones apart, is [ErrRegistered], named. Without a
// catalog in the store it does nothing; without a key that may sign for it, it
// looks whether something is registered, and cannot keep others from registering
// it at that moment.
func (c *Catalog) Claim(ctx context.Context, by string, locations ...string) (release func(context.Context) error, err error) {
	nothing := func(context.Context) error { return nil }
	v, err := c.View(ctx)
	if isNoCatalog(err) {
		return nothing, nil
	}
	if err != nil {
		return nil, err
	}
	for _, l := range locations {
		if err := v.Unregistered(ctx, l); err != nil {
			return nil, err
		}
	}
	if !c.signs(v) {
		return nothing, nil
	}
	id, err := newNonce()
	if err != nil {
		return nil, err
	}
	err = c.Update(ctx, func(t *Tx) error {
		for _, l := range locations {
			if err := t.Unregistered(ctx, l); err != nil {
				return err
			}
			n := &Claim{Location: l, Created: t.at, By: by}
			if has, err := t.claim(ctx, l); err != nil {
				return err
			} else if has != nil {
				n.Holders, n.Released = has.alive(t.at), has.Released
			}
			if len(n.Holders) == maxHolders {
				return refuse(CodeNotPermitted, "What lies at %s is being deleted by %d others", l, maxHolders)
			}
			n.Holders = append(n.Holders, Holder{id, t.at})
			if err := t.set(&entry{Key: claimKey(l), Claim: n}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return c.release(ctx, id, locations) }, nil
}

// release says that a deletion that was claimed has ended.
func (c *Catalog) release(ctx context.Context, id string, locations []string) error {
	return c.Update(ctx, func(t *Tx) error {
		for _, l := range locations {
			has, err := t.claim(ctx, l)
			if err != nil {
				return err
			}
			if has == nil || !slices.ContainsFunc(has.Holders, func(h Holder) bool { return h.ID == id }) {
				continue
			}
			n := *has
			n.Holders = slices.DeleteFunc(slices.Clone(has.Holders), func(h Holder) bool { return h.ID == id })
			n.Released = t.view.Sequence() + 1
			if err := t.set(&entry{Key: claimKey(l), Claim: &n}); err != nil {
				return err
			}
		}
		return nil
	})
}

// forgetClaims forgets deletions that ended so long ago that nobody is about to
// register what he saw before.
func (t *Tx) forgetClaims(ctx context.Context) error {
	for c, err := range t.Claims(ctx) {
		if err != nil {
			return err
		}
		if len(c.alive(t.at)) == 0 && t.at.Sub(c.Created) > tokenLife {
			t.delete(claimKey(c.Location))
		}
	}
	return nil
}

// errDeleted says that what was looked at was, perhaps, deleted since.
var errDeleted = errors.New("a deletion came between")

// claimed refuses a location that is being deleted, and one that a deletion was
// done with after the state since, in which the caller looked at it.
func (t *Tx) claimed(ctx context.Context, location string, since int64) error {
	if location == "" {
		return nil
	}
	has, err := t.claim(ctx, location)
	if err != nil || has == nil {
		return err
	}
	if len(has.alive(t.at)) > 0 {
		return refuse(CodeManifest, "What lies at %s is being deleted, since %s", location, has.Created.Format("2006-01-02T15:04:05Z"))
	}
	if has.Released > since {
		return errDeleted
	}
	return nil
}

// Guard is [images.Options.Claim] for the images of the catalog's store.
func (c *Catalog) Guard(ctx context.Context, image string, versions []chunked.Name) (release func(context.Context) error, err error) {
	var locations []string
	for _, n := range versions {
		locations = append(locations, image+"@"+n.String())
	}
	return c.Claim(ctx, "", locations...)
}

// Registered are the Instar images that are registered, for
// [images.GCOptions.Registered]. Without a catalog there are none.
func (c *Catalog) Registered(ctx context.Context) (func(image string, n chunked.Name) bool, error) {
	at := map[string]bool{}
	err := c.Read(ctx, func(v *View) error {
		clear(at)
		for m, err := range v.Images(ctx) {
			if err != nil {
				return err
			}
			if m.Kind == KindInstar && m.State != Deregistered {
				at[m.Location] = true
			}
		}
		return nil
	})
	if err != nil && !isNoCatalog(err) {
		return nil, err
	}
	return func(image string, n chunked.Name) bool { return at[image+"@"+n.String()] }, nil
}

// signs tells whether changes signed here are believed here.
func (c *Catalog) signs(v *View) bool {
	if c.opt.Signer == nil {
		return false
	}
	_, err := c.opt.Trust.Check(c.opt.Signer.Public(), v.Region(), Namespace)
	return err == nil
}

// Unregistered makes sure that no image is registered at location: else
// [ErrRegistered] with the ids.
func (l Lookup) Unregistered(ctx context.Context, location string) error {
	at, err := l.At(ctx, location)
	if err != nil || len(at) == 0 {
		return err
	}
	var ids []string
	for _, m := range at {
		ids = append(ids, fmt.Sprintf("%s (%s)", m.ID, m.Name))
	}
	return &Error{Code: CodeNotPermitted, Message: fmt.Sprintf("%s is registered as %s: deregister that first", location, strings.Join(ids, ", ")), Err: ErrRegistered}
}
