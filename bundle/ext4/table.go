package ext4

import (
	"encoding/binary"
	"iter"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// table makes the inodes. Those of the tree are to be asked for in its order.
type table struct {
	m                    *metadata
	data, symlinks, dirs cursor
	dirNr                int
	uses                 []uint32 // inodes so far, of each set of attributes
	values               cursor
	nextValue            func() (value, bool)
	x                    []extent
	kept                 map[uint32]value // of a plan that keeps places: the values
}

// inodes writes the used part of the inode tables.
func (m *metadata) inodes() error {
	p, g := m.p, &m.p.g
	m.f.kind = KindInodes
	nextValue, stop := iter.Pull(p.values())
	defer stop()
	t := &table{
		m: m, data: g.cursor(g.data), symlinks: g.cursor(g.symlinks), dirs: g.cursor(g.dirs),
		values: g.cursor(g.values), uses: make([]uint32, len(p.sets)), nextValue: nextValue,
	}
	tables := g.cursor(g.tables)
	for group := range g.groups {
		at, _ := tables.whole(g.tableLen())
		if p.groupInodes(group) == 0 {
			break
		}
		if err := m.f.seek(at.start); err != nil {
			return err
		}
		if err := t.group(group); err != nil {
			return err
		}
	}
	return nil
}

// group writes the used part of one group's table.
func (t *table) group(group int64) error {
	p := t.m.p
	var b []byte
	for i := range p.groupInodes(group) {
		if i%(BlockSize/inodeSize) == 0 {
			var err error
			if b, err = t.m.f.block(); err != nil {
				return err
			}
			clear(b)
		}
		t.inode(b[i%(BlockSize/inodeSize)*inodeSize:][:inodeSize], uint32(group*p.g.ipg+i+1))
	}
	return nil
}

// inode fills b with the inode of a number.
func (t *table) inode(b []byte, ino uint32) {
	p, g := t.m.p, &t.m.p.g
	n := diskInode{ino: ino, links: 1, mtime: filetree.Time{Sec: p.created}}
	switch id := p.id(ino); {
	case id != filetree.None && p.kept != nil:
		t.tree(&n, id)
	case id != filetree.None && ino == firstIno:
		t.early(&n, id)
	case id != filetree.None:
		if id > 0 && id-1 == p.lost {
			t.pass(p.lost)
		}
		t.tree(&n, id)
	case ino == firstIno:
		n.mode = unix.S_IFDIR | 0o700
		n.links = 2
		t.lost(&n, nil, 0)
	case ino == journalIno:
		root, blocks := p.journalTree()
		n.mode = unix.S_IFREG | 0o600
		n.flags = flagExtents
		n.size = g.journal * BlockSize
		n.blocks = g.journal + int64(len(blocks)/BlockSize)
		n.block = root
	case ino == resizeIno && g.rgdt > 0:
		const per = BlockSize / 4
		n.mode = unix.S_IFREG | 0o600
		n.size = (per*per + per + 12) * BlockSize
		n.blocks = 1 + g.rgdt*int64(1+len(g.supers))
		c := g.cursor(g.resize)
		binary.LittleEndian.PutUint32(n.block[4*13:], uint32(c.run(1).start))
	case ino < firstIno:
		return // reserved
	case p.kept != nil:
		if v, ok := t.kept[ino]; ok {
			runs := p.kept.sets[v.set].values
			i := slices.IndexFunc(runs, func(r layoutValue) bool { return r.ino == ino })
			t.value(b, &n, v, &cursor{runs: runs[i].runs})
		}
		return
	default:
		v, _ := t.nextValue()
		t.value(b, &n, v, &t.values)
		return
	}
	p.encode(b, &n)
}

// early describes the tree's lost+found, whose number is out of the tree's order.
func (t *table) early(n *diskInode, id filetree.ID) {
	then := *t
	then.uses = slices.Clone(t.uses)
	for i := filetree.Root + 1; i < id; i++ {
		then.pass(i)
	}
	then.tree(n, id)
}

// pass takes an inode's directory and attribute blocks into account.
func (t *table) pass(id filetree.ID) {
	t.uses[t.m.p.t.XattrSet(id)]++
	if isDir(t.m.p.t.Mode(id)) {
		t.dirs.skip(int64(t.m.p.dirs[t.dirNr].blocks))
		t.dirNr++
	}
}

// tree describes an inode of the tree.
func (t *table) tree(n *diskInode, id filetree.ID) {
	p := t.m.p
	a := p.t.Attr(id)
	n.mode, n.uid, n.gid, n.mtime = a.Mode, a.UID, a.GID, a.Mtime
	n.flags = keptFlags(&a)
	n.links = uint16(min(p.t.Names(id), maxLinks))
	n.set = p.t.XattrSet(id)
	if s := &p.sets[n.set]; s.blocks > 0 {
		if k := p.kept; k != nil {
			n.xattr = k.xattrBlock(n.set, id)
		} else {
			c := p.g.cursor(p.g.xattrs)
			c.skip(int64(s.block + t.uses[n.set]/xattrUses))
			t.uses[n.set]++
			n.xattr = c.run(1).start
		}
		n.blocks++
		if s.values > 0 { // counted with each inode, though shared
			for _, x := range packSet(p.t.Set(n.set)).values {
				n.blocks += blocksOf(int64(len(x.value)))
			}
		}
	}
	switch a.Type() {
	case unix.S_IFREG:
		n.size = p.fileSize(id)
		if k := p.kept; k != nil {
			t.x = p.extentsAt(t.x[:0], k.places, id)
		} else {
			t.x = p.fileExtents(t.x[:0], id, &t.data)
		}
		d := t.m.damage.files[id]
		if d != nil {
			n.size = d.size
			t.x = spoil(t.x, d.bad)
			if d.gone {
				n.links = 1
			}
		}
		t.extents(n, id)
	case unix.S_IFDIR:
		if k := p.kept; k != nil {
			t.dirNr = k.dirNr(id)
			t.x = p.extentsAt(t.x[:0], k.places, id)
		} else {
			t.x = appendExtents(t.x[:0], &t.dirs, 0, int64(p.dirs[t.dirNr].blocks))
		}
		d := p.dirs[t.dirNr]
		t.dirNr++
		n.links = dirLinks(d)
		if id == p.lost {
			t.lost(n, t.x, int64(d.blocks))
			break
		}
		n.size = int64(d.blocks) * BlockSize
		if d.blocks > 1 {
			n.flags |= flagIndex
		}
		t.extents(n, id)
	case unix.S_IFLNK:
		n.size = p.t.Size(id)
		if !p.slowLink(id) {
			copy(n.block[:], p.t.Target(id))
			break
		}
		at := &t.symlinks
		if k := p.kept; k != nil {
			at = &cursor{runs: k.runs(nil, id, 1)}
		}
		t.x = appendExtents(t.x[:0], at, 0, 1)
		t.extents(n, id)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.block = storedDevice(a.Major, a.Minor)
	}
}

// extents gives an inode the extents t.x.
func (t *table) extents(n *diskInode, id filetree.ID) {
	n.flags |= flagExtents
	for _, e := range t.x {
		n.blocks += e.n
	}
	n.blocks += treeBlocks(int64(len(t.x)))
	if root, ok := t.m.roots[id]; ok {
		n.block = root
		return
	}
	n.block, _ = extentTree(t.x, nil, 0)
}

// lost describes lost+found, whose names in the tree take the blocks of x.
func (t *table) lost(n *diskInode, x []extent, blocks int64) {
	p := t.m.p
	c := p.g.cursor(p.g.lost)
	t.x = appendExtents(slices.Clip(x), &c, blocks, t.m.lostLen())
	n.size = (blocks + t.m.lostLen()) * BlockSize
	t.extents(n, p.lost)
}

// value fills b with the inode of an attribute's value. The kernel keeps the
// number of references in ctime and version, and the hash in atime.
func (t *table) value(b []byte, n *diskInode, v value, at *cursor) {
	p := t.m.p
	n.mode = unix.S_IFREG | 0o600
	n.size = int64(len(v.data))
	n.flags = flagExtents | flagValue
	n.mtime = filetree.Time{}
	n.blocks = blocksOf(n.size)
	n.block, _ = extentTree(appendExtents(nil, at, 0, n.blocks), nil, 0)
	p.encode(b, n)
	le := binary.LittleEndian
	le.PutUint32(b[0x08:], p.valueHash(v.data))
	le.PutUint32(b[0x24:], v.refs)
	p.sumInode(b, n.ino)
}
