package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/catalog/stored"
)

const formatStored = "instar-stored-image"

// storedDoc is the head of an image as one object (SPEC.md of package stored).
type storedDoc struct {
	Format  string          `json:"format"`
	Version int             `json:"version"`
	Region  string          `json:"region"`  // whose catalog says so
	Created time.Time       `json:"created"` // of the object
	Image   *Image          `json:"image"`
	Members []stored.Member `json:"members"`
}

// storedRecord is what of a record goes with the image: what it is, not what was
// done with it here. What its owner alone is shown goes with his.
func storedRecord(m *Image, account string) *Image {
	n := m.Clone()
	n.Reason, n.Public, n.LaunchAccounts, n.LaunchOrgs, n.LaunchOrgUnits = Reason{}, false, nil, nil, nil
	n.Deprecated, n.Deregistered, n.LastLaunched, n.ProtectedUntil = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	n.Protection, n.History, n.SourceObject = "", nil, ""
	if m.Owner != account {
		n.Tags, n.SourceInstance = nil, ""
	}
	return n
}

// signStored makes the head.
func (c *Catalog) signStored(ctx context.Context, m *Image, account, region string, at time.Time, members []stored.Member) ([]byte, error) {
	if c.opt.Signer == nil {
		return nil, ErrReadOnly
	}
	d := &storedDoc{formatStored, version, region, at, storedRecord(m, account), members}
	if err := d.check(); err != nil {
		return nil, err
	}
	b, err := encodeJSON(d)
	if err != nil {
		return nil, err
	}
	return chunked.Sign(ctx, b, Namespace, c.opt.Signer)
}

// parseStored reads a head without believing it.
func parseStored(object []byte) (*storedDoc, error) {
	b, _, err := chunked.Split(object)
	if err != nil {
		return nil, fmt.Errorf("stored image: %w", err)
	}
	d := &storedDoc{}
	if err := decodeJSON(formatStored, b, stored.MaxHead, d, func() (string, int) { return d.Format, d.Version }); err != nil {
		return nil, err
	}
	return d, d.check()
}

// openStored reads and verifies a head: its signer must be one who may speak for
// the region it names.
func openStored(object []byte, trust *keys.AllowedSigners) (*storedDoc, error) {
	d, err := parseStored(object)
	if err != nil {
		return nil, err
	}
	if trust == nil {
		return nil, ErrNoTrust
	}
	v, err := chunked.Verify(object, Namespace, trust, d.Region)
	if err == nil {
		err = v.At(d.Created)
	}
	if err != nil {
		return nil, fmt.Errorf("stored image: %w", err)
	}
	return d, nil
}

func (d *storedDoc) check() error {
	if err := CheckRegion(d.Region); err != nil {
		return fmt.Errorf("stored image: %w: %w", ErrFormat, err)
	}
	if d.Image == nil {
		return fmt.Errorf("stored image: %w: it has no record", ErrFormat)
	}
	err := errors.Join(checkTime("created", d.Created), d.Image.check())
	switch {
	case err != nil:
	case d.Image.State != Available || d.Image.Kind == KindNone || d.Image.Digest == "":
		err = fmt.Errorf("image %s is %s, of kind %s", d.Image.ID, d.Image.State, d.Image.Kind)
	case d.Image.Kind == KindBundle:
		_, _, err = SplitBundle(d.Image.Location)
	}
	if err == nil && (len(d.Members) == 0 || len(d.Members) > stored.MaxMembers) {
		err = fmt.Errorf("%d members", len(d.Members))
	}
	if err != nil {
		return fmt.Errorf("stored image: %w: %w", ErrFormat, err)
	}
	return nil
}
