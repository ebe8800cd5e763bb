package catalog

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Registration is what RegisterImage is asked for.
type Registration struct {
	// Image is what the caller says of it: Name, Description, Location (or
	// RootDeviceName for a record of Kind none), and whatever is not to be
	// taken from the manifest. ID, Owner, State, times, Revision and History
	// are the catalog's.
	Image Image

	// Token makes the request idempotent; "" does not.
	Token string

	// Check, if it is not nil, is asked of the location before it is looked at,
	// each time. Whoever is about to replace what lies there holds a claim while he
	// makes Check find that out.
	Check func(ctx context.Context, location string) error
}

// newID draws an id that was never used: prefix is "ami", "aki", "ari" or "key".
func (t *Tx) newID(ctx context.Context, prefix string) (string, error) {
	for {
		id, err := t.view.c.opt.NewID(prefix)
		if err != nil {
			return "", fmt.Errorf("draw an id: %w", err)
		}
		key := imageKey(id)
		if prefix == "key" {
			key = keyPairID + id
		}
		e, err := t.entry(ctx, key)
		if err != nil {
			return "", err
		}
		if e == nil {
			return id, nil
		}
	}
}

// randomID draws 68 bits.
func randomID(prefix string) (string, error) {
	var b [9]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return prefix + "-" + hex.EncodeToString(b[:])[:17], nil
}

// prefixOf is the kind of id that an image's type has.
func prefixOf(imageType string) string {
	switch imageType {
	case "kernel":
		return "aki"
	case "ramdisk":
		return "ari"
	}
	return "ami"
}

// Register registers an image: what lies at its location is fetched and checked
// first, and gives what the caller left out. It is available at once.
func (c *Catalog) Register(ctx context.Context, call Call, r Registration) (*Image, error) {
	want := r.Image.Clone()
	if err := CheckAccount(call.Account); err != nil {
		return nil, err
	}
	if err := CheckName(want.Name); err != nil {
		return nil, err
	}
	if want.Location == "" && want.RootDeviceName == "" {
		return nil, refuse(CodeMissing, "The request must contain the parameter ImageLocation, or RootDeviceName")
	}
	digest := requestDigest(struct {
		Image Image
		Owner string
	}{r.Image, call.Account})
	if m, err := c.repeated(ctx, call, "RegisterImage", r.Token, digest); m != nil || err != nil {
		return m, err
	}
	var made *Image
	err := c.inspected(ctx, want.Location, r.Check, c.inspectAsked, func(facts *Facts, since int64) (err error) {
		made, err = c.register(ctx, call, r, want.Clone(), facts, since, digest)
		return err
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// inspected has what lies at a location, if there is one, fetched and checked, and
// registered by f: again, if what lies there was deleted meanwhile.
func (c *Catalog) inspected(ctx context.Context, location string, check func(context.Context, string) error, look func(context.Context, string) (*Facts, error), f func(facts *Facts, since int64) error) error {
	if location == "" {
		return f(nil, 0)
	}
	for try := 1; ; try++ {
		v, err := c.View(ctx)
		if err != nil {
			return err
		}
		if check != nil {
			if err := check(ctx, strings.TrimPrefix(location, "/")); err != nil {
				return err
			}
		}
		facts, err := look(ctx, location)
		if err != nil {
			return err
		}
		err = f(facts, v.Sequence())
		if !errors.Is(err, errDeleted) || try == maxTries {
			return err
		}
	}
}

func (c *Catalog) register(ctx context.Context, call Call, r Registration, want *Image, facts *Facts, since int64, digest string) (*Image, error) {
	if facts != nil {
		facts.fill(want)
	} else {
		want.Kind = KindNone
		want.RootDeviceType = "ebs"
	}
	want.defaults()
	var made *Image
	err := c.run(ctx, call, func(t *Tx) error {
		made = nil
		if id, ok, err := t.Token(ctx, call.Account, "RegisterImage", r.Token, digest); err != nil || ok {
			if err == nil {
				made, err = t.Image(ctx, id)
			}
			return err
		}
		m := want.Clone()
		m.Owner, m.State, m.Created = call.Account, Available, t.Now()
		var err error
		if m.ID, err = t.newID(ctx, prefixOf(m.Type)); err != nil {
			return err
		}
		if err := t.claimed(ctx, m.Location, since); err != nil {
			return err
		}
		if made, err = t.create(ctx, m, call, "RegisterImage", m.Location); err != nil {
			return err
		}
		return t.PutToken(call.Account, "RegisterImage", r.Token, digest, m.ID)
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// repeated finds out, before any work, what a request with the same token led
// to. It is nil if there was none.
func (c *Catalog) repeated(ctx context.Context, call Call, action, token, digest string) (m *Image, err error) {
	if token == "" || call.DryRun {
		return nil, nil
	}
	err = c.Read(ctx, func(v *View) error {
		t := newTx(v, nil, c.now())
		id, ok, err := t.Token(ctx, call.Account, action, token, digest)
		if err == nil && ok {
			m, err = t.Image(ctx, id)
		}
		return err
	})
	return m, err
}

func requestDigest(v any) string {
	b, err := encodeJSON(v)
	if err != nil {
		return ""
	}
	return digestOf(string(b))
}

// create puts a new record.
func (t *Tx) create(ctx context.Context, m *Image, call Call, action, detail string) (*Image, error) {
	m.Revision = 1
	m.History = []Change{{Time: t.at, Revision: 1, Action: action, Account: call.Account, By: call.By, Detail: oneLine(detail, 512)}}
	return m, t.PutImage(ctx, m)
}

// defaults are what a record has that says nothing else.
func (m *Image) defaults() {
	set := func(s *string, to string) {
		if *s == "" {
			*s = to
		}
	}
	set(&m.Type, "machine")
	set(&m.Architecture, "i386") // EC2's
	set(&m.RootDeviceType, "instance-store")
	set(&m.VirtualizationType, "paravirtual")
	set(&m.Hypervisor, "xen")
	set(&m.UsageOperation, "RunInstances")
	if m.Platform == "windows" {
		set(&m.PlatformDetails, "Windows")
	}
	set(&m.PlatformDetails, "Linux/UNIX")
}

// Deregister ends an image's life in the catalog. Its bytes stay, and so do
// machines that run from it. Its id is never used again; its name is free.
func (c *Catalog) Deregister(ctx context.Context, call Call, id string) error {
	return c.run(ctx, call, func(t *Tx) error {
		m, err := t.Own(ctx, call.Account, id)
		if err != nil {
			return err
		}
		if m.Protection != "" {
			return refuse(CodeNotPermitted, "The image '%s' is protected against deregistration: disable the protection first", id)
		}
		if t.at.Before(m.ProtectedUntil) {
			return refuse(CodeNotPermitted, "The image '%s' is protected against deregistration until %s", id, m.ProtectedUntil.Format("2006-01-02T15:04:05Z"))
		}
		_, err = t.Change(ctx, m, call, "DeregisterImage", "", func(n *Image) error {
			n.State, n.Deregistered = Deregistered, t.at
			// What remains says which image it was, not what it held.
			n.Reason, n.Public, n.LaunchAccounts, n.LaunchOrgs, n.LaunchOrgUnits = Reason{}, false, nil, nil, nil
			n.GettingStarted, n.Parameters, n.Files, n.UefiData, n.BlockDevices, n.BillingProducts = "", nil, nil, "", nil, nil
			return nil
		})
		return err
	})
}

// mergeTags gives t with what is put.
func mergeTags(t, put Tags) Tags {
	n := maps.Clone(t)
	if n == nil {
		n = Tags{}
	}
	maps.Copy(n, put)
	return n
}

func sortedSet(l []string) []string {
	l = slices.Compact(slices.Sorted(slices.Values(l)))
	if len(l) == 0 {
		return nil
	}
	return l
}
