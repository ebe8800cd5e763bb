package ext4

import (
	"context"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Write writes the bytes of [Plan.Map], in order, holes left out, to w, in
// pieces of up to 1 MiB that w must not keep. It opens each regular file once,
// some dozens ahead of their turn and up to four at a time, and reports, in the
// order of IDs, each one that is not what the tree has, without
// failing; report may be nil. It fails with what w or ctx fails with.
//
// A plan that keeps its parent's places it refuses with [ErrScattered].
func (p *Plan) Write(ctx context.Context, w io.Writer, src filetree.Source, report func(Change)) error {
	if p.kept != nil {
		return ErrScattered
	}
	if report == nil {
		report = func(Change) {}
	}
	f := newFlow(ctx, w, p)
	d := &damage{p: p, files: map[filetree.ID]*fileDamage{}}
	a := newAhead(ctx, p, src, nil)
	defer a.stop()
	c := &contents{ctx: ctx, p: p, out: f, ahead: a, report: report, damage: d}
	m := &metadata{p: p, f: f, damage: d, roots: map[filetree.ID][60]byte{}, spare: map[int64][]byte{}}
	for _, step := range []func() error{
		m.front,
		func() error { return f.files(c) },
		m.fileTrees, m.xattrs, m.values, m.symlinks, m.dirs, m.dirTrees, m.lostFound, m.inodes,
		func() error { return f.seek(p.g.blocks) },
		f.flush,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// files writes the data of all files.
func (f *flow) files(c *contents) error {
	p := f.p
	if err := f.seek(p.g.data); err != nil {
		return err
	}
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		if err := c.file(id, p.g.cursor(f.at)); err != nil {
			return err
		}
	}
	return nil
}

// metadata writes all but the files' data.
type metadata struct {
	p      *Plan
	f      *flow
	damage *damage
	roots  map[filetree.ID][60]byte // of extent trees that are damaged or larger than the inode
	spare  map[int64][]byte         // extent blocks for lost+found's spare blocks, by position
}

// front writes what precedes the files' data.
func (m *metadata) front() error {
	p, f, g := m.p, m.f, &m.p.g
	if err := f.super(); err != nil {
		return err
	}
	f.kind = KindReserved
	for i := range g.rgdt {
		b, err := f.raw(1)
		if err != nil {
			return err
		}
		p.reservedBlock(b, i)
	}
	c := g.cursor(g.bitmaps)
	block := func(fill func(b []byte)) error {
		if err := f.seek(c.at - 1); err != nil {
			return err
		}
		b, err := f.block()
		if err == nil {
			fill(b)
		}
		return err
	}
	f.kind = KindBlockBitmap
	for group := range g.groups {
		c.run(1)
		if g.uninit(group) {
			continue
		}
		if err := block(func(b []byte) { g.blockBitmap(b, group) }); err != nil {
			return err
		}
	}
	f.kind = KindInodeBitmap
	for group := range g.groups {
		c.run(1)
		if p.groupInodes(group) == 0 {
			continue
		}
		if err := block(func(b []byte) { p.inodeBitmap(b, group) }); err != nil {
			return err
		}
	}
	if g.rgdt > 0 {
		f.kind = KindResize
		c.run(1)
		if err := block(p.resizeBlock); err != nil {
			return err
		}
	}
	f.kind = KindJournal
	c.run(1)
	return block(p.journalSuper)
}

// tree writes the extent tree of an inode, as far as there is room planned.
func (m *metadata) tree(id filetree.ID, x []extent, planned int64) error {
	return m.f.copyBlocks(m.plant(id, x, m.p.treeAt(m.f.at, planned)))
}

// plant makes the extent tree of an inode and keeps its root. It returns the
// blocks for the places planned, and keeps the others for spare ones.
func (m *metadata) plant(id filetree.ID, x []extent, at []int64) []byte {
	need, planned := treeBlocks(int64(len(x))), int64(len(at))
	c := m.p.g.cursor(m.p.g.lost)
	c.skip(lostBlocks - int64(len(m.spare)) - (need - planned))
	for range need - planned {
		at = append(at, c.run(1).start)
	}
	root, blocks := extentTree(x, at, m.p.inodeSeed(m.p.ino(id)))
	m.roots[id] = root
	for i := planned; i < need; i++ {
		m.spare[at[i]] = blocks[i*BlockSize:][:BlockSize]
	}
	return blocks[:planned*BlockSize]
}

func (m *metadata) fileTrees() error {
	p := m.p
	m.f.kind = KindExtents
	_, blocks := p.journalTree()
	if err := m.f.copyBlocks(blocks); err != nil {
		return err
	}
	data := p.g.cursor(p.g.data)
	var x []extent
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		x = p.fileExtents(x[:0], id, &data)
		planned := treeBlocks(int64(len(x)))
		d := m.damage.files[id]
		if planned == 0 && d == nil {
			continue
		}
		y := x
		if d != nil {
			y = spoil(x, d.bad)
		}
		if err := m.tree(id, y, planned); err != nil {
			return err
		}
	}
	return nil
}

func (m *metadata) xattrs() error {
	m.f.kind = KindXattrs
	for set, s := range m.p.sets {
		for nr := range s.blocks {
			b, at, err := m.f.blockAt()
			if err != nil {
				return err
			}
			m.p.xattrBlock(b, set, int(nr), at)
		}
	}
	return nil
}

func (m *metadata) values() error {
	m.f.kind = KindValues
	for v := range m.p.values() {
		for data := v.data; len(data) > 0; {
			b, err := m.f.block()
			if err != nil {
				return err
			}
			n := copy(b, data)
			clear(b[n:])
			data = data[n:]
		}
	}
	return nil
}

func (m *metadata) symlinks() error {
	m.f.kind = KindSymlinks
	for i := range m.p.t.Len() {
		if id := filetree.ID(i); m.p.slowLink(id) {
			b, err := m.f.block()
			if err != nil {
				return err
			}
			clear(b[copy(b, m.p.t.Target(id)):])
		}
	}
	return nil
}

func (m *metadata) dirs() error {
	m.f.kind = KindDir
	w := dirWriter{l: lister{p: m.p}, gone: m.damage.gone}
	nr := 0
	for i := range m.p.t.Len() {
		id := filetree.ID(i)
		if !isDir(m.p.t.Mode(id)) {
			continue
		}
		if err := w.write(id, m.p.dirs[nr], m.f.block); err != nil {
			return err
		}
		nr++
	}
	return nil
}

func (m *metadata) dirTrees() error {
	p := m.p
	m.f.kind = KindDirExtents
	c := p.g.cursor(p.g.dirs)
	nr := 0
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if !isDir(p.t.Mode(id)) {
			continue
		}
		x := appendExtents(nil, &c, 0, int64(p.dirs[nr].blocks))
		nr++
		planned := treeBlocks(int64(len(x)))
		if id == p.lost {
			x = m.withLost(x)
		}
		if planned == 0 && id != p.lost {
			continue
		}
		if err := m.tree(id, x, planned); err != nil {
			return err
		}
	}
	return nil
}

// withLost appends lost+found's spare blocks to its extents.
func (m *metadata) withLost(x []extent) []extent {
	c := m.p.g.cursor(m.p.g.lost)
	last := x[len(x)-1]
	return appendExtents(x, &c, last.logical+last.n, m.lostLen())
}

// lostLen is the number of blocks that lost+found has beside those planned for its names.
func (m *metadata) lostLen() int64 { return lostBlocks - m.damage.spare }

// lostFound writes lost+found's spare blocks, with the files that vanished.
func (m *metadata) lostFound() error {
	p := m.p
	m.f.kind = KindLost
	ino := uint32(firstIno)
	seed := p.inodeSeed(ino)
	lost := m.damage.lost
	for i := range m.lostLen() {
		buf, err := m.f.block()
		if err != nil {
			return err
		}
		b := newDirBlock(buf)
		if i == 0 && p.lost == filetree.None {
			b.addDots(ino, p.ino(filetree.Root))
		}
		for ; len(lost) > 0; lost = lost[1:] {
			name := fmt.Appendf(nil, "#%d", p.ino(lost[0]))
			for p.lost != filetree.None && p.t.Find("lost+found/"+string(name)) != filetree.None {
				name = append(name, '~')
			}
			if !b.fits(len(name)) {
				break
			}
			b.add(p.ino(lost[0]), fileType(unix.S_IFREG), name)
		}
		b.finish(seed)
	}
	for range m.damage.spare {
		b, at, err := m.f.blockAt()
		if err != nil {
			return err
		}
		copy(b, m.spare[at])
	}
	return nil
}
