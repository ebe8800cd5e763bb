package ext4

import (
	"encoding/binary"
	"math"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	flagIndex   = 0x1000
	flagExtents = 0x80000
	flagValue   = 0x200000 // an attribute value's inode

	// What lsattr(1) shows and ext4 keeps, for each type of file.
	flagsOther   = 0x40 | 0x80 // nodump noatime
	flagsRegular = flagsOther | 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x4000 | 0x8000
	flagsDir     = flagsOther | 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x10000 | 0x20000
)

// Times ext4 can store, in seconds: 1901-12-13 to 2446-05-10.
const (
	minTime = math.MinInt32
	maxTime = math.MaxInt32 + 3<<32
)

// diskInode is what distinguishes one inode from another.
type diskInode struct {
	ino      uint32
	mode     uint32
	uid, gid uint32
	links    uint16
	flags    uint32
	size     int64
	blocks   int64 // of the filesystem
	mtime    filetree.Time
	block    [60]byte
	xattr    int64 // block of attributes
	set      int   // of attributes
}

// encode fills b, inodeSize bytes. All four times are the modification time.
func (p *Plan) encode(b []byte, n *diskInode) {
	le := binary.LittleEndian
	clear(b)
	sec, extra := storedTime(n.mtime)
	le.PutUint16(b[0x00:], uint16(n.mode))
	le.PutUint16(b[0x02:], uint16(n.uid))
	le.PutUint32(b[0x04:], uint32(n.size))
	for _, at := range [...]int{0x08, 0x0c, 0x10, 0x90} {
		le.PutUint32(b[at:], sec)
	}
	for _, at := range [...]int{0x84, 0x88, 0x8c, 0x94} {
		le.PutUint32(b[at:], extra)
	}
	le.PutUint16(b[0x18:], uint16(n.gid))
	le.PutUint16(b[0x1a:], n.links)
	sectors := n.blocks * (BlockSize / 512)
	le.PutUint32(b[0x1c:], uint32(sectors))
	le.PutUint16(b[0x74:], uint16(sectors>>32))
	le.PutUint32(b[0x20:], n.flags)
	copy(b[0x28:0x64], n.block[:])
	le.PutUint32(b[0x68:], uint32(n.xattr))
	le.PutUint16(b[0x76:], uint16(n.xattr>>32))
	le.PutUint32(b[0x6c:], uint32(n.size>>32))
	le.PutUint16(b[0x78:], uint16(n.uid>>16))
	le.PutUint16(b[0x7a:], uint16(n.gid>>16))
	le.PutUint16(b[0x80:], inodeSize-128-96)
	p.inodeXattrs(b[0xa0:], n.set)
	p.sumInode(b, n.ino)
}

func (p *Plan) sumInode(b []byte, ino uint32) {
	le := binary.LittleEndian
	le.PutUint16(b[0x7c:], 0)
	le.PutUint16(b[0x82:], 0)
	sum := crc32c(p.inodeSeed(ino), b)
	le.PutUint16(b[0x7c:], uint16(sum))
	le.PutUint16(b[0x82:], uint16(sum>>16))
}

// storedTime is a time as ext4 has it: the low 32 bits of the seconds, and
// nanoseconds with two more bits of the seconds.
func storedTime(t filetree.Time) (sec, extra uint32) {
	switch {
	case t.Sec < minTime:
		t = filetree.Time{Sec: minTime}
	case t.Sec > maxTime:
		t = filetree.Time{Sec: maxTime}
	}
	epoch := uint32((t.Sec-int64(int32(t.Sec)))>>32) & 3
	return uint32(t.Sec), t.Nsec<<2 | epoch
}

func (p *Plan) slowLink(id filetree.ID) bool {
	return p.t.Mode(id)&unix.S_IFMT == unix.S_IFLNK && p.t.Size(id) >= 60
}

// deviceFits tells whether ext4 can store a device number.
func deviceFits(major, minor uint32) bool { return major < 1<<12 && minor < 1<<20 }

// storedDevice encodes a device number in the old form where it fits.
func storedDevice(major, minor uint32) (b [60]byte) {
	le := binary.LittleEndian
	switch {
	case !deviceFits(major, minor):
	case major < 256 && minor < 256:
		le.PutUint32(b[:], major<<8|minor)
	default:
		le.PutUint32(b[4:], minor&0xff|major<<8|minor&^0xff<<12)
	}
	return b
}

// keptFlags are those of an inode's flags that go into the image.
func keptFlags(a *filetree.Attr) uint32 {
	switch a.Type() {
	case unix.S_IFREG:
		return a.Flags & flagsRegular
	case unix.S_IFDIR:
		return a.Flags & flagsDir
	}
	return a.Flags & flagsOther
}
