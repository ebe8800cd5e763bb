package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/catalog/stored"
)

const formatStored = "instar-stored-image"

// storedDoc is the head of an image as one object (SPEC.md of package stored).
type storedDoc struct {
	Format  string        `json:"format"`
	Version int           `json:"version"`
	Region  string        `json:"region"`  // whose catalog says so
	Created time.Time     `json:"created"` // of the object
	Image   *Image        `json:"image"`
	Members storedMembers `json:"members"`
}

// storedMembers are counted while they are read.
type storedMembers []stored.Member

// UnmarshalJSON implements json.Unmarshaler.
func (l *storedMembers) UnmarshalJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return errors.New("the members are no list")
	}
	*l = nil
	for d.More() {
		if len(*l) == stored.MaxMembers {
			return fmt.Errorf("more than %d members", stored.MaxMembers)
		}
		var m stored.Member
		if err := d.Decode(&m); err != nil {
			return err
		}
		*l = append(*l, m)
	}
	return nil
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

// storedRegion is the region that a head names, by its first bytes: a document has
// one form only.
func storedRegion(object []byte) (string, error) {
	const longest = 160 // bytes up to the end of a region's name
	front := string(object[:min(len(object), longest)])
	rest, ok := strings.CutPrefix(front, `{"format":"`+formatStored+`","version":`)
	number, rest, more := strings.Cut(rest, `,"region":"`)
	if n, err := strconv.Atoi(number); !ok || !more || err != nil {
		return "", fmt.Errorf("stored image: %w: it begins with %q", ErrFormat, clip(front))
	} else if n != version {
		return "", fmt.Errorf("stored image: %w: version %d, this program knows version %d", ErrVersion, n, version)
	}
	region, _, _ := strings.Cut(rest, `"`)
	if err := CheckRegion(region); err != nil {
		return "", fmt.Errorf("stored image: %w: %w", ErrFormat, err)
	}
	return region, nil
}

// openStored verifies a head and reads it: its signer must be one who may speak for
// the region it names. Of one that nobody trusted has signed nothing but the
// region is read: what it says may be made to take far more memory than it has bytes.
func openStored(object []byte, trust *keys.AllowedSigners) (*storedDoc, error) {
	if trust == nil {
		return nil, ErrNoTrust
	}
	region, err := storedRegion(object)
	if err != nil {
		return nil, err
	}
	v, err := chunked.Verify(object, Namespace, trust, region)
	if err != nil {
		return nil, fmt.Errorf("stored image: %w", err)
	}
	d := &storedDoc{}
	if err := decodeJSON(formatStored, v.Doc, stored.MaxHead, d, func() (string, int) { return d.Format, d.Version }); err != nil {
		return nil, err
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	if d.Region != region {
		return nil, fmt.Errorf("stored image: %w: of region %q, not of %q", ErrOther, clip(d.Region), region)
	}
	if err := v.At(d.Created); err != nil {
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
	case d.Image.Kind == KindInstar:
		if name, digest, ok := strings.Cut(d.Image.Location, "@"); !ok || digest != d.Image.Digest {
			err = fmt.Errorf("image %s of digest %s is at %q", d.Image.ID, clip(d.Image.Digest), clip(d.Image.Location))
		} else {
			err = chunked.CheckImageName(name)
		}
	}
	if err == nil && (len(d.Members) == 0 || len(d.Members) > stored.MaxMembers) {
		err = fmt.Errorf("%d members", len(d.Members))
	}
	if err != nil {
		return fmt.Errorf("stored image: %w: %w", ErrFormat, err)
	}
	return nil
}
