package capture

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
)

// sameCache is the memory for the parent's chunks that files are compared with,
// in bytes.
const sameCache = 8 << 20

// sameContent takes from the parent what was read and found to be as it is
// there: of files that were in doubt, or are all to be read. Cut anew, the small
// ones among them would share chunks with others than they did before.
type sameContent struct {
	c  *creation
	s  *chunked.StreamWriter
	at io.ReaderAt // the parent's disk

	file   filetree.ID
	origin []ext4.Origin // of file
	spans  []span        // of the piece at hand
	old    []byte
}

// span says that length bytes of a piece, from off in it, are at pos in the parent's disk.
type span struct{ off, pos, length int64 }

// sameContent is nil if there is no parent.
func (c *creation) sameContent(ctx context.Context, s *chunked.StreamWriter) *sameContent {
	if c.parent == nil {
		return nil
	}
	return &sameContent{c: c, s: s, at: c.parent.disk.ReaderAt(ctx, sameCache), file: filetree.None}
}

// take maps a piece of a file, which comes to lie at pos, to the parent's
// chunks, if they hold the same bytes and may be used.
func (x *sameContent) take(ctx context.Context, p ext4.Piece, pos int64) (bool, error) {
	if x == nil || x.c.matches.Standing(p.ID) == ext4.Changed {
		return false, nil
	}
	if p.ID != x.file {
		x.file, x.origin = p.ID, x.c.matches.Origin(p.ID)
	}
	x.spans = x.spans[:0]
	at, end := p.Off, p.Off+int64(len(p.Data))
	for _, o := range x.origin {
		if from, to := max(o.Off, at), min(o.Off+o.Len, end); from == at && from < to {
			x.spans = append(x.spans, span{from - p.Off, x.c.parent.start + o.Pos + from - o.Off, to - from})
			at = to
		}
	}
	if at != end {
		return false, nil
	}
	for _, sp := range x.spans {
		if same, err := x.same(ctx, p.Data[sp.off:sp.off+sp.length], sp.pos); !same || err != nil {
			return false, err
		}
	}
	for _, sp := range x.spans {
		if err := x.s.CopyFrom(ctx, x.c.parent.disk, sp.pos, pos+sp.off, sp.length); err != nil {
			return false, fmt.Errorf("taking %q from the image before: %w", x.c.volume.Root.Tree.Path(p.ID), err)
		}
	}
	return true, nil
}

func (x *sameContent) same(ctx context.Context, data []byte, pos int64) (bool, error) {
	ok, err := x.s.CanCopy(ctx, x.c.parent.disk, pos, int64(len(data)))
	if ok && err == nil {
		if cap(x.old) < len(data) {
			x.old = make([]byte, len(data))
		}
		_, err = x.at.ReadAt(x.old[:len(data)], pos)
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	// What the parent has and cannot be read is stored again.
	return ok && err == nil && bytes.Equal(data, x.old[:len(data)]), nil
}
