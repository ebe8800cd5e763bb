package images

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// ResolveOptions narrows what a reader takes for the newest version.
type ResolveOptions struct {
	// MaxAge is how old the head may be, by the later of the store's clock
	// and this machine's; 0 is any age. Beyond it: chunked.ErrStale.
	MaxAge time.Duration
	// AtLeast is the least sequence the head may have; below it:
	// chunked.ErrRollback.
	AtLeast int64
	// Listed demands that the head lists the version even if it is named in full:
	// one that was deleted and put back is [ErrNoImage].
	Listed bool
	// Architecture, if it is not "", is the only one wanted; else [ErrUnfit].
	Architecture string
}

// Freshness says what is known about a version being the newest.
type Freshness int

// What is known about a version being the newest, from least to most.
const (
	// NotProven: the head is authentic. The store's owner may have kept back
	// newer ones.
	NotProven Freshness = iota
	// SeenBefore: nothing older than what this machine saw before.
	SeenBefore
	// Limited: within the limits the reader set, or the head's own expiry.
	Limited
	// Pinned: the reader named the version in full.
	Pinned
)

func (f Freshness) String() string {
	switch f {
	case SeenBefore:
		return "not older than what was seen before"
	case Limited:
		return "within the limits asked for"
	case Pinned:
		return "the version asked for by its whole name"
	}
	return "not proven: this machine never saw the image before, and no limit was given"
}

// Image is a version of an image whose manifest is verified.
type Image struct {
	Name      chunked.Name // of the manifest
	Size      int64        // of the manifest object, bytes
	Manifest  *chunked.Manifest
	Signer    ssh.PublicKey
	Head      *chunked.Head // by which it was found; nil if it was named in full
	Freshness Freshness

	s      *Store
	during *Run // as whose parent it was resolved; else nil
}

// Resolve finds a version of an image, by a reference as [ParseRef] has them,
// and verifies it. It remembers the newest head it sees, and refuses one that
// is older than what is remembered (chunked.ErrRollback).
func (s *Store) Resolve(ctx context.Context, ref string, o ResolveOptions) (*Image, error) {
	r, err := ParseRef(ref)
	if err != nil {
		return nil, err
	}
	img, err := s.resolve(ctx, r, o)
	if err != nil {
		return nil, fmt.Errorf("image %s in %s: %w", r, s, err)
	}
	return img, nil
}

func (s *Store) resolve(ctx context.Context, r Ref, o ResolveOptions) (*Image, error) {
	name, pinned := r.pinned()
	img := &Image{Freshness: Pinned}
	if !pinned || r.Parents > 0 || o.MaxAge > 0 || o.AtLeast > 0 || o.Listed {
		h, err := s.head(ctx, r.Image)
		if err != nil {
			return nil, err
		}
		if h == nil {
			return nil, ErrNoImage
		}
		fresh, err := s.fresh(ctx, h, o)
		if err != nil {
			return nil, err
		}
		img.Head = h.doc
		if !pinned || fresh == Limited {
			img.Freshness = fresh
		}
		if !pinned || o.Listed {
			if name, err = pick(h.doc, r); err != nil {
				return nil, err
			}
		}
	}
	for i := 0; ; i++ {
		if err := s.readManifest(ctx, r.Image, name, img); err != nil {
			return nil, err
		}
		if i == r.Parents {
			break
		}
		if img.Manifest.Parent == (chunked.Name{}) {
			return nil, fmt.Errorf("%w: version %s has no parent", ErrNoImage, name)
		}
		name = img.Manifest.Parent
		if !lists(img.Head, name) {
			return nil, fmt.Errorf("%w: version %s is not kept any more", ErrNoImage, name)
		}
	}
	if img.Head != nil && img.Manifest.Sequence > img.Head.Sequence {
		return nil, fmt.Errorf("%w: the head of sequence %d names a manifest of sequence %d", chunked.ErrOther, img.Head.Sequence, img.Manifest.Sequence)
	}
	if o.Architecture != "" && img.Manifest.Architecture != o.Architecture {
		return nil, fmt.Errorf("%w: it is of %s, wanted is %s", ErrUnfit, img.Manifest.Architecture, o.Architecture)
	}
	return img, nil
}

// pick finds the version in the head.
func pick(h *chunked.Head, r Ref) (chunked.Name, error) {
	if h.Manifest == (chunked.Name{}) {
		return chunked.Name{}, chunked.ErrDeleted
	}
	if r.Version == "" {
		return h.Manifest, nil
	}
	var found []chunked.Name
	for _, n := range versions(h) {
		if strings.HasPrefix(n.String(), r.Version) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return chunked.Name{}, fmt.Errorf("%w: no version begins with %s", ErrNoImage, r.Version)
	case 1:
		return found[0], nil
	}
	return chunked.Name{}, fmt.Errorf("%w: %d versions begin with %s: give more digits", ErrNoImage, len(found), r.Version)
}

// versions are all that a head lists, newest first.
func versions(h *chunked.Head) []chunked.Name {
	if h == nil || h.Manifest == (chunked.Name{}) {
		return nil
	}
	return append([]chunked.Name{h.Manifest}, h.Versions...)
}

func lists(h *chunked.Head, n chunked.Name) bool {
	for _, v := range versions(h) {
		if v == n {
			return true
		}
	}
	return false
}

// storedHead is a head as it is stored, verified.
type storedHead struct {
	doc  *chunked.Head
	etag string
	seen []chunked.Seen // what was remembered before
}

// head reads, verifies and remembers an image's head; nil if there is none.
func (s *Store) head(ctx context.Context, image string) (*storedHead, error) {
	if s.opt.Trust == nil {
		return nil, ErrNoTrust
	}
	seen, err := s.memory.seen(image)
	if err != nil {
		return nil, err
	}
	seen = chunked.Current(seen, s.opt.Trust, image)
	b, o, err := s.get(ctx, chunked.HeadKey(image), maxHead)
	if errors.Is(err, upload.ErrNotExist) {
		if len(seen) > 0 {
			return nil, fmt.Errorf("%w: the head is gone, sequence %d was there before", chunked.ErrRollback, seen[0].Sequence)
		}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	doc, v, err := chunked.OpenHead(b, s.opt.Trust, image)
	if err != nil {
		return nil, fmt.Errorf("head: %w", err)
	}
	if err := doc.CheckFresh(chunked.Freshness{Seen: seen}); err != nil {
		return nil, err
	}
	return &storedHead{doc: doc, etag: o.ETag, seen: seen}, s.memory.see(doc, keys.Fingerprint(v.Key))
}

// fresh holds a head against its expiry and the reader's limits.
func (s *Store) fresh(ctx context.Context, h *storedHead, o ResolveOptions) (Freshness, error) {
	demands := chunked.Freshness{AtLeast: o.AtLeast, MaxAge: o.MaxAge}
	f := NotProven
	if len(h.seen) > 0 {
		f = SeenBefore
	}
	if o.AtLeast > 0 || o.MaxAge > 0 || !h.doc.Expires.IsZero() {
		f = Limited
	}
	if o.MaxAge > 0 || !h.doc.Expires.IsZero() {
		var err error
		if demands.Now, err = s.now(ctx); err != nil {
			return 0, err
		}
		// The store's owner may have stopped his clock.
		if local := s.opt.Local(); local.After(demands.Now) {
			demands.Now = local
		}
	}
	return f, h.doc.CheckFresh(demands)
}

// readManifest reads and verifies a manifest into img.
func (s *Store) readManifest(ctx context.Context, image string, n chunked.Name, img *Image) error {
	b, err := s.getRecalled(ctx, chunked.ManifestKey(image, n), n, -1, maxManifest)
	if errors.Is(err, upload.ErrNotExist) {
		return fmt.Errorf("%w: manifest %s is missing: %w", ErrNoImage, n, err)
	}
	if err != nil {
		return err
	}
	if s.opt.Trust == nil {
		return ErrNoTrust
	}
	m, v, err := chunked.OpenManifest(b, s.opt.Trust, image)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", n, err)
	}
	img.Name, img.Size, img.Manifest, img.Signer, img.s = n, int64(len(b)), m, v.Key, s
	return nil
}

// Forget drops what is remembered of an image, so that an older state of it, or
// a new beginning, is accepted once: after a restored store, or after a key
// that signed absurd sequences was removed from the trusted ones.
func (s *Store) Forget(image string) error {
	if err := chunked.CheckImageName(image); err != nil {
		return err
	}
	return s.memory.forget(image)
}
