package chunked

import (
	"cmp"
	"fmt"
	"slices"
)

// MaxMoved is the most bytes that a moved object has.
const MaxMoved = 64 << 20

const movedMagic = "INSTARMV"

// Moved says where the chunks of a pack that is gone are now (SPEC.md §12.4).
// It need not be believed: digest and tag of a chunk decide.
type Moved struct {
	Manifests []Name       // ascending: those all of whose chunks of the pack are among Entries
	Packs     []ObjectSize // ascending by name
	Entries   []MovedChunk // ascending by From
}

// MovedChunk is one sealed chunk and where it went.
type MovedChunk struct {
	From   int64 // offset in the pack that is gone
	To     int64 // offset in Packs[Pack]
	Sealed int32 // length there
	Pack   uint32
}

// Lookup tells where the sealed chunk that was at offset is now.
func (m *Moved) Lookup(offset int64) (Location, bool) {
	i, ok := slices.BinarySearchFunc(m.Entries, offset, func(e MovedChunk, off int64) int { return cmp.Compare(e.From, off) })
	if !ok {
		return Location{}, false
	}
	e := m.Entries[i]
	return Location{Pack: m.Packs[e.Pack].Name, Offset: e.To, Sealed: int(e.Sealed)}, true
}

// Serves reports whether every chunk that this manifest has in the pack has
// moved.
func (m *Moved) Serves(manifest Name) bool {
	_, ok := slices.BinarySearchFunc(m.Manifests, manifest, Name.Compare)
	return ok
}

func (m *Moved) check(object string) error {
	for i, n := range m.Manifests {
		if i > 0 && n.Compare(m.Manifests[i-1]) <= 0 {
			return bad(ErrFormat, object, "manifest %s does not follow %s", n, m.Manifests[i-1])
		}
	}
	for i, p := range m.Packs {
		if i > 0 && p.Name.Compare(m.Packs[i-1].Name) <= 0 {
			return bad(ErrFormat, object, "pack %s does not follow %s", p.Name, m.Packs[i-1].Name)
		}
		if p.Size < minPack || p.Size > MaxPack {
			return bad(ErrFormat, object, "pack %s has %d bytes, not %d to %d", p.Name, p.Size, minPack, int64(MaxPack))
		}
	}
	used, unused := make([]bool, len(m.Packs)), len(m.Packs)
	last := int64(packHeaderSize) - 1
	for i, e := range m.Entries {
		switch {
		case e.Sealed < minSealedChunk || e.Sealed > maxSealedChunk:
			return bad(ErrFormat, object, "entry %d has %d bytes, not %d to %d", i, e.Sealed, minSealedChunk, maxSealedChunk)
		case e.From <= last || e.From > MaxPack-minSealedChunk:
			return bad(ErrFormat, object, "entry %d at %d is not between %d and any pack's end", i, e.From, last)
		case int(e.Pack) >= len(m.Packs):
			return bad(ErrFormat, object, "entry %d is in pack %d of %d", i, e.Pack, len(m.Packs))
		case e.To < packHeaderSize || e.To > m.Packs[e.Pack].Size-int64(e.Sealed)-packTrailerSize:
			return bad(ErrFormat, object, "entry %d leaves its pack", i)
		}
		if !used[e.Pack] {
			used[e.Pack] = true
			unused--
		}
		last = e.From
	}
	switch {
	case len(m.Entries) == 0:
		return bad(ErrFormat, object, "it holds nothing")
	case unused > 0:
		return bad(ErrFormat, object, "it lists a pack that it does not use")
	}
	return nil
}

// Encode gives the object's bytes.
func (m *Moved) Encode() ([]byte, error) {
	if err := m.check("moved object"); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	b := appendUvarint(appendMagic(nil, movedMagic), len(m.Manifests))
	for _, n := range m.Manifests {
		b = append(b, n[:]...)
	}
	b = appendUvarint(b, len(m.Packs))
	for _, p := range m.Packs {
		b = appendUvarint(append(b, p.Name[:]...), p.Size)
	}
	b = appendUvarint(b, len(m.Entries))
	for _, e := range m.Entries {
		b = appendUvarint(b, e.From)
		b = appendUvarint(b, int64(e.Sealed))
		b = appendUvarint(b, e.Pack)
		b = appendUvarint(b, e.To)
	}
	if len(b) > MaxMoved {
		return nil, bad(ErrLimit, "moved object", "it needs %d bytes, more than %d", len(b), MaxMoved)
	}
	return b, nil
}

// DecodeMoved reads the moved object of pack old. Encoding what it returns
// gives p again.
func DecodeMoved(old Name, p []byte) (*Moved, error) {
	object := "moved object of " + packObject(old)
	if len(p) > MaxMoved {
		return nil, bad(ErrLimit, object, "%d bytes are more than %d", len(p), MaxMoved)
	}
	w := &wire{object: object, b: p}
	w.magic(movedMagic)
	m := &Moved{}
	n := w.count("manifests", 32)
	m.Manifests = slices.Grow(m.Manifests, n)
	for range n {
		m.Manifests = append(m.Manifests, w.array32())
	}
	n = w.count("packs", 33)
	m.Packs = slices.Grow(m.Packs, n)
	for range n {
		p := ObjectSize{Name: w.array32()}
		p.Size = w.within("a pack's size", minPack, MaxPack)
		m.Packs = append(m.Packs, p)
	}
	n = w.count("entries", 4)
	m.Entries = slices.Grow(m.Entries, n)
	for range n {
		e := MovedChunk{From: w.within("an offset", packHeaderSize, MaxPack)}
		e.Sealed = int32(w.within("a sealed chunk's length", minSealedChunk, maxSealedChunk))
		e.Pack = uint32(w.within("a pack", 0, int64(len(m.Packs))))
		e.To = w.within("an offset", packHeaderSize, MaxPack)
		m.Entries = append(m.Entries, e)
	}
	if err := w.end(); err != nil {
		return nil, err
	}
	if err := m.check(object); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(m.Packs, func(p ObjectSize) bool { return p.Name == old }) {
		return nil, bad(ErrFormat, object, "it names that pack itself")
	}
	return m, nil
}
