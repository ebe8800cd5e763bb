package chunked

import (
	"fmt"
	"slices"
)

// Limits of segments (SPEC.md §6), in bytes.
const (
	MaxSegment       = 16 << 20           // before sealing
	maxStoredSegment = MaxSegment + 4<<10 // after it
	minSegment       = len(segmentMagic) + 4 + 16 + 1 + 32 + 1 + minSegmentChunk + 1 + 4
	minSegmentChunk  = 32 + 32 + 4

	segmentMagic = "INSTARIS"
)

// SegmentSalt makes a segment's name new.
type SegmentSalt [16]byte

// Segment tells what a range of a stream holds. Its lists are in the order of
// first use and everything in them is used, so that what is told in equal words
// is told in equal bytes, but for the salt.
type Segment struct {
	Salt    SegmentSalt
	Packs   []Name
	Chunks  []SegmentChunk
	Extents []SegmentExtent
}

// SegmentChunk is a chunk of a segment; its pack is an index into Packs.
type SegmentChunk struct {
	Digest Digest
	Key    Key
	Offset int64
	Size   int32
	Sealed int32
	Pack   uint32
}

// SegmentExtent says that Length bytes from position Pos of the segment are
// those of Chunks[Chunk] from Start on.
type SegmentExtent struct {
	Pos    int64
	Length int32
	Start  int32
	Chunk  uint32
}

// Chunk is chunk i with its location.
func (s *Segment) Chunk(i uint32) Chunk {
	c := &s.Chunks[i]
	return Chunk{
		Digest: c.Digest, Key: c.Key, Size: int(c.Size),
		At: Location{Pack: s.Packs[c.Pack], Offset: c.Offset, Sealed: int(c.Sealed)},
	}
}

// check reports the first rule that s breaks as the segment of length bytes.
func (s *Segment) check(object string, length int64) error {
	packs := make(map[Name]struct{}, len(s.Packs))
	for _, p := range s.Packs {
		packs[p] = struct{}{}
	}
	chunks := make(map[Digest]struct{}, len(s.Chunks))
	nextPack := uint32(0)
	for i := range s.Chunks {
		c := &s.Chunks[i]
		chunks[c.Digest] = struct{}{}
		if c.Pack > nextPack || int(c.Pack) >= len(s.Packs) {
			return bad(ErrFormat, object, "chunk %d is in pack %d, which is not next", i, c.Pack)
		}
		if c.Pack == nextPack {
			nextPack++
		}
		full := s.Chunk(uint32(i))
		if err := full.check(); err != nil {
			return &Error{Class: ErrFormat, Object: object, Err: err}
		}
	}
	end, nextChunk := int64(0), uint32(0)
	for i, e := range s.Extents {
		switch {
		case e.Pos < end || e.Length < 1 || int64(e.Length) > length-e.Pos:
			return bad(ErrFormat, object, "extent %d, %d bytes at %d, does not fit between %d and %d", i, e.Length, e.Pos, end, length)
		case e.Chunk > nextChunk || int(e.Chunk) >= len(s.Chunks):
			return bad(ErrFormat, object, "extent %d uses chunk %d, which is not next", i, e.Chunk)
		case e.Start < 0 || e.Length > s.Chunks[e.Chunk].Size-e.Start:
			return bad(ErrFormat, object, "extent %d leaves its chunk", i)
		case i > 0 && s.Extents[i-1].continues(e):
			return bad(ErrFormat, object, "extents %d and %d are one", i-1, i)
		}
		if e.Chunk == nextChunk {
			nextChunk++
		}
		end = e.Pos + int64(e.Length)
	}
	switch {
	case len(s.Extents) == 0:
		return bad(ErrFormat, object, "it holds nothing")
	case len(packs) != len(s.Packs) || len(chunks) != len(s.Chunks):
		return bad(ErrFormat, object, "it lists something twice")
	case int(nextPack) != len(s.Packs) || int(nextChunk) != len(s.Chunks):
		return bad(ErrFormat, object, "it lists what it does not use")
	}
	return nil
}

// continues reports whether f goes on where e ends, in the stream and in the
// chunk: the two are one extent.
func (e SegmentExtent) continues(f SegmentExtent) bool {
	return f.Chunk == e.Chunk && f.Pos == e.Pos+int64(e.Length) && f.Start == e.Start+e.Length
}

// Encode gives the plaintext of the segment of length bytes.
func (s *Segment) Encode(length int64) ([]byte, error) {
	if err := s.check("segment", length); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	b := make([]byte, 0, 64+32*len(s.Packs)+80*len(s.Chunks)+10*len(s.Extents))
	b = append(appendMagic(b, segmentMagic), s.Salt[:]...)
	b = appendUvarint(b, len(s.Packs))
	for _, p := range s.Packs {
		b = append(b, p[:]...)
	}
	b = appendUvarint(b, len(s.Chunks))
	for i := range s.Chunks {
		c := &s.Chunks[i]
		b = append(append(b, c.Digest[:]...), c.Key[:]...)
		b = appendUvarint(b, int64(c.Size))
		b = appendUvarint(b, c.Pack)
		b = appendUvarint(b, c.Offset)
		b = appendUvarint(b, int64(c.Sealed))
	}
	b = appendUvarint(b, len(s.Extents))
	end := int64(0)
	for _, e := range s.Extents {
		b = appendUvarint(b, e.Pos-end)
		b = appendUvarint(b, int64(e.Length))
		b = appendUvarint(b, e.Chunk)
		b = appendUvarint(b, int64(e.Start))
		end = e.Pos + int64(e.Length)
	}
	if len(b) > MaxSegment {
		return nil, bad(ErrLimit, "segment", "%d extents need %d bytes, more than %d", len(s.Extents), len(b), MaxSegment)
	}
	return b, nil
}

// DecodeSegment reads the plaintext of the segment of length bytes. Encoding
// what it returns gives p again.
func DecodeSegment(p []byte, length int64) (*Segment, error) {
	return decodeSegment("segment", p, length)
}

func decodeSegment(object string, p []byte, length int64) (*Segment, error) {
	if len(p) > MaxSegment {
		return nil, bad(ErrLimit, object, "%d bytes are more than %d", len(p), MaxSegment)
	}
	w := &wire{object: object, b: p}
	w.magic(segmentMagic)
	s := &Segment{}
	copy(s.Salt[:], w.bytes(len(s.Salt)))
	n := w.count("packs", 32)
	s.Packs = slices.Grow(s.Packs, n)
	for range n {
		s.Packs = append(s.Packs, w.array32())
	}
	n = w.count("chunks", minSegmentChunk)
	s.Chunks = slices.Grow(s.Chunks, n)
	for range n {
		c := SegmentChunk{Digest: w.array32(), Key: w.array32()}
		c.Size = int32(w.within("a chunk's length", 1, MaxChunk))
		c.Pack = uint32(w.within("a chunk's pack", 0, int64(len(s.Packs))))
		c.Offset = w.within("a chunk's offset", packHeaderSize, MaxPack)
		c.Sealed = int32(w.within("a sealed chunk's length", minSealedChunk, maxSealedChunk))
		s.Chunks = append(s.Chunks, c)
	}
	n = w.count("extents", 4)
	s.Extents = slices.Grow(s.Extents, n)
	end := int64(0)
	for range n {
		e := SegmentExtent{Pos: end + w.within("a gap", 0, length-end)}
		e.Length = int32(w.within("an extent's length", 1, MaxChunk))
		e.Chunk = uint32(w.within("an extent's chunk", 0, int64(len(s.Chunks))))
		e.Start = int32(w.within("an extent's start", 0, MaxChunk))
		end = e.Pos + int64(e.Length)
		s.Extents = append(s.Extents, e)
	}
	if err := w.end(); err != nil {
		return nil, err
	}
	if err := s.check(object, length); err != nil {
		return nil, err
	}
	return s, nil
}
