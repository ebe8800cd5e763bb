package ext4

import (
	"encoding/binary"
	"fmt"
	"iter"
	"maps"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	tailLen  = 12                  // the checksum at the end of a directory block
	dirSpace = BlockSize - tailLen // for entries
	dotsLen  = 24                  // the entries . and ..
)

func recLen(name int) int { return (8 + name + 3) &^ 3 }

var fileTypes = map[uint32]byte{
	unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFCHR: 3, unix.S_IFBLK: 4,
	unix.S_IFIFO: 5, unix.S_IFSOCK: 6, unix.S_IFLNK: 7,
}

func isDir(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFDIR }

func fileType(mode uint32) byte { return fileTypes[mode&unix.S_IFMT] }

// lister lists what goes into directories: it adds lost+found to the root and
// leaves out the names of a file beyond those ext4 can count. Its answers
// depend on directories being listed once each, in the tree's order.
type lister struct {
	p    *Plan
	seen map[filetree.ID]int // names so far, of files with too many
}

func (l *lister) clone() *lister { return &lister{l.p, maps.Clone(l.seen)} }

// names yields the names of a directory; that of a lost+found not in the tree
// comes with [filetree.None].
func (l *lister) names(dir filetree.ID) iter.Seq2[[]byte, filetree.ID] {
	return func(yield func([]byte, filetree.ID) bool) {
		if dir == filetree.Root && l.p.lost == filetree.None && !yield([]byte("lost+found"), filetree.None) {
			return
		}
		for name, id := range l.p.t.Children(dir) {
			if l.p.manyLinks && l.p.t.Names(id) > maxLinks {
				if l.seen == nil {
					l.seen = map[filetree.ID]int{}
				}
				if l.seen[id]++; l.seen[id] > maxLinks {
					continue
				}
			}
			if !yield(name, id) {
				return
			}
		}
	}
}

// planDirs finds the number of blocks and of subdirectories of each directory.
func (p *Plan) planDirs() error {
	if p.lost == filetree.None && p.t.Find("lost+found") != filetree.None {
		return fmt.Errorf("%w: it must be left out of the image or renamed", ErrLostFound)
	}
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Names(id) > maxLinks {
			p.manyLinks = true
		}
	}
	l := &lister{p: p}
	var ix index
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if !isDir(p.t.Mode(id)) {
			continue
		}
		again := l.clone()
		var d dirPlan
		total, linear, at := dotsLen, 1, dotsLen
		for name, child := range l.names(id) {
			n := recLen(len(name))
			total += n
			if at+n > dirSpace {
				linear++
				at = 0
			}
			at += n
			if child == filetree.None || isDir(p.t.Mode(child)) {
				d.subdirs++
			}
		}
		switch {
		case linear == 1 || id == p.lost:
			// lost+found is never indexed: e2fsck wants room in it that it finds without.
			if linear > 30_000 { // its extents, with those of the spare blocks, fit in the inode
				return fmt.Errorf("%w: directory %q has too many names", ErrTooLarge, p.t.Path(id))
			}
			d.blocks = uint32(linear)
		default:
			ix.build(again, id)
			if ix.depth() > 3 {
				return fmt.Errorf("%w: directory %q has too many names", ErrTooLarge, p.t.Path(id))
			}
			if ix.depth() > 2 {
				p.largeDir = true
			}
			d.blocks = uint32(ix.blocks())
		}
		p.dirs = append(p.dirs, d)
	}
	return nil
}

// dirBlock fills one block with entries.
type dirBlock struct {
	b        []byte // a whole block
	at, last int    // end of the entries so far, start of the last one
}

func newDirBlock(b []byte) *dirBlock {
	clear(b)
	return &dirBlock{b: b, last: -1}
}

// fits tells whether a name finds room.
func (d *dirBlock) fits(name int) bool { return d.at+recLen(name) <= dirSpace }

func (d *dirBlock) add(ino uint32, typ byte, name []byte) {
	e := d.b[d.at:]
	le := binary.LittleEndian
	le.PutUint32(e, ino)
	le.PutUint16(e[4:], uint16(recLen(len(name))))
	e[6] = byte(len(name))
	e[7] = typ
	copy(e[8:], name)
	d.last = d.at
	d.at += recLen(len(name))
}

func (d *dirBlock) addDots(self, parent uint32) {
	d.add(self, 2, []byte("."))
	d.add(parent, 2, []byte(".."))
}

// finish stretches the last entry to the block's end and adds the checksum.
func (d *dirBlock) finish(seed uint32) {
	le := binary.LittleEndian
	if d.last < 0 { // no entry: an unused one
		d.last = 0
	}
	le.PutUint16(d.b[d.last+4:], uint16(dirSpace-d.last))
	tail := d.b[dirSpace:]
	le.PutUint16(tail[4:], tailLen)
	tail[7] = 0xde
	le.PutUint32(tail[8:], crc32c(seed, d.b[:dirSpace]))
}

// dirWriter makes the blocks of directories, in the tree's order.
type dirWriter struct {
	l    lister
	ix   index
	gone func(filetree.ID) bool // whether an inode's names are left out
}

// write makes the blocks of one directory, each in the memory that next gives
// for it.
func (w *dirWriter) write(id filetree.ID, d dirPlan, next func() ([]byte, error)) error {
	p := w.l.p
	self, parent := p.ino(id), p.ino(p.t.Parent(id))
	if d.blocks > 1 && id != p.lost {
		w.ix.build(&w.l, id)
		return w.ix.write(p, id, w.gone, next)
	}
	buf, err := next()
	if err != nil {
		return err
	}
	seed := p.inodeSeed(self)
	b := newDirBlock(buf)
	b.addDots(self, parent)
	at := dotsLen // as planned, with names that are gone
	for name, child := range w.l.names(id) {
		if n := recLen(len(name)); at+n > dirSpace {
			b.finish(seed)
			if buf, err = next(); err != nil {
				return err
			}
			b, at = newDirBlock(buf), 0
		}
		at += recLen(len(name))
		if child == filetree.None {
			b.add(firstIno, 2, name)
		} else if !w.gone(child) {
			b.add(p.ino(child), fileType(p.t.Mode(child)), name)
		}
	}
	b.finish(seed)
	return nil
}

func dirLinks(d dirPlan) uint16 {
	if n := d.subdirs + 2; n <= maxLinks {
		return uint16(n)
	}
	return 1 // dir_nlink: not counted
}
