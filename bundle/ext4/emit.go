package ext4

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Piece is a part of the image with its bytes: whole blocks, 1 MiB at most.
// ID and Off are those of a file where Kind is [KindData]; else None and 0.
type Piece struct {
	Segment
	Data []byte
	from *buffers
}

// Release gives the memory of Data back. It is to be called once a piece, from
// any goroutine; a piece that is forgotten costs an allocation and no more.
func (p Piece) Release() {
	if p.from != nil {
		p.from.put(p.Data)
	}
}

// EmitOptions of [Plan.Emit]. The zero value is usable.
type EmitOptions struct {
	// Skip tells of a regular file that it is not to be read: the image's metadata
	// describe it as if it had been, unchanged. It is asked from several
	// goroutines, and must always give the same answer for one file.
	Skip func(filetree.ID) bool
	// Report is called for each file that is not what the tree has, in the order of
	// IDs, before sink gets the first piece of metadata.
	Report func(Change)
}

// Emit delivers the image in pieces, for those who need not have it by
// ascending position. First come the files' data, in the order of the tree,
// the pieces of a file one after the other, each of one run of blocks; then
// all metadata, by ascending position, cut where the kind changes and where
// the position is a multiple of 1 MiB.
//
// What is not delivered is zero, or of files that are skipped: pieces of
// metadata do not begin or end with a block of zeros, and of files that could
// not be opened, or ended early, there is no data where they have none.
//
// The sink is called from one goroutine. It has a piece until it releases it;
// files are opened as by [Plan.Write], and changes reported in the same way.
// Emit fails with what sink or ctx fails with.
func (p *Plan) Emit(ctx context.Context, src filetree.Source, o EmitOptions, sink func(Piece) error) error {
	if o.Report == nil {
		o.Report = func(Change) {}
	}
	e := &emitter{p: p, sink: sink, large: newBuffers(flowBuffer, 8)}
	d := &damage{p: p, files: map[filetree.ID]*fileDamage{}}
	a := newAhead(ctx, p, src, o.Skip)
	defer a.stop()
	c := &contents{ctx: ctx, p: p, out: e, ahead: a, report: o.Report, damage: d}
	if err := e.files(c, o.Skip); err != nil {
		return err
	}
	f := newFlow(ctx, nil, p)
	f.sink = e
	m := &metadata{p: p, f: f, damage: d, roots: map[filetree.ID][60]byte{}, spare: map[int64][]byte{}}
	rest := []func() error{
		func() error { return f.seek(p.g.extents) },
		m.fileTrees, m.xattrs, m.values, m.symlinks, m.dirs, m.dirTrees, m.lostFound, m.inodes,
	}
	if p.kept != nil {
		rest = []func() error{m.scattered}
	}
	for _, step := range []func() error{
		m.front,
		func() error {
			for _, step := range rest {
				if err := step(); err != nil {
					return err
				}
			}
			return nil
		},
		func() error { return f.seek(p.g.blocks) },
		f.flush,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// emitter hands pieces to a sink.
type emitter struct {
	p     *Plan
	sink  func(Piece) error
	large *buffers

	id   filetree.ID // of the file at hand
	at   *cursor     // where its next block lies
	read *reading    // of it
	now  Piece       // being filled; without Data: none
}

// files delivers the data of all files.
func (e *emitter) files(c *contents, skip func(filetree.ID) bool) error {
	p := e.p
	at := p.g.cursor(p.g.data)
	var runs []run
	e.at = &at
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		skipped := skip != nil && skip(id)
		if p.kept != nil && !skipped {
			runs = p.kept.runs(runs[:0], id, p.blockCount(p.kept.places, id))
			at = cursor{runs: runs}
		}
		if skipped {
			if p.kept == nil {
				p.countFile(id, e.at)
			}
			continue
		}
		e.id = id
		if err := e.file(c); err != nil {
			return err
		}
	}
	return nil
}

// file delivers the data of the file at hand.
func (e *emitter) file(c *contents) error {
	start := *e.at
	size := e.p.fileSize(e.id)
	if size != e.p.t.Size(e.id) {
		return nil // too large for ext4: see Warnings
	}
	f, err := c.ahead.next(c.ctx)
	switch {
	case err != nil && c.ctx.Err() != nil:
		return context.Cause(c.ctx)
	case err != nil:
		c.missing(e.id, start, err)
		return e.nothing(e.id)
	case f.whole && !f.changed && f.err == nil && f.closing == nil && size > 0:
		if !e.p.dense(e.id) {
			break
		}
		n, next := blocksOf(size), start
		if r := next.run(n); r.n == n {
			*e.at = next
			b := f.data[:n*BlockSize]
			clear(b[size:])
			f.data = nil
			return e.deliver(Piece{Segment{KindData, e.id, 0, r.start * BlockSize, n * BlockSize}, b, f.free})
		}
	}
	e.read = &reading{c: c, id: e.id, file: f, size: size}
	if err = c.read(e.read, start); err == nil {
		err = e.flush()
	}
	e.read = nil
	return err
}

func (e *emitter) deliver(p Piece) error {
	if err := e.sink(p); err != nil {
		return fmt.Errorf("delivering %d bytes of the filesystem image at %d: %w", p.Len, p.Pos, err)
	}
	return nil
}

// flush delivers the piece at hand, unless the file ended before it.
func (e *emitter) flush() error {
	p := e.now
	e.now = Piece{}
	if p.Data == nil {
		return nil
	}
	if e.read != nil && p.Off >= e.read.size {
		p.Release()
		return nil
	}
	return e.deliver(p)
}

func (e *emitter) spanAt(off, n int64) ([]byte, error) {
	if err := e.flush(); err != nil {
		return nil, err
	}
	r := e.at.run(min(n, flowBuffer/BlockSize))
	b := e.large.get()[:r.n*BlockSize]
	e.now = Piece{Segment{KindData, e.id, off, r.start * BlockSize, r.n * BlockSize}, b, e.large}
	return b, nil
}

func (e *emitter) nothing(id filetree.ID) error {
	e.p.countFile(id, e.at)
	return nil
}

// metadata delivers blocks of metadata, without zeros at their ends.
func (e *emitter) metadata(kind Kind, at int64, b []byte) error {
	whole := b
	for len(b) > 0 && isZero(b[len(b)-BlockSize:]) {
		b = b[:len(b)-BlockSize]
	}
	if len(b) == 0 {
		e.large.put(whole)
		return nil
	}
	for isZero(b[:BlockSize]) {
		b = b[BlockSize:]
		at++
	}
	return e.deliver(Piece{Segment{kind, filetree.None, 0, at * BlockSize, int64(len(b))}, b, e.large})
}

func isZero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	return true
}

// buffers keeps memory of one size for use again.
type buffers struct {
	size int
	free chan []byte
}

// newBuffers makes buffers of a size, of which it keeps some.
func newBuffers(size, keep int) *buffers { return &buffers{size, make(chan []byte, keep)} }

// get gives a buffer of the full size, with whatever it holds.
func (s *buffers) get() []byte {
	select {
	case b := <-s.free:
		return b
	default:
		return make([]byte, s.size)
	}
}

// put takes a buffer back, or its beginning.
func (s *buffers) put(b []byte) {
	if cap(b) < s.size {
		return
	}
	select {
	case s.free <- b[:s.size]:
	default:
	}
}
