// Package ext4 plans an ext4 filesystem image from the metadata of a file
// hierarchy and streams it, in one pass from the first byte to the last,
// without a scratch file.
//
// A [filetree.Tree] goes in; [NewPlan] lays out every block of the image from
// it alone, so that size and map are known before any file is opened. The
// image comes out of [Plan.Write], or in pieces out of [Plan.Emit]; each reads
// every file once, in the tree's order. The package touches nothing but the
// [filetree.Source] it is given.
//
// All metadata that depends on what reading the files brought (extents,
// directories, inodes) follows all file data, so that a file which changed
// since the tree was made is told truthfully; see [Change].
//
// The same tree and options give the same bytes. The format is that of the
// Linux kernel, Documentation/filesystems/ext4.
package ext4

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// BlockSize is the size of a filesystem block in bytes.
const BlockSize = 4096

// Options of [NewPlan]. The zero value is usable.
type Options struct {
	// Size of the image in bytes. 0 makes it as small as the content allows
	// with Headroom bytes left free for unprivileged users, rounded up to 1 MiB.
	Size int64
	// Headroom in bytes, where Size is 0. 0 means a tenth of the content, at
	// least 128 MiB; a negative value none.
	Headroom int64
	// Label is the volume's name, at most 16 bytes.
	Label string
	// UUID of the filesystem. Zero: the parent's, or derived from the tree and the options.
	UUID [16]byte
	// Created is the time of creation the superblock tells, in seconds since
	// 1970. 0: the parent's, if its places are kept, or the newest modification
	// time in the tree.
	Created int64
	// NotAfter, if not 0, leaves modification times after it out of account
	// for Created: e2fsck complains of superblocks from its future.
	NotAfter int64
	// Inodes to make at least. 0: one per 16 KiB (4 KiB below 512 MiB, 32 KiB
	// from 4 TiB, 64 KiB from 16 TiB), or more if the tree needs them. The
	// count is rounded up; fewer than the tree needs, or more than 2^31, are an error.
	Inodes int64
	// JournalBlocks is the journal's size in blocks, at least 1024. 0: as mke2fs
	// chooses it, 16,384 (64 MiB) for an image of 2-16 GiB.
	JournalBlocks int64
	// ReservedPercent of the blocks are kept for root, up to 50. 0 means 5, as
	// mke2fs does; a negative value none.
	ReservedPercent int
	// Parent, if not nil, is the layout of an image of which the plan keeps what it
	// can: size, inode numbers, and the places of what takes the same blocks. Where
	// that leaves less than half of the Headroom, or the other options ask for
	// another size, UUID or journal, the image has more than 4 TiB or a file more
	// than 65000 names, the plan is made as without; see [Plan.Kept].
	Parent *Layout
}

// Errors of [NewPlan].
var (
	ErrOptions   = errors.New("invalid filesystem option")
	ErrTooLarge  = errors.New("filesystem too large")
	ErrLostFound = errors.New("/lost+found is not a directory")
)

// TooSmallError is returned by [NewPlan] for an [Options.Size] that cannot hold the tree.
type TooSmallError struct {
	Need, Have int64 // bytes
}

func (e *TooSmallError) Error() string {
	return fmt.Sprintf("the filesystem needs %d MiB, but has only %d MiB", (e.Need+1<<20-1)>>20, e.Have>>20)
}

const (
	resizeIno  = 7
	journalIno = 8
	firstIno   = 11 // lost+found's, the first that is not reserved

	maxInodes   = 1 << 31 // leaves room for what is rounded up in each group
	maxFileSize = (1<<32 - 1) * BlockSize
	maxLinks    = 65000
	groupBlocks = 8 * BlockSize
	inodeSize   = 256
	// lostBlocks is what lost+found has for vanished files, above what the
	// tree put there. Extent blocks that damage makes necessary come from it too.
	lostBlocks = 32
)

type dirPlan struct {
	blocks, subdirs uint32
}

type setPlan struct {
	inodes uint32 // that have this set of attributes
	blocks uint32 // attribute blocks, one for every xattrUses inodes
	block  uint32 // number of the first one
	values uint32 // value inodes
	value  uint32 // number of the first one
}

// Plan is the layout of an image, immutable and safe for concurrent use.
// Beside the tree it takes 8 bytes a directory: where each file lies is found
// again in every pass by going through the tree in order. One that keeps its
// parent's places takes 16 bytes an inode, and a bit a block.
type Plan struct {
	t         *filetree.Tree
	size      int64
	label     string
	uuid      [16]byte
	seed      uint32
	hashSeed  [4]uint32
	created   int64
	lost      filetree.ID // lost+found, or None if the tree has none
	dirs      []dirPlan   // by order of directories
	sets      []setPlan   // by number of attribute set
	eaBlocks  int64
	eaInodes  int64
	largeDir  bool
	manyLinks bool // some file has more names than ext4 allows
	g         geometry
	m         sparse.Map
	kept      *kept // nil if laid out in order
}

// NewPlan plans an image of a tree. It fails with a [TooSmallError], an error
// wrapping [ErrTooLarge] or [ErrLostFound] or, for what cannot be asked for, [ErrOptions].
func NewPlan(t *filetree.Tree, o Options) (*Plan, error) {
	switch {
	case len(o.Label) > 16:
		return nil, fmt.Errorf("%w: label %q is longer than 16 bytes", ErrOptions, o.Label)
	case o.ReservedPercent > 50:
		return nil, fmt.Errorf("%w: %d percent reserved, at most 50 can be", ErrOptions, o.ReservedPercent)
	case o.JournalBlocks != 0 && (o.JournalBlocks < 1024 || o.JournalBlocks > 10_240_000):
		return nil, fmt.Errorf("%w: journal of %d blocks, 1024 to 10240000 can be", ErrOptions, o.JournalBlocks)
	case o.Size < 0 || o.Inodes < 0 || o.Inodes > maxInodes:
		return nil, fmt.Errorf("%w: size %d, inodes %d", ErrOptions, o.Size, o.Inodes)
	case o.Size > maxBlocks*BlockSize:
		return nil, fmt.Errorf("%w: %d bytes, at most %d TiB can be", ErrTooLarge, o.Size, int64(maxBlocks*BlockSize>>40))
	}
	p := &Plan{t: t, label: o.Label, uuid: o.UUID, created: o.Created, lost: filetree.None}
	if id := t.Find("lost+found"); id != filetree.None && t.Mode(id)&unix.S_IFMT == unix.S_IFDIR {
		p.lost = id
	}
	if p.created == 0 {
		p.created = newest(t, o.NotAfter)
	}
	p.created = min(max(p.created, 0), math.MaxUint32)
	switch {
	case p.uuid != [16]byte{}:
	case o.Parent != nil:
		p.uuid = o.Parent.header.uuid
	default:
		p.uuid = deriveUUID(t, o)
	}
	p.seed = crc32c(math.MaxUint32, p.uuid[:])
	h := sha256.Sum256(append([]byte("instar ext4 hash seed\x00"), p.uuid[:]...))
	for i := range p.hashSeed {
		p.hashSeed[i] = binary.LittleEndian.Uint32(h[4*i:])
	}
	if err := p.planSets(); err != nil {
		return nil, err
	}
	if int64(t.Len())+p.eaInodes+firstIno > maxInodes {
		return nil, fmt.Errorf("%w: %d inodes", ErrTooLarge, t.Len())
	}
	if err := p.planDirs(); err != nil {
		return nil, err
	}
	if o.Parent == nil || !p.keep(o.Parent, &o) {
		if err := p.fit(o); err != nil {
			return nil, err
		}
	}
	p.countDirs()
	p.m = p.written()
	return p, nil
}

// Kept tells whether the plan keeps the places of [Options.Parent].
func (p *Plan) Kept() bool { return p.kept != nil }

// Size is the size of the image in bytes.
func (p *Plan) Size() int64 { return p.size }

// Tree is what the plan is of.
func (p *Plan) Tree() *filetree.Tree { return p.t }

// UUID is the filesystem's.
func (p *Plan) UUID() [16]byte { return p.uuid }

// Map tells which bytes of the image [Plan.Write] writes, or would write; all others are zero.
func (p *Plan) Map() sparse.Map { return p.m }

// Free is the number of bytes the image has free, those reserved for root included.
func (p *Plan) Free() int64 { return p.g.free() * BlockSize }

// Inodes are the number of inodes the image has and of those in use.
func (p *Plan) Inodes() (total, used int64) {
	return p.g.inodes(), int64(p.usedInodes())
}

// ino is the number of an inode of the tree.
func (p *Plan) ino(id filetree.ID) uint32 {
	switch {
	case p.kept != nil:
		return p.kept.ino[id]
	case id == filetree.Root:
		return 2
	case id == p.lost:
		return firstIno
	case id < p.lost: // always, where there is none
		return firstIno + uint32(id)
	}
	return firstIno - 1 + uint32(id)
}

// id is the inverse of ino, None for inodes that are not in the tree.
func (p *Plan) id(ino uint32) filetree.ID {
	switch {
	case p.kept != nil:
		return p.kept.ids[ino]
	case ino == 2:
		return filetree.Root
	case ino == firstIno:
		return p.lost
	case ino < firstIno || ino > p.lastTreeIno():
		return filetree.None
	}
	id := filetree.ID(ino - firstIno)
	if p.lost != filetree.None && id >= p.lost {
		id++
	}
	return id
}

func (p *Plan) lastTreeIno() uint32 {
	n := uint32(firstIno + p.t.Len() - 1)
	if p.lost != filetree.None {
		n--
	}
	return n
}

func (p *Plan) lastIno() uint32 { return p.lastTreeIno() + uint32(p.eaInodes) }

// fileSize is the size planned for a regular file: 0 for one too large for ext4.
func (p *Plan) fileSize(id filetree.ID) int64 {
	if n := p.t.Size(id); n <= maxFileSize {
		return n
	}
	return 0
}

func newest(t *filetree.Tree, notAfter int64) int64 {
	var n int64
	for id := range t.Len() {
		a := t.Attr(filetree.ID(id))
		if a.Mtime.Sec > n && (notAfter == 0 || a.Mtime.Sec <= notAfter) {
			n = a.Mtime.Sec
		}
	}
	return n
}

// deriveUUID makes a UUID (version 8, RFC 9562) of everything the image
// stores but the files' content.
func deriveUUID(t *filetree.Tree, o Options) (u [16]byte) {
	h := sha256.New()
	le := binary.LittleEndian
	var b []byte
	str := func(s []byte) {
		b = le.AppendUint64(b, uint64(len(s)))
		b = append(b, s...)
	}
	b = append(b, "instar ext4 UUID\x00"...)
	for _, v := range []int64{o.Size, o.Headroom, o.Created, o.Inodes, o.JournalBlocks, int64(o.ReservedPercent)} {
		b = le.AppendUint64(b, uint64(v))
	}
	str([]byte(o.Label))
	for i := range t.Len() {
		id := filetree.ID(i)
		a := t.Attr(id)
		for _, v := range []uint32{a.Mode, a.UID, a.GID, a.Major, a.Minor, a.Flags, a.Mtime.Nsec} {
			b = le.AppendUint32(b, v)
		}
		b = le.AppendUint64(b, uint64(a.Size))
		b = le.AppendUint64(b, uint64(a.Mtime.Sec))
		switch a.Type() {
		case unix.S_IFLNK:
			str(t.Target(id))
		case unix.S_IFDIR:
			for name, child := range t.Children(id) {
				str(name)
				b = le.AppendUint32(b, uint32(child))
			}
		case unix.S_IFREG:
			for _, e := range t.Data(id) {
				b = le.AppendUint64(b, uint64(e.Off))
				b = le.AppendUint64(b, uint64(e.Len))
			}
		}
		for _, x := range t.Xattrs(id) {
			str([]byte(x.Name))
			str(x.Value)
		}
		if len(b) >= 1<<15 {
			h.Write(b)
			b = b[:0]
		}
	}
	h.Write(b)
	copy(u[:], h.Sum(nil))
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}
