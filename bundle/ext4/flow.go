package ext4

import (
	"context"
	"fmt"
	"io"
)

// flow writes the image's blocks by ascending position, the copies of
// superblock and descriptors in their places among them: to w as one stream,
// or to sink in pieces that lie together and are of one kind.
type flow struct {
	ctx  context.Context
	w    io.Writer
	sink *emitter
	p    *Plan
	buf  []byte // filled up to len, written when full
	at   int64  // block
	next int    // in geometry.supers

	kind     Kind  // of what is written now
	bufKind  Kind  // of what buf holds, where there is a sink
	bufStart int64 // block
}

const flowBuffer = 1 << 20

func newFlow(ctx context.Context, w io.Writer, p *Plan) *flow {
	return &flow{ctx: ctx, w: w, p: p, buf: make([]byte, 0, flowBuffer)}
}

func (f *flow) flush() error {
	if len(f.buf) == 0 {
		return nil
	}
	if err := f.ctx.Err(); err != nil {
		return context.Cause(f.ctx)
	}
	if f.sink != nil {
		b := f.buf
		f.buf = f.sink.large.get()[:0]
		return f.sink.metadata(f.bufKind, f.bufStart, b)
	}
	n, err := f.w.Write(f.buf)
	if err == nil && n < len(f.buf) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("writing the filesystem image: %w", err)
	}
	f.buf = f.buf[:0]
	return nil
}

// raw gives memory for 1 to n blocks at the present position, to be filled
// before the next call.
func (f *flow) raw(n int64) ([]byte, error) {
	if f.sink != nil {
		if err := f.cut(); err != nil {
			return nil, err
		}
		n = min(n, (flowBuffer-f.at*BlockSize%flowBuffer)/BlockSize)
	} else if len(f.buf) == cap(f.buf) {
		if err := f.flush(); err != nil {
			return nil, err
		}
	}
	k := int(min(n*BlockSize, int64(cap(f.buf)-len(f.buf))))
	at := len(f.buf)
	f.buf = f.buf[:at+k]
	f.at += int64(k / BlockSize)
	return f.buf[at:], nil
}

// cut ends the piece at hand where the next block does not belong to it.
func (f *flow) cut() error {
	end := f.bufStart + int64(len(f.buf)/BlockSize)
	if f.at != end || f.kind != f.bufKind || f.at*BlockSize%flowBuffer == 0 {
		if err := f.flush(); err != nil {
			return err
		}
		f.bufKind, f.bufStart = f.kind, f.at
	}
	return nil
}

// span is raw, around the copies of the superblock.
func (f *flow) span(n int64) ([]byte, error) {
	s := f.p.g.supers
	if f.next < len(s) {
		if f.at == s[f.next] {
			if err := f.seek(f.at); err != nil {
				return nil, err
			}
		}
	}
	if f.next < len(s) {
		n = min(n, s[f.next]-f.at)
	}
	return f.raw(n)
}

// spanAt is span for the content of a file, whose offset it need not know.
func (f *flow) spanAt(_, n int64) ([]byte, error) { return f.span(n) }

// block gives memory for the next block.
func (f *flow) block() ([]byte, error) { return f.span(1) }

// blockAt is block, with the block's position.
func (f *flow) blockAt() ([]byte, int64, error) {
	b, err := f.block()
	return b, f.at - 1, err
}

// copyBlocks writes whole blocks.
func (f *flow) copyBlocks(b []byte) error {
	for len(b) > 0 {
		to, err := f.span(int64(len(b) / BlockSize))
		if err != nil {
			return err
		}
		b = b[copy(to, b):]
	}
	return nil
}

// seek leaves a hole up to a later block.
func (f *flow) seek(to int64) error {
	s := f.p.g.supers
	for f.next < len(s) && s[f.next] <= to {
		f.at = s[f.next]
		f.next++
		if err := f.super(); err != nil {
			return err
		}
		f.at += f.p.g.rgdt
	}
	f.at = max(f.at, to)
	return nil
}

// super writes superblock and descriptors of the group that begins here.
func (f *flow) super() error {
	defer func(kind Kind) { f.kind = kind }(f.kind)
	group := f.at / groupBlocks
	f.kind = KindSuper
	b, err := f.raw(1)
	if err != nil {
		return err
	}
	clear(b)
	if group == 0 {
		b = b[1024:]
	}
	f.p.superblock(b[:1024], group)
	f.kind = KindDescriptors
	return f.p.descriptors(func(block []byte) error {
		b, err := f.raw(1)
		copy(b, block)
		return err
	})
}
