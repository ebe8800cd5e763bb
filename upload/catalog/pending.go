package catalog

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// CreatePending puts the record of an image that is still being made:
// [Catalog.Complete] or [Catalog.Fail] is to follow. It is of no kind and has no
// location yet. check, which may be nil, is asked before anything is put, within
// the transaction; it must have no effects.
func (c *Catalog) CreatePending(ctx context.Context, call Call, action string, want Image, check func(*Tx) error) (*Image, error) {
	if err := CheckName(want.Name); err != nil {
		return nil, err
	}
	w := want.Clone()
	w.Kind, w.Location = KindNone, ""
	w.defaults()
	var made *Image
	err := c.run(ctx, call, func(t *Tx) error {
		if check != nil {
			if err := check(t); err != nil {
				return err
			}
		}
		m := w.Clone()
		m.Owner, m.State, m.Created = call.Account, Pending, t.Now()
		var err error
		if m.ID, err = t.newID(ctx, prefixOf(m.Type)); err != nil {
			return err
		}
		made, err = t.create(ctx, m, call, action, m.SourceInstance)
		return err
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// errSettled ends a transaction that has nothing left to do.
var errSettled = errors.New("the image is no longer pending")

// Complete makes a pending image available: what lies at the location is
// fetched and checked as by [Catalog.Register]. The location must be no other
// image's: what is new lies where nothing was. An image that is no longer
// pending is left alone.
//
// If notBefore is not zero, somebody without a key may have said what the location
// is. Then it must be IMAGE@DIGITS with all 64 digits, of a version that the image's
// head lists and that was made at notBefore or later, less [ClockSlack].
func (c *Catalog) Complete(ctx context.Context, call Call, id, location string, notBefore time.Time) error {
	if location == "" {
		return refuse(CodeManifest, "There is no location to find the image at")
	}
	look := c.Inspect
	if !notBefore.IsZero() {
		look = func(ctx context.Context, location string) (*Facts, error) {
			return c.inspectNew(ctx, location, notBefore)
		}
	}
	return c.inspected(ctx, location, nil, look, func(facts *Facts, since int64) error { return c.complete(ctx, call, id, facts, since) })
}

// ClockSlack is by how much the clock of whoever made something may differ from the
// catalog's.
const ClockSlack = 15 * time.Minute

// inspectNew is Inspect of a version that is to be new and to be kept.
func (c *Catalog) inspectNew(ctx context.Context, location string, notBefore time.Time) (*Facts, error) {
	_, version, _ := strings.Cut(location, "@")
	if _, err := chunked.ParseName(version); err != nil {
		return nil, refuse(CodeManifest, "%q is no version's whole name", clip(location))
	}
	f, err := c.inspectInstar(ctx, location, images.ResolveOptions{Listed: true})
	if err != nil {
		return nil, err
	}
	if f.Made.Before(notBefore.Add(-ClockSlack)) {
		return nil, refuse(CodeManifest, "The version %q is of %s, older than what was asked for at %s", clip(location), f.Made.Format(time.RFC3339), notBefore.UTC().Format(time.RFC3339))
	}
	return f, nil
}

func (c *Catalog) complete(ctx context.Context, call Call, id string, facts *Facts, since int64) error {
	return c.settle(ctx, call, id, "complete", facts.Location, func(t *Tx, n *Image) error {
		others, err := t.At(ctx, facts.Location)
		if err != nil {
			return err
		}
		if len(others) > 0 {
			whose := "another image" // and if it is another account's, not more
			if i := slices.IndexFunc(others, func(m *Image) bool { return m.Owner == call.Account }); i >= 0 {
				whose = others[i].ID
			}
			return refuse(CodeManifest, "The location %q is %s's already", clip(facts.Location), whose)
		}
		if err := t.claimed(ctx, facts.Location, since); err != nil {
			return err
		}
		n.Architecture, n.VirtualizationType = "", "" // guesses until now
		facts.fill(n)
		n.defaults()
		n.State, n.Reason = Available, Reason{}
		return nil
	})
}

// Fail says that a pending image will not come. One that is no longer pending
// is left alone.
func (c *Catalog) Fail(ctx context.Context, call Call, id string, why Reason) error {
	why.Message = oneLine(why.Message, 1024)
	return c.settle(ctx, call, id, "fail", why.Code, func(_ *Tx, n *Image) error {
		n.State, n.Reason = Failed, why
		return nil
	})
}

func (c *Catalog) settle(ctx context.Context, call Call, id, action, detail string, f func(*Tx, *Image) error) error {
	_, err := c.change(ctx, call, id, action, detail, func(t *Tx, n *Image) error {
		if n.State != Pending {
			return errSettled
		}
		return f(t, n)
	})
	if errors.Is(err, errSettled) {
		return nil
	}
	return err
}
