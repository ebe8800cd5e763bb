package ext4

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// places says where each inode's blocks lie, for who does not go through them
// in the order in which they were laid out.
type places struct {
	where []int64               // by inode: block of its first, where they lie together; ^i: frags[i]; 0: it has none
	frags [][]run               // of those that do not
	trees map[filetree.ID][]run // extent blocks
	sets  []layoutSet           // by number of attribute set
	dirs  []filetree.ID         // all directories, in order
}

func (s *places) put(id filetree.ID, runs []run) {
	switch len(runs) {
	case 0:
	case 1:
		s.where[id] = runs[0].start
	default:
		s.where[id] = ^int64(len(s.frags))
		s.frags = append(s.frags, slices.Clone(runs))
	}
}

// has tells whether an inode's blocks have been put somewhere.
func (s *places) has(id filetree.ID) bool { return s.where[id] != 0 }

// runs appends the runs of an inode's n blocks.
func (s *places) runs(out []run, id filetree.ID, n int64) []run {
	switch w := s.where[id]; {
	case w > 0:
		return append(out, run{w, n})
	case w < 0:
		return append(out, s.frags[^w]...)
	}
	return out
}

// dirNr is the number of a directory among all.
func (s *places) dirNr(id filetree.ID) int {
	nr, _ := slices.BinarySearch(s.dirs, id)
	return nr
}

// blockCount is the number of blocks an inode has, attributes and extent blocks not counted.
func (p *Plan) blockCount(s *places, id filetree.ID) (n int64) {
	switch p.t.Mode(id) & unix.S_IFMT {
	case unix.S_IFREG:
		for _, k := range p.pieces(id) {
			n += k
		}
	case unix.S_IFDIR:
		n = int64(p.dirs[s.dirNr(id)].blocks)
	case unix.S_IFLNK:
		if p.slowLink(id) {
			n = 1
		}
	}
	return n
}

func newPlaces(p *Plan) *places {
	s := &places{where: make([]int64, p.t.Len()), trees: map[filetree.ID][]run{}, sets: make([]layoutSet, len(p.sets))}
	for i := range p.t.Len() {
		if id := filetree.ID(i); isDir(p.t.Mode(id)) {
			s.dirs = append(s.dirs, id)
		}
	}
	return s
}

// taken takes n blocks and returns the runs they lie in.
func (c *cursor) taken(out []run, n int64) []run {
	for n > 0 {
		r := c.run(n)
		out = append(out, r)
		n -= r.n
	}
	return out
}

// locate finds the places of a plan that was laid out in order.
func (p *Plan) locate() *places {
	g := &p.g
	s := newPlaces(p)
	data, trees, symlinks := g.cursor(g.data), g.cursor(g.extents), g.cursor(g.symlinks)
	journal := g.cursor(g.journalAt)
	trees.skip(treeBlocks(countExtents(&journal, g.journal)))
	dirs, dirTrees := g.cursor(g.dirs), g.cursor(g.dirExts)
	var runs []run
	for i := range p.t.Len() {
		id := filetree.ID(i)
		switch p.t.Mode(id) & unix.S_IFMT {
		case unix.S_IFREG:
			runs = runs[:0]
			count := int64(0)
			for _, n := range p.pieces(id) {
				k := len(runs)
				runs = data.taken(runs, n)
				for _, r := range runs[k:] {
					count += ceilDiv(r.n, extentLen)
				}
			}
			s.put(id, joined(runs))
			if n := treeBlocks(count); n > 0 {
				s.trees[id] = trees.taken(nil, n)
			}
		case unix.S_IFLNK:
			if p.slowLink(id) {
				s.put(id, symlinks.taken(runs[:0], 1))
			}
		}
	}
	for nr, id := range s.dirs {
		runs = dirs.taken(runs[:0], int64(p.dirs[nr].blocks))
		s.put(id, runs)
		c := cursor{runs: runs}
		if n := treeBlocks(countExtents(&c, int64(p.dirs[nr].blocks))); n > 0 {
			s.trees[id] = dirTrees.taken(nil, n)
		}
	}
	xattrs := g.cursor(g.xattrs)
	for i := range p.sets {
		s.sets[i].blocks = xattrs.taken(nil, int64(p.sets[i].blocks))
	}
	values := g.cursor(g.values)
	for v := range p.values() {
		s.sets[v.set].values = append(s.sets[v.set].values, layoutValue{v.ino, values.taken(nil, blocksOf(int64(len(v.data))))})
	}
	return s
}

// joined joins runs that touch, in place.
func joined(runs []run) []run {
	out := runs[:0]
	for _, r := range runs {
		if n := len(out); n > 0 && out[n-1].start+out[n-1].n == r.start {
			out[n-1].n += r.n
		} else {
			out = append(out, r)
		}
	}
	return out
}

// setDigest tells a set of attributes from others.
func (p *Plan) setDigest(set int) (d [16]byte) {
	var b []byte
	for _, x := range p.t.Set(set) {
		b = binary.AppendUvarint(b, uint64(len(x.Name)))
		b = append(b, x.Name...)
		b = binary.AppendUvarint(b, uint64(len(x.Value)))
		b = append(b, x.Value...)
	}
	sum := sha256.Sum256(b)
	copy(d[:], sum[:])
	return d
}

// located gives the places of the plan.
func (p *Plan) located() *places {
	if p.kept != nil {
		return p.kept.places
	}
	return p.locate()
}
