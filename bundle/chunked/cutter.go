package chunked

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync/atomic"
)

// Where chunks begin (SPEC.md §6.3), in bytes.
const (
	blockSize = 4 << 10
	cellSize  = 512 << 10 // of large files: those that have as much
	groupMax  = 1 << 20   // of small files
	groupMin  = 256 << 10
	groupOdds = 4096      // of 65536 files, those that end a group of groupMin
	metaSize  = 128 << 10 // of filesystem metadata
)

// CutterOptions of [Writer.Cutter].
type CutterOptions struct {
	// Parent is the stream whose metadata this one's resembles, or nil: blocks
	// that are equal at the same position are the parent's.
	Parent *Stream
	// First are ranges of the stream, in the order in which they are read first:
	// the blocks in them, up to 64 MiB, lie together in chunks of their own, which
	// come last. Not for CopySparse, which promises what is settled.
	First []Range
}

// Cutter cuts what a stream holds into chunks as SPEC.md §6.3 has it: file after
// file, then metadata. Blocks of zeros are left out. One goroutine uses it, and
// several cutters may work for one writer.
type Cutter struct {
	ctx context.Context //nolint:containedctx // of the parent's reader and all that blocks
	w   *Writer
	s   *StreamWriter

	small bool   // the file at hand shares chunks
	last  bool   // a group may end behind it
	cell  int64  // the number of the cell in part, if part is of a large file
	group gather // of small files
	part  gather // of a large file's cell
	meta  gather // of metadata

	parent *parentCompare
	first  *first
	zero   [blockSize]byte
}

// Cutter makes a cutter for s. Its calls fail once ctx has ended.
func (w *Writer) Cutter(ctx context.Context, s *StreamWriter, o CutterOptions) *Cutter {
	c := &Cutter{ctx: ctx, w: w, s: s}
	if o.Parent != nil {
		c.parent = newParentCompare(ctx, s, o.Parent)
	}
	if len(o.First) > 0 {
		c.first = newFirst(o.First, s.size)
	}
	return c
}

// gather is a chunk being put together out of pieces.
type gather struct {
	b       []byte // what there is so far
	release func() // of b; nil: there is no b
	runs    []run
}

// run is an extent of a chunk being put together.
type run struct{ pos, length, start int64 }

func addRun(runs []run, r run) []run {
	if n := len(runs); n > 0 {
		if l := &runs[n-1]; l.pos+l.length == r.pos && l.start+l.length == r.start {
			l.length += r.length
			return runs
		}
	}
	return append(runs, r)
}

// append copies p, which is at pos, behind what is there.
func (g *gather) append(w *Writer, pos int64, p []byte) {
	if g.release == nil {
		b, release := w.Buffer()
		g.b, g.release = b[:0], release
	}
	g.runs = addRun(g.runs, run{pos, int64(len(p)), int64(len(g.b))})
	g.b = append(g.b, p...)
}

// flush makes a chunk of what is there.
func (c *Cutter) flush(g *gather) error {
	if g.release == nil {
		return nil
	}
	ref := c.w.add(g.b, g.release, g != &c.part)
	err := c.mapRuns(ref, g.runs)
	*g = gather{runs: g.runs[:0]}
	return err
}

func (c *Cutter) mapRuns(ref Ref, runs []run) error {
	for _, r := range runs {
		if err := c.s.Map(r.pos, r.length, ref, r.start); err != nil {
			return err
		}
	}
	return nil
}

// File begins the next file: Data that follows is its. size is its length in
// bytes, as far as known.
func (c *Cutter) File(path string, size int64) error {
	if err := c.endFile(); err != nil {
		return err
	}
	size = (size + blockSize - 1) / blockSize * blockSize
	c.small, c.last = size < cellSize, false
	if !c.small {
		return nil
	}
	d := DigestOf([]byte(path))
	c.last = binary.LittleEndian.Uint16(d[:]) < groupOdds
	if int64(len(c.group.b))+size > groupMax {
		return c.flush(&c.group)
	}
	return nil
}

func (c *Cutter) endFile() error {
	if c.last && len(c.group.b) >= groupMin {
		c.last = false
		return c.flush(&c.group)
	}
	return c.flush(&c.part)
}

// Data gives bytes of the file at hand: p is at off in the file and at pos in
// the stream. Pieces are whole blocks of 4096 bytes but for the stream's last,
// and ascend by off. p belongs to the cutter until it calls release, once.
func (c *Cutter) Data(off, pos int64, p []byte, release func()) error {
	h := holdOn(release)
	defer h.drop()
	if c.small {
		return c.smallData(pos, p)
	}
	for len(p) > 0 {
		n := off / cellSize
		k := min(int64(len(p)), (n+1)*cellSize-off)
		if err := c.cellData(n, pos, p[:k], h); err != nil {
			return err
		}
		off, pos, p = off+k, pos+k, p[k:]
	}
	return nil
}

func (c *Cutter) smallData(pos int64, p []byte) error {
	for len(p) > 0 {
		k := min(blockSize, len(p))
		if !bytes.Equal(p[:k], c.zero[:k]) && !c.first.take(pos, p[:k], false) {
			if len(c.group.b)+k > groupMax { // it is larger than was said
				if err := c.flush(&c.group); err != nil {
					return err
				}
			}
			c.group.append(c.w, pos, p[:k])
		}
		pos, p = pos+int64(k), p[k:]
	}
	return nil
}

// cellData takes bytes of cell n of a large file. A whole cell is not copied.
func (c *Cutter) cellData(n, pos int64, p []byte, h *hold) error {
	if n != c.cell {
		if err := c.flush(&c.part); err != nil {
			return err
		}
		c.cell = n
	}
	if len(p) == cellSize && !c.first.any(pos, len(p)) {
		runs := c.part.runs[:0]
		for i := 0; i < len(p); i += blockSize {
			if !bytes.Equal(p[i:i+blockSize], c.zero[:]) {
				runs = addRun(runs, run{pos + int64(i), blockSize, int64(i)})
			}
		}
		c.part.runs = runs[:0]
		if len(runs) == 0 {
			return nil
		}
		return c.mapRuns(c.w.Add(p, h.share()), runs)
	}
	for len(p) > 0 {
		k := min(blockSize, len(p))
		if !bytes.Equal(p[:k], c.zero[:k]) && !c.first.take(pos, p[:k], false) {
			c.part.append(c.w, pos, p[:k])
		}
		pos, p = pos+int64(k), p[k:]
	}
	return nil
}

// Metadata gives bytes of the filesystem's own: whole blocks at pos. Positions
// ascend; all files are done. p belongs to the cutter until it calls release.
func (c *Cutter) Metadata(pos int64, p []byte, release func()) error {
	if release != nil {
		defer release()
	}
	for len(p) > 0 {
		k := min(int64(len(p)), blockSize)
		if !bytes.Equal(p[:k], c.zero[:k]) && !c.first.take(pos, p[:k], true) {
			if n := len(c.meta.runs); n > 0 && c.meta.runs[n-1].pos/metaSize != pos/metaSize {
				if err := c.endMeta(); err != nil {
					return err
				}
			}
			c.meta.append(c.w, pos, p[:k])
		}
		pos, p = pos+k, p[k:]
	}
	return nil
}

// endMeta makes a chunk of the metadata at hand, unless there is a parent that
// may have it.
func (c *Cutter) endMeta() error {
	if c.parent == nil || c.meta.release == nil || c.w.knows(c.meta.b) {
		return c.flush(&c.meta)
	}
	g := c.meta
	c.meta = gather{}
	return c.parent.add(c, g)
}

// Finish makes chunks of what is left.
func (c *Cutter) Finish() error {
	for _, step := range []func() error{
		c.endFile,
		func() error { return c.flush(&c.group) },
		c.endMeta,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("cut stream %q: %w", c.s.name, err)
		}
	}
	if c.parent != nil {
		if err := c.parent.finish(c); err != nil {
			return fmt.Errorf("cut stream %q: %w", c.s.name, err)
		}
	}
	if err := c.endFirst(); err != nil {
		return err
	}
	return c.w.Err()
}

// hold lets several chunks share memory that is given back once.
type hold struct {
	n       atomic.Int32
	release func()
}

func holdOn(release func()) *hold {
	h := &hold{release: release}
	h.n.Store(1)
	return h
}

func (h *hold) drop() {
	if h.n.Add(-1) == 0 && h.release != nil {
		h.release()
	}
}

func (h *hold) share() func() {
	h.n.Add(1)
	return h.drop
}
