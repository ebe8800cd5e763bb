package ext4

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// LayoutOptions of [Plan.WriteLayout].
type LayoutOptions struct {
	// Started is when the scan began that found the tree, by the clock that the
	// files' times are of: a file written after it, or up to two seconds before it,
	// may have been written again without its times telling.
	Started filetree.Time
	// Unsure tells which regular files are never to be recognised by their
	// attributes: those that changed while they were read, and those whose content
	// does not come from the volume. nil: none.
	Unsure func(filetree.ID) bool
}

// WriteLayout writes the plan's [Layout], in one Write for the header and one
// for each directory: good places to cut it, for a directory's bytes depend
// on nothing but what is in it and where that lies. It fails with what w
// fails with.
func (p *Plan) WriteLayout(w io.Writer, o LayoutOptions) error {
	e := &layoutEncoder{p: p, o: o, s: p.located(), devs: map[uint64]uint64{}, named: map[filetree.ID]struct{}{}}
	put := func(b []byte) error {
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("writing the filesystem's layout: %w", err)
		}
		return nil
	}
	if err := put(e.header()); err != nil {
		return err
	}
	for stack := []filetree.ID{filetree.Root}; len(stack) > 0; {
		id := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if err := put(e.directory(id)); err != nil {
			return err
		}
		n := len(stack)
		for _, child := range p.t.Children(id) {
			if isDir(p.t.Mode(child)) {
				stack = append(stack, child)
			}
		}
		slices.Reverse(stack[n:])
	}
	return put([]byte{0})
}

type layoutEncoder struct {
	p     *Plan
	o     LayoutOptions
	s     *places
	devs  map[uint64]uint64 // numbers of devices
	named map[filetree.ID]struct{}
	body  []byte
	out   []byte
	buf   []run
}

func (e *layoutEncoder) number(v uint64) { e.body = binary.AppendUvarint(e.body, v) }
func (e *layoutEncoder) step(from, to int64) {
	e.body = binary.AppendVarint(e.body, to-from)
}

func (e *layoutEncoder) runs(runs []run, from *int64) {
	e.number(uint64(len(runs)))
	for _, r := range runs {
		e.step(*from, r.start)
		e.number(uint64(r.n))
		*from = r.start + r.n
	}
}

func (e *layoutEncoder) time(from, to filetree.Time) {
	e.step(from.Sec, to.Sec)
	e.number(uint64(to.Nsec))
}

func (e *layoutEncoder) near(from, to filetree.Time) {
	a, ok := nanoseconds(from)
	b, also := nanoseconds(to)
	if !ok || !also {
		e.number(0)
		e.time(from, to)
		return
	}
	d := b - a
	e.number((uint64(d<<1) ^ uint64(d>>63)) + 1)
}

// framed puts what was encoded behind its length.
func (e *layoutEncoder) framed(prefix string) []byte {
	e.out = append(e.out[:0], prefix...)
	e.out = binary.AppendUvarint(e.out, uint64(len(e.body)))
	e.out = append(e.out, e.body...)
	e.body = e.body[:0]
	return e.out
}

func (e *layoutEncoder) header() []byte {
	p, g := e.p, &e.p.g
	e.number(uint64(p.size))
	e.body = append(e.body, p.uuid[:]...)
	for _, v := range []int64{g.blocks, g.ipg, g.journal, p.created, g.extents, g.lost, g.tables} {
		e.number(uint64(v))
	}
	e.time(filetree.Time{}, e.o.Started)
	var devs []uint64
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		d := p.device(id)
		if _, ok := e.devs[d]; !ok {
			e.devs[d] = uint64(len(devs))
			devs = append(devs, d)
		}
	}
	e.number(uint64(len(devs)))
	for _, d := range devs {
		e.number(d)
	}
	n := 0
	for i := range e.s.sets {
		if len(e.s.sets[i].blocks) > 0 {
			n++
		}
	}
	e.number(uint64(n))
	for i := range e.s.sets {
		s := &e.s.sets[i]
		if len(s.blocks) == 0 {
			continue
		}
		d := p.setDigest(i)
		e.body = append(e.body, d[:]...)
		var at int64
		e.runs(s.blocks, &at)
		e.number(uint64(len(s.values)))
		for _, v := range s.values {
			e.number(uint64(v.ino))
			e.runs(v.runs, &at)
		}
	}
	return e.framed(layoutMagic)
}

func (e *layoutEncoder) directory(dir filetree.ID) []byte {
	p := e.p
	var at int64
	e.buf = e.s.runs(e.buf[:0], dir, p.blockCount(e.s, dir))
	e.runs(e.buf, &at)
	e.runs(e.s.trees[dir], &at)
	var c layoutChain
	for name, id := range p.t.Children(dir) {
		e.entry(&c, name, id)
		c.name = append(c.name[:0], name...)
	}
	return e.framed("")
}

func (e *layoutEncoder) entry(c *layoutChain, name []byte, id filetree.ID) {
	p := e.p
	a := p.t.Attr(id)
	ino := int64(p.ino(id))
	head := byte(a.Type() >> 12)
	again := false
	if p.t.Names(id) > 1 {
		if _, again = e.named[id]; again {
			head = 0
		} else {
			e.named[id] = struct{}{}
			head |= entryNames
		}
	}
	facts := false
	switch {
	case again:
	case a.Type() == unix.S_IFREG:
		e.buf = e.s.runs(e.buf[:0], id, p.blockCount(e.s, id))
		if facts = e.o.Unsure == nil || !e.o.Unsure(id); facts {
			head |= entryFacts
		}
		if a.Size > 0 && !p.dense(id) {
			head |= entrySparse
		}
		if len(e.buf) > 1 {
			head |= entryRuns
		}
	case p.slowLink(id):
		head |= entryRuns
	}
	e.body = append(e.body, head)
	shared := 0
	for shared < min(len(name), len(c.name)) && name[shared] == c.name[shared] {
		shared++
	}
	e.number(uint64(shared))
	e.number(uint64(len(name) - shared))
	e.body = append(e.body, name[shared:]...)
	e.step(c.ino+1, ino)
	if again {
		return
	}
	c.ino = ino
	switch {
	case a.Type() == unix.S_IFREG:
		e.regular(c, id, head)
	case p.slowLink(id):
		start := e.s.where[id]
		e.step(c.link, start)
		c.link = start + 1
	}
	if facts {
		e.time(c.mtime, a.Mtime)
		e.near(c.ctime, a.Ctime)
		e.number(e.devs[p.device(id)])
		e.step(int64(c.host), int64(a.Ino))
		c.mtime, c.ctime, c.host = a.Mtime, a.Ctime, a.Ino
	}
}

func (e *layoutEncoder) regular(c *layoutChain, id filetree.ID, head byte) {
	p := e.p
	e.number(uint64(p.t.Size(id)))
	if head&entrySparse != 0 {
		n, at := 0, int64(0)
		for range p.pieces(id) {
			n++
		}
		e.number(uint64(n))
		for start, n := range p.pieces(id) {
			e.number(uint64(start - at))
			e.number(uint64(n))
			at = start + n
		}
	}
	switch {
	case head&entryRuns != 0:
		e.runs(e.buf, &c.data)
	case len(e.buf) > 0:
		e.step(c.data, e.buf[0].start)
		c.data = e.buf[0].start + e.buf[0].n
	}
	if trees := e.s.trees[id]; trees != nil {
		e.runs(trees, &c.data)
	}
}
