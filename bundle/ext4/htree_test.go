package ext4

import (
	"fmt"
	"testing"
)

// Names are cut into leaves of a block by their hashes; those of one hash that
// fill more than a block go on in leaves marked so.
func TestCut(t *testing.T) {
	var x index
	add := func(hash uint32, n int) {
		for i := range n {
			x.names = append(x.names, indexName{hash: hash, name: fmt.Appendf(nil, "%0100d", i)})
		}
	}
	const perBlock = dirSpace / 108
	add(0x10, 5)
	add(0x7000_0000, 2*perBlock+1)
	add(0x7000_0002, perBlock)
	add(0xffff_fffa, 1)
	x.cut(x.names, 0, 31)
	want := []indexLeaf{
		{0, 5}, {0x7000_0000, perBlock}, {0x7000_0001, perBlock}, {0x7000_0001, 1}, {0x7000_0002, perBlock}, {0x8000_0000, 1},
	}
	if fmt.Sprint(x.leaves) != fmt.Sprint(want) {
		t.Errorf("leaves %x, want %x", x.leaves, want)
	}
}

// The hash is debugfs's dx_hash -h half_md4 -s 00010203-0405-0607-0809-0a0b0c0d0e0f.
func TestDirHash(t *testing.T) {
	seed := [4]uint32{0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c}
	for name, want := range map[string][2]uint32{
		"a":          {0xa2fa3a0, 0x6b8ed956},
		"lost+found": {0xf06b5bf6, 0x6b1b6f5e},
		"a name of more than thirty-two bytes, so that there are two rounds": {0x142a2326, 0xf50091dc},
		"exactly-thirty-two-bytes-long--1":                                   {0x3825b934, 0xce700281},
	} {
		if h, m := dirHash([]byte(name), &seed); h != want[0] || m != want[1] {
			t.Errorf("%q: %#x %#x, want %#x", name, h, m, want)
		}
	}
}
