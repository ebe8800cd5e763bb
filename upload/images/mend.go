package images

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
)

// patient is a damaged pack and the chunks that images have in it.
type patient struct {
	pack   chunked.Name
	size   int64
	there  bool
	chunks []chunked.Chunk
	saved  map[int64]*place // by offset; nil: where the moved object says
}

// mend saves what images need of damaged packs.
func (r *repairer) mend(ctx context.Context) error {
	if r.o.Domain == nil {
		return nil
	}
	m := &marks{
		byName: map[chunked.Name]*marked{}, moved: r.found.moved, present: r.found.there,
		manifests: r.found.manifests,
	}
	m.trace()
	damaged := r.damagedPacks(m)
	if len(damaged) == 0 {
		return nil
	}
	all := r.s.newContents()
	closed := map[*marked]bool{}
	for _, n := range damaged {
		for _, d := range m.uses[n] {
			err := all.take(ctx, d)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil && !closed[d] {
				closed[d] = true
				r.report.Unopened = append(r.report.Unopened, d.ref())
			}
		}
	}
	all.follow(m.moved)
	var patients []*patient
	for _, n := range damaged {
		_, there := r.found.there[chunked.PackKey(n)]
		patients = append(patients, &patient{pack: n, size: m.sizes[n], there: there, chunks: all.of(n), saved: map[int64]*place{}})
	}
	w := &packWriter{s: r.s, d: r.o.Domain.Domain, owner: r.o.Owner}
	if err := r.rescue(ctx, w, all, m, patients); err != nil {
		return err
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	for _, p := range patients {
		if err := r.announce(ctx, m, all, p, closed); err != nil {
			return err
		}
	}
	return nil
}

// damagedPacks are the packs in use that are damaged, or gone and not known to
// have been moved for all who use them, in order.
func (r *repairer) damagedPacks(m *marks) []chunked.Name {
	var l []chunked.Name
	for n, users := range m.uses {
		key := chunked.PackKey(n)
		_, there := r.found.there[key]
		moved := m.moved[n]
		unserved := moved == nil || slices.ContainsFunc(users, func(d *marked) bool { return !moved.Serves(d.name) })
		if r.found.bad[key] != nil || !there && unserved {
			l = append(l, n)
		}
	}
	slices.SortFunc(l, chunked.Name.Compare)
	return l
}

// need is a chunk that is looked for.
type need struct {
	p *patient
	c chunked.Chunk
}

// rescue looks for the patients' chunks, from the nearest source to the
// farthest.
func (r *repairer) rescue(ctx context.Context, w *packWriter, all *contents, m *marks, patients []*patient) error {
	needs := map[chunked.ID][]need{}
	take := func(c chunked.Chunk, sealed []byte) error {
		id := r.o.Domain.ID(c.Digest)
		to, err := w.add(ctx, c, sealed)
		if err != nil {
			return err
		}
		for _, n := range needs[id] {
			n.p.saved[n.c.At.Offset] = to
		}
		delete(needs, id)
		return nil
	}
	forget := func(c chunked.Chunk, p *patient) {
		id := r.o.Domain.ID(c.Digest)
		needs[id] = slices.DeleteFunc(needs[id], func(n need) bool { return n.p == p && n.c.At == c.At })
		if len(needs[id]) == 0 {
			delete(needs, id)
		}
	}
	for _, p := range patients {
		for _, c := range p.chunks {
			id := r.o.Domain.ID(c.Digest)
			needs[id] = append(needs[id], need{p, c})
		}
	}
	// What is left of the packs themselves, or was moved before.
	for _, p := range patients {
		for _, c := range p.chunks {
			if _, open := needs[r.o.Domain.ID(c.Digest)]; !open {
				continue
			}
			sealed, err := r.fetch(ctx, r.s, c, c.At)
			if err != nil {
				return err
			}
			if sealed != nil {
				if err := take(c, sealed); err != nil {
					return err
				}
				continue
			}
			if err := r.alreadyMoved(ctx, m, need{p, c}); err != nil {
				return err
			}
			if p.saved[c.At.Offset] != nil {
				forget(c, p)
			}
		}
	}
	for _, s := range append([]*Store{r.s}, r.o.Stores...) {
		if len(needs) == 0 {
			return nil
		}
		if err := r.fromFooters(ctx, s, needs, take); err != nil {
			return err
		}
	}
	for _, c := range r.o.Candidates {
		if len(needs) == 0 {
			return nil
		}
		if err := r.fromPlaces(ctx, c, all, m, needs, take); err != nil {
			return err
		}
		if err := r.fromPieces(ctx, c, needs, take); err != nil {
			return err
		}
	}
	return nil
}

// alreadyMoved finds a chunk where moved objects say it is: there it stays.
func (r *repairer) alreadyMoved(ctx context.Context, m *marks, n need) error {
	at := n.c.At
	for range maxHops {
		mv := m.moved[at.Pack]
		if mv == nil {
			return nil
		}
		to, ok := mv.Lookup(at.Offset)
		if !ok {
			return nil
		}
		at = to
		sealed, err := r.fetch(ctx, r.s, n.c, at)
		if err != nil {
			return err
		}
		if sealed != nil {
			size := r.found.there[chunked.PackKey(at.Pack)].Size
			n.p.saved[n.c.At.Offset] = &place{pack: chunked.ObjectSize{Name: at.Pack, Size: size}, offset: at.Offset, sealed: at.Sealed}
			return nil
		}
	}
	return nil
}

// fetch reads a sealed chunk from somewhere and verifies it; nil if it is not
// there, or not it.
func (r *repairer) fetch(ctx context.Context, s *Store, c chunked.Chunk, at chunked.Location) ([]byte, error) {
	sealed := make([]byte, at.Sealed)
	err := (&source{s: s}).ReadPack(ctx, at.Pack, at.Offset, sealed)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		// Only this store's own failures count: another's are as if it had
		// nothing.
		if s == r.s {
			return nil, fatal(ctx, err)
		}
		return nil, nil
	}
	c.At = at
	if _, err := chunked.OpenChunk(c, slices.Clone(sealed)); err != nil {
		return nil, nil
	}
	return sealed, nil
}

// fromFooters asks the footers of all packs of a store.
func (r *repairer) fromFooters(ctx context.Context, s *Store, needs map[chunked.ID][]need, take func(chunked.Chunk, []byte) error) error {
	found, err := s.list(ctx, chunked.PacksFolder)
	if err != nil {
		if s == r.s || ctx.Err() != nil {
			return err
		}
		return nil
	}
	cache := s.memory.footers(r.o.Domain.Label())
	for _, key := range sortedKeys(found) {
		n, err := chunked.ParseFanned(chunked.PacksFolder, key)
		if err != nil {
			continue
		}
		f, err := s.footer(ctx, r.o.Domain.Domain, cache, chunked.ObjectSize{Name: n, Size: found[key].Size})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			continue
		}
		for e, at := range f.All(n) {
			list, ok := needs[e.ID]
			if !ok || len(list) == 0 {
				continue
			}
			c := list[0].c
			sealed, err := r.fetch(ctx, s, c, at)
			if err != nil {
				return err
			}
			if sealed == nil {
				continue
			}
			if err := take(c, sealed); err != nil {
				return err
			}
		}
		if len(needs) == 0 {
			return nil
		}
	}
	return nil
}

// fromPlaces asks a candidate for what is, or was, at the chunks' places in the
// streams.
func (r *repairer) fromPlaces(ctx context.Context, cand Candidate, all *contents, m *marks, needs map[chunked.ID][]need, take func(chunked.Chunk, []byte) error) error {
	for _, d := range m.manifests {
		if len(needs) == 0 {
			return nil
		}
		if _, ok := all.images[d.name]; !ok {
			continue
		}
		img := &Image{Name: d.name, Manifest: d.doc, s: r.s}
		x, err := img.OpenWith(ctx, all.src)
		if f := fatal(ctx, err); f != nil {
			return f
		}
		if err != nil {
			continue
		}
		got := map[chunked.Digest]*partial{}
		for _, st := range x.Root().Streams {
			for _, ref := range st.Segments {
				seg, err := x.Segment(ctx, ref)
				if f := fatal(ctx, err); f != nil {
					return f
				}
				if err != nil {
					continue
				}
				for _, e := range seg.Extents {
					c := seg.Chunk(e.Chunk)
					if _, wanted := needs[r.o.Domain.ID(c.Digest)]; !wanted {
						continue
					}
					p := make([]byte, e.Length)
					if cand.At(ctx, d.doc, st.Name, ref.Pos+e.Pos, p) != nil {
						if ctx.Err() != nil {
							return context.Cause(ctx)
						}
						continue
					}
					if got[c.Digest] == nil {
						got[c.Digest] = &partial{c: c, data: make([]byte, c.Size)}
					}
					if !got[c.Digest].add(int(e.Start), p) {
						continue
					}
					if err := r.takePlain(c, got[c.Digest].data, take); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// partial is a chunk's plaintext as extents give it.
type partial struct {
	c    chunked.Chunk
	data []byte
	have []Span
}

// add takes a part, and tells whether all is there.
func (p *partial) add(start int, b []byte) bool {
	copy(p.data[start:], b)
	p.have = merge(append(p.have, Span{From: int64(start), To: int64(start + len(b))}))
	return len(p.have) == 1 && p.have[0].From == 0 && p.have[0].To == int64(p.c.Size)
}

// takePlain seals a plaintext anew if it is what is looked for.
func (r *repairer) takePlain(c chunked.Chunk, plain []byte, take func(chunked.Chunk, []byte) error) error {
	if len(plain) != c.Size || chunked.DigestOf(plain) != c.Digest {
		return nil
	}
	sealed, b, err := r.o.Domain.SealChunk(plain, chunked.Default)
	if err != nil {
		return err
	}
	if sealed.Key != c.Key {
		return nil // of another domain: its readers have another key
	}
	return take(c, b)
}

// fromPieces looks among a candidate's pieces.
func (r *repairer) fromPieces(ctx context.Context, cand Candidate, needs map[chunked.ID][]need, take func(chunked.Chunk, []byte) error) error {
	if len(needs) == 0 {
		return nil
	}
	for p, err := range cand.Pieces(ctx) {
		if err != nil {
			return fmt.Errorf("look for lost chunks in a candidate: %w", err)
		}
		if len(p) < 1 || len(p) > chunked.MaxChunk {
			continue
		}
		if list := needs[r.o.Domain.ID(chunked.DigestOf(p))]; len(list) > 0 {
			if err := r.takePlain(list[0].c, p, take); err != nil {
				return err
			}
		}
		if len(needs) == 0 {
			return nil
		}
	}
	return nil
}

// announce says where a patient's chunks are, and removes the pack if nobody
// needs what is left of it.
func (r *repairer) announce(ctx context.Context, m *marks, all *contents, p *patient, closed map[*marked]bool) error {
	rep := Mended{Pack: p.pack, Chunks: len(p.chunks), Saved: len(p.saved)}
	if len(p.saved) > 0 {
		plan := &movePlan{pack: p.pack, size: p.size}
		for off, to := range p.saved {
			plan.moves = append(plan.moves, move{off, to})
		}
		everybody := true
		for _, d := range m.uses[p.pack] {
			if closed[d] || !all.serves(m, d, p) {
				everybody = false
				continue
			}
			plan.serves = append(plan.serves, d)
		}
		moved, err := r.s.putMoved(ctx, plan)
		if err != nil {
			return err
		}
		m.moved[p.pack] = moved
		rep.Into = moved.Packs
		if everybody && p.there {
			if err := r.remove(ctx, p); err != nil {
				return err
			}
		}
	}
	r.report.Moved = append(r.report.Moved, rep)
	return nil
}

// remove takes a damaged pack out of the way.
func (r *repairer) remove(ctx context.Context, p *patient) error {
	key := chunked.PackKey(p.pack)
	// It may have been put back meanwhile.
	err := (&scrub{s: r.s}).digest(ctx, key, p.pack)
	if err == nil || errors.Is(err, chunked.ErrMissing) {
		return nil
	}
	if f := fatal(ctx, err); f != nil {
		return f
	}
	if err := r.quarantine(ctx, key); err != nil {
		return err
	}
	return r.s.objects.Delete(ctx, key)
}

// serves tells whether all that a version has in a pack was saved.
func (c *contents) serves(m *marks, d *marked, p *patient) bool {
	for _, seg := range d.doc.Index.Segments {
		for _, k := range c.segments[seg.Name] {
			at := k.At
			for range maxHops {
				if at.Pack == p.pack {
					if p.saved[at.Offset] == nil {
						return false
					}
					break
				}
				mv := m.moved[at.Pack]
				if mv == nil {
					break
				}
				to, ok := mv.Lookup(at.Offset)
				if !ok {
					break
				}
				at = to
			}
		}
	}
	return true
}
