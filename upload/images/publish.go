package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// maxTries is how often a conditional put is tried against others who change
// the same object.
const maxTries = 64

// PublishOptions is what a capture adds up to.
type PublishOptions struct {
	// Manifest is the image's. Publish fills in Name, Sequence, Domain, Parent
	// (that of [Run.Parent], if it is a version of the same image) and Created.
	Manifest chunked.Manifest

	IndexKey   chunked.Key       // of the root that the manifest names
	Recipients []*keys.Recipient // who may read the image
	Signer     keys.Signer

	// Expires, if it is not 0, is how long readers take the head for the
	// newest one.
	Expires time.Duration
}

// Published is a version that was published.
type Published struct {
	Name     chunked.Name // of the manifest
	Size     int64        // of the manifest object, bytes
	Sequence int64        // of the head
	KeysSize int64        // of the key's object, bytes
	Manifest *chunked.Manifest
}

// Publish makes what was stored an image's newest version, all or nothing: it
// puts key and manifest, makes sure that everything the manifest names is there
// to stay, and only then the head (SPEC.md §11).
//
// With [ErrCollected] garbage collection was faster; nothing is published, and
// the capture is to be begun again, which finds what is stored. After any other
// error it is not published either, unless the answer to the last request was
// lost for good; running the capture again is right in every case.
func (r *Run) Publish(ctx context.Context, o PublishOptions) (*Published, error) {
	p, err := r.publish(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("publish image %q in %s: %w", r.opt.Image, r.s, err)
	}
	return p, nil
}

func (r *Run) publish(ctx context.Context, o PublishOptions) (*Published, error) {
	m := o.Manifest
	m.Packs = slices.Clone(m.Packs)
	m.Name, m.Domain, m.Parent = r.opt.Image, r.opt.Domain.Name, chunked.Name{}
	if p := r.parentImage(); p != nil && p.Manifest.Name == m.Name {
		m.Parent = p.Name
	}
	for i, pack := range m.Packs {
		if pack.Size != 0 {
			continue
		}
		size, ok := r.PackSize(pack.Name)
		if !ok {
			return nil, fmt.Errorf("pack %s was neither listed when the capture began nor is it its parent's", pack.Name)
		}
		m.Packs[i].Size = size
	}
	keysObject, err := wrapKey(o.IndexKey, m.Index.Root.Name, o.Recipients)
	if err != nil {
		return nil, err
	}
	for range maxTries {
		head, err := r.s.head(ctx, m.Name)
		if err != nil {
			return nil, err
		}
		if m.Parent != (chunked.Name{}) && (head == nil || !lists(head.doc, m.Parent)) {
			m.Parent = chunked.Name{} // deleted meanwhile
		}
		m.Sequence = 1
		if head != nil {
			m.Sequence = head.doc.Sequence + 1
		}
		m.Created = r.s.stamp()
		done, err := r.attempt(ctx, &m, keysObject, head, o)
		if err != nil || done != nil {
			return done, err
		}
	}
	return nil, fmt.Errorf("%w: %d others published first", ErrBusy, maxTries)
}

// attempt tries to publish m on top of head. It returns nil without error if
// another was faster.
func (r *Run) attempt(ctx context.Context, m *chunked.Manifest, keysObject []byte, head *storedHead, o PublishOptions) (*Published, error) {
	s := r.s
	object, err := m.Sign(ctx, o.Signer)
	if err != nil {
		return nil, err
	}
	// A signature that readers will not take is found out now.
	if _, _, err := chunked.OpenManifest(object, s.opt.Trust, m.Name); err != nil {
		return nil, fmt.Errorf("the signing key is not one this machine trusts for the image: %w", err)
	}
	name := chunked.NameOf(object)
	h := &chunked.Head{Name: m.Name, Sequence: m.Sequence, Manifest: name, Created: m.Created}
	if head != nil {
		h.Versions = versions(head.doc)
	}
	if o.Expires > 0 {
		h.Expires = m.Created.Add(o.Expires)
	}
	headObject, err := h.Sign(ctx, o.Signer)
	if err != nil {
		return nil, err
	}
	p := &Published{Name: name, Size: int64(len(object)), Sequence: h.Sequence, KeysSize: int64(len(keysObject)), Manifest: m}

	keysKey, manifestKey := chunked.KeysKey(m.Name, name), chunked.ManifestKey(m.Name, name)
	if _, err := upload.PutBytes(ctx, s.objects, keysKey, keysObject, upload.PutOptions{}); err != nil {
		return nil, err
	}
	if err := s.putNamed(ctx, manifestKey, name, object); err != nil {
		return nil, err
	}
	withdraw := func(why error) error {
		if err := s.deleteInOrder(context.WithoutCancel(ctx), manifestKey, keysKey); err != nil {
			return errors.Join(why, fmt.Errorf("and manifest %s, which was not published, could not be removed: %w", name, err))
		}
		return why
	}
	if err := r.check(ctx, m, keysKey); err != nil {
		return nil, withdraw(err)
	}
	etag := ""
	if head != nil {
		etag = head.etag
	}
	puterr := s.putIf(ctx, chunked.HeadKey(m.Name), headObject, etag)
	if puterr == nil {
		// What is remembered is no reason to call it unpublished.
		_ = s.memory.see(h, keys.Fingerprint(o.Signer.Public()))
		return p, nil
	}
	// The answer may have been lost, and another may have published on top
	// since. A manifest that a head lists stays.
	now, err := s.head(ctx, m.Name)
	switch {
	case err != nil:
		return nil, errors.Join(puterr, err)
	case now != nil && lists(now.doc, name):
		return p, nil
	case !errors.Is(puterr, upload.ErrExist):
		// Perhaps it is still on its way: then the manifest must be there.
		return nil, puterr
	}
	return nil, withdraw(nil)
}

// check makes sure that nothing the manifest names is gone or going: gc/ is read
// first, then the rest is listed.
func (r *Run) check(ctx context.Context, m *chunked.Manifest, keysKey string) error {
	now, err := r.s.takeInventory(ctx)
	if err != nil {
		return err
	}
	if now.condemned[keysKey] {
		return fmt.Errorf("%w: the object with its key is condemned", ErrCollected)
	}
	for _, o := range append(slices.Clone(m.Index.Segments), m.Index.Root) {
		if key := chunked.IndexObjectKey(o.Name); !now.hasSize(key, o.Size) {
			return r.lacking(now, key, o.Size)
		}
	}
	parent := chunked.Name{}
	if p := r.parentImage(); p != nil {
		parent = p.Name
	}
	for _, o := range m.Packs {
		key := chunked.PackKey(o.Name)
		if now.hasSize(key, o.Size) {
			continue
		}
		if r.viaMoved(o.Name) {
			ok, err := r.s.follow(ctx, r.start, now, parent, o.Name, 0)
			if err != nil {
				return err
			}
			if ok {
				continue
			}
		}
		return r.lacking(now, key, o.Size)
	}
	return nil
}

func (r *Run) lacking(now *inventory, key string, size int64) error {
	o, ok := now.objects[key]
	switch {
	case !ok:
		return fmt.Errorf("%w: %s is gone", ErrCollected, key)
	case now.condemned[key]:
		return fmt.Errorf("%w: %s is condemned", ErrCollected, key)
	}
	return fmt.Errorf("%w: %s has %d bytes, should have %d", ErrCollected, key, o.Size, size)
}
