package ext4

import (
	"context"
	"errors"
	"io"

	"github.com/instar-image/instar/bundle/filetree"
)

// contents reads the files and records what is wrong with them.
type contents struct {
	ctx    context.Context
	p      *Plan
	out    output
	ahead  *ahead
	report func(Change)
	damage *damage
}

// output takes the files' data.
type output interface {
	// spanAt gives memory for 1 to n blocks of the file at hand, from the byte off
	// of it on, to be filled before the next call.
	spanAt(off, n int64) ([]byte, error)
	// nothing stands for the data of a file that could not be opened.
	nothing(id filetree.ID) error
}

// file puts out the data of one file, whatever happens to the file, whose
// blocks begin at start.
func (c *contents) file(id filetree.ID, start cursor) error {
	size := c.p.fileSize(id)
	if size != c.p.t.Size(id) {
		return nil // too large for ext4: see Warnings
	}
	file, err := c.ahead.next(c.ctx)
	if err != nil {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		c.missing(id, start, err)
		return c.out.nothing(id)
	}
	return c.read(&reading{c: c, id: id, file: file, size: size}, start)
}

// read puts out the data of an open file and closes it.
func (c *contents) read(r *reading, start cursor) error {
	id, size := r.id, r.size
	err := r.all()
	if e := r.file.Close(); err == nil && e != nil && r.change.Kind == 0 {
		r.change = Change{Kind: Modified, Err: e}
	}
	if err != nil {
		return err
	}
	if r.size != size || len(r.bad) > 0 {
		if r.size != size {
			r.lose(blocksOf(r.size), blocksOf(size))
		}
		d := &fileDamage{size: r.size, bad: r.bad}
		if !c.damage.add(id, d, start) {
			r.change = Change{Kind: Unreadable, Off: d.bad[0].start * BlockSize, Err: errors.Join(r.change.Err, ErrCrumbled)}
			for _, b := range d.bad {
				r.change.Lost += max(min((b.start+b.n)*BlockSize, size)-b.start*BlockSize, 0)
			}
		}
	}
	if r.change.Kind != 0 {
		c.tell(id, r.change)
	}
	return nil
}

func (c *contents) tell(id filetree.ID, ch Change) {
	ch.ID, ch.Path = id, c.p.t.Path(id)
	c.report(ch)
}

// missing deals with a file that could not be opened.
func (c *contents) missing(id filetree.ID, start cursor, err error) {
	ch := Change{Kind: Unreadable, Lost: c.p.t.Size(id), Err: err}
	gone := true
	switch {
	case errors.Is(err, filetree.ErrVanished):
		ch.Kind = Vanished
	case errors.Is(err, filetree.ErrReplaced):
		ch.Kind = Replaced
	default:
		gone = false
	}
	var bad []run
	if end := blocksOf(c.p.fileSize(id)); end > 0 {
		bad = []run{{0, end}}
	}
	c.damage.add(id, &fileDamage{bad: bad}, start)
	if gone && !c.damage.lose(id) {
		ch.Err = errors.Join(err, ErrKept)
	}
	c.tell(id, ch)
}

// nothing fills the place of a file with zeros.
func (f *flow) nothing(id filetree.ID) error {
	for _, n := range f.p.pieces(id) {
		for n > 0 {
			b, err := f.span(n)
			if err != nil {
				return err
			}
			clear(b)
			n -= int64(len(b) / BlockSize)
		}
	}
	return nil
}

// reading is the state of reading one file.
type reading struct {
	c      *contents
	id     filetree.ID
	file   filetree.File
	size   int64 // as planned, until the file turns out to have shrunk
	shrunk bool
	bad    []run
	change Change
}

func (r *reading) all() error {
	planned := r.size
	end := int64(0) // of the data so far
	for logical, n := range r.c.p.pieces(r.id) {
		off := logical * BlockSize
		for n > 0 {
			b, err := r.c.out.spanAt(off, n)
			if err != nil {
				return err
			}
			n -= int64(len(b) / BlockSize)
			if err := r.fill(b, off, end); err != nil {
				return err
			}
			off += int64(len(b))
			end = min(off, planned)
		}
	}
	if r.shrunk || r.change.Kind != 0 {
		return nil
	}
	changed, err := r.file.Changed()
	if err != nil {
		r.change = Change{Kind: Modified, Err: err}
		return nil
	}
	switch {
	case !changed:
	case end < planned && r.past(planned-1):
		r.shrink(r.end(end, planned))
	case !r.past(planned):
		r.change = Change{Kind: Grew, Off: planned}
	default:
		r.change = Change{Kind: Modified}
	}
	return nil
}

// fill reads the part of the file from off on into b, whole blocks; end is
// where the data before it ended.
func (r *reading) fill(b []byte, off, end int64) error {
	want := int(min(int64(len(b)), r.size-off))
	if r.shrunk {
		want = 0
	}
	clear(b[max(want, 0):])
	step := want
	for got := 0; got < want; {
		part := b[got:min(got+step, want)]
		n, err := r.file.ReadAt(part, off+int64(got))
		if n == len(part) {
			got += n
			continue
		}
		if r.c.ctx.Err() != nil {
			return context.Cause(r.c.ctx)
		}
		if errors.Is(err, io.EOF) {
			got += n
			clear(b[got:])
			at := off + int64(got)
			if got == 0 && end < at {
				at = r.end(end, at)
			}
			r.shrink(at)
			return nil
		}
		if err == nil {
			err = io.ErrNoProgress
		}
		if step > BlockSize { // find the bad blocks one by one
			step = BlockSize
			got += n &^ (BlockSize - 1)
			continue
		}
		clear(part)
		if r.change.Kind == 0 {
			r.change = Change{Kind: Unreadable, Off: off + int64(got), Err: err}
		}
		r.change.Lost += int64(len(part))
		at := (off + int64(got)) / BlockSize
		r.lose(at, at+1)
		got += len(part)
	}
	return nil
}

// lose adds blocks to those without data.
func (r *reading) lose(from, to int64) {
	if from >= to {
		return
	}
	if n := len(r.bad); n > 0 && r.bad[n-1].start+r.bad[n-1].n >= from {
		r.bad[n-1].n = max(r.bad[n-1].n, to-r.bad[n-1].start)
		return
	}
	r.bad = append(r.bad, run{from, to - from})
}

func (r *reading) shrink(size int64) {
	r.shrunk, r.size = true, size
	if r.change.Kind == 0 {
		r.change = Change{Kind: Shrank, Off: size}
	} else {
		r.change.Err = errors.Join(r.change.Err, io.ErrUnexpectedEOF)
	}
}

// past tells whether the file has no byte at off.
func (r *reading) past(off int64) bool {
	var b [1]byte
	n, err := r.file.ReadAt(b[:], off)
	return n == 0 && errors.Is(err, io.EOF)
}

// end finds where the file ends, at lo at least and hi at most.
func (r *reading) end(lo, hi int64) int64 {
	for lo < hi {
		mid := lo + (hi-lo)/2
		if r.past(mid) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}
