package ext4

import (
	"encoding/binary"
	"iter"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	rootExtents  = 4                     // that fit in the inode
	blockExtents = (BlockSize - 16) / 12 // that fit in a block, beside header and checksum
	// extentLen is the longest extent made: that of an unwritten one, so that
	// an extent can become unwritten without being cut.
	extentLen = 32767
)

// extent maps n blocks of a file from its block logical on.
type extent struct {
	logical, start, n int64
	unwritten         bool
}

// treeBlocks is the number of blocks the tree of n extents takes outside the inode.
func treeBlocks(n int64) int64 {
	var total int64
	for n > rootExtents {
		n = ceilDiv(n, blockExtents)
		total += n
	}
	return total
}

// countExtents takes n blocks in a row for a file and counts its extents.
func countExtents(c *cursor, n int64) int64 {
	var count int64
	for n > 0 {
		k := c.run(n).n
		n -= k
		count += ceilDiv(k, extentLen)
	}
	return count
}

// pieces yields the ranges of blocks that a regular file has data in: the
// first block and the number of blocks.
func (p *Plan) pieces(id filetree.ID) iter.Seq2[int64, int64] {
	return func(yield func(int64, int64) bool) {
		if p.fileSize(id) == 0 {
			return
		}
		var at int64
		for _, e := range p.t.Data(id) {
			lo, hi := max(e.Off/BlockSize, at), blocksOf(e.End())
			if hi <= lo {
				continue
			}
			if !yield(lo, hi-lo) {
				return
			}
			at = hi
		}
	}
}

// dense tells whether a regular file has data, and no holes of whole blocks.
func (p *Plan) dense(id filetree.ID) bool {
	for at, n := range p.pieces(id) {
		return at == 0 && n == blocksOf(p.fileSize(id))
	}
	return false
}

// countFile passes the blocks of a regular file and counts its extents.
func (p *Plan) countFile(id filetree.ID, c *cursor) int64 {
	var n int64
	for _, blocks := range p.pieces(id) {
		n += countExtents(c, blocks)
	}
	return n
}

// fileExtents passes the blocks of a regular file and returns its extents.
func (p *Plan) fileExtents(x []extent, id filetree.ID, c *cursor) []extent {
	for logical, n := range p.pieces(id) {
		x = appendExtents(x, c, logical, n)
	}
	return x
}

// appendExtents takes n blocks in a row for a file, from its block logical on.
func appendExtents(x []extent, c *cursor, logical, n int64) []extent {
	for n > 0 {
		r := c.run(min(n, extentLen))
		x = append(x, extent{logical: logical, start: r.start, n: r.n})
		logical += r.n
		n -= r.n
	}
	return x
}

// spoil makes the blocks of bad, ascending ranges of a file's blocks, unwritten.
func spoil(x []extent, bad []run) []extent {
	if len(bad) == 0 {
		return x
	}
	out := make([]extent, 0, len(x)+2*len(bad))
	for _, e := range x {
		for e.n > 0 {
			for len(bad) > 0 && bad[0].start+bad[0].n <= e.logical {
				bad = bad[1:]
			}
			n, unwritten := e.n, false
			if len(bad) > 0 {
				b := bad[0]
				if b.start <= e.logical {
					unwritten = true
					n = min(n, b.start+b.n-e.logical)
				} else {
					n = min(n, b.start-e.logical)
				}
			}
			out = append(out, extent{e.logical, e.start, n, unwritten})
			e.logical += n
			e.start += n
			e.n -= n
		}
	}
	return out
}

// extentTree encodes a tree: its root for the inode, and its blocks, to be put
// at the given positions in the order given.
func extentTree(x []extent, at []int64, seed uint32) (root [60]byte, blocks []byte) {
	le := binary.LittleEndian
	type child struct{ logical, at int64 }
	var children []child
	count := len(x)
	put := func(b []byte, i int) { // i of this level's things
		if children != nil {
			c := children[i]
			le.PutUint32(b, uint32(c.logical))
			le.PutUint32(b[4:], uint32(c.at))
			le.PutUint16(b[8:], uint16(c.at>>32))
			return
		}
		e := x[i]
		n := uint16(e.n)
		if e.unwritten {
			n += 32768
		}
		le.PutUint32(b, uint32(e.logical))
		le.PutUint16(b[4:], n)
		le.PutUint16(b[6:], uint16(e.start>>32))
		le.PutUint32(b[8:], uint32(e.start))
	}
	header := func(b []byte, n, room, depth int) {
		le.PutUint16(b, 0xf30a)
		le.PutUint16(b[2:], uint16(n))
		le.PutUint16(b[4:], uint16(room))
		le.PutUint16(b[6:], uint16(depth))
	}
	depth := 0
	for ; count > rootExtents; depth++ {
		var up []child
		for i := 0; i < count; i += blockExtents {
			n := min(blockExtents, count-i)
			b := make([]byte, BlockSize)
			header(b, n, blockExtents, depth)
			for j := range n {
				put(b[12+12*j:], i+j)
			}
			le.PutUint32(b[BlockSize-4:], crc32c(seed, b[:BlockSize-4]))
			blocks = append(blocks, b...)
			first := int64(le.Uint32(b[12:]))
			up = append(up, child{first, at[0]})
			at = at[1:]
		}
		children, count = up, len(up)
	}
	header(root[:], count, rootExtents, depth)
	for i := range count {
		put(root[12+12*i:], i)
	}
	return root, blocks
}
