package ext4

import "encoding/binary"

// journalSuper is the journal's superblock (include/linux/jbd2.h): an empty
// journal, version 2. It is big-endian.
func (p *Plan) journalSuper(b []byte) {
	be := binary.BigEndian
	clear(b)
	be.PutUint32(b[0x00:], 0xc03b3998)
	be.PutUint32(b[0x04:], 4) // superblock, version 2
	be.PutUint32(b[0x0c:], BlockSize)
	be.PutUint32(b[0x10:], uint32(p.g.journal))
	be.PutUint32(b[0x14:], 1) // first block of the log
	be.PutUint32(b[0x18:], 1) // first sequence number
	copy(b[0x30:], p.uuid[:])
	be.PutUint32(b[0x40:], 1) // users
}

// journalTree makes the extent tree of the journal's inode. Its blocks are the
// first of all extent blocks.
func (p *Plan) journalTree() (root [60]byte, blocks []byte) {
	c := p.g.cursor(p.g.journalAt)
	x := appendExtents(nil, &c, 0, p.g.journal)
	at := p.treeAt(p.g.extents, treeBlocks(int64(len(x))))
	return extentTree(x, at, p.inodeSeed(journalIno))
}

// treeAt gives the positions of so many blocks from start on.
func (p *Plan) treeAt(start, n int64) []int64 {
	c := p.g.cursor(start)
	at := make([]int64, n)
	for i := range at {
		at[i] = c.run(1).start
	}
	return at
}

// The resize inode owns the blocks reserved for more group descriptors, of all
// copies, so that the kernel finds them when the filesystem grows
// (libext2fs, lib/ext2fs/res_gdt.c).

// resizeBlock is its double indirect block: the primary's reserved blocks.
func (p *Plan) resizeBlock(b []byte) {
	g := &p.g
	clear(b)
	for i := range g.rgdt {
		nr := (g.gdt + i) % (BlockSize / 4)
		binary.LittleEndian.PutUint32(b[4*nr:], uint32(1+g.gdt+i))
	}
}

// reservedBlock is the i-th of the primary's reserved blocks, an indirect
// block that names its counterparts in the copies.
func (p *Plan) reservedBlock(b []byte, i int64) {
	g := &p.g
	clear(b)
	for j, s := range g.supers {
		binary.LittleEndian.PutUint32(b[4*j:], uint32(s+1+g.gdt+i))
	}
}
