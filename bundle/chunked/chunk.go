package chunked

import "fmt"

// Limits of chunks (SPEC.md §5), in bytes.
const (
	MaxChunk       = 4 << 20          // plaintext
	minSealedChunk = SealOverhead + 1 //
	maxSealedChunk = 4_260_000        //
)

func chunkObject(d Digest, at Location) string {
	return fmt.Sprintf("chunk %s at %d of pack %s", d, at.Offset, at.Pack)
}

// open gives the plaintext of c, whose sealed bytes are given and are
// overwritten. The result is in sealed's memory or in dst's, if dst has room.
func (u *unpacker) open(c *Chunk, sealed, dst []byte) ([]byte, error) {
	object := chunkObject(c.Digest, c.At)
	p, err := u.openExact(object, c.Key, TypeChunk, sealed, c.Size, dst)
	if err != nil {
		return nil, err
	}
	if d := DigestOf(p); d != c.Digest {
		return nil, bad(ErrCorrupt, object, "it has digest %s", d)
	}
	return p, nil
}

// OpenChunk gives the plaintext of c from its sealed bytes, which are
// overwritten. Callers with many chunks use [Index.ReaderAt] or [Restore].
func OpenChunk(c Chunk, sealed []byte) ([]byte, error) {
	u, err := newUnpacker()
	if err != nil {
		return nil, err
	}
	defer u.dec.Close()
	if err := c.check(); err != nil {
		return nil, err
	}
	return u.open(&c, sealed, nil)
}

func (c *Chunk) check() error {
	switch {
	case c.Size < 1 || c.Size > MaxChunk:
		return bad(ErrFormat, chunkObject(c.Digest, c.At), "a chunk has 1 to %d bytes, not %d", MaxChunk, c.Size)
	case c.At.Sealed < minSealedChunk || c.At.Sealed > maxSealedChunk:
		return bad(ErrFormat, chunkObject(c.Digest, c.At), "a sealed chunk has %d to %d bytes, not %d", minSealedChunk, maxSealedChunk, c.At.Sealed)
	case c.At.Offset < packHeaderSize || c.At.Offset > MaxPack-int64(c.At.Sealed):
		return bad(ErrFormat, chunkObject(c.Digest, c.At), "no pack reaches that far")
	}
	return nil
}

// SealChunk gives the chunk with plaintext p and its sealed bytes. Where it is
// (At.Pack, At.Offset) is left to whoever stores it.
func (d *Domain) SealChunk(p []byte, l Level) (Chunk, []byte, error) {
	if len(p) < 1 || len(p) > MaxChunk {
		return Chunk{}, nil, fmt.Errorf("%w: a chunk has 1 to %d bytes, not %d", ErrUsage, MaxChunk, len(p))
	}
	z, err := newPacker(l)
	if err != nil {
		return Chunk{}, nil, err
	}
	c := Chunk{Digest: DigestOf(p), Size: len(p)}
	c.Key = d.ChunkKey(c.Digest)
	codec, b := z.pack(p)
	sealed := AppendSeal(nil, c.Key, TypeChunk, codec, b)
	c.At.Sealed = len(sealed)
	return c, sealed, nil
}
