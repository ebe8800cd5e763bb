package ext4

import (
	"bytes"
	"math"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// layoutWalk goes through a layout, directory by directory:
//
//	for w.directory() { for w.next() { … w.rec … } }
//
// For each entry that is a directory, in their order, the caller says by
// descend what it will have as id when its turn comes.
type layoutWalk struct {
	l     *Layout
	inos  int64
	rest  layoutDecoder // directories to come
	stack []filetree.ID // of them, the next one last
	below []filetree.ID // of the directory at hand
	err   error

	id    filetree.ID // of the directory at hand
	runs  []run       // where its blocks lie
	trees []run
	d     layoutDecoder
	rec   record // of the entry at hand, valid until the next
	at    layoutChain
	buf   [255]byte // its name
}

// layoutChain is what the numbers of an entry count from: the entries before
// it in its directory.
type layoutChain struct {
	name         []byte
	ino          int64
	data, link   int64 // ends of runs
	mtime, ctime filetree.Time
	host         uint64
}

func newLayoutWalk(l *Layout, root filetree.ID) *layoutWalk {
	h := &l.header
	return &layoutWalk{l: l, inos: h.ipg * ceilDiv(h.blocks, groupBlocks), rest: layoutDecoder{b: l.dirs}, stack: []filetree.ID{root}}
}

func (w *layoutWalk) descend(id filetree.ID) { w.below = append(w.below, id) }

// directory goes to the next directory; false at the end or after an error.
func (w *layoutWalk) directory() bool {
	for len(w.below) > 0 {
		last := len(w.below) - 1
		w.stack = append(w.stack, w.below[last])
		w.below = w.below[:last]
	}
	if w.err = w.d.err; w.err != nil {
		return false
	}
	b := w.rest.block()
	if len(w.stack) == 0 {
		if len(b) != 0 {
			w.rest.fail("more directories than there are names for")
		}
		w.rest.end("the layout")
		w.err = w.rest.err
		return false
	}
	if len(b) == 0 {
		w.rest.fail("%d directories are missing", len(w.stack))
	}
	if w.err = w.rest.err; w.err != nil {
		return false
	}
	last := len(w.stack) - 1
	w.id, w.stack = w.stack[last], w.stack[:last]
	w.d = layoutDecoder{b: b}
	w.at = layoutChain{name: w.buf[:0]}
	var at int64
	w.runs = w.d.runs(w.runs[:0], &at, w.l.header.blocks)
	w.trees = w.d.runs(w.trees[:0], &at, w.l.header.blocks)
	return true
}

// next goes to the next entry of the directory; false at its end or after an error.
func (w *layoutWalk) next() bool {
	d, r, c, h := &w.d, &w.rec, &w.at, &w.l.header
	if len(d.b) == 0 {
		return false
	}
	*r = record{pieces: r.pieces[:0], runs: r.runs[:0], trees: r.trees[:0]}
	head := d.take(1)[0]
	r.mode = uint32(head&0xf) << 12
	r.facts, r.sparse, r.names = head&entryFacts != 0, head&entrySparse != 0, head&entryNames != 0
	regular := r.mode == unix.S_IFREG
	if _, ok := fileTypes[r.mode]; !ok && r.mode != 0 || (r.facts || r.sparse) && !regular ||
		head&entryRuns != 0 && !regular && r.mode != unix.S_IFLNK || r.names && (r.mode == 0 || r.mode == unix.S_IFDIR) {
		d.fail("an entry of type and flags %#x", head)
	}
	w.name()
	r.ino = uint32(d.step(c.ino+1, 1, w.inos))
	if r.mode != 0 {
		c.ino = int64(r.ino)
	}
	switch {
	case regular:
		w.regular(head&entryRuns != 0)
	case head&entryRuns != 0:
		start := d.step(c.link, 1, h.blocks-1)
		r.runs = append(r.runs, run{start, 1})
		c.link = start + 1
	}
	return d.err == nil
}

func (w *layoutWalk) name() {
	d, c := &w.d, &w.at
	shared := int(d.number(uint64(len(c.name))))
	tail := d.take(int(d.number(uint64(255 - shared))))
	// The names ascend: what is not shared is greater.
	ascends := len(tail) > 0 && (shared == len(c.name) || tail[0] > c.name[shared])
	name := append(w.buf[:shared], tail...)
	if d.err == nil && (!ascends || bytes.ContainsAny(tail, "/\x00") || string(name) == "." || string(name) == "..") {
		d.fail("a name %q", name)
	}
	w.rec.name, c.name = name, name
}

// regular takes what is told of a regular file.
func (w *layoutWalk) regular(several bool) {
	d, r, c, h := &w.d, &w.rec, &w.at, &w.l.header
	r.size = int64(d.number(math.MaxInt64))
	total := blocksOf(min(r.size, maxFileSize))
	if r.size > maxFileSize {
		total = 0
	}
	end := total
	if r.sparse {
		var at int64
		total = 0
		for range d.count(2) {
			p := run{start: at + int64(d.number(uint64(end-at)))}
			p.n = int64(d.number(uint64(end - p.start)))
			if p.n == 0 {
				d.fail("a piece of no blocks")
			}
			at = p.start + p.n
			total += p.n
			r.pieces = append(r.pieces, p)
		}
	} else if total > 0 {
		r.pieces = append(r.pieces, run{0, total})
	}
	switch {
	case several:
		r.runs = d.runs(r.runs, &c.data, h.blocks)
	case total > 0:
		start := d.step(c.data, 1, h.blocks-total)
		r.runs = append(r.runs, run{start, total})
		c.data = start + total
	}
	if total != length(r.runs) {
		d.fail("runs of %d blocks for a file of %d", length(r.runs), total)
	}
	if d.err == nil {
		if n := treeBlocks(extentsIn(r.pieces, r.runs)); n > 0 {
			if r.trees = d.runs(r.trees, &c.data, h.blocks); length(r.trees) != n {
				d.fail("runs of %d extent blocks for a file that has %d", length(r.trees), n)
			}
		}
	}
	if r.facts {
		r.mtime, r.ctime = d.time(c.mtime), d.near(c.ctime)
		c.mtime, c.ctime = r.mtime, r.ctime
		if n := d.number(uint64(max(len(h.devs), 1) - 1)); len(h.devs) > 0 {
			r.dev = h.devs[n]
		} else {
			d.fail("a file, but no device")
		}
		r.host = uint64(d.step(int64(c.host), math.MinInt64, math.MaxInt64))
		c.host = r.host
	}
}

// length is the number of blocks in runs.
func length(runs []run) (n int64) {
	for _, r := range runs {
		n += r.n
	}
	return n
}

// extentsIn counts the extents of a file with data in pieces that lie in runs.
func extentsIn(pieces, runs []run) (n int64) {
	c := cursor{runs: runs}
	for _, p := range pieces {
		n += countExtents(&c, p.n)
	}
	return n
}
