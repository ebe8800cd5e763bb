package ext4

import (
	"cmp"
	"iter"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Kind says what a part of the image is.
type Kind uint8

// Kinds of [Segment].
const (
	KindSuper       Kind = iota // superblock or a copy; Off is the group's number
	KindReserved                // reserved for more descriptors
	KindBlockBitmap             // Off is the first group's number
	KindInodeBitmap             // Off is the first group's number
	KindResize                  // the resize inode's block
	KindJournal
	KindData     // content of a regular file, filled up with zeros to whole blocks
	KindExtents  // extent blocks of files
	KindXattrs   // blocks of extended attributes
	KindValues   // large values of extended attributes
	KindSymlinks // targets of 60 bytes and more
	KindDir      // a directory's blocks
	KindDirExtents
	KindLost        // spare blocks of lost+found
	KindInodes      // inode tables, as far as used; Off is the number of the first inode less one
	KindDescriptors // group descriptors; Off is the group's number
)

// Segment is a part of the image that [Plan.Write] writes.
type Segment struct {
	Kind Kind
	ID   filetree.ID // of KindData and KindDir; else None
	Off  int64       // bytes from the beginning of the file or directory; see also Kind
	Pos  int64       // bytes from the beginning of the image
	Len  int64       // bytes, whole blocks
}

// Segments yields all parts of the image that are written, by ascending
// position. Where nothing is written the image is zero. A file's data takes
// several segments where it has holes or does not lie together.
func (p *Plan) Segments() iter.Seq[Segment] {
	return func(yield func(Segment) bool) {
		if p.kept != nil {
			var all []Segment
			p.keptSegments(func(s Segment) bool {
				all = append(all, s)
				return true
			})
			slices.SortFunc(all, func(a, b Segment) int { return cmp.Compare(a.Pos, b.Pos) })
			for i := range all {
				if !yield(all[i]) {
					return
				}
			}
			return
		}
		s := segmenter{g: &p.g, yield: yield, ok: true}
		s.walk(p)
	}
}

// Data yields the segments of [KindData] in the order of IDs, those of a file by
// ascending Off: unlike [Plan.Segments] it takes no memory where places were kept.
func (p *Plan) Data() iter.Seq[Segment] {
	return func(yield func(Segment) bool) {
		seq := p.g.cursor(p.g.data)
		c := &seq
		var runs []run
		for i := range p.t.Len() {
			id := filetree.ID(i)
			if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
				continue
			}
			if k := p.kept; k != nil {
				runs = k.runs(runs[:0], id, p.blockCount(k.places, id))
				c = &cursor{runs: runs}
			}
			for at, n := range p.pieces(id) {
				for n > 0 {
					r := c.run(n)
					if !yield(Segment{KindData, id, at * BlockSize, r.start * BlockSize, r.n * BlockSize}) {
						return
					}
					at += r.n
					n -= r.n
				}
			}
		}
	}
}

type segmenter struct {
	g     *geometry
	at    int64 // block
	next  int   // superblock copy
	yield func(Segment) bool
	ok    bool
}

// emit yields n blocks at s.at, and moves there.
func (s *segmenter) emit(kind Kind, id filetree.ID, off, n int64) {
	if s.ok && n > 0 {
		s.ok = s.yield(Segment{kind, id, off, s.at * BlockSize, n * BlockSize})
	}
	s.at += n
}

// seek moves to a later block, or to one after a copy of the superblock.
func (s *segmenter) seek(to int64) {
	for s.next < len(s.g.supers) && s.g.supers[s.next] <= to {
		s.at = s.g.supers[s.next]
		s.next++
		s.super(s.at / groupBlocks)
		s.at += s.g.rgdt
	}
	s.at = max(s.at, to)
}

// super yields the superblock of a group and the descriptors after it.
func (s *segmenter) super(group int64) {
	s.emit(KindSuper, filetree.None, group, 1)
	s.emit(KindDescriptors, filetree.None, group, s.g.gdt)
}

// put yields n blocks from s.at on, around copies of the superblock.
func (s *segmenter) put(kind Kind, id filetree.ID, off, n int64) {
	for n > 0 && s.ok {
		k := n
		if s.next < len(s.g.supers) {
			if s.at == s.g.supers[s.next] {
				s.seek(s.at)
				continue
			}
			k = min(n, s.g.supers[s.next]-s.at)
		}
		s.emit(kind, id, off, k)
		off += k * BlockSize
		n -= k
	}
}

// front yields what precedes the files' data.
func (s *segmenter) front(p *Plan) {
	g, none := &p.g, filetree.None
	s.super(0)
	s.emit(KindReserved, none, 0, g.rgdt)

	bitmaps := func(kind Kind, start int64, written func(group int64) bool) {
		c := g.cursor(start)
		for group := range g.groups {
			at := c.run(1).start
			if written(group) {
				s.seek(at)
				s.emit(kind, none, group, 1)
			}
		}
	}
	bitmaps(KindBlockBitmap, g.bitmaps, func(group int64) bool { return !g.uninit(group) })
	bitmaps(KindInodeBitmap, g.inodeBitmaps, func(group int64) bool { return p.groupInodes(group) > 0 })
	c := g.cursor(g.resize)
	if g.rgdt > 0 {
		s.seek(c.run(1).start)
		s.emit(KindResize, none, 0, 1)
	}
	s.seek(c.run(1).start)
	s.emit(KindJournal, none, 0, 1)
	s.seek(g.data)
}

func (s *segmenter) walk(p *Plan) {
	g, none := &p.g, filetree.None
	s.front(p)

	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		for logical, n := range p.pieces(id) {
			s.put(KindData, id, logical*BlockSize, n)
		}
		if !s.ok {
			return
		}
	}
	s.put(KindExtents, none, 0, g.count(g.extents, g.xattrs))
	s.put(KindXattrs, none, 0, g.count(g.xattrs, g.values))
	s.put(KindValues, none, 0, g.count(g.values, g.symlinks))
	s.put(KindSymlinks, none, 0, g.count(g.symlinks, g.dirs))
	nr := 0
	for i := range p.t.Len() {
		if id := filetree.ID(i); isDir(p.t.Mode(id)) {
			s.put(KindDir, id, 0, int64(p.dirs[nr].blocks))
			nr++
		}
	}
	s.put(KindDirExtents, none, 0, g.count(g.dirExts, g.lost))
	s.put(KindLost, none, 0, lostBlocks)
	c := g.cursor(g.tables)
	for group := range g.groups {
		n := p.groupInodes(group)
		at, _ := c.whole(g.tableLen())
		if n == 0 || !s.ok {
			break
		}
		s.seek(at.start)
		s.emit(KindInodes, none, group*g.ipg, ceilDiv(n*inodeSize, BlockSize))
	}
	if s.ok {
		s.seek(g.blocks)
	}
}

// count is the number of blocks from one position to another, without the
// copies of the superblock between them.
func (g *geometry) count(from, to int64) int64 {
	n := to - from
	for _, s := range g.supers {
		if from <= s && s < to {
			n -= g.supersLen
		}
	}
	return n
}
