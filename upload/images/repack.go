package images

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// Repack says how packs that are mostly garbage are rewritten.
type Repack struct {
	// Below is the percentage of a pack's bytes that must be in use for it to
	// be left as it is, 1 to 100.
	Below int
	// Domain is whose packs are rewritten: the images of others keep theirs.
	Domain *Domain
	// Owner makes the new packs known to this machine as its own.
	Owner chunked.Key
	// PackSize is how many bytes of chunks make a new pack; 0 is 16 MiB.
	PackSize int
}

// Repacked is a pack whose chunks in use were copied elsewhere. It is condemned
// with what nothing refers to.
type Repacked struct {
	Pack  chunked.Name
	Size  int64                // bytes
	Used  int64                // of them, by sealed chunks
	Into  []chunked.ObjectSize // empty with DryRun
	Error error                // why it was left as it is; nil otherwise
}

// repack copies chunks in use out of packs that are mostly garbage, and says
// where they went. All images that use such a pack must be open to this
// machine: else the pack stays.
func (c *collector) repack(ctx context.Context) error {
	r := c.o.Repack
	if r.Below < 1 || r.Below > 100 || r.Domain == nil {
		return errors.New("repack: a percentage from 1 to 100 and a domain are needed")
	}
	all := c.s.newContents()
	closed := map[*marked]bool{}
	for _, d := range c.marks.manifests {
		if d.doc.Domain != r.Domain.Name {
			closed[d] = true
			continue
		}
		if err := all.take(ctx, d); ctx.Err() != nil {
			return context.Cause(ctx)
		} else if err != nil {
			closed[d] = true
			c.report.Unreadable = append(c.report.Unreadable, d.ref())
		}
	}
	all.follow(c.marks.moved)
	w := &packWriter{s: c.s, d: r.Domain.Domain, owner: r.Owner, size: r.PackSize}
	var plans []*movePlan
	for _, key := range sortedKeys(c.seen.objects) {
		n, err := chunked.ParseFanned(chunked.PacksFolder, key)
		size := c.seen.objects[key].Size
		if err != nil || !c.marks.livePack(n) || size != c.marks.sizes[n] ||
			slices.ContainsFunc(c.marks.uses[n], func(d *marked) bool { return closed[d] }) {
			continue
		}
		p := &movePlan{pack: n, size: size, chunks: all.of(n), serves: c.marks.uses[n]}
		used := int64(0)
		for _, k := range p.chunks {
			used += int64(k.At.Sealed)
		}
		if len(p.chunks) == 0 || used*100 >= size*int64(r.Below) {
			continue
		}
		rep := Repacked{Pack: n, Size: size, Used: used}
		if !c.o.DryRun {
			if err := w.copy(ctx, p); err != nil {
				if !errors.Is(err, chunked.ErrCorrupt) && !errors.Is(err, chunked.ErrMissing) {
					return err
				}
				rep.Error = err
			} else {
				plans = append(plans, p)
			}
		}
		c.report.Repacked = append(c.report.Repacked, rep)
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	for _, p := range plans {
		m, err := c.s.putMoved(ctx, p)
		if err != nil {
			return err
		}
		for _, t := range m.Packs {
			c.marks.present[chunked.PackKey(t.Name)] = upload.Object{Key: chunked.PackKey(t.Name), Size: t.Size, Modified: c.now}
		}
		c.marks.moved[p.pack] = m
		i := slices.IndexFunc(c.report.Repacked, func(r Repacked) bool { return r.Pack == p.pack })
		c.report.Repacked[i].Into = m.Packs
	}
	c.marks.trace()
	return nil
}

// movePlan is what becomes of a pack.
type movePlan struct {
	pack   chunked.Name
	size   int64
	chunks []chunked.Chunk // in use, by offset
	serves []*marked       // all who use it
	moves  []move
}

// move is one chunk of a pack and where it is now.
type move struct {
	from int64
	to   *place
}

// place is where a chunk lands: known once its pack is stored.
type place struct {
	pack   chunked.ObjectSize
	offset int64
	sealed int
}

// packWriter collects sealed chunks and stores them in packs.
type packWriter struct {
	s     *Store
	d     *chunked.Domain
	owner chunked.Key
	size  int

	chunks []chunked.SealedChunk
	places []*place
	bytes  int
}

// packHeader is how far into a pack its first chunk is.
const packHeader = 16

// copy reads a pack's chunks, verifies them and adds them to the packs being
// made. Nothing is added if one of them is not what it should be.
func (w *packWriter) copy(ctx context.Context, p *movePlan) error {
	src := w.s.Source()
	sealed := make([][]byte, len(p.chunks))
	for i, k := range p.chunks {
		b := make([]byte, k.At.Sealed)
		if err := src.ReadPack(ctx, k.At.Pack, k.At.Offset, b); err != nil {
			return err
		}
		if _, err := chunked.OpenChunk(k, slices.Clone(b)); err != nil {
			return err
		}
		sealed[i] = b
	}
	for i, k := range p.chunks {
		to, err := w.add(ctx, k, sealed[i])
		if err != nil {
			return err
		}
		p.moves = append(p.moves, move{k.At.Offset, to})
	}
	return nil
}

// add takes a sealed chunk that was verified.
func (w *packWriter) add(ctx context.Context, k chunked.Chunk, sealed []byte) (*place, error) {
	limit := w.size
	if limit <= 0 {
		limit = 16 << 20
	}
	if w.bytes > 0 && w.bytes+len(sealed) > limit {
		if err := w.flush(ctx); err != nil {
			return nil, err
		}
	}
	to := &place{offset: int64(packHeader + w.bytes), sealed: len(sealed)}
	w.chunks = append(w.chunks, chunked.SealedChunk{ID: w.d.ID(k.Digest), Plain: k.Size, Sealed: sealed})
	w.places = append(w.places, to)
	w.bytes += len(sealed)
	return to, nil
}

// flush stores what was added since the last pack.
func (w *packWriter) flush(ctx context.Context) error {
	if len(w.chunks) == 0 {
		return nil
	}
	var salt chunked.Salt
	if _, err := rand.Read(salt[:]); err != nil {
		return fmt.Errorf("draw a pack's salt: %w", err)
	}
	data, err := chunked.EncodePack(w.d, w.owner, salt, w.chunks)
	if err != nil {
		return err
	}
	n := chunked.NameOf(data)
	if err := w.s.putNamed(ctx, chunked.PackKey(n), n, data); err != nil {
		return err
	}
	for _, p := range w.places {
		p.pack = chunked.ObjectSize{Name: n, Size: int64(len(data))}
	}
	w.chunks, w.places, w.bytes = nil, nil, 0
	return nil
}

// putMoved says where a pack's chunks are now. What was said before stays, but
// for chunks that moved again.
func (s *Store) putMoved(ctx context.Context, p *movePlan) (*chunked.Moved, error) {
	for range maxTries {
		old, o, err := s.readMoved(ctx, p.pack)
		if err != nil {
			return nil, err
		}
		m := mergeMoved(old, p)
		data, err := m.Encode()
		if err != nil {
			return nil, err
		}
		err = s.putIf(ctx, chunked.MovedKey(p.pack), data, o.ETag)
		if err == nil {
			return m, nil
		}
		if !errors.Is(err, upload.ErrExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: %s", ErrBusy, chunked.MovedKey(p.pack))
}

func mergeMoved(old *chunked.Moved, p *movePlan) *chunked.Moved {
	m := &chunked.Moved{}
	at := map[int64]place{}
	if old != nil {
		m.Manifests = slices.Clone(old.Manifests)
		for _, e := range old.Entries {
			at[e.From] = place{old.Packs[e.Pack], e.To, int(e.Sealed)}
		}
	}
	for _, mv := range p.moves {
		at[mv.from] = *mv.to
	}
	for _, d := range p.serves {
		m.Manifests = append(m.Manifests, d.name)
	}
	slices.SortFunc(m.Manifests, chunked.Name.Compare)
	m.Manifests = slices.Compact(m.Manifests)
	for _, t := range at {
		m.Packs = append(m.Packs, t.pack)
	}
	slices.SortFunc(m.Packs, func(a, b chunked.ObjectSize) int { return a.Name.Compare(b.Name) })
	m.Packs = slices.Compact(m.Packs)
	for from, t := range at {
		i, _ := slices.BinarySearchFunc(m.Packs, t.pack.Name, func(p chunked.ObjectSize, n chunked.Name) int { return p.Name.Compare(n) })
		m.Entries = append(m.Entries, chunked.MovedChunk{From: from, To: t.offset, Sealed: int32(t.sealed), Pack: uint32(i)})
	}
	slices.SortFunc(m.Entries, func(a, b chunked.MovedChunk) int { return int(a.From - b.From) })
	return m
}
