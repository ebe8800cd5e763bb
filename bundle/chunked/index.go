package chunked

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
)

// Source gives the objects of a store back. Its methods are called
// concurrently. What it gives is checked before it is used.
type Source interface {
	PackReader
	// ReadIndex gives the index object n, which has size bytes. The memory is the
	// caller's.
	ReadIndex(ctx context.Context, n Name, size int64) ([]byte, error)
}

// Mover is what a [Source] implements that knows of chunks that were moved
// (SPEC.md §12.4).
type Mover interface {
	// Moved tells where the sealed chunk that was at a location went. It is asked
	// when it could not be read there, or was not what was written; and up to 8
	// times, if it is not at the next place either. It fails with an error that
	// wraps [ErrNotMoved] if nothing is known.
	Moved(ctx context.Context, at Location) (Location, error)
}

// Rereader is what a [Source] implements that may have read from elsewhere than
// the store itself, from a cache for instance.
type Rereader interface {
	// RereadPack is ReadPack from the store. It is asked when what ReadPack gave
	// was not what was written.
	RereadPack(ctx context.Context, n Name, off int64, p []byte) error
}

// Holder is what a [Source] implements that has some of what it gives at hand.
type Holder interface {
	// Holds tells whether ReadPack gives what is at a location without asking a store.
	Holds(at Location) bool
}

// ErrNotMoved is what [Mover] fails with if nothing is known of a chunk.
var ErrNotMoved = errors.New("not moved")

// maxHops is how often a chunk that is not where it was is looked for.
const maxHops = 8

// segmentCache is how many bytes of segments an index keeps.
const segmentCache = 24 << 20

// Index is an image's index. Its segments are read when they are needed. Its
// methods may be called concurrently.
type Index struct {
	src      Source
	root     *Root
	u        *unpacker
	segments *cache[SegmentRef, *Segment] // Pos is 0
}

// OpenIndex reads and checks the index root n, which has size bytes, and opens
// it with the image's index key. What a manifest that is trusted does not say
// must not be handed to it.
func OpenIndex(ctx context.Context, src Source, n Name, size int64, k Key) (*Index, error) {
	if size < minSealedChunk || size > MaxStoredRoot {
		return nil, bad(ErrFormat, "index root "+n.String(), "it has %d bytes, not %d to %d", size, minSealedChunk, MaxStoredRoot)
	}
	data, err := src.ReadIndex(ctx, n, size)
	if err != nil {
		return nil, fmt.Errorf("read index root %s: %w", n, err)
	}
	if err := checkObject("index root "+n.String(), n, size, data); err != nil {
		return nil, err
	}
	u, err := newUnpacker()
	if err != nil {
		return nil, err
	}
	root, err := u.root(n, k, data)
	if err != nil {
		return nil, err
	}
	return &Index{src: src, root: root, u: u, segments: newCache[SegmentRef, *Segment](segmentCache)}, nil
}

// Root is the decoded root. It is not to be changed.
func (x *Index) Root() *Root { return x.root }

// Holds tells whether the index's source has a chunk at hand ([Holder]).
func (x *Index) Holds(c *Chunk) bool {
	h, ok := x.src.(Holder)
	return ok && h.Holds(c.At)
}

// Segments gives all segments of all streams, ascending by name, none twice.
func (x *Index) Segments() []ObjectSize {
	m := map[Name]int64{}
	for _, s := range x.root.Streams {
		for _, r := range s.Segments {
			m[r.Name] = int64(r.Stored)
		}
	}
	return sortedObjects(m)
}

// Segment reads and checks a segment of this index. It is not to be changed.
func (x *Index) Segment(ctx context.Context, ref SegmentRef) (*Segment, error) {
	return x.segment(ctx, ref)
}

func (x *Index) segment(ctx context.Context, ref SegmentRef) (*Segment, error) {
	at := ref
	at.Pos = 0
	return x.segments.get(ctx, at, func() (*Segment, int64, error) {
		data, err := x.src.ReadIndex(ctx, ref.Name, int64(ref.Stored))
		if err != nil {
			return nil, 0, fmt.Errorf("read index segment %s: %w", ref.Name, err)
		}
		s, err := x.u.segment(ref, data)
		if err != nil {
			return nil, 0, err
		}
		return s, int64(32*len(s.Packs) + 88*len(s.Chunks) + 24*len(s.Extents)), nil
	})
}

// Streams are the names of the index's streams, ascending.
func (x *Index) Streams() []string {
	names := make([]string, len(x.root.Streams))
	for i, s := range x.root.Streams {
		names[i] = s.Name
	}
	return names
}

// Stream is one stream of an index.
type Stream struct {
	x  *Index
	st RootStream
}

// Stream gives the stream of that name, or an error that wraps [ErrMissing].
func (x *Index) Stream(name string) (*Stream, error) {
	i, ok := slices.BinarySearchFunc(x.root.Streams, name, func(s RootStream, name string) int { return cmp.Compare(s.Name, name) })
	if !ok {
		return nil, fmt.Errorf("stream %q: %w", clip(name), ErrMissing)
	}
	return &Stream{x, x.root.Streams[i]}, nil
}

// Name is the stream's name.
func (s *Stream) Name() string { return s.st.Name }

// Size is the stream's length in bytes.
func (s *Stream) Size() int64 { return s.st.Size }

// Extent says that Length bytes from position Pos of a stream are those of a
// chunk from Start on. What is between extents is zero.
type Extent struct {
	Pos, Length int64
	Chunk       Chunk
	Start       int64
}

// Extents gives what is not zero from position from up to position to, in
// ascending order, cut at both. It ends with the first error.
func (s *Stream) Extents(ctx context.Context, from, to int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		list := s.st.Segments
		i, _ := slices.BinarySearchFunc(list, from, func(r SegmentRef, pos int64) int { return cmp.Compare(r.Pos+r.Length, pos+1) })
		for ; i < len(list) && list[i].Pos < to; i++ {
			ref := list[i]
			seg, err := s.x.segment(ctx, ref)
			if err != nil {
				yield(Extent{}, err)
				return
			}
			j, _ := slices.BinarySearchFunc(seg.Extents, from-ref.Pos, func(e SegmentExtent, pos int64) int {
				return cmp.Compare(e.Pos+int64(e.Length), pos+1)
			})
			for ; j < len(seg.Extents); j++ {
				e := seg.Extents[j]
				x := Extent{Pos: ref.Pos + e.Pos, Length: int64(e.Length), Chunk: seg.Chunk(e.Chunk), Start: int64(e.Start)}
				if skip := from - x.Pos; skip > 0 {
					x.Pos, x.Length, x.Start = x.Pos+skip, x.Length-skip, x.Start+skip
				}
				if x.Pos >= to {
					return
				}
				x.Length = min(x.Length, to-x.Pos)
				if !yield(x, nil) {
					return
				}
			}
		}
	}
}
