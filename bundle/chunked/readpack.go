package chunked

import (
	"context"
	"errors"
	"fmt"
)

// With is the index read from another source. Both share what was read and
// checked of it.
func (x *Index) With(src Source) *Index {
	return &Index{src: src, root: x.root, u: x.u, segments: x.segments}
}

// ReadChunks reads chunks that lie in one pack, by ascending offset, in one
// range from the first to the last, and calls give for each in order, with its
// verified plaintext, which is give's to keep, or with why it cannot be had.
// What is not right in the range, or not there, is read again on its own, and
// where it was moved.
func (x *Index) ReadChunks(ctx context.Context, list []Chunk, give func(i int, p []byte, err error)) {
	if len(list) == 0 {
		return
	}
	first := list[0].At
	end := first.Offset
	for i := range list {
		c := &list[i]
		err := c.check()
		if err == nil && (c.At.Pack != first.Pack || c.At.Offset < end) {
			err = fmt.Errorf("%w: %s is not behind the chunk before it", ErrUsage, chunkObject(c.Digest, c.At))
		}
		if err != nil {
			for j := range list {
				give(j, nil, err)
			}
			return
		}
		end = c.At.Offset + int64(c.At.Sealed)
	}
	buf := make([]byte, end-first.Offset)
	failed := x.src.ReadPack(ctx, first.Pack, first.Offset, buf)
	if failed != nil {
		failed = fmt.Errorf("read %s: %w", chunkObject(list[0].Digest, first), failed)
	}
	// A store that does not answer is not asked for each of them again.
	lost := failed == nil || errors.Is(failed, ErrMissing) || errors.Is(failed, ErrCorrupt)
	for i := range list {
		c := list[i]
		var p []byte
		err := failed
		if err == nil {
			off := c.At.Offset - first.Offset
			dst := make([]byte, 1, c.Size)
			p, err = x.u.open(&c, buf[off:off+int64(c.At.Sealed)], dst)
			if err == nil && len(list) > 1 && &p[0] != &dst[0] {
				p = append(dst[:0], p...) // of a small chunk the whole range would stay in memory
			}
		}
		if err != nil && lost && ctx.Err() == nil {
			p, err = x.read(ctx, c, nil, nil)
		}
		give(i, p, err)
	}
}
