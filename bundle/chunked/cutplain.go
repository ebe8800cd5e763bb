package chunked

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/instar-image/instar/bundle/sparse"
)

// CopySparse cuts the ranges of r that m has, at their positions, every 512
// KiB: for a raw disk.
func (c *Cutter) CopySparse(r io.ReaderAt, m sparse.Map) error {
	if err := c.File("", c.s.size); err != nil {
		return err
	}
	c.small = false
	for _, e := range m {
		for off := e.Off; off < e.End(); {
			if err := c.ctx.Err(); err != nil {
				return context.Cause(c.ctx)
			}
			b, release := c.w.Buffer()
			n := min(e.End(), (off/cellSize+1)*cellSize) - off
			if _, err := io.ReadFull(io.NewSectionReader(r, off, n), b[:n]); err != nil {
				release()
				return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
			}
			if err := c.Data(off, off, b[:n], release); err != nil {
				return err
			}
			off += n
			// The cell that is not whole is not mapped yet.
			if err := c.s.Settled(c.ctx, off-off%cellSize-cellSize); err != nil {
				return err
			}
		}
	}
	return nil
}

// Copy cuts all that r has, from the stream's beginning on, every 512 KiB, and
// tells how much it was: for a kernel or an initrd.
func (c *Cutter) Copy(r io.Reader) (int64, error) {
	if err := c.File("", cellSize); err != nil {
		return 0, err
	}
	for off := int64(0); ; {
		if err := c.ctx.Err(); err != nil {
			return off, context.Cause(c.ctx)
		}
		b, release := c.w.Buffer()
		n, err := io.ReadFull(r, b[:cellSize])
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			release()
			return off, fmt.Errorf("read stream %q at %d: %w", c.s.name, off, err)
		}
		if n == 0 {
			release()
			return off, c.w.Err()
		}
		if err := c.Data(off, off, b[:n], release); err != nil {
			return off, err
		}
		off += int64(n)
	}
}

// Records cuts what is written to it from the stream's beginning on. Each Write
// is a record: chunks end behind some of them, so that a record that changes
// disturbs few others. Close makes a chunk of what is left and, if the stream
// is [Unsized], sets its size; no Finish is needed.
func (c *Cutter) Records() io.WriteCloser { return &records{c: c} }

type records struct {
	c   *Cutter
	off int64
}

// Chunks of records, in bytes.
const (
	recordsMax  = 256 << 10
	recordsMin  = 16 << 10
	recordsOdds = 65536 / 4
)

func (r *records) Write(p []byte) (int, error) {
	c := r.c
	if err := c.w.Err(); err != nil {
		return 0, err
	}
	if len(c.group.b) > 0 && len(c.group.b)+len(p) > recordsMax {
		if err := c.flush(&c.group); err != nil {
			return 0, err
		}
	}
	done := 0
	for rest := p; len(rest) > 0; {
		k := min(len(rest), groupMax-len(c.group.b))
		c.group.append(c.w, r.off, rest[:k])
		r.off += int64(k)
		done += k
		if rest = rest[k:]; len(rest) > 0 {
			if err := c.flush(&c.group); err != nil {
				return done, err
			}
		}
	}
	d := DigestOf(p)
	if len(c.group.b) >= recordsMin && binary.LittleEndian.Uint16(d[:]) < recordsOdds {
		return done, c.flush(&c.group)
	}
	return done, nil
}

func (r *records) Close() error {
	if err := r.c.flush(&r.c.group); err != nil {
		return err
	}
	if r.c.s.unsized {
		return r.c.s.SetSize(r.off)
	}
	return r.c.w.Err()
}
