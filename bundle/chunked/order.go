package chunked

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
)

// Phase says why a [Batch] comes when it does.
type Phase uint8

// Phases, in their order.
const (
	PhaseTrace    Phase = iota // a boot is known to read it
	PhaseMetadata              // whatever opens a file reads it
	PhaseRest
)

// String is the phase's name.
func (p Phase) String() string {
	switch p {
	case PhaseTrace:
		return "trace"
	case PhaseMetadata:
		return "metadata"
	}
	return "rest"
}

// OrderOptions of [Stream.Order]. The zero value is the stream from its
// beginning to its end.
type OrderOptions struct {
	// Trace and Metadata are ranges to begin with. They are hints: what lies
	// outside the stream, or is named again, is passed over, and so is what comes
	// after 65,536 chunks.
	Trace, Metadata []Range
	// Have reports that a range is there already; nil: nothing is.
	Have func(off, length int64) bool
	// Span is the most bytes of one read; 0: 4 MiB, of a trace 1 MiB.
	Span int64
}

// Placement says that Length bytes from position Pos of a stream are those of a
// chunk from Start on.
type Placement struct{ Pos, Length, Start int64 }

// Want is a chunk, and where its bytes go.
type Want struct {
	Chunk  Chunk
	Places []Placement
}

// Batch is one read of a pack, and the chunks that it brings.
type Batch struct {
	Phase          Phase
	Pack           Name
	Offset, Length int64 // in the pack, bytes
	Wants          []Want
}

// Limits of Order.
const (
	orderHints  = 1 << 16 // chunks that hints may name
	orderWindow = 32 << 20
	orderSpan   = 4 << 20
	orderTrace  = 1 << 20
	orderLists  = 8 // segments whose chunks' places are kept
)

// Order yields reads that bring all of the stream that is not zero: what a trace
// names in its order, as far as reads of what lies together allow, then
// metadata, then the rest by segments. A chunk comes once a segment. It ends
// with the first error, which is that of a segment of the index. It needs some
// 10 MiB at most.
func (s *Stream) Order(ctx context.Context, o OrderOptions) iter.Seq2[Batch, error] {
	return func(yield func(Batch, error) bool) {
		r := &ordering{s: s, ctx: ctx, o: o, yield: yield, seen: map[segmentChunk]struct{}{}, lists: map[int]*placeList{}}
		ok := r.hints(o.Trace, PhaseTrace) && r.hints(o.Metadata, PhaseMetadata) && r.rest()
		if !ok && r.err != nil {
			yield(Batch{}, r.err)
		}
	}
}

// segmentChunk is a chunk by its place in the index.
type segmentChunk struct{ segment, chunk uint32 }

// placeList finds the extents of each chunk of a segment.
type placeList struct {
	seg         *Segment
	first, next []uint32 // extents, from 1 on
}

func newPlaceList(seg *Segment) *placeList {
	l := &placeList{seg, make([]uint32, len(seg.Chunks)), make([]uint32, len(seg.Extents))}
	for i := len(seg.Extents) - 1; i >= 0; i-- {
		c := seg.Extents[i].Chunk
		l.next[i], l.first[c] = l.first[c], uint32(i+1)
	}
	return l
}

type ordering struct {
	s     *Stream
	ctx   context.Context //nolint:containedctx // of one iteration
	o     OrderOptions
	yield func(Batch, error) bool
	seen  map[segmentChunk]struct{} // chunks that hints named
	lists map[int]*placeList
	err   error

	wants  []Want
	ranks  []int
	sealed int64
}

func (r *ordering) list(i int) (*placeList, error) {
	if l := r.lists[i]; l != nil {
		return l, nil
	}
	seg, err := r.s.x.segment(r.ctx, r.s.st.Segments[i])
	if err != nil {
		return nil, err
	}
	if len(r.lists) >= orderLists {
		clear(r.lists)
	}
	l := newPlaceList(seg)
	r.lists[i] = l
	return l, nil
}

// hints yields what ranges name. It reports whether to go on.
func (r *ordering) hints(ranges []Range, phase Phase) bool {
	segments := r.s.st.Segments
	for _, h := range ranges {
		if h.Position < 0 || h.Length < 1 || h.Position >= r.s.st.Size {
			continue
		}
		from, to := h.Position, h.Position+min(h.Length, r.s.st.Size-h.Position)
		i, _ := slices.BinarySearchFunc(segments, from, func(g SegmentRef, pos int64) int { return cmp.Compare(g.Pos+g.Length, pos+1) })
		for ; i < len(segments) && segments[i].Pos < to; i++ {
			if len(r.seen) >= orderHints {
				return r.flush(phase)
			}
			l, err := r.list(i)
			if err != nil {
				r.err = err
				return false
			}
			base := segments[i].Pos
			j, _ := slices.BinarySearchFunc(l.seg.Extents, from-base, func(e SegmentExtent, pos int64) int {
				return cmp.Compare(e.Pos+int64(e.Length), pos+1)
			})
			for ; j < len(l.seg.Extents) && base+l.seg.Extents[j].Pos < to && len(r.seen) < orderHints; j++ {
				key := segmentChunk{uint32(i), l.seg.Extents[j].Chunk}
				if _, ok := r.seen[key]; ok {
					continue
				}
				r.seen[key] = struct{}{}
				r.add(l, base, key.chunk)
			}
		}
		if r.sealed >= orderWindow && !r.flush(phase) {
			return false
		}
	}
	return r.flush(phase)
}

// rest yields what no hint named, segment by segment.
func (r *ordering) rest() bool {
	clear(r.lists)
	for i, ref := range r.s.st.Segments {
		l, err := r.list(i)
		if err != nil {
			r.err = err
			return false
		}
		for c := range l.seg.Chunks {
			key := segmentChunk{uint32(i), uint32(c)}
			if _, ok := r.seen[key]; !ok {
				r.add(l, ref.Pos, key.chunk)
			}
		}
		clear(r.lists)
		if !r.flush(PhaseRest) {
			return false
		}
	}
	return true
}

func (r *ordering) add(l *placeList, base int64, chunk uint32) {
	w := Want{Chunk: l.seg.Chunk(chunk)}
	for e := l.first[chunk]; e != 0; e = l.next[e-1] {
		x := l.seg.Extents[e-1]
		w.Places = append(w.Places, Placement{base + x.Pos, int64(x.Length), int64(x.Start)})
	}
	r.ranks = append(r.ranks, len(r.wants))
	r.wants = append(r.wants, w)
	r.sealed += int64(w.Chunk.At.Sealed)
}

// flush yields what was gathered: reads in the order in which the first chunk of
// each is wanted.
func (r *ordering) flush(phase Phase) bool {
	wants := r.wants
	r.wants, r.ranks, r.sealed = nil, nil, 0
	order := make([]int, len(wants))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := wants[a].Chunk.At, wants[b].Chunk.At
		return cmp.Or(x.Pack.Compare(y.Pack), cmp.Compare(x.Offset, y.Offset))
	})
	span := r.o.Span
	if span <= 0 {
		span = orderSpan
		if phase == PhaseTrace {
			span = orderTrace
		}
	}
	type ranked struct{ first, from, to int } // rank, and where in order
	var batches []ranked
	for i := 0; i < len(order); {
		first := wants[order[i]].Chunk.At
		b := ranked{order[i], i, i + 1}
		end := first.Offset + int64(first.Sealed)
		for ; b.to < len(order); b.to++ {
			at := wants[order[b.to]].Chunk.At
			last := at.Offset + int64(at.Sealed)
			if at.Pack != first.Pack || at.Offset < end || at.Offset-end > restoreSkip || last-first.Offset > span {
				break
			}
			end = last
			b.first = min(b.first, order[b.to])
		}
		batches = append(batches, b)
		i = b.to
	}
	slices.SortFunc(batches, func(a, b ranked) int { return cmp.Compare(a.first, b.first) })
	for _, b := range batches {
		if err := r.ctx.Err(); err != nil {
			r.err = context.Cause(r.ctx)
			return false
		}
		x := Batch{Phase: phase}
		for _, i := range order[b.from:b.to] {
			if !r.have(&wants[i]) {
				x.Wants = append(x.Wants, wants[i])
			}
		}
		if len(x.Wants) == 0 {
			continue
		}
		first, last := x.Wants[0].Chunk.At, x.Wants[len(x.Wants)-1].Chunk.At
		x.Pack, x.Offset, x.Length = first.Pack, first.Offset, last.Offset+int64(last.Sealed)-first.Offset
		if !r.yield(x, nil) {
			return false
		}
	}
	return true
}

func (r *ordering) have(w *Want) bool {
	if r.o.Have == nil {
		return false
	}
	for _, p := range w.Places {
		if !r.o.Have(p.Pos, p.Length) {
			return false
		}
	}
	return true
}

// Fetch reads a batch at once and calls f with the verified bytes of each of its
// places, from one goroutine; they are f's during the call only. A chunk that
// is not there, or not right, is read again by itself, and where it was moved;
// the others come nevertheless, and the first such error is returned. An error
// of the source that says neither ends it, and so does one of f. It takes
// memory for the batch and a chunk.
func (s *Stream) Fetch(ctx context.Context, b Batch, f func(e Extent, p []byte) error) error {
	if len(b.Wants) == 0 {
		return nil
	}
	if b.Length < 1 || b.Length > MaxPack || b.Offset < 0 {
		return fmt.Errorf("%w: a read of %d bytes at %d of a pack", ErrUsage, b.Length, b.Offset)
	}
	x := s.x
	m := x.room()
	defer x.rooms.Put(m)
	buf := grown(&m.sealed, int(b.Length))
	whole := x.src.ReadPack(ctx, b.Pack, b.Offset, buf)
	if whole != nil && (ctx.Err() != nil || !isObjects(whole)) {
		return fmt.Errorf("read %d bytes at %d of %s: %w", b.Length, b.Offset, packObject(b.Pack), whole)
	}
	var first error
	for i := range b.Wants {
		w := &b.Wants[i]
		at := w.Chunk.At
		off := at.Offset - b.Offset
		if err := w.Chunk.check(); err != nil || at.Pack != b.Pack || off < 0 || off > b.Length-int64(at.Sealed) {
			return fmt.Errorf("%w: %s is not in what is read", ErrUsage, chunkObject(w.Chunk.Digest, at))
		}
		plain := grown(&m.plain, w.Chunk.Size)
		var p []byte
		err := whole
		if err == nil {
			p, err = x.u.open(&w.Chunk, buf[off:off+int64(at.Sealed)], plain)
		}
		if err != nil {
			p, err = x.read(ctx, w.Chunk, nil, plain)
		}
		if err != nil {
			if ctx.Err() != nil || !isObjects(err) {
				return err
			}
			if first == nil {
				first = err
			}
			continue
		}
		for _, t := range w.Places {
			if t.Start < 0 || t.Length < 1 || t.Length > int64(len(p))-t.Start {
				return fmt.Errorf("%w: %s has not %d bytes from %d", ErrUsage, chunkObject(w.Chunk.Digest, at), t.Length, t.Start)
			}
			e := Extent{Pos: t.Pos, Length: t.Length, Chunk: w.Chunk, Start: t.Start}
			if err := f(e, p[t.Start:t.Start+t.Length]); err != nil {
				return err
			}
		}
	}
	return first
}

// fetchRoom is memory that Fetch uses again.
type fetchRoom struct{ sealed, plain []byte }

func (x *Index) room() *fetchRoom {
	if m, ok := x.rooms.Get().(*fetchRoom); ok {
		return m
	}
	return &fetchRoom{}
}

func grown(p *[]byte, n int) []byte {
	if cap(*p) < n {
		*p = make([]byte, n)
	}
	return (*p)[:n]
}

// isObjects reports whether an error is an object's own, and not that of the
// way to it.
func isObjects(err error) bool {
	for _, class := range []error{ErrMissing, ErrCorrupt, ErrFormat, ErrVersion, ErrLimit} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}
