package chunked

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
)

// MaxOpening is the most bytes that an opening has.
const MaxOpening = 8 << 20

const openingMagic = "INSTAROP"

// Opening holds copies of what who reads an image for the first time wants first,
// in one object: of its index, and of packs what the kernel reads to find files
// (SPEC.md §10.1). It need not be believed: what is copied is verified like what
// is read from where it was copied from.
type Opening struct {
	Objects []OpeningObject // of the index, ascending by name
	Ranges  []OpeningRange  // of packs, ascending by pack and offset; they do not meet
}

// OpeningObject is a copy of an index object: its name is that of its bytes.
type OpeningObject struct {
	Name  Name
	Bytes []byte
}

// OpeningRange is a copy of a range of a pack.
type OpeningRange struct {
	Pack   Name
	Offset int64
	Bytes  []byte
}

func (o *Opening) check(object string) error {
	for i, x := range o.Objects {
		if i > 0 && x.Name.Compare(o.Objects[i-1].Name) <= 0 {
			return bad(ErrFormat, object, "index object %s does not follow %s", x.Name, o.Objects[i-1].Name)
		}
		if len(x.Bytes) == 0 {
			return bad(ErrFormat, object, "index object %s is empty", x.Name)
		}
	}
	for i, r := range o.Ranges {
		if len(r.Bytes) == 0 || r.Offset < packHeaderSize || r.Offset > MaxPack-int64(len(r.Bytes)) {
			return bad(ErrFormat, object, "range %d has %d bytes at %d of a pack", i, len(r.Bytes), r.Offset)
		}
		if i == 0 {
			continue
		}
		last := o.Ranges[i-1]
		if c := r.Pack.Compare(last.Pack); c < 0 || c == 0 && r.Offset <= last.Offset+int64(len(last.Bytes)) {
			return bad(ErrFormat, object, "range %d is not behind the one before it", i)
		}
	}
	if len(o.Objects) == 0 && len(o.Ranges) == 0 {
		return bad(ErrFormat, object, "it holds nothing")
	}
	return nil
}

// Encode gives the object's bytes: ErrUsage if something is not as it must be,
// ErrLimit if it is more than [MaxOpening].
func (o *Opening) Encode() ([]byte, error) {
	const object = "opening"
	if err := o.check(object); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	b := appendUvarint(appendMagic(nil, openingMagic), len(o.Objects))
	for _, x := range o.Objects {
		b = appendUvarint(append(b, x.Name[:]...), len(x.Bytes))
	}
	b = appendUvarint(b, len(o.Ranges))
	for _, r := range o.Ranges {
		b = appendUvarint(append(b, r.Pack[:]...), r.Offset)
		b = appendUvarint(b, len(r.Bytes))
	}
	for _, x := range o.Objects {
		b = append(b, x.Bytes...)
	}
	for _, r := range o.Ranges {
		b = append(b, r.Bytes...)
	}
	if len(b) > MaxOpening {
		return nil, bad(ErrLimit, object, "it needs %d bytes, more than %d", len(b), MaxOpening)
	}
	return b, nil
}

// DecodeOpening reads an opening, whose copies are parts of p. Encoding what it
// returns gives p again.
func DecodeOpening(p []byte) (*Opening, error) {
	const object = "opening"
	if len(p) > MaxOpening {
		return nil, bad(ErrLimit, object, "%d bytes are more than %d", len(p), MaxOpening)
	}
	w := &wire{object: object, b: p}
	w.magic(openingMagic)
	o := &Opening{}
	n := w.count("index objects", 33)
	sizes := make([]int, 0, n)
	for range n {
		o.Objects = append(o.Objects, OpeningObject{Name: w.array32()})
		sizes = append(sizes, int(w.within("an index object's size", 1, MaxOpening)))
	}
	n = w.count("ranges", 34)
	for range n {
		o.Ranges = append(o.Ranges, OpeningRange{Pack: w.array32(), Offset: w.within("an offset", packHeaderSize, MaxPack)})
		sizes = append(sizes, int(w.within("a range's length", 1, MaxOpening)))
	}
	for i := range o.Objects {
		o.Objects[i].Bytes = w.bytes(sizes[i])
	}
	for i := range o.Ranges {
		o.Ranges[i].Bytes = w.bytes(sizes[len(o.Objects)+i])
	}
	if err := w.end(); err != nil {
		return nil, err
	}
	if err := o.check(object); err != nil {
		return nil, err
	}
	return o, nil
}

// Before is src for who has the opening: what it has a copy of is not asked for.
// A copy that is not what was written is read again from src, and so is what lies in
// the same range from then on.
func (o *Opening) Before(src Source) Source {
	return &openingSource{o, src, make([]atomic.Bool, len(o.Ranges))}
}

// openingSource is [Opening.Before].
type openingSource struct {
	o     *Opening
	src   Source
	wrong []atomic.Bool // of ranges: not what was written
}

// ReadIndex gives the copy, if there is one that is whole.
func (s *openingSource) ReadIndex(ctx context.Context, n Name, size int64) ([]byte, error) {
	i, ok := slices.BinarySearchFunc(s.o.Objects, n, func(x OpeningObject, n Name) int { return x.Name.Compare(n) })
	if ok {
		if b := s.o.Objects[i].Bytes; int64(len(b)) == size && NameOf(b) == n {
			return bytes.Clone(b), nil
		}
	}
	return s.src.ReadIndex(ctx, n, size)
}

// copied gives the copy of a range of a pack, and in which of the opening's it is; nil if there is none.
func (s *openingSource) copied(n Name, off int64, length int) ([]byte, int) {
	i, ok := slices.BinarySearchFunc(s.o.Ranges, off, func(r OpeningRange, off int64) int {
		return cmp.Or(r.Pack.Compare(n), cmp.Compare(r.Offset, off))
	})
	if !ok {
		i--
	}
	if i < 0 || s.o.Ranges[i].Pack != n {
		return nil, 0
	}
	r := s.o.Ranges[i]
	if from := off - r.Offset; from <= int64(len(r.Bytes)-length) {
		return r.Bytes[from : from+int64(length)], i
	}
	return nil, 0
}

// ReadPack gives the copy, if there is one of the whole range.
func (s *openingSource) ReadPack(ctx context.Context, n Name, off int64, p []byte) error {
	if b, i := s.copied(n, off, len(p)); b != nil && !s.wrong[i].Load() {
		copy(p, b)
		return nil
	}
	return s.src.ReadPack(ctx, n, off, p)
}

// RereadPack reads what was copied from where it was copied from, and what was
// not as its source does.
func (s *openingSource) RereadPack(ctx context.Context, n Name, off int64, p []byte) error {
	b, i := s.copied(n, off, len(p))
	if b != nil && !s.wrong[i].Swap(true) {
		return s.src.ReadPack(ctx, n, off, p)
	}
	if again, ok := s.src.(Rereader); ok {
		if err := again.RereadPack(ctx, n, off, p); err == nil || b == nil {
			return err
		}
	}
	if b != nil { // it may be the copy that was read, before another found it wrong
		return s.src.ReadPack(ctx, n, off, p)
	}
	return fmt.Errorf("%s was read from the store itself: %w", packObject(n), ErrCorrupt)
}

// Moved asks the source.
func (s *openingSource) Moved(ctx context.Context, at Location) (Location, error) {
	if m, ok := s.src.(Mover); ok {
		return m.Moved(ctx, at)
	}
	return Location{}, fmt.Errorf("what was at %d of %s: %w", at.Offset, packObject(at.Pack), ErrNotMoved)
}

// Holds implements [Holder].
func (s *openingSource) Holds(at Location) bool {
	b, i := s.copied(at.Pack, at.Offset, at.Sealed)
	return b != nil && !s.wrong[i].Load()
}
