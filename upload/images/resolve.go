package images

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// ResolveOptions narrows what a reader takes for the newest version.
type ResolveOptions struct {
	// MaxAge is how old the head may be, by the later of the store's clock
	// and this machine's; 0 is any age. Beyond it: [ErrStale].
	MaxAge time.Duration
	// AtLeast is the least sequence the head may have; below it: [ErrStale].
	AtLeast uint64
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

	s *Store
}

// Resolve finds a version of an image, by a reference as [ParseRef] has them,
// and verifies it. It remembers the newest head it sees, and refuses one that
// is older than what is remembered ([ErrRollback]).
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
	if !pinned || r.Parents > 0 || o.MaxAge > 0 || o.AtLeast > 0 {
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
		if !pinned {
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
		return nil, fmt.Errorf("%w: the head of sequence %d names a manifest of sequence %d", ErrMixed, img.Head.Sequence, img.Manifest.Sequence)
	}
	if o.Architecture != "" && img.Manifest.Architecture != o.Architecture {
		return nil, fmt.Errorf("%w: it is of %s, wanted is %s", ErrUnfit, img.Manifest.Architecture, o.Architecture)
	}
	return img, nil
}

// pick finds the version in the head.
func pick(h *chunked.Head, r Ref) (chunked.Name, error) {
	if h.Manifest == (chunked.Name{}) {
		return chunked.Name{}, ErrDeleted
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
	doc    *chunked.Head
	data   []byte
	etag   string
	before bool // it, or an older one, was seen before
}

// head reads, verifies and remembers an image's head; nil if there is none.
func (s *Store) head(ctx context.Context, image string) (*storedHead, error) {
	key := chunked.HeadKey(image)
	b, o, err := s.get(ctx, key, maxHead)
	if errors.Is(err, upload.ErrNotExist) {
		seen, ok, merr := s.memory.head(image)
		if merr != nil {
			return nil, merr
		}
		if ok {
			return nil, fmt.Errorf("%w: the head is gone, sequence %d was seen", ErrRollback, seen.Sequence)
		}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v, err := s.verify(b, chunked.NamespaceHead, image)
	if err != nil {
		return nil, fmt.Errorf("head: %w", err)
	}
	doc, err := chunked.ParseHead(v.Doc)
	if err != nil {
		return nil, err
	}
	if err := v.At(doc.Created); err != nil {
		return nil, fmt.Errorf("head: %w", err)
	}
	if doc.Name != image {
		return nil, fmt.Errorf("%w: it is the head of image %q", ErrMixed, doc.Name)
	}
	h := &storedHead{doc: doc, data: b, etag: o.ETag}
	if h.before, err = s.memory.see(image, doc.Sequence, b); err != nil {
		return nil, err
	}
	return h, nil
}

// fresh holds a head against its expiry and the reader's limits.
func (s *Store) fresh(ctx context.Context, h *storedHead, o ResolveOptions) (Freshness, error) {
	f := NotProven
	if h.before {
		f = SeenBefore
	}
	if o.AtLeast > 0 {
		if h.doc.Sequence < o.AtLeast {
			return 0, fmt.Errorf("%w: its sequence is %d, at least %d is asked for", ErrStale, h.doc.Sequence, o.AtLeast)
		}
		f = Limited
	}
	if o.MaxAge <= 0 && h.doc.Expires.IsZero() {
		return f, nil
	}
	now, err := s.now(ctx)
	if err != nil {
		return 0, err
	}
	if local := s.opt.Local(); local.After(now) {
		now = local
	}
	if !h.doc.Expires.IsZero() && now.After(h.doc.Expires) {
		return 0, fmt.Errorf("%w: it expired at %s", ErrStale, h.doc.Expires.UTC().Format(time.RFC3339))
	}
	if age := now.Sub(h.doc.Created); o.MaxAge > 0 && age > o.MaxAge {
		return 0, fmt.Errorf("%w: it was made %s ago, at most %s is allowed", ErrStale, age.Round(time.Second), o.MaxAge)
	}
	return Limited, nil
}

// readManifest reads and verifies a manifest into img.
func (s *Store) readManifest(ctx context.Context, image string, n chunked.Name, img *Image) error {
	b, err := s.getNamed(ctx, chunked.ManifestKey(image, n), n, -1, maxManifest)
	if errors.Is(err, upload.ErrNotExist) {
		return fmt.Errorf("%w: manifest %s is missing: %w", ErrNoImage, n, err)
	}
	if err != nil {
		return err
	}
	v, err := s.verify(b, chunked.NamespaceImage, image)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", n, err)
	}
	m, err := chunked.ParseManifest(v.Doc)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", n, err)
	}
	if err := v.At(m.Created); err != nil {
		return fmt.Errorf("manifest %s: %w", n, err)
	}
	if m.Name != image {
		return fmt.Errorf("%w: manifest %s is of image %q", ErrMixed, n, m.Name)
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
