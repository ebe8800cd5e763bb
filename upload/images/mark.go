package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// marks is what the manifests of a store refer to. It needs no signature to keep
// what a manifest names. To give a manifest up for dead it needs a head by a
// signer it trusts: else whoever may write a head could have all versions of an
// image deleted.
type marks struct {
	manifests []*marked
	byName    map[chunked.Name]*marked
	heads     map[string]*chunked.Head // those whose signer is trusted
	moved     map[chunked.Name]*chunked.Moved
	index     map[chunked.Name]bool
	uses      map[chunked.Name][]*marked // packs, those moved to included
	sizes     map[chunked.Name]int64     // of packs, as manifests and moved objects have them
	present   map[string]upload.Object   // the inventory's objects, by which moved packs are judged
	dead      []*marked                  // manifests that can never be published any more
	below     map[string]upload.Object   // keys under images/
}

// marked is a manifest that was read.
type marked struct {
	image string
	name  chunked.Name
	doc   *chunked.Manifest
}

func (m *marked) ref() string { return m.image + "@" + m.name.String()[:12] }

// mark reads all manifests, heads and moved objects. Whatever of them cannot be
// read is an error, [ErrBlocked], that names them all. No manifest is dead that spare
// names.
func (s *Store) mark(ctx context.Context, v *inventory, spare func(image string, n chunked.Name) bool) (*marks, error) {
	m := &marks{
		byName: map[chunked.Name]*marked{}, heads: map[string]*chunked.Head{}, moved: map[chunked.Name]*chunked.Moved{},
		present: v.objects,
	}
	var err error
	if m.below, err = s.list(ctx, chunked.ImagesFolder); err != nil {
		return nil, err
	}
	var bad blockers
	if err := s.markHeads(ctx, m, &bad); err != nil {
		return nil, err
	}
	if err := s.markManifests(ctx, m, &bad); err != nil {
		return nil, err
	}
	if err := s.markMoved(ctx, m, v, &bad); err != nil {
		return nil, err
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	m.bury(spare)
	m.trace()
	return m, nil
}

// blockers are the objects for whose sake nothing is deleted.
type blockers struct {
	mu   sync.Mutex
	list []error
}

// add takes note of an error that is the object's own and not the network's.
// Others are returned.
func (b *blockers) add(key string, err error) error {
	var e *upload.Error
	if errors.As(err, &e) && !errors.Is(err, upload.ErrTooLarge) && !errors.Is(err, upload.ErrCorrupt) && !errors.Is(err, upload.ErrNotExist) {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.list = append(b.list, fmt.Errorf("%w: %s: %w", ErrBlocked, key, err))
	return nil
}

func (b *blockers) err() error {
	slices.SortFunc(b.list, func(x, y error) int { return strings.Compare(x.Error(), y.Error()) })
	return errors.Join(b.list...)
}

func (s *Store) markHeads(ctx context.Context, m *marks, bad *blockers) error {
	var images []string
	for key := range m.below {
		if image, rest, ok := imageOf(key); ok && rest == "head" {
			images = append(images, image)
		}
	}
	var mu sync.Mutex
	return each(ctx, s.opt.Parallel, images, func(ctx context.Context, image string) error {
		h, trusted, err := s.anyHead(ctx, image)
		// A version may be in the head that the list lacks: a list with a gap,
		// a version that came or went since, or one that is lost.
		for try := 0; err == nil && h != nil; try++ {
			lost, lerr := s.lost(ctx, m, &mu, image, h)
			if lerr != nil {
				return lerr
			}
			if len(lost) == 0 {
				break
			}
			was := h
			if h, trusted, err = s.anyHead(ctx, image); err == nil && h != nil && h.Sequence == was.Sequence {
				err = fmt.Errorf("manifest %s, which it lists, is missing: repair the image, or delete that version", lost[0])
			}
		}
		if err != nil {
			return bad.add(chunked.HeadKey(image), err)
		}
		if h != nil && trusted {
			mu.Lock()
			m.heads[image] = h
			mu.Unlock()
		}
		return nil
	})
}

// lost gives the versions of a head that are not in the store, and adds those to
// the list that it lacked.
func (s *Store) lost(ctx context.Context, m *marks, mu *sync.Mutex, image string, h *chunked.Head) ([]chunked.Name, error) {
	var lost []chunked.Name
	for _, n := range versions(h) {
		key := chunked.ManifestKey(image, n)
		mu.Lock()
		_, ok := m.below[key]
		mu.Unlock()
		if ok {
			continue
		}
		o, err := s.objects.Stat(ctx, key)
		switch {
		case errors.Is(err, upload.ErrNotExist):
			lost = append(lost, n)
		case err != nil:
			return nil, err
		default:
			mu.Lock()
			m.below[key] = o
			mu.Unlock()
		}
	}
	return lost, nil
}

// anyHead reads a head, whoever signed it, and tells whether its signer is
// trusted; nil if there is none.
func (s *Store) anyHead(ctx context.Context, image string) (*chunked.Head, bool, error) {
	b, _, err := s.get(ctx, chunked.HeadKey(image), maxHead)
	if errors.Is(err, upload.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if s.opt.Trust != nil {
		if h, _, err := chunked.OpenHead(b, s.opt.Trust, image); err == nil {
			return h, true, nil
		}
	}
	h, err := chunked.ReadHeadUnverified(b)
	if err == nil && h.Name != image {
		err = fmt.Errorf("%w: it is the head of image %q", chunked.ErrOther, h.Name)
	}
	return h, false, err
}

// anyManifest reads a manifest without asking who signed it.
func (s *Store) anyManifest(ctx context.Context, image string, n chunked.Name) (*chunked.Manifest, error) {
	b, err := s.getNamed(ctx, chunked.ManifestKey(image, n), n, -1, maxManifest)
	if err != nil {
		return nil, err
	}
	doc, err := chunked.ReadManifestUnverified(b)
	if err == nil && doc.Name != image {
		err = fmt.Errorf("%w: it is a manifest of image %q", chunked.ErrOther, doc.Name)
	}
	return doc, err
}

func (s *Store) markManifests(ctx context.Context, m *marks, bad *blockers) error {
	var mu sync.Mutex
	err := each(ctx, s.opt.Parallel, sortedKeys(m.below), func(ctx context.Context, key string) error {
		image, rest, _ := imageOf(key)
		n, ok := named(rest, "manifests")
		if !ok {
			return nil
		}
		doc, err := s.anyManifest(ctx, image, n)
		if errors.Is(err, upload.ErrNotExist) {
			return nil // withdrawn or deleted since
		}
		if err != nil {
			return bad.add(key, err)
		}
		mu.Lock()
		defer mu.Unlock()
		m.manifests = append(m.manifests, &marked{image, n, doc})
		return nil
	})
	slices.SortFunc(m.manifests, func(a, b *marked) int { return a.name.Compare(b.name) })
	return err
}

func (s *Store) markMoved(ctx context.Context, m *marks, v *inventory, bad *blockers) error {
	var packs []chunked.Name
	for key := range v.objects {
		if n, err := chunked.ParseFanned(chunked.MovedFolder, key); err == nil {
			packs = append(packs, n)
		}
	}
	var mu sync.Mutex
	return each(ctx, s.opt.Parallel, packs, func(ctx context.Context, n chunked.Name) error {
		doc, _, err := s.readMoved(ctx, n)
		if err != nil {
			return bad.add(chunked.MovedKey(n), err)
		}
		if doc != nil {
			mu.Lock()
			m.moved[n] = doc
			mu.Unlock()
		}
		return nil
	})
}

// bury sets the manifests apart that no head lists and none ever will.
func (m *marks) bury(spare func(image string, n chunked.Name) bool) {
	m.manifests = slices.DeleteFunc(m.manifests, func(d *marked) bool {
		h := m.heads[d.image]
		if h == nil || lists(h, d.name) || d.doc.Sequence > h.Sequence || spare(d.image, d.name) {
			m.byName[d.name] = d
			return false
		}
		m.dead = append(m.dead, d)
		return true
	})
}

// trace finds out who uses what.
func (m *marks) trace() {
	m.index, m.uses, m.sizes = map[chunked.Name]bool{}, map[chunked.Name][]*marked{}, map[chunked.Name]int64{}
	for _, d := range m.manifests {
		m.index[d.doc.Index.Root.Name] = true
		for _, o := range d.doc.Index.Segments {
			m.index[o.Name] = true
		}
		for _, o := range d.doc.Packs {
			m.use(d, o)
		}
	}
}

func (m *marks) use(d *marked, p chunked.ObjectSize) {
	if u := m.uses[p.Name]; len(u) > 0 && u[len(u)-1] == d {
		return
	}
	m.uses[p.Name] = append(m.uses[p.Name], d)
	m.sizes[p.Name] = p.Size
	if to := m.moved[p.Name]; to != nil {
		for _, t := range to.Packs {
			m.use(d, t)
		}
	}
}

// livePack tells whether a manifest needs the pack where it is.
func (m *marks) livePack(n chunked.Name) bool {
	users := m.uses[n]
	if len(users) == 0 {
		return false
	}
	to := m.moved[n]
	if to == nil || !m.reachable(to, 0) {
		return true
	}
	return slices.ContainsFunc(users, func(d *marked) bool { return !to.Serves(d.name) })
}

// reachable tells whether the packs moved to are there, or moved themselves to
// ones that are.
func (m *marks) reachable(to *chunked.Moved, hops int) bool {
	for _, t := range to.Packs {
		if o, ok := m.present[chunked.PackKey(t.Name)]; ok && o.Size == t.Size {
			continue
		}
		next := m.moved[t.Name]
		if next == nil || hops >= maxHops || !m.reachable(next, hops+1) {
			return false
		}
	}
	return true
}

// live tells whether an object is needed. Keys that garbage collection has no
// business with are.
func (m *marks) live(key string) bool {
	if n, err := chunked.ParseFanned(chunked.PacksFolder, key); err == nil {
		return m.livePack(n)
	}
	if n, err := chunked.ParseFanned(chunked.IndexFolder, key); err == nil {
		return m.index[n]
	}
	if n, err := chunked.ParseFanned(chunked.MovedFolder, key); err == nil {
		return len(m.uses[n]) > 0
	}
	if image, rest, ok := imageOf(key); ok {
		for _, folder := range []string{"keys", "traces", "openings"} {
			if n, ok := named(rest, folder); ok {
				d := m.byName[n]
				return d != nil && d.image == image
			}
		}
	}
	return true
}
