package chunked

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
)

// Limits of packs (SPEC.md §5), in bytes.
const (
	MaxPack         = 256 << 20
	maxFooter       = 16 << 20 // before sealing
	packHeaderSize  = 16
	packTrailerSize = 48
	minPack         = packHeaderSize + minSealedChunk + minFooter + SealOverhead + packTrailerSize
	minFooter       = ownerSize + 1 + minPackEntry
	minPackEntry    = 32 + 1 + 1
	maxPackEntry    = 32 + 4 + 4
	ownerSize       = 16

	packMagic    = "INSTARPK"
	trailerMagic = "INSTARPF"
)

// NameOf is the name of the object with these bytes.
func NameOf(data []byte) Name { return sha256.Sum256(data) }

func packObject(n Name) string { return "pack " + n.String() }

// PackEntry is what a footer says about a chunk of its pack.
type PackEntry struct {
	ID     ID
	Plain  int // length of the plaintext, bytes
	Sealed int // length of the sealed chunk, bytes
}

// Footer says which chunks a pack holds. It is a claim of whoever made the
// pack (SPEC.md §5): believe one's own (OwnedBy), and others' only by decision.
type Footer struct {
	Salt    Salt
	Entries []PackEntry // as they follow each other in the pack
	owner   [ownerSize]byte
	owned   []byte // what owner authenticates
}

// All gives the chunks and where in pack n they are.
func (f *Footer) All(n Name) func(yield func(PackEntry, Location) bool) {
	return func(yield func(PackEntry, Location) bool) {
		off := int64(packHeaderSize)
		for _, e := range f.Entries {
			if !yield(e, Location{Pack: n, Offset: off, Sealed: e.Sealed}) {
				return
			}
			off += int64(e.Sealed)
		}
	}
}

// OwnedBy reports whether the creator with this owner's key made the pack.
func (f *Footer) OwnedBy(owner Key) bool {
	want := ownerOf(owner, f.Salt, f.owned)
	return subtle.ConstantTimeCompare(want[:], f.owner[:]) == 1
}

func ownerOf(owner Key, salt Salt, rest []byte) (o [ownerSize]byte) {
	m := mac(owner, salt[:], rest)
	copy(o[:], m[:])
	return o
}

// appendPackHeader begins a pack.
func appendPackHeader(b []byte) []byte {
	return append(appendMagic(b, packMagic), 0, 0, 0, 0)
}

// footerRoom is the most that a footer of n chunks and what is behind it takes.
func footerRoom(n int) int {
	return ownerSize + binary.MaxVarintLen64 + n*maxPackEntry + SealOverhead + packTrailerSize
}

// appendPackEnd appends footer and trailer to a pack, which then is whole.
func appendPackEnd(pack []byte, d *Domain, owner Key, salt Salt, entries []PackEntry) []byte {
	f := make([]byte, ownerSize, footerRoom(len(entries)))
	f = appendUvarint(f, len(entries))
	for _, e := range entries {
		f = append(f, e.ID[:]...)
		f = appendUvarint(f, e.Plain)
		f = appendUvarint(f, e.Sealed)
	}
	o := ownerOf(owner, salt, f[ownerSize:])
	copy(f, o[:])
	begin := len(pack)
	pack = AppendSeal(pack, d.FooterKey(salt), TypeFooter, Stored, f)
	pack = binary.LittleEndian.AppendUint32(pack, uint32(len(pack)-begin))
	pack = binary.LittleEndian.AppendUint32(pack, version)
	pack = binary.LittleEndian.AppendUint32(pack, uint32(len(f)))
	pack = append(pack, d.label[:]...)
	pack = append(pack, salt[:]...)
	return append(pack, trailerMagic...)
}

// SealedChunk is a chunk as a pack holds it.
type SealedChunk struct {
	ID     ID
	Plain  int
	Sealed []byte
}

// EncodePack makes a pack of chunks that are sealed already: of copied ones,
// or for test vectors. A [Writer] makes its own.
func EncodePack(d *Domain, owner Key, salt Salt, chunks []SealedChunk) ([]byte, error) {
	size := packHeaderSize + footerRoom(len(chunks))
	entries := make([]PackEntry, len(chunks))
	for i, c := range chunks {
		if c.Plain < 1 || c.Plain > MaxChunk || len(c.Sealed) < minSealedChunk || len(c.Sealed) > maxSealedChunk {
			return nil, fmt.Errorf("%w: chunk %s has %d bytes, sealed %d", ErrUsage, c.ID, c.Plain, len(c.Sealed))
		}
		entries[i] = PackEntry{ID: c.ID, Plain: c.Plain, Sealed: len(c.Sealed)}
		size += len(c.Sealed)
	}
	if len(chunks) == 0 || footerRoom(len(chunks)) > maxFooter || size > MaxPack {
		return nil, fmt.Errorf("%w: %d chunks with %d bytes are no pack", ErrUsage, len(chunks), size)
	}
	pack := appendPackHeader(make([]byte, 0, size))
	for _, c := range chunks {
		pack = append(pack, c.Sealed...)
	}
	return appendPackEnd(pack, d, owner, salt, entries), nil
}

// trailer is the decoded end of a pack.
type trailer struct {
	sealed, plain int
	salt          Salt
}

// parseTrailer reads the last packTrailerSize bytes of a pack of size bytes.
func parseTrailer(object string, d *Domain, p []byte, size int64) (trailer, error) {
	var t trailer
	w := &wire{object: object, b: p[:packTrailerSize-len(trailerMagic)]}
	if got := p[packTrailerSize-len(trailerMagic):]; string(got) != trailerMagic {
		w.fail(ErrCorrupt, "it ends in %q, not %q", got, trailerMagic)
	}
	sealed := int64(w.u32())
	if v := w.u32(); w.err == nil && v != version {
		w.fail(ErrVersion, "version %d; this program knows version %d: use a newer one", v, version)
	}
	plain := int64(w.u32())
	var label Label
	copy(label[:], w.bytes(len(label)))
	copy(t.salt[:], w.bytes(len(t.salt)))
	if w.err == nil && label != d.label {
		w.fail(ErrForeign, "its domain's label is %s, not %s", label, d.label)
	}
	if w.err == nil && (plain < minFooter || plain > maxFooter || sealed < minFooter+SealOverhead || sealed > plain+SealOverhead ||
		sealed > size-packHeaderSize-minSealedChunk-packTrailerSize) {
		w.fail(ErrCorrupt, "a footer of %d bytes, %d opened, does not fit into its %d", sealed, plain, size)
	}
	t.sealed, t.plain = int(sealed), int(plain)
	return t, w.end()
}

// parseFooter reads an opened footer whose chunks are bytes long together.
func parseFooter(object string, f []byte, salt Salt, chunks int64) (*Footer, error) {
	w := &wire{object: object, b: f}
	out := &Footer{Salt: salt}
	copy(out.owner[:], w.bytes(ownerSize))
	out.owned = w.b
	n := w.count("chunks", minPackEntry)
	if w.err == nil && n == 0 {
		w.fail(ErrFormat, "it holds no chunk")
	}
	out.Entries = make([]PackEntry, 0, n)
	for range n {
		e := PackEntry{ID: w.array32()}
		e.Plain = int(w.within("a chunk's length", 1, MaxChunk))
		e.Sealed = int(w.within("a sealed chunk's length", minSealedChunk, maxSealedChunk))
		chunks -= int64(e.Sealed)
		out.Entries = append(out.Entries, e)
	}
	if w.err == nil && chunks != 0 {
		w.fail(ErrFormat, "its chunks do not end where its footer begins")
	}
	return out, w.end()
}

// PackReader reads packs.
type PackReader interface {
	// ReadPack fills p with the bytes of pack n from offset off on. It fails
	// with an error that wraps [ErrMissing] if there is no such pack, and never
	// gives less than it was asked for. It is called concurrently.
	ReadPack(ctx context.Context, n Name, off int64, p []byte) error
}

// footerGuess is how much of a pack's end is read at first: the footers of
// 16 MiB packs are shorter.
const footerGuess = 16 << 10

// ReadFooter reads the footer of pack n, which has size bytes, in one ranged
// read, or two if it has more than 400 chunks.
func (d *Domain) ReadFooter(ctx context.Context, r PackReader, n Name, size int64) (*Footer, error) {
	object := packObject(n)
	if size < minPack || size > MaxPack {
		return nil, bad(ErrCorrupt, object, "a pack has %d to %d bytes, not %d", minPack, int64(MaxPack), size)
	}
	tail := make([]byte, min(size, footerGuess))
	if err := r.ReadPack(ctx, n, size-int64(len(tail)), tail); err != nil {
		return nil, fmt.Errorf("read the end of %s: %w", object, err)
	}
	t, err := parseTrailer(object, d, tail[len(tail)-packTrailerSize:], size)
	if err != nil {
		return nil, err
	}
	begin := size - packTrailerSize - int64(t.sealed)
	sealed := tail[:len(tail)-packTrailerSize]
	if len(sealed) >= t.sealed {
		sealed = sealed[len(sealed)-t.sealed:]
	} else {
		sealed = make([]byte, t.sealed)
		if err := r.ReadPack(ctx, n, begin, sealed); err != nil {
			return nil, fmt.Errorf("read the footer of %s: %w", object, err)
		}
	}
	return d.openFooter(object, t, sealed, begin-packHeaderSize)
}

func (d *Domain) openFooter(object string, t trailer, sealed []byte, chunks int64) (*Footer, error) {
	u, err := newUnpacker()
	if err != nil {
		return nil, err
	}
	defer u.dec.Close()
	object = "footer of " + object
	f, err := u.openExact(object, d.FooterKey(t.salt), TypeFooter, sealed, t.plain, nil)
	if err != nil {
		return nil, err
	}
	return parseFooter(object, f, t.salt, chunks)
}

// OpenPack checks a whole pack against its name and reads its footer. data is
// not changed.
func (d *Domain) OpenPack(n Name, data []byte) (*Footer, error) {
	object := packObject(n)
	if got := NameOf(data); got != n {
		return nil, bad(ErrCorrupt, object, "its bytes have the name %s", got)
	}
	if len(data) < minPack || len(data) > MaxPack {
		return nil, bad(ErrFormat, object, "a pack has %d to %d bytes, not %d", minPack, int64(MaxPack), len(data))
	}
	w := &wire{object: object, b: data[:packHeaderSize]}
	w.magic(packMagic)
	if v := w.u32(); w.err == nil && v != 0 {
		w.fail(ErrFormat, "a reserved field is %d", v)
	}
	if err := w.end(); err != nil {
		return nil, err
	}
	t, err := parseTrailer(object, d, data[len(data)-packTrailerSize:], int64(len(data)))
	if err != nil {
		return nil, err
	}
	begin := len(data) - packTrailerSize - t.sealed
	sealed := append([]byte(nil), data[begin:begin+t.sealed]...)
	return d.openFooter(object, t, sealed, int64(begin-packHeaderSize))
}
