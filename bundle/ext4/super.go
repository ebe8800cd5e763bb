package ext4

import (
	"encoding/binary"
	"math"
)

const descSize = 64

// superblock fills sb, 1024 bytes, with the copy for a group.
func (p *Plan) superblock(sb []byte, group int64) {
	le := binary.LittleEndian
	g := &p.g
	u16 := func(at int, v uint16) { le.PutUint16(sb[at:], v) }
	u32 := func(at int, v uint32) { le.PutUint32(sb[at:], v) }
	wide := func(lo, hi int, v int64) {
		u32(lo, uint32(v))
		u32(hi, uint32(v>>32))
	}
	clear(sb)
	u32(0x00, uint32(g.inodes()))
	wide(0x04, 0x150, g.blocks)
	wide(0x08, 0x154, g.reserved)
	wide(0x0c, 0x158, g.free())
	u32(0x10, uint32(g.inodes())-p.usedInodes())
	u32(0x18, 2) // blocks of 1024<<2
	u32(0x1c, 2)
	u32(0x20, groupBlocks)
	u32(0x24, groupBlocks)
	u32(0x28, uint32(g.ipg))
	u32(0x30, uint32(p.created))
	u16(0x36, math.MaxUint16) // no check after so many mounts
	u16(0x38, 0xef53)
	if group == 0 {
		u16(0x3a, 1) // clean; libext2fs does not say so in copies either
	}
	u16(0x3c, 1) // on errors: continue
	u32(0x40, uint32(p.created))
	u32(0x4c, 1) // revision
	u32(0x54, firstIno)
	u16(0x58, inodeSize)
	u16(0x5a, uint16(group))
	compat := uint32(0x4 | 0x8 | 0x20) // has_journal ext_attr dir_index
	if g.rgdt > 0 {
		compat |= 0x10 // resize_inode
	}
	incompat := uint32(0x2 | 0x40 | 0x80 | 0x200) // filetype extent 64bit flex_bg
	if p.eaInodes > 0 {
		incompat |= 0x400 // ea_inode
	}
	if p.largeDir {
		incompat |= 0x4000 // large_dir
	}
	u32(0x5c, compat)
	u32(0x60, incompat)
	u32(0x64, 0x1|0x2|0x8|0x20|0x40|0x400) // sparse_super large_file huge_file dir_nlink extra_isize metadata_csum
	copy(sb[0x68:0x78], p.uuid[:])
	copy(sb[0x78:0x88], p.label)
	u16(0xce, uint16(g.rgdt))
	u32(0xe0, journalIno)
	for i, v := range p.hashSeed {
		u32(0xec+4*i, v)
	}
	sb[0xfc] = 1 // half MD4
	sb[0xfd] = 1 // the journal's extents follow at 0x10c
	u16(0xfe, descSize)
	u32(0x100, 0x4|0x8) // user_xattr, acl
	u32(0x108, uint32(p.created))
	root, _ := p.journalTree()
	copy(sb[0x10c:], root[:])
	wide(0x10c+16*4, 0x10c+15*4, g.journal*BlockSize)
	u16(0x15c, inodeSize-128-96) // least and wanted size of the fields after the first 128 bytes
	u16(0x15e, inodeSize-128-96)
	u32(0x160, 2) // hashes of unsigned characters
	sb[0x174] = 4 // a flexible group is 16 groups
	sb[0x175] = 1 // CRC-32C
	le.PutUint64(sb[0x178:], uint64(p.m.Bytes()>>10))
	u32(0x3fc, crc32c(math.MaxUint32, sb[:0x3fc]))
}

// usedInodes counts the inodes in use, the reserved ones included.
func (p *Plan) usedInodes() uint32 {
	if p.kept != nil {
		return p.kept.total
	}
	return p.lastIno()
}

const (
	inodeUninit = 1 // flags of a group
	blockUninit = 2
	tableZeroed = 4
)

// descriptors writes all group descriptors, a block at a time.
func (p *Plan) descriptors(put func(block []byte) error) error {
	le := binary.LittleEndian
	g := &p.g
	bb, ib, it := g.cursor(g.bitmaps), g.cursor(g.inodeBitmaps), g.cursor(g.tables)
	sums := bitmapSums{p: p}
	buf := make([]byte, BlockSize)
	for group := int64(0); group < g.groups; group++ {
		d := buf[group%(BlockSize/descSize)*descSize:][:descSize]
		at, _ := it.whole(g.tableLen())
		wide := func(lo, hi int, v int64) {
			le.PutUint32(d[lo:], uint32(v))
			le.PutUint32(d[hi:], uint32(v>>32))
		}
		half := func(lo, hi int, v uint32) {
			le.PutUint16(d[lo:], uint16(v))
			le.PutUint16(d[hi:], uint16(v>>16))
		}
		wide(0x00, 0x20, bb.run(1).start)
		wide(0x04, 0x24, ib.run(1).start)
		wide(0x08, 0x28, at.start)
		usedInodes, high := p.groupUsed(group), p.groupInodes(group)
		half(0x0c, 0x2c, uint32(g.groupFree(group)))
		half(0x0e, 0x2e, uint32(g.ipg-usedInodes))
		if group < int64(len(g.usedDirs)) {
			half(0x10, 0x30, g.usedDirs[group])
		}
		flags := uint16(tableZeroed)
		if usedInodes == 0 {
			flags |= inodeUninit
		} else {
			half(0x1a, 0x3a, sums.inodes(group))
		}
		if g.uninit(group) {
			flags |= blockUninit
		} else {
			half(0x18, 0x38, sums.blocks(group))
		}
		le.PutUint16(d[0x12:], flags)
		half(0x1c, 0x32, uint32(g.ipg-high))
		sum := crc32c(crc32c32(p.seed, uint32(group)), d)
		le.PutUint16(d[0x1e:], uint16(sum))
		if (group+1)%(BlockSize/descSize) == 0 || group == g.groups-1 {
			if err := put(buf); err != nil {
				return err
			}
			clear(buf)
		}
	}
	return nil
}
