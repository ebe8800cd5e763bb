package ext4

import (
	"cmp"
	"iter"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// A plan that keeps its parent's places has its metadata anywhere among the
// data; these are its parts.

// part is a run of blocks of one thing.
type part struct {
	run
	kind Kind
	id   uint32 // of the inode, the set of attributes, the value's inode or the group
	nr   int32  // of its first block among the thing's
}

// parts yields all metadata but what precedes the data and the copies of the
// superblock, in no order.
func (p *Plan) parts() iter.Seq[part] {
	return func(yield func(part) bool) {
		g, k := &p.g, p.kept
		ok := true
		put := func(kind Kind, id uint32, runs []run) {
			nr := int32(0)
			for _, r := range runs {
				ok = ok && yield(part{r, kind, id, nr})
				nr += int32(r.n)
			}
		}
		_, blocks := p.journalTree()
		c := g.cursor(g.extents)
		put(KindExtents, uint32(filetree.None), c.taken(nil, int64(len(blocks)/BlockSize)))
		c = g.cursor(g.lost)
		put(KindLost, 0, c.taken(nil, lostBlocks))
		c = g.cursor(g.tables)
		for group := range g.groups {
			at, _ := c.whole(g.tableLen())
			if n := p.groupInodes(group); n > 0 {
				put(KindInodes, uint32(group), []run{{at.start, ceilDiv(n*inodeSize, BlockSize)}})
			}
		}
		for i := range k.sets {
			put(KindXattrs, uint32(i), k.sets[i].blocks)
			for _, v := range k.sets[i].values {
				put(KindValues, v.ino, v.runs)
			}
		}
		var runs []run
		for i := 0; i < p.t.Len() && ok; i++ {
			id := filetree.ID(i)
			mode := p.t.Mode(id)
			switch {
			case isDir(mode):
				runs = k.runs(runs[:0], id, p.blockCount(k.places, id))
				put(KindDir, uint32(id), runs)
				put(KindDirExtents, uint32(id), k.trees[id])
			case mode&unix.S_IFMT == unix.S_IFREG:
				put(KindExtents, uint32(id), k.trees[id])
			case p.slowLink(id):
				put(KindSymlinks, uint32(id), k.runs(runs[:0], id, 1))
			}
		}
	}
}

// keptSegments yields what [Plan.Segments] does, in no order.
func (p *Plan) keptSegments(yield func(Segment) bool) {
	g, none := &p.g, filetree.None
	ok := true
	s := segmenter{g: g, yield: func(s Segment) bool {
		ok = ok && yield(s)
		return ok
	}, ok: true}
	s.front(p)
	s.seek(g.blocks)
	for part := range p.parts() {
		id, off := none, int64(0)
		switch part.kind {
		case KindDir:
			id, off = filetree.ID(part.id), int64(part.nr)*BlockSize
		case KindInodes:
			off = int64(part.id) * g.ipg
		}
		if ok = ok && yield(Segment{part.kind, id, off, part.start * BlockSize, part.n * BlockSize}); !ok {
			return
		}
	}
	for s := range p.Data() {
		if ok = ok && yield(s); !ok {
			return
		}
	}
}

// written is the map of what the image has.
func (p *Plan) written() (m sparse.Map) {
	if p.kept == nil {
		for s := range p.Segments() {
			m = m.Append(sparse.Extent{Off: s.Pos, Len: s.Len})
		}
		return m
	}
	b := newBitset(p.g.blocks)
	p.keptSegments(func(s Segment) bool {
		b.add(s.Pos/BlockSize, (s.Pos+s.Len)/BlockSize)
		return true
	})
	for at := int64(0); ; {
		from := b.next(at, p.g.blocks, true)
		if from == p.g.blocks {
			return m
		}
		at = b.next(from, p.g.blocks, false)
		m = append(m, sparse.Extent{Off: from * BlockSize, Len: (at - from) * BlockSize})
	}
}

// xattrBlock is the block of an inode's attributes.
func (k *kept) xattrBlock(set int, id filetree.ID) int64 {
	nr := 0
	if r := k.ranks[set]; r != nil {
		i, _ := slices.BinarySearch(r, id)
		nr = i / xattrUses
	}
	return blockAt(k.sets[set].blocks, int64(nr))
}

// blockAt is the position of a block, by its number among those of runs.
func blockAt(runs []run, nr int64) int64 {
	for _, r := range runs {
		if nr < r.n {
			return r.start + nr
		}
		nr -= r.n
	}
	return 0
}

func positions(runs []run) (at []int64) {
	for _, r := range runs {
		for i := range r.n {
			at = append(at, r.start+i)
		}
	}
	return at
}

// scattered writes what [Plan.parts] has, by ascending position.
func (m *metadata) scattered() error {
	s := &scatter{m: m, damaged: map[filetree.ID][]byte{}, values: map[uint32]value{}}
	for v := range m.p.values() {
		s.values[v.ino] = v
	}
	s.plant()
	s.t = &table{m: m, kept: s.values}
	s.w = dirWriter{l: lister{p: m.p}, gone: m.damage.gone}
	var parts []part
	for part := range m.p.parts() {
		if part.kind != KindLost || part.nr == 0 { // its blocks follow each other, around copies of the superblock
			parts = append(parts, part)
		}
	}
	slices.SortFunc(parts, func(a, b part) int { return cmp.Compare(a.start, b.start) })
	for i := range parts {
		if err := s.part(&parts[i]); err != nil {
			return err
		}
	}
	return nil
}

type scatter struct {
	m       *metadata
	t       *table
	w       dirWriter
	damaged map[filetree.ID][]byte // extent blocks that are not what the plan has
	values  map[uint32]value       // by inode
	scratch [BlockSize]byte
}

// plant makes the extent trees that are larger than an inode or damaged.
func (s *scatter) plant() {
	m, p, k := s.m, s.m.p, s.m.p.kept
	var x []extent
	for i := range p.t.Len() {
		id := filetree.ID(i)
		d, trees := m.damage.files[id], k.trees[id]
		if trees == nil && d == nil && id != p.lost {
			continue
		}
		x = p.extentsAt(x[:0], k.places, id)
		if d != nil {
			x = spoil(x, d.bad)
		}
		if id == p.lost {
			x = m.withLost(x)
		}
		blocks := m.plant(id, x, positions(trees))
		if d != nil || id == p.lost {
			s.damaged[id] = blocks
		}
	}
}

// tree is the extent blocks of an inode.
func (s *scatter) tree(id filetree.ID) []byte {
	p, k := s.m.p, s.m.p.kept
	if id == filetree.None {
		_, blocks := p.journalTree()
		return blocks
	}
	if b, ok := s.damaged[id]; ok {
		return b
	}
	_, blocks := extentTree(p.extentsAt(nil, k.places, id), positions(k.trees[id]), p.inodeSeed(p.ino(id)))
	return blocks
}

func (s *scatter) part(part *part) error {
	m, p, f := s.m, s.m.p, s.m.f
	f.kind = part.kind
	if err := f.seek(part.start); err != nil {
		return err
	}
	from, to := int(part.nr)*BlockSize, (int(part.nr)+int(part.n))*BlockSize
	switch part.kind {
	case KindExtents, KindDirExtents:
		return f.copyBlocks(s.tree(filetree.ID(part.id))[from:to])
	case KindXattrs:
		for i := range part.n {
			b, at, err := f.blockAt()
			if err != nil {
				return err
			}
			p.xattrBlock(b, int(part.id), int(part.nr)+int(i), at)
		}
	case KindValues:
		return s.bytes(s.values[part.id].data, from, to)
	case KindSymlinks:
		return s.bytes(p.t.Target(filetree.ID(part.id)), from, to)
	case KindDir:
		id, nr := filetree.ID(part.id), -1
		return s.w.write(id, p.dirs[p.kept.dirNr(id)], func() ([]byte, error) {
			if nr++; nr < int(part.nr) || nr >= int(part.nr)+int(part.n) {
				return s.scratch[:], nil
			}
			return f.block()
		})
	case KindLost:
		return m.lostFound()
	case KindInodes:
		return s.t.group(int64(part.id))
	}
	return nil
}

// bytes writes the blocks from..to-1 of data that are filled up with zeros.
func (s *scatter) bytes(data []byte, from, to int) error {
	for ; from < to; from += BlockSize {
		b, err := s.m.f.block()
		if err != nil {
			return err
		}
		clear(b[copy(b, data[min(from, len(data)):]):])
	}
	return nil
}
