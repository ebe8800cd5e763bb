package chunked

import (
	"fmt"
	"math"
	"slices"
)

// Limits of roots (SPEC.md §6.2), in bytes.
const (
	MaxRoot       = 64 << 20        // before sealing
	MaxStoredRoot = MaxRoot + 4<<10 // after it
	minSegmentRef = 1 + 1 + 32 + 32 + 2 + 1
	minRootStream = 1 + 1 + 1 + 1
	maxStreamName = 64

	rootMagic = "INSTARIR"
)

// Root is the beginning of an image's index.
type Root struct {
	Streams []RootStream // ascending by name
}

// RootStream is a stream; what none of its segments covers is zero.
type RootStream struct {
	Name     string
	Size     int64        // bytes
	Segments []SegmentRef // ascending, not overlapping
}

// SegmentRef is a segment of a stream and how to open it.
type SegmentRef struct {
	Pos, Length int64 // which range of the stream it tells about
	Name        Name
	Key         Key
	Plain       int32 // length before sealing
	Stored      int32 // and after it
}

// CheckStreamName tells what is wrong with a stream's name, if anything.
func CheckStreamName(s string) error {
	if len(s) < 1 || len(s) > maxStreamName {
		return fmt.Errorf("%w: stream name %q: 1 to %d characters are allowed", ErrFormat, clip(s), maxStreamName)
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("%w: stream name %q: a-z, 0-9 and - are allowed", ErrFormat, s)
		}
	}
	return nil
}

func (r *Root) check(object string) error {
	for i, s := range r.Streams {
		if err := CheckStreamName(s.Name); err != nil {
			return &Error{Class: ErrFormat, Object: object, Err: err}
		}
		if i > 0 && s.Name <= r.Streams[i-1].Name {
			return bad(ErrFormat, object, "stream %q does not follow %q", s.Name, r.Streams[i-1].Name)
		}
		if s.Size < 0 {
			return bad(ErrFormat, object, "stream %q has %d bytes", s.Name, s.Size)
		}
		end := int64(0)
		for j, g := range s.Segments {
			switch {
			case g.Pos < end || g.Length < 1 || g.Length > s.Size-g.Pos:
				return bad(ErrFormat, object, "segment %d of stream %q, %d bytes at %d, does not fit between %d and %d", j, s.Name, g.Length, g.Pos, end, s.Size)
			case int(g.Plain) < minSegment || g.Plain > MaxSegment:
				return bad(ErrFormat, object, "segment %d of stream %q has %d bytes, not %d to %d", j, s.Name, g.Plain, minSegment, MaxSegment)
			case g.Stored < minSealedChunk || g.Stored > maxStoredSegment:
				return bad(ErrFormat, object, "segment %d of stream %q has %d bytes sealed, not %d to %d", j, s.Name, g.Stored, minSealedChunk, maxStoredSegment)
			}
			end = g.Pos + g.Length
		}
	}
	return nil
}

// Encode gives the plaintext of the root.
func (r *Root) Encode() ([]byte, error) {
	if err := r.check("index root"); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	b := appendUvarint(appendMagic(nil, rootMagic), len(r.Streams))
	for _, s := range r.Streams {
		b = appendUvarint(b, len(s.Name))
		b = append(b, s.Name...)
		b = appendUvarint(b, s.Size)
		b = appendUvarint(b, len(s.Segments))
		end := int64(0)
		for _, g := range s.Segments {
			b = appendUvarint(b, g.Pos-end)
			b = appendUvarint(b, g.Length)
			b = append(append(b, g.Name[:]...), g.Key[:]...)
			b = appendUvarint(b, int64(g.Plain))
			b = appendUvarint(b, int64(g.Stored))
			end = g.Pos + g.Length
		}
	}
	if len(b) > MaxRoot {
		return nil, bad(ErrLimit, "index root", "it needs %d bytes, more than %d", len(b), MaxRoot)
	}
	return b, nil
}

// DecodeRoot reads the plaintext of a root. Encoding what it returns gives p
// again.
func DecodeRoot(p []byte) (*Root, error) { return decodeRoot("index root", p) }

func decodeRoot(object string, p []byte) (*Root, error) {
	if len(p) > MaxRoot {
		return nil, bad(ErrLimit, object, "%d bytes are more than %d", len(p), MaxRoot)
	}
	w := &wire{object: object, b: p}
	w.magic(rootMagic)
	r := &Root{}
	n := w.count("streams", minRootStream)
	r.Streams = slices.Grow(r.Streams, n)
	for range n {
		s := RootStream{Name: string(w.bytes(int(w.within("a name's length", 1, maxStreamName))))}
		s.Size = w.within("a stream's size", 0, math.MaxInt64)
		m := w.count("segments", minSegmentRef)
		s.Segments = slices.Grow(s.Segments, m)
		end := int64(0)
		for range m {
			g := SegmentRef{Pos: end + w.within("a gap", 0, s.Size-end)}
			g.Length = w.within("a segment's length", 1, s.Size-g.Pos)
			g.Name, g.Key = w.array32(), w.array32()
			g.Plain = int32(w.within("a segment's length before sealing", 1, MaxSegment))
			g.Stored = int32(w.within("a segment's length after sealing", 1, maxStoredSegment))
			end = g.Pos + g.Length
			s.Segments = append(s.Segments, g)
		}
		r.Streams = append(r.Streams, s)
	}
	if err := w.end(); err != nil {
		return nil, err
	}
	if err := r.check(object); err != nil {
		return nil, err
	}
	return r, nil
}
