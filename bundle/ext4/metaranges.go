package ext4

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/instar-image/instar/bundle/sparse"
)

// MetadataRanges tells where an ext4 filesystem of size bytes keeps what the
// kernel reads before any file: superblock and descriptors, bitmaps, and the
// inode tables as far as they are used; ascending. It reads the first two of
// them. What is no ext4 filesystem has none, and that is no error. Directories
// lie where only inodes say.
func MetadataRanges(r io.ReaderAt, size int64) (sparse.Map, error) {
	var sb [1024]byte
	if size < 2048 {
		return nil, nil
	}
	if _, err := r.ReadAt(sb[:], 1024); err != nil {
		return nil, fmt.Errorf("read the superblock: %w", err)
	}
	le := binary.LittleEndian
	if le.Uint16(sb[0x38:]) != 0xef53 || le.Uint32(sb[0x60:])&0x40 == 0 || le.Uint32(sb[0x18:]) > 6 {
		return nil, nil // not ext, or without extents
	}
	block := int64(1024) << le.Uint32(sb[0x18:])
	blocks, perGroup, ipg := int64(le.Uint32(sb[0x04:])), int64(le.Uint32(sb[0x20:])), int64(le.Uint32(sb[0x28:]))
	desc, inode := int64(32), int64(le.Uint16(sb[0x58:]))
	if le.Uint32(sb[0x60:])&0x80 != 0 {
		blocks |= int64(le.Uint32(sb[0x150:])) << 32
		desc = int64(le.Uint16(sb[0xfe:]))
	}
	if blocks < 1 || blocks > size/block || perGroup < 1 || ipg < 1 || desc < 32 || desc > block || inode < 128 || inode > block {
		return nil, nil
	}
	groups := (blocks + perGroup - 1) / perGroup
	at := (int64(le.Uint32(sb[0x14:])) + 1) * block // behind the superblock's block
	if groups > (size-at)/desc {
		return nil, nil
	}
	table := make([]byte, min(groups*desc, 1<<20)/desc*desc)
	var list []sparse.Extent
	add := func(first, n int64) {
		if first > 0 && n > 0 && first < blocks {
			list = append(list, sparse.Extent{Off: first * block, Len: min(n, blocks-first) * block})
		}
	}
	list = append(list, sparse.Extent{Off: 0, Len: min(size, at+(groups*desc+block-1)/block*block)})
	for done := int64(0); done < groups; {
		n := min(groups-done, int64(len(table))/desc)
		if _, err := r.ReadAt(table[:n*desc], at+done*desc); err != nil {
			return nil, fmt.Errorf("read the group descriptors: %w", err)
		}
		for i := range n {
			d := table[i*desc : (i+1)*desc]
			wide := func(lo, hi int) int64 {
				v := int64(le.Uint32(d[lo:]))
				if desc >= 64 {
					v |= int64(le.Uint32(d[hi:])) << 32
				}
				return v
			}
			flags, unused := le.Uint16(d[0x12:]), int64(le.Uint16(d[0x1c:]))
			if flags&2 == 0 { // blocks are initialised
				add(wide(0, 0x20), 1)
			}
			if flags&1 == 0 { // and inodes
				add(wide(4, 0x24), 1)
				add(wide(8, 0x28), (max(0, ipg-unused)*inode+block-1)/block)
			}
		}
		done += n
	}
	return ascending(list), nil
}

// ascending puts extents in order and joins those that touch.
func ascending(list []sparse.Extent) sparse.Map {
	slices.SortFunc(list, func(a, b sparse.Extent) int { return cmp.Compare(a.Off, b.Off) })
	var m sparse.Map
	for _, e := range list {
		if n := len(m); n > 0 && e.Off <= m[n-1].End() {
			m[n-1].Len = max(m[n-1].End(), e.End()) - m[n-1].Off
			continue
		}
		m = append(m, e)
	}
	return m
}
