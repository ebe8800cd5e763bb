package chunked

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
)

// segmentRange is how much of a stream a segment tells about.
const segmentRange = 256 << 20

// StreamWriter lays chunks out as a stream. What nothing is mapped to is zero.
type StreamWriter struct {
	w    *Writer
	name string

	mu       sync.Mutex
	size     int64
	unsized  bool
	end      int64                   // of what is mapped
	segments map[int64]*segmentBuild // by number
	settled  int64                   // below this segment all are settled
	refs     []placedRef             // of segments that are stored
	data     int64
}

type segmentBuild struct {
	s        *StreamWriter
	pos      int64
	mappings []mapping
}

// mapping is an extent relative to its segment, 16 bytes.
type mapping struct {
	pos    uint32
	length int32
	start  int32
	ref    uint32
}

func (m mapping) end() int64 { return int64(m.pos) + int64(m.length) }

// placedRef is a stored segment, and the packs it needs.
type placedRef struct {
	SegmentRef
	packs []uint32
}

// Unsized is the size of a stream whose writer learns it later and then says
// so by SetSize.
const Unsized = -1

// Stream begins a stream of size bytes.
func (w *Writer) Stream(name string, size int64) (*StreamWriter, error) {
	if err := CheckStreamName(name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	if size < Unsized {
		return nil, fmt.Errorf("%w: stream %q of %d bytes", ErrUsage, name, size)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.streams[name] != nil || w.finished {
		return nil, fmt.Errorf("%w: stream %q is written a second time, or too late", ErrUsage, name)
	}
	s := &StreamWriter{w: w, name: name, size: size, unsized: size == Unsized, segments: map[int64]*segmentBuild{}}
	if s.unsized {
		s.size = math.MaxInt64
	}
	w.streams[name] = s
	return s, nil
}

// SetSize says how long a stream is that was [Unsized]. All is mapped.
func (s *StreamWriter) SetSize(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.unsized || size < s.end {
		return fmt.Errorf("%w: stream %q gets %d bytes, and has %d", ErrUsage, s.name, size, s.end)
	}
	s.size, s.unsized = size, false
	return nil
}

// Map says that length bytes from pos of the stream are those of ref from
// start on. Mappings come in any order; of two that overlap, Finish complains.
func (s *StreamWriter) Map(pos, length int64, ref Ref, start int64) error {
	size := int64(s.w.slots.size(ref))
	if err := s.w.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if pos < 0 || length < 1 || length > s.size-pos || start < 0 || length > size-start {
		return fmt.Errorf("%w: %d bytes from %d of a chunk of %d, at %d of stream %q of %d", ErrUsage, length, start, size, pos, s.name, s.size)
	}
	s.end = max(s.end, pos+length)
	for length > 0 {
		n := pos / segmentRange
		if n < s.settled {
			return fmt.Errorf("%w: stream %q is settled up to %d, and %d is written", ErrUsage, s.name, s.settled*segmentRange, pos)
		}
		b := s.segments[n]
		if b == nil {
			b = &segmentBuild{s: s, pos: n * segmentRange}
			s.segments[n] = b
		}
		k := min(length, b.pos+segmentRange-pos)
		b.add(mapping{pos: uint32(pos - b.pos), length: int32(k), start: int32(start), ref: ref.n})
		pos, start, length = pos+k, start+k, length-k
	}
	return nil
}

// add appends a mapping, to the last one if it goes on where that ends.
func (b *segmentBuild) add(m mapping) {
	if n := len(b.mappings); n > 0 {
		if l := &b.mappings[n-1]; l.ref == m.ref && l.end() == int64(m.pos) && l.start+l.length == m.start {
			l.length += m.length
			return
		}
	}
	b.mappings = append(b.mappings, m)
}

// MapChunk is Map for a chunk of the parent's.
func (s *StreamWriter) MapChunk(pos, length int64, c Chunk, start int64) error {
	ref, err := s.w.slots.foreign(c, func() (uint32, error) {
		if err := c.check(); err != nil {
			return 0, err
		}
		// Who reads the chunk by this domain's index needs this key.
		if s.w.o.Domain.ChunkKey(c.Digest) != c.Key {
			return 0, bad(ErrForeign, chunkObject(c.Digest, c.At), "its key is not of the domain that is written to")
		}
		return s.w.packs.known(c.At.Pack), nil
	})
	if err != nil {
		return err
	}
	return s.Map(pos, length, ref, start)
}

// CanCopy reports whether the parent's chunks behind length bytes from
// position from may be referred to.
func (s *StreamWriter) CanCopy(ctx context.Context, parent *Stream, from, length int64) (bool, error) {
	usable := s.w.o.UsablePack
	if usable == nil {
		return true, nil
	}
	for e, err := range parent.Extents(ctx, from, from+length) {
		if err != nil {
			return false, err
		}
		if !usable(e.Chunk.At.Pack) {
			return false, nil
		}
	}
	return true, nil
}

// CopyFrom maps length bytes from pos to what is at from in the parent.
func (s *StreamWriter) CopyFrom(ctx context.Context, parent *Stream, from, pos, length int64) error {
	for e, err := range parent.Extents(ctx, from, from+length) {
		if err != nil {
			return err
		}
		if err := s.MapChunk(pos+e.Pos-from, e.Length, e.Chunk, e.Start); err != nil {
			return err
		}
	}
	return nil
}

// Settled promises that nothing will be mapped before pos any more: that part
// of the index is stored as soon as its packs are, and its memory given back.
func (s *StreamWriter) Settled(ctx context.Context, pos int64) error {
	n := pos / segmentRange
	s.mu.Lock()
	var ready []*segmentBuild
	for i, b := range s.segments {
		if i < n {
			ready = append(ready, b)
			delete(s.segments, i)
		}
	}
	s.settled = max(s.settled, n)
	s.mu.Unlock()
	if len(ready) == 0 {
		return nil
	}
	s.w.mu.Lock()
	s.w.waiting = append(s.w.waiting, ready...)
	s.w.mu.Unlock()
	return s.w.settle(ctx)
}

// settle stores the waiting segments all of whose packs are in the store.
func (w *Writer) settle(ctx context.Context) error {
	w.mu.Lock()
	var ready []*segmentBuild
	w.waiting = slices.DeleteFunc(w.waiting, func(b *segmentBuild) bool {
		if !b.safe() {
			return false
		}
		ready = append(ready, b)
		return true
	})
	w.mu.Unlock()
	for _, b := range ready {
		if err := b.store(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (b *segmentBuild) safe() bool {
	for _, m := range b.mappings {
		if _, x := b.s.w.slots.get(m.ref); x.pack == 0 || !b.s.w.packs.row(x.pack-1).safe {
			return false
		}
	}
	return true
}

// build lays the segment out. Its packs are in the store.
func (b *segmentBuild) build() (*Segment, []uint32, int64, error) {
	w := b.s.w
	slices.SortFunc(b.mappings, func(x, y mapping) int { return cmp.Compare(x.pos, y.pos) })
	seg := &Segment{Extents: make([]SegmentExtent, 0, len(b.mappings))}
	chunks := map[Digest]uint32{}
	packs := map[uint32]uint32{}
	var used []uint32
	var data, end int64
	for _, m := range b.mappings {
		if int64(m.pos) < end {
			return nil, nil, 0, fmt.Errorf("%w: position %d of stream %q is mapped twice", ErrUsage, b.pos+int64(m.pos), b.s.name)
		}
		end = m.end()
		_, x := w.slots.get(m.ref)
		c, ok := chunks[x.digest]
		if !ok {
			if x.pack == 0 {
				return nil, nil, 0, fmt.Errorf("%w: position %d of stream %q is of a chunk that is nowhere", ErrUsage, b.pos+int64(m.pos), b.s.name)
			}
			p, ok := packs[x.pack-1]
			if !ok {
				p = uint32(len(seg.Packs))
				packs[x.pack-1] = p
				used = append(used, x.pack-1)
				seg.Packs = append(seg.Packs, w.packs.row(x.pack-1).name)
			}
			c = uint32(len(seg.Chunks))
			chunks[x.digest] = c
			seg.Chunks = append(seg.Chunks, SegmentChunk{
				Digest: x.digest, Key: w.o.Domain.ChunkKey(x.digest),
				Offset: int64(x.offset), Size: x.size, Sealed: x.sealed, Pack: p,
			})
		}
		e := SegmentExtent{Pos: int64(m.pos), Length: m.length, Start: m.start, Chunk: c}
		data += int64(e.Length)
		if n := len(seg.Extents); n > 0 && seg.Extents[n-1].continues(e) {
			seg.Extents[n-1].Length += e.Length
			continue
		}
		seg.Extents = append(seg.Extents, e)
	}
	return seg, used, data, nil
}

// store puts the segment into the store, or finds it there.
func (b *segmentBuild) store(ctx context.Context) error {
	w := b.s.w
	seg, packs, data, err := b.build()
	if err != nil {
		return err
	}
	length := min(segmentRange, b.s.size-b.pos)
	ref, err := w.reuse(ctx, b, seg, length)
	if err != nil {
		return err
	}
	if ref == nil {
		if err := w.draw(seg.Salt[:]); err != nil {
			return err
		}
		plain, err := seg.Encode(length)
		if err != nil {
			return fmt.Errorf("index of stream %q at %d: %w", b.s.name, b.pos, err)
		}
		r, object, err := w.sealSegment(plain)
		if err != nil {
			return err
		}
		if err := w.o.Sink.PutIndex(ctx, r.Name, object); err != nil {
			return fmt.Errorf("store index segment %s, %d bytes: %w", r.Name, len(object), err)
		}
		w.fill.index.Add(int64(len(object)))
		ref = &r
	}
	ref.Pos, ref.Length = b.pos, length
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.s.refs = append(b.s.refs, placedRef{*ref, packs})
	b.s.data += data
	b.mappings = nil
	return nil
}

// sealSegment compresses with memory that is kept, for there may be thousands.
func (w *Writer) sealSegment(plain []byte) (SegmentRef, []byte, error) {
	w.packing.Lock()
	defer w.packing.Unlock()
	if w.packing.z == nil {
		z, err := newPacker(Default)
		if err != nil {
			return SegmentRef{}, nil, err
		}
		w.packing.z = z
	}
	ref, object := w.o.Domain.sealSegment(w.packing.z, plain)
	return ref, object, nil
}

// reuse finds the parent's segment that says the same: with its salt, the same
// bytes and so the same key follow.
func (w *Writer) reuse(ctx context.Context, b *segmentBuild, seg *Segment, length int64) (*SegmentRef, error) {
	if w.o.Parent == nil {
		return nil, nil
	}
	ps, err := w.o.Parent.Stream(b.s.name)
	if err != nil {
		return nil, nil // the parent has no such stream
	}
	i, ok := slices.BinarySearchFunc(ps.st.Segments, b.pos, func(r SegmentRef, pos int64) int { return cmp.Compare(r.Pos, pos) })
	if !ok || ps.st.Segments[i].Length != length {
		return nil, nil
	}
	ref := ps.st.Segments[i]
	if w.o.UsableIndex != nil && !w.o.UsableIndex(ref.Name) {
		return nil, nil
	}
	old, err := w.o.Parent.segment(ctx, ref)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, nil // a new one will do
	}
	seg.Salt = old.Salt
	plain, err := seg.Encode(length)
	if err != nil {
		return nil, fmt.Errorf("index of stream %q at %d: %w", b.s.name, b.pos, err)
	}
	if k := w.o.Domain.SegmentKey(DigestOf(plain)); !bytes.Equal(k[:], ref.Key[:]) {
		return nil, nil
	}
	return &ref, nil
}
