package ext4

import (
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// maxBlocks is 128 TiB: the group descriptors' copies must fit in a group.
const maxBlocks = 1 << 35

// geometry says where everything lies, in blocks. The blocks from 0 to end are
// all in use, but for gaps, in this order: superblock and descriptors, blocks
// reserved for more descriptors, block bitmaps, inode bitmaps, the resize
// inode's block, journal, file data, extent blocks of files, attribute
// blocks, attribute values, symbolic links, directories, their extent blocks,
// lost+found's spare blocks, inode tables. Copies of superblock and
// descriptors (supers) lie at fixed places and interrupt that.
type geometry struct {
	blocks, groups int64
	gdt, rgdt      int64 // blocks of descriptors, and reserved for more
	ipg            int64 // inodes per group
	journal        int64
	reserved       int64 // blocks for root
	supers         []int64
	supersLen      int64

	bitmaps, inodeBitmaps, resize, journalAt               int64
	data, extents, xattrs, values, symlinks, dirs, dirExts int64
	lost, tables, end                                      int64
	gaps                                                   []run
	usedDirs                                               []uint32 // by group, as far as used

	// Of a geometry that keeps a parent's places these say what is in use, in
	// place of end and gaps; data to dirExts but extents mean nothing then.
	bits   bitset
	unused int64 // blocks not in use
}

type run struct{ start, n int64 }

func (g *geometry) inodes() int64 { return g.ipg * g.groups }

// tableLen is the length of a group's inode table.
func (g *geometry) tableLen() int64 { return g.ipg * inodeSize / BlockSize }

func ceilDiv[T int | int64](a, b T) T { return (a + b - 1) / b }

// hasSuper tells whether a group holds a copy of the superblock (sparse_super).
func hasSuper(g int64) bool {
	if g <= 1 {
		return true
	}
	for _, b := range []int64{3, 5, 7} {
		n := b
		for n < g {
			n *= b
		}
		if n == g {
			return true
		}
	}
	return false
}

// newGeometry sets all sizes for a filesystem of so many blocks, with the
// inodes wanted, or at least those it must have. A runt of a last group is
// dropped, as mke2fs does.
func newGeometry(blocks, want, must, journal int64) geometry {
	g := geometry{blocks: blocks, journal: journal}
	for {
		g.groups = ceilDiv(g.blocks, groupBlocks)
		const descs = BlockSize / descSize
		g.gdt = ceilDiv(g.groups, descs)
		g.rgdt = 0
		if g.blocks <= math.MaxUint32 { // the resize inode's pointers have 32 bits
			most := min(g.blocks*1024, math.MaxUint32)
			g.rgdt = min(ceilDiv(ceilDiv(most, groupBlocks), descs)-g.gdt, BlockSize/4)
		}
		g.ipg = min(ceilDiv(want, g.groups), groupBlocks)
		g.ipg = max(ceilDiv(max(g.ipg, ceilDiv(must, g.groups)), 16)*16, 16)
		rest := g.blocks % groupBlocks
		overhead := 2 + g.tableLen() + 50
		if hasSuper(g.groups - 1) {
			overhead += 1 + g.gdt + g.rgdt
		}
		if rest == 0 || rest >= overhead || g.groups == 1 {
			break
		}
		g.blocks -= rest
	}
	g.supersLen = 1 + g.gdt + g.rgdt
	for n := int64(1); n < g.groups; n = nextSuper(n) {
		g.supers = append(g.supers, n*groupBlocks)
	}
	return g
}

func nextSuper(n int64) int64 {
	next := int64(math.MaxInt64)
	for _, b := range []int64{3, 5, 7} {
		v := b
		for v <= n {
			v *= b
		}
		next = min(next, v)
	}
	return next
}

func defaultJournal(blocks int64) int64 {
	switch {
	case blocks < 32768:
		return 1024
	case blocks < 256<<10:
		return 4096
	case blocks < 512<<10:
		return 8192
	case blocks < 4096<<10:
		return 16384
	case blocks < 8192<<10:
		return 32768
	case blocks < 16384<<10:
		return 65536
	case blocks < 32768<<10:
		return 131072
	}
	return 262144
}

func defaultInodes(blocks int64) int64 {
	switch {
	case blocks < 512<<20/BlockSize:
		return blocks
	case blocks < 4<<40/BlockSize:
		return blocks / 4
	case blocks < 16<<40/BlockSize:
		return blocks / 8
	}
	return blocks / 16
}

// cursor walks the blocks that lie between the copies of the superblock or,
// without a geometry, those of runs, of which there must be enough.
type cursor struct {
	g    *geometry
	at   int64 // block; without a geometry it counts from the beginning of runs[0]
	next int   // in g.supers: the first one whose end is after at
	runs []run
}

func (g *geometry) cursor(at int64) cursor {
	c := cursor{g: g, at: at}
	c.next, _ = slices.BinarySearchFunc(g.supers, at, func(s, at int64) int {
		if s+g.supersLen <= at {
			return -1
		}
		return 1
	})
	return c
}

// run takes the next blocks, at most n, that lie together.
func (c *cursor) run(n int64) run {
	if c.g == nil {
		r := c.runs[0]
		r = run{r.start + c.at, min(r.n-c.at, n)}
		if c.at += r.n; c.at == c.runs[0].n {
			c.runs, c.at = c.runs[1:], 0
		}
		return r
	}
	for c.next < len(c.g.supers) {
		s := c.g.supers[c.next]
		if c.at < s {
			n = min(n, s-c.at)
			break
		}
		c.at = max(c.at, s+c.g.supersLen)
		c.next++
	}
	c.at += n
	return run{c.at - n, n}
}

// skip passes n blocks and returns the position after them.
func (c *cursor) skip(n int64) int64 {
	for n > 0 {
		n -= c.run(n).n
	}
	return c.at
}

// whole takes n blocks that lie together, leaving a gap where need be.
func (c *cursor) whole(n int64) (at run, gap run) {
	r := c.run(n)
	if r.n == n {
		return r, run{}
	}
	c.at = r.start + r.n
	return c.run(n), r
}

// front sets the positions of what precedes the files' data, and returns where they begin.
func (g *geometry) front() cursor {
	c := g.cursor(g.supersLen)
	g.bitmaps = c.at
	g.inodeBitmaps = c.skip(g.groups)
	g.resize = c.skip(g.groups)
	g.journalAt = c.at
	if g.rgdt > 0 {
		g.journalAt = c.skip(1)
	}
	g.data = c.skip(g.journal)
	return c
}

// place sets all positions of g. The image is feasible if g.end <= g.blocks.
func (p *Plan) place(g *geometry) {
	c := g.front()
	j := g.cursor(g.journalAt)
	trees := treeBlocks(countExtents(&j, g.journal))

	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT == unix.S_IFREG {
			trees += treeBlocks(p.countFile(id, &c))
		}
	}
	g.extents = c.at
	g.xattrs = c.skip(trees)
	g.values = c.skip(p.eaBlocks)
	for v := range p.values() {
		c.skip(blocksOf(int64(len(v.data))))
	}
	g.symlinks = c.at
	for i := range p.t.Len() {
		if id := filetree.ID(i); p.slowLink(id) {
			c.skip(1)
		}
	}
	g.dirs = c.at
	trees = 0
	for _, d := range p.dirs {
		trees += treeBlocks(countExtents(&c, int64(d.blocks)))
	}
	g.dirExts = c.at
	g.lost = c.skip(trees)
	g.tables = c.skip(lostBlocks)
	g.gaps = nil
	for range g.groups {
		_, gap := c.whole(g.tableLen())
		if gap.n > 0 {
			g.gaps = append(g.gaps, gap)
		}
	}
	g.end = c.at
}

func blocksOf(bytes int64) int64 { return ceilDiv(bytes, BlockSize) }

// free counts the blocks not in use.
func (g *geometry) free() int64 {
	if g.bits != nil {
		return g.unused
	}
	n := g.blocks - g.end
	for _, s := range g.supers {
		if s >= g.end {
			n -= g.supersLen
		}
	}
	for _, gap := range g.gaps {
		n += gap.n
	}
	return n
}

// candidate makes a placed geometry, or ok = false if it cannot hold the tree.
func (p *Plan) candidate(blocks, want, must int64, o *Options) (g geometry, ok bool) {
	journal := o.JournalBlocks
	if journal == 0 {
		journal = defaultJournal(blocks)
	}
	g = newGeometry(blocks, want, must, journal)
	if g.ipg > groupBlocks || g.inodes() > math.MaxUint32 || blocks < 2048 {
		return g, false
	}
	p.place(&g)
	g.setReserved(o)
	return g, g.end <= g.blocks && g.free() >= 0
}

func (g *geometry) setReserved(o *Options) {
	percent := o.ReservedPercent
	if percent == 0 {
		percent = 5
	}
	g.reserved = g.blocks * int64(max(percent, 0)) / 100
}

// inodeCounts gives how many inodes a filesystem should have, and must have.
func (p *Plan) inodeCounts(blocks int64, o *Options) (want, must int64) {
	used := int64(p.lastIno())
	if o.Inodes != 0 {
		return o.Inodes, o.Inodes
	}
	return max(defaultInodes(blocks), used+used/8+1024), used + 16
}

// smallest finds the least number of blocks, in whole MiB, that leaves
// headroom blocks free of those reserved.
func (p *Plan) smallest(headroom int64, comfortable bool, o *Options) (geometry, error) {
	const step = 1 << 20 / BlockSize
	blocks := int64(2048)
	for blocks <= maxBlocks {
		want, must := p.inodeCounts(blocks, o)
		if !comfortable {
			want = must
		}
		g, ok := p.candidate(blocks, want, must, o)
		lack := int64(step)
		switch {
		case ok && g.blocks == blocks:
			lack = headroom + g.reserved - g.free()
			if lack <= 0 {
				return g, nil
			}
		case g.ipg > groupBlocks:
			lack = ceilDiv(must, groupBlocks)*groupBlocks - groupBlocks - blocks + step
		case g.end > blocks:
			lack = g.end - blocks
		}
		blocks = ceilDiv(blocks+max(lack, 1), step) * step
	}
	return geometry{}, fmt.Errorf("%w: it would need more than %d TiB", ErrTooLarge, int64(maxBlocks*BlockSize>>40))
}

// fit chooses the geometry.
func (p *Plan) fit(o Options) error {
	if o.Inodes != 0 && o.Inodes < int64(p.lastIno()) {
		return fmt.Errorf("%w: %d inodes asked for, %d needed", ErrOptions, o.Inodes, p.lastIno())
	}
	var err error
	if o.Size == 0 {
		headroom := o.Headroom
		if headroom == 0 {
			g, err := p.smallest(0, false, &Options{ReservedPercent: -1, Inodes: o.Inodes, JournalBlocks: o.JournalBlocks})
			if err != nil {
				return err
			}
			headroom = max(128<<20, g.end*BlockSize/10)
		}
		if p.g, err = p.smallest(blocksOf(max(headroom, 0)), true, &o); err != nil {
			return err
		}
		p.size = p.g.blocks * BlockSize
		return nil
	}
	p.size = o.Size
	blocks := o.Size / BlockSize
	want, must := p.inodeCounts(blocks, &o)
	var ok bool
	if p.g, ok = p.candidate(blocks, want, must, &o); !ok {
		p.g, ok = p.candidate(blocks, must, must, &o)
	}
	if !ok {
		o.ReservedPercent = -1
		g, err := p.smallest(0, false, &o)
		if err != nil {
			return err
		}
		return &TooSmallError{Need: g.blocks * BlockSize, Have: o.Size}
	}
	return nil
}

// countDirs counts the directories of each group.
func (p *Plan) countDirs() {
	p.g.usedDirs = make([]uint32, ceilDiv(int64(p.lastIno()), p.g.ipg))
	if p.kept != nil {
		p.g.usedDirs = make([]uint32, p.g.groups)
	}
	count := func(ino uint32) { p.g.usedDirs[int64(ino-1)/p.g.ipg]++ }
	for i := range p.t.Len() {
		if id := filetree.ID(i); isDir(p.t.Mode(id)) {
			count(p.ino(id))
		}
	}
	if p.lost == filetree.None {
		count(firstIno)
	}
}
