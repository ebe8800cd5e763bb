package ext4

import (
	"iter"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// Lookups yields what the kernel reads of the image to mount it and to find its
// files, what is wanted sooner first: superblock and descriptors, the journal's
// superblock, directories with their inodes, those near the root before those
// below them, then the other inodes, then long symbolic links, attributes and the
// extents of files that have many. Some of it is yielded more than once.
func (p *Plan) Lookups() iter.Seq[sparse.Extent] {
	return func(yield func(sparse.Extent) bool) {
		ok := true
		put := func(start, n int64) {
			ok = ok && (n == 0 || yield(sparse.Extent{Off: start * BlockSize, Len: n * BlockSize}))
		}
		g := &p.g
		inode := p.inodeBlocks()
		put(0, 1+g.gdt)
		put(inode(journalIno), 1)
		put(g.journalAt, 1)
		j := g.cursor(g.journalAt)
		for _, at := range p.treeAt(g.extents, treeBlocks(countExtents(&j, g.journal))) {
			put(at, 1)
		}
		p.lookDirs(inode, put, &ok)
		for _, kinds := range [][]Kind{{KindInodes, KindLost}, {KindSymlinks, KindXattrs, KindValues, KindExtents}} {
			for kind, r := range p.metadata() {
				if !ok {
					return
				}
				if slices.Contains(kinds, kind) {
					put(r.start, r.n)
				}
			}
		}
	}
}

// lookDirs puts the blocks of directories and those their inodes are in, level by level.
func (p *Plan) lookDirs(inode func(uint32) int64, put func(start, n int64), ok *bool) {
	places := p.located()
	var runs []run
	level := []filetree.ID{filetree.Root}
	for len(level) > 0 && *ok {
		var below []filetree.ID
		for _, dir := range level {
			put(inode(p.ino(dir)), 1)
			runs = places.runs(runs[:0], dir, p.blockCount(places, dir))
			for _, r := range append(runs, places.trees[dir]...) {
				put(r.start, r.n)
			}
			if !*ok {
				return
			}
			for _, id := range p.t.Children(dir) {
				if p.t.Mode(id)&unix.S_IFMT == unix.S_IFDIR {
					below = append(below, id)
				}
			}
		}
		level = below
	}
}

// inodeBlocks gives what tells the block of an inode, in its group's table.
func (p *Plan) inodeBlocks() func(ino uint32) int64 {
	tables := make([]int64, 0, p.g.groups)
	c := p.g.cursor(p.g.tables)
	for range p.g.groups {
		at, _ := c.whole(p.g.tableLen())
		tables = append(tables, at.start)
	}
	return func(ino uint32) int64 {
		n := int64(ino - 1)
		return tables[n/p.g.ipg] + n%p.g.ipg*inodeSize/BlockSize
	}
}

// metadata yields the runs of what follows the files' data, in no order.
func (p *Plan) metadata() iter.Seq2[Kind, run] {
	return func(yield func(Kind, run) bool) {
		if p.kept != nil {
			for part := range p.parts() {
				if !yield(part.kind, part.run) {
					return
				}
			}
			return
		}
		for s := range p.Segments() {
			if s.Kind != KindData && !yield(s.Kind, run{s.Pos / BlockSize, s.Len / BlockSize}) {
				return
			}
		}
	}
}
