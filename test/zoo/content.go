package zoo

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// contentKinds differ in size and in where their data lies.
func contentKinds() []Kind {
	return []Kind{
		{Name: "empty", make: func(m *maker) { m.file("f", "") }},
		{Name: "one-byte", make: func(m *maker) { m.file("f", "x") }},
		{Name: "inline-sizes", make: func(m *maker) {
			// Some filesystems keep so few bytes in the inode.
			for _, n := range []int{59, 60, 61, 155, 156, 157, 2047, 2048} {
				m.file(fmt.Sprint(n), m.bytes(n))
			}
		}},
		{Name: "block-sizes", make: func(m *maker) {
			for _, n := range []int{511, 512, 1023, 1024, 4095, 4096, 4097, 8191, 8192, 8193, 65535, 65536, 65537} {
				m.file(fmt.Sprint(n), m.bytes(n))
			}
		}},
		{Name: "mebibytes", make: func(m *maker) { m.file("f", m.bytes(5<<20+1)) }},
		{Name: "written-zeros", make: func(m *maker) { m.file("f", strings.Repeat("\x00", 1<<20)) }},
		{Name: "over-one-extent", make: func(m *maker) {
			// An initialised ext4 extent holds at most 128 MiB.
			m.file("f", strings.Repeat(m.bytes(1<<16), 2081))
		}},
		{Name: "hole-only", make: func(m *maker) { m.sparse("f", 10<<20+5) }},
		{Name: "hole-at-start", make: func(m *maker) { m.sparse("f", 1<<20+3, piece{1 << 20, "end"}) }},
		{Name: "hole-at-end", make: func(m *maker) { m.sparse("f", 1<<20+7, piece{0, "start"}) }},
		{Name: "hole-in-middle", make: func(m *maker) {
			m.sparse("f", 3<<20+100, piece{0, "start"}, piece{3 << 20, m.bytes(100)})
		}},
		{Name: "unaligned-holes", make: func(m *maker) {
			m.sparse("f", 1<<20, piece{1000, "x"}, piece{123457, m.bytes(5000)}, piece{999999, "y"})
		}},
		{Name: "four-extents", make: func(m *maker) { m.sparse("f", 8<<16, stripes(m, 4, 1<<17)...) }},
		{Name: "five-extents", make: func(m *maker) { m.sparse("f", 10<<16, stripes(m, 5, 1<<17)...) }},
		{Name: "extent-tree-depth-1", make: func(m *maker) { m.sparse("f", 340<<13, stripes(m, 340, 1<<13)...) }},
		{Name: "extent-tree-depth-2", make: func(m *maker) { m.sparse("f", 2000<<13, stripes(m, 2000, 1<<13)...) }},
		{Name: "over-4GiB", make: func(m *maker) {
			m.sparse("f", 4<<30+8192+1, piece{0, "start"}, piece{1<<32 - 2, "over"}, piece{4<<30 + 8192, "!"})
		}},
		{Name: "one-TiB", Far: true, make: func(m *maker) {
			m.sparse("f", 1<<40+1, piece{5, "start"}, piece{1 << 39, "middle"}, piece{1 << 40, "e"})
		}},
		{Name: "preallocated", make: func(m *maker) {
			m.file("f", "data")
			m.fallocate("f", 0, 0, 1<<20) // unwritten, but within the size
			m.fallocate("empty", 0, 0, 1<<18)
		}},
		{Name: "preallocated-beyond-end", make: func(m *maker) {
			m.file("f", "data")
			m.fallocate("f", unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20)
		}},
		{Name: "punched", make: func(m *maker) {
			m.file("f", m.bytes(1<<20))
			m.fallocate("f", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 100_000, 700_000)
		}},
		{Name: "equal-content", make: func(m *maker) {
			data := m.bytes(100_000)
			m.file("a", data)
			m.file("b", data)
		}},
		{Name: "many-small", make: func(m *maker) {
			for i := range 2000 {
				m.file(fmt.Sprint(i), strings.Repeat("small ", i%97))
			}
		}},
	}
}

// stripes are n blocks of 4096 bytes, one every step bytes.
func stripes(m *maker, n int, step int64) []piece {
	out := make([]piece, n)
	for i := range out {
		out[i] = piece{int64(i) * step, m.bytes(4096)}
	}
	return out
}

// linkKinds are hard and symbolic links.
func linkKinds() []Kind {
	return []Kind{
		{Name: "hard-link", make: func(m *maker) {
			m.file("a", "linked")
			m.link("a", "b")
		}},
		{Name: "hard-links-across-directories", make: func(m *maker) {
			m.dir("x", "y", "y/z")
			m.file("y/z/file", m.bytes(10_000))
			m.link("y/z/file", "x/first")
			m.link("y/z/file", "y/second")
			m.link("y/z/file", "zz")
		}},
		{Name: "thousand-hard-links", make: func(m *maker) {
			m.file("0", "many names")
			for i := range 999 {
				m.link("0", fmt.Sprint(i+1))
			}
		}},
		{Name: "hard-linked-nodes", make: func(m *maker) {
			m.node("fifo", unix.S_IFIFO|0o600, 0, 0)
			m.link("fifo", "fifo2")
			m.node("dev", unix.S_IFCHR|0o600, 1, 3)
			m.link("dev", "dev2")
			m.symlink("nowhere", "link")
			m.link("link", "link2")
			m.node("socket", unix.S_IFSOCK|0o600, 0, 0)
			m.link("socket", "socket2")
		}},
		{Name: "hard-linked-setuid", make: func(m *maker) {
			m.file("a", "#!/bin/true\n")
			m.owner("a", 0, 5)
			m.mode("a", 0o6755)
			m.link("a", "b")
		}},
		{Name: "symlink", make: func(m *maker) {
			m.file("f", "x")
			m.symlink("f", "l")
			m.symlink("../symlink/f", "up")
			m.symlink("/etc/passwd", "absolute")
		}},
		{Name: "symlink-dangling", make: func(m *maker) { m.symlink("no such file", "l") }},
		{Name: "symlink-loop", make: func(m *maker) {
			m.symlink("self", "self")
			m.symlink("b", "a")
			m.symlink("a", "b")
		}},
		{Name: "symlink-to-directory", make: func(m *maker) {
			m.dir("d")
			m.file("d/f", "x")
			m.symlink("d", "l")
			m.symlink("d/", "slash")
		}},
		{Name: "symlink-lengths", make: func(m *maker) {
			// ext4 keeps up to 59 bytes in the inode.
			for _, n := range []int{1, 58, 59, 60, 61, 255, 1000, 1023} {
				m.symlink(strings.Repeat("t", n), fmt.Sprint(n))
			}
		}},
		{Name: "symlink-4095-bytes", Not: []string{"xfs"}, make: func(m *maker) {
			m.symlink(strings.Repeat("0123456789abcde/", 256)[:4095], "l")
		}},
		{Name: "symlink-odd-targets", make: func(m *maker) {
			m.symlink("new\nline", "newline")
			m.symlink("\xff\xfe", "invalid-utf8")
			m.symlink(" ", "space")
		}},
	}
}

// nodeKinds are neither files nor directories nor symbolic links.
func nodeKinds() []Kind {
	return []Kind{
		{Name: "fifo", make: func(m *maker) { m.node("f", unix.S_IFIFO|0o640, 0, 0) }},
		{Name: "socket", make: func(m *maker) { m.node("s", unix.S_IFSOCK|0o755, 0, 0) }},
		{Name: "character-device", make: func(m *maker) { m.node("null", unix.S_IFCHR|0o666, 1, 3) }},
		{Name: "block-device", make: func(m *maker) { m.node("loop", unix.S_IFBLK|0o660, 7, 0) }},
		{Name: "device-numbers", make: func(m *maker) {
			// The old encoding holds 8 bits of each, the new one 12 and 20.
			for _, n := range [][2]uint32{{0, 1}, {255, 255}, {255, 256}, {256, 255}, {511, 262143}, {1, 65536}} {
				m.node(fmt.Sprintf("c%d-%d", n[0], n[1]), unix.S_IFCHR|0o600, n[0], n[1])
				m.node(fmt.Sprintf("b%d-%d", n[0], n[1]), unix.S_IFBLK|0o600, n[0], n[1])
			}
		}},
		{Name: "device-number-largest", Not: []string{"xfs"}, make: func(m *maker) {
			m.node("d", unix.S_IFBLK|0o600, 4095, 1048575)
		}},
		{Name: "overlay-whiteout", make: func(m *maker) { m.node("gone", unix.S_IFCHR, 0, 0) }},
	}
}
