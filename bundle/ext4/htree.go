package ext4

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	rootIndex = (BlockSize-32)/8 - 1 // entries of an index's root block, beside its checksum
	nodeIndex = (BlockSize-8)/8 - 1  // of a node block
)

// index is the htree of one directory. Leaves are cut by the names' hashes
// alone, halving a range until its names fit in a block: a name more or less
// changes one leaf, or splits it, and leaves the rest as it was.
type index struct {
	names  []indexName
	leaves []indexLeaf
}

type indexName struct {
	hash, minor uint32
	name        []byte
	id          filetree.ID
}

type indexLeaf struct {
	hash uint32 // least hash of the leaf; the low bit says that names of this hash precede it
	n    int    // names
}

// build sorts and cuts the names of a directory. The index may be reused.
func (x *index) build(l *lister, dir filetree.ID) {
	x.names, x.leaves = x.names[:0], x.leaves[:0]
	for name, id := range l.names(dir) {
		h, m := dirHash(name, &l.p.hashSeed)
		x.names = append(x.names, indexName{h, m, name, id})
	}
	slices.SortFunc(x.names, func(a, b indexName) int {
		if c := cmp.Compare(a.hash, b.hash); c != 0 {
			return c
		}
		if c := cmp.Compare(a.minor, b.minor); c != 0 {
			return c
		}
		return bytes.Compare(a.name, b.name)
	})
	x.cut(x.names, 0, 31)
}

// cut makes leaves of names, whose hashes begin with the bits of prefix above bit.
func (x *index) cut(names []indexName, prefix uint32, bit int) {
	if len(names) == 0 {
		return
	}
	total := 0
	for i := range names {
		total += recLen(len(names[i].name))
	}
	switch {
	case total <= dirSpace:
		x.leaves = append(x.leaves, indexLeaf{prefix, len(names)})
	case bit > 0:
		upper := prefix | 1<<bit
		i, _ := slices.BinarySearchFunc(names, upper, func(n indexName, h uint32) int { return cmp.Compare(n.hash, h) })
		x.cut(names[:i], prefix, bit-1)
		x.cut(names[i:], upper, bit-1)
	default: // more names of one hash than a block holds
		for len(names) > 0 {
			n, room := 0, dirSpace
			for n < len(names) && recLen(len(names[n].name)) <= room {
				room -= recLen(len(names[n].name))
				n++
			}
			x.leaves = append(x.leaves, indexLeaf{prefix, n})
			names = names[n:]
			prefix |= 1
		}
	}
}

// levels gives the number of node blocks of each level between root and
// leaves, from the root down.
func (x *index) levels() []int {
	var l []int
	for n := len(x.leaves); n > rootIndex; {
		n = ceilDiv(n, nodeIndex)
		l = append(l, n)
	}
	slices.Reverse(l)
	return l
}

// depth is the number of levels above the leaves, the root's included.
func (x *index) depth() int { return len(x.levels()) + 1 }

func (x *index) blocks() int {
	n := 1 + len(x.leaves)
	for _, l := range x.levels() {
		n += l
	}
	return n
}

// write makes root, nodes and leaves.
func (x *index) write(p *Plan, dir filetree.ID, gone func(filetree.ID) bool, next func() ([]byte, error)) error {
	le := binary.LittleEndian
	self := p.ino(dir)
	seed := p.inodeSeed(self)
	levels := x.levels()

	// hashes[i] holds the first hash of each block of level i+1; the last level is the leaves.
	hashes := make([][]uint32, len(levels)+1)
	for _, l := range x.leaves {
		hashes[len(levels)] = append(hashes[len(levels)], l.hash)
	}
	for i := len(levels) - 1; i >= 0; i-- {
		for j := 0; j < len(hashes[i+1]); j += nodeIndex {
			hashes[i] = append(hashes[i], hashes[i+1][j])
		}
	}
	child := 1 // number of the first block of the level below
	fill := func(b []byte, at, limit int, children []uint32) {
		le.PutUint16(b[at:], uint16(limit))
		le.PutUint16(b[at+2:], uint16(len(children)))
		for i, h := range children {
			if i > 0 {
				le.PutUint32(b[at+8*i:], h)
			}
			le.PutUint32(b[at+8*i+4:], uint32(child))
			child++
		}
		sum := crc32c(seed, b[:at+8*len(children)])
		sum = crc32c(sum, make([]byte, 8))
		le.PutUint32(b[at+8*limit+4:], sum)
	}
	b, err := next()
	if err != nil {
		return err
	}
	d := newDirBlock(b)
	d.addDots(self, p.ino(p.t.Parent(dir)))
	le.PutUint16(b[12+4:], BlockSize-12)
	b[28] = 1 // half MD4
	b[29] = 8 // length of this
	b[30] = byte(len(levels))
	fill(b, 32, rootIndex, hashes[0])
	for i, n := range levels {
		below := hashes[i+1]
		for range n {
			if b, err = next(); err != nil {
				return err
			}
			clear(b)
			le.PutUint16(b[4:], BlockSize)
			k := min(nodeIndex, len(below))
			fill(b, 8, nodeIndex, below[:k])
			below = below[k:]
		}
	}
	names := x.names
	for _, l := range x.leaves {
		if b, err = next(); err != nil {
			return err
		}
		d := newDirBlock(b)
		for _, n := range names[:l.n] {
			if n.id == filetree.None {
				d.add(firstIno, 2, n.name)
			} else if !gone(n.id) {
				d.add(p.ino(n.id), fileType(p.t.Mode(n.id)), n.name)
			}
		}
		d.finish(seed)
		names = names[l.n:]
	}
	return nil
}
