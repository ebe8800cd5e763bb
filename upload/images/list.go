package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
)

// Listed is an image as a list shows it.
type Listed struct {
	Image    string
	Sequence int64     // of the head; 0 if there is none (nothing was published yet) or it is not to be believed
	Changed  time.Time // when the head was made, as it says
	Expires  time.Time // zero: never
	Deleted  bool
	Err      error     // why the head is not to be believed; nil if it is verified
	Versions []Version // newest first
}

// Version is one version of a listed image.
type Version struct {
	Name     chunked.Name
	Size     int64             // of the manifest object, bytes
	Manifest *chunked.Manifest // nil if Err says that it could not be read
	Newest   bool
	Signer   string // fingerprint of the key that signed it
	Err      error  // why it is not to be believed; nil if it is verified

	// Unpublished: no head lists it. It is being published, or was left by a
	// capture that was interrupted, or by a deletion.
	Unpublished bool
}

// Stored is how many bytes of packs and index the version refers to.
func (v Version) Stored() int64 {
	if v.Manifest == nil {
		return 0
	}
	total := v.Manifest.Index.Root.Size
	for _, l := range [][]chunked.ObjectSize{v.Manifest.Packs, v.Manifest.Index.Segments} {
		for _, o := range l {
			total += o.Size
		}
	}
	return total
}

// List gives the images whose names begin with prefix, by name, with all
// versions that are in the store. Each says whether it is verified; an image
// that is not does not keep the others from being listed.
func (s *Store) List(ctx context.Context, prefix string) ([]Listed, error) {
	found, err := s.list(ctx, chunked.ImagesFolder+prefix)
	if err != nil {
		return nil, fmt.Errorf("list the images of %s: %w", s, err)
	}
	byImage := map[string][]chunked.Name{}
	for _, key := range sortedKeys(found) {
		image, rest, ok := imageOf(key)
		if !ok {
			continue
		}
		if n, ok := named(rest, "manifests"); ok {
			byImage[image] = append(byImage[image], n)
		} else if rest == "head" && byImage[image] == nil {
			byImage[image] = []chunked.Name{}
		}
	}
	names := sortedKeys(byImage)
	list := make([]Listed, len(names))
	var mu sync.Mutex
	at := map[string]int{}
	for i, n := range names {
		at[n] = i
	}
	err = each(ctx, max(1, s.opt.Parallel/4), names, func(ctx context.Context, image string) error {
		l, err := s.listImage(ctx, image, byImage[image])
		mu.Lock()
		defer mu.Unlock()
		list[at[image]] = l
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the images of %s: %w", s, err)
	}
	return list, nil
}

func (s *Store) listImage(ctx context.Context, image string, stored []chunked.Name) (Listed, error) {
	l := Listed{Image: image}
	h, err := s.head(ctx, image)
	if err := fatal(ctx, err); err != nil {
		return l, err
	}
	var doc *chunked.Head
	switch {
	case err != nil:
		l.Err = err
	case h != nil:
		doc = h.doc
		l.Sequence, l.Changed, l.Expires, l.Deleted = doc.Sequence, doc.Created, doc.Expires, doc.Deleted()
	}
	order := union(slices.Clone(versions(doc)), stored)
	l.Versions = make([]Version, len(order))
	at := map[chunked.Name]int{}
	for i, n := range order {
		at[n] = i
	}
	err = each(ctx, max(1, s.opt.Parallel/4), order, func(ctx context.Context, n chunked.Name) error {
		v := Version{Name: n, Newest: doc != nil && doc.Manifest == n, Unpublished: l.Err == nil && !lists(doc, n)}
		img := &Image{}
		if v.Err = s.readManifest(ctx, image, n, img); v.Err == nil {
			v.Manifest, v.Size, v.Signer = img.Manifest, img.Size, keys.Fingerprint(img.Signer)
		} else if err := fatal(ctx, v.Err); err != nil {
			return err
		} else if m, err := s.anyManifest(ctx, image, n); err == nil {
			v.Manifest = m // to be shown, with Err
		}
		l.Versions[at[n]] = v
		return nil
	})
	// Those no head lists, by time.
	rest := l.Versions[len(versions(doc)):]
	slices.SortStableFunc(rest, func(a, b Version) int {
		if a.Manifest == nil || b.Manifest == nil {
			return strings.Compare(a.Name.String(), b.Name.String())
		}
		return b.Manifest.Created.Compare(a.Manifest.Created)
	})
	return l, err
}

// fatal gives err back if it is the network's or the caller's, not one object's.
func fatal(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var b blockers
	if err == nil || errors.Is(err, ErrNoTrust) {
		return nil
	}
	return b.add("", err)
}
