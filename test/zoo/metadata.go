package zoo

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// nameKinds have names that programs trip over.
func nameKinds() []Kind {
	one := func(kind string, names ...string) Kind {
		return Kind{Name: kind, make: func(m *maker) {
			for i, n := range names {
				m.file(n, fmt.Sprint(i))
			}
		}}
	}
	control := make([]string, 0, 32)
	for c := byte(1); c < 32; c++ {
		control = append(control, "c"+string(rune(c))+"c")
	}
	return []Kind{
		one("name-newline", "two\nlines", "\n", "end\n"),
		one("name-tab-and-controls", append(control, "\t", "\x7f", "\x1b[31mred")...),
		one("name-quotes", `"`, `'`, "`", `\`, `a\"b'c`, "$(id)", "${HOME}", "*", "?", "[a]", "a;b", "a&b", "|", "<", ">", "~", "#", "!", "%s%n"),
		one("name-invalid-utf8", "\xff", "latin1-\xe9", "\xc3\x28", "\xed\xa0\x80"),
		one("name-255-bytes", strings.Repeat("n", 255), strings.Repeat("é", 127)+"x"),
		one("name-leading-dash", "-", "--", "-rf", "--help", "-e"),
		one("name-spaces", " ", "  ", " lead", "trail ", "in the middle"),
		one("name-dots", "...", "..a", ".hidden", "a.", "a..", ".#lock"),
		one("name-unicode", "ünïcödé", "e\u0301", "\u00e9", "日本語", "🦌", "\u202eright-to-left"),
		one("name-case", "README", "readme", "ReadMe"),
		one("name-like-ours", "lost+found", "image.manifest.xml", "image.part.0"),
		{Name: "name-prefix-order", make: func(m *maker) {
			// A directory beside names that sort between it and its content.
			m.dir("a", "a-b")
			m.file("a/x", "1")
			m.file("a.b", "2")
			m.file("a-b/x", "3")
			m.file("a0", "4")
		}},
	}
}

// metadataKinds differ in what the inode says of them.
func metadataKinds() []Kind {
	return []Kind{
		{Name: "modes", make: func(m *maker) {
			for _, mode := range []uint32{0, 0o1, 0o10, 0o100, 0o444, 0o777, 0o1644, 0o2755, 0o4755, 0o6755, 0o7777, 0o2644, 0o4644} {
				m.file(fmt.Sprintf("%04o", mode), "x")
				m.mode(fmt.Sprintf("%04o", mode), mode)
			}
		}},
		{Name: "owners", make: func(m *maker) {
			for _, id := range []uint32{1, 999, 65533, 65534, 65535, 65536, 1 << 31, 1<<32 - 2} {
				m.file(fmt.Sprintf("u%d", id), "x")
				m.owner(fmt.Sprintf("u%d", id), id, 0)
				m.file(fmt.Sprintf("g%d", id), "x")
				m.owner(fmt.Sprintf("g%d", id), 0, id)
			}
			m.symlink("x", "link")
			m.owner("link", 1<<32-2, 1<<32-2)
			m.dir("dir")
			m.owner("dir", 1<<32-2, 70000)
			m.node("dev", unix.S_IFCHR|0o600, 5, 1)
			m.owner("dev", 3, 4)
		}},
		times("time-nanoseconds", at{1_600_000_000, 1}, at{1_600_000_000, 999_999_999}, at{1_600_000_000, 123_456_789}),
		times("time-before-1970", at{-1, 0}, at{-1, 999_999_999}, at{-86400 * 365, 5}, at{-1 << 31, 0}, at{-1<<31 + 1, 1}),
		times("time-zero", at{0, 0}, at{0, 1}, at{1, 0}),
		times("time-after-2038", at{1<<31 - 1, 0}, at{1 << 31, 0}, at{1<<31 + 1, 7}, at{1<<32 - 1, 1}, at{1 << 32, 0}, at{13_000_000_000, 3}),
		{Name: "time-of-other-types", make: func(m *maker) {
			m.symlink("x", "link")
			m.node("fifo", unix.S_IFIFO|0o600, 0, 0)
			m.node("dev", unix.S_IFBLK|0o600, 8, 1)
			m.node("socket", unix.S_IFSOCK|0o600, 0, 0)
			m.dir("dir")
			m.file("dir/f", "x")
			for i, n := range []string{"link", "fifo", "dev", "socket", "dir"} {
				m.mtime(n, 1_234_567_890+int64(i), 111_111_111)
			}
		}},
		{Name: "xattr-user", make: func(m *maker) {
			m.file("f", "x")
			m.xattr("f", "user.plain", "value")
			m.xattr("f", "user.empty", "")
			m.xattr("f", "user.binary", "\x00\xff\n\x00")
			m.xattr("f", "user."+strings.Repeat("n", 250), "long name")
			m.xattr("f", "user.ünïcödé \n\xff", "odd name")
			m.dir("d")
			m.xattr("d", "user.dir", "value")
		}},
		{Name: "xattr-trusted", make: func(m *maker) {
			m.file("f", "x")
			m.xattr("f", "trusted.a", "for root only")
			m.symlink("f", "link")
			m.xattr("link", "trusted.link", "on a symlink")
			m.node("dev", unix.S_IFCHR|0o600, 1, 5)
			m.xattr("dev", "trusted.dev", "on a device")
			m.node("fifo", unix.S_IFIFO|0o600, 0, 0)
			m.xattr("fifo", "trusted.fifo", "on a FIFO")
			m.dir("opaque")
			m.xattr("opaque", "trusted.overlay.opaque", "y")
		}},
		{Name: "xattr-security", make: func(m *maker) {
			m.file("f", "x")
			m.xattr("f", "security.selinux", "system_u:object_r:etc_t:s0\x00")
			m.dir("d")
			m.xattr("d", "security.selinux", "system_u:object_r:var_t:s0\x00")
			m.symlink("f", "link")
			m.xattr("link", "security.selinux", "system_u:object_r:bin_t:s0\x00")
			m.node("dev", unix.S_IFBLK|0o600, 8, 0)
			m.xattr("dev", "security.selinux", "system_u:object_r:fixed_disk_device_t:s0\x00")
		}},
		{Name: "xattr-many", make: func(m *maker) {
			m.file("f", "x")
			for i := range 60 {
				m.xattr("f", fmt.Sprintf("user.%02d", i), strings.Repeat("v", i))
			}
		}},
		{Name: "xattr-shared", make: func(m *maker) {
			// More files than one attribute block may serve.
			for i := range 1100 {
				n := fmt.Sprint(i)
				m.file(n, "")
				m.xattr(n, "user.same", strings.Repeat("s", 200))
			}
		}},
		{Name: "xattr-in-inode-and-block", make: func(m *maker) {
			for _, n := range []int{1, 50, 60, 70, 80, 90, 95, 100, 110, 3000, 3900} {
				f := fmt.Sprint(n)
				m.file(f, "x")
				m.xattr(f, "user.a", strings.Repeat("a", n))
				m.xattr(f, "user.b", "b")
			}
		}},
		{Name: "xattr-over-4KiB", make: func(m *maker) {
			m.file("f", "x")
			m.xattr("f", "user.large", m.bytes(9000))
			m.xattr("f", "user.small", "beside it")
			m.file("same", "y")
			m.xattr("same", "user.large", strings.Repeat("0123456789abcdef", 400))
			m.dir("d")
			m.xattr("d", "user.large", strings.Repeat("0123456789abcdef", 400))
		}},
		{Name: "acl", make: func(m *maker) {
			m.file("f", "x")
			m.acl("u:1000:rw,g:2000:r,m::rwx", "f")
			m.file("mask", "x")
			m.acl("u:4294967294:rwx,m::r", "mask")
			m.file("many", "x")
			spec := make([]string, 25)
			for i := range spec {
				spec[i] = fmt.Sprintf("u:%d:r", 5000+i)
			}
			m.acl(strings.Join(spec, ","), "many")
			m.node("fifo", unix.S_IFIFO|0o600, 0, 0)
			m.acl("u:1000:r", "fifo")
			m.node("dev", unix.S_IFCHR|0o600, 1, 7)
			m.acl("g:44:rw", "dev")
		}},
		{Name: "acl-default", make: func(m *maker) {
			m.dir("d")
			m.acl("d:u:1000:rwx,d:g:2000:rx,d:o::-", "d")
			m.file("d/inherits", "x")
			m.dir("d/inherits-too")
			m.dir("both")
			m.acl("u:1:r,d:u:2:w", "both")
		}},
		{Name: "capabilities", make: func(m *maker) {
			m.file("f", "x")
			m.mode("f", 0o755)
			m.tool("setcap", "cap_net_raw,cap_net_admin+ep", "f")
			m.file("inheritable", "x")
			m.tool("setcap", "cap_sys_admin+i", "inheritable")
			m.file("v3", "x")
			m.tool("setcap", "-n", "100000", "cap_chown+ep", "v3")
		}},
		{Name: "flags", make: func(m *maker) {
			m.file("immutable", "x")
			m.file("append", "x")
			m.file("nodump", "x")
			m.dir("immutable-dir", "nodump-dir")
			m.file("immutable-dir/f", "x")
			m.tool("chattr", "+d", "nodump", "nodump-dir")
			m.tool("chattr", "+a", "append")
			m.tool("chattr", "+i", "immutable", "immutable-dir")
		}},
	}
}

type at struct{ sec, nsec int64 }

func times(kind string, list ...at) Kind {
	return Kind{Name: kind, make: func(m *maker) {
		for _, a := range list {
			n := fmt.Sprintf("%d.%09d", a.sec, a.nsec)
			m.file(n, "x")
			m.mtime(n, a.sec, a.nsec)
		}
	}}
}

// directoryKinds are about directories themselves.
func directoryKinds() []Kind {
	return []Kind{
		{Name: "directory-empty", make: func(m *maker) { m.dir("d") }},
		{Name: "directory-modes", make: func(m *maker) {
			for _, mode := range []uint32{0, 0o700, 0o1777, 0o2775, 0o3777, 0o7000} {
				n := fmt.Sprintf("%04o", mode)
				m.dir(n)
				m.file(n+"/f", "x")
				m.mode(n, mode)
			}
		}},
		{Name: "directory-two-blocks", make: func(m *maker) { m.fill(".", 300, "entry") }},
		{Name: "directory-indexed", make: func(m *maker) { m.fill(".", 3000, strings.Repeat("long-name-", 10)) }},
		{Name: "directory-emptied", make: func(m *maker) {
			m.dir("d")
			m.fill("d", 2000, "gone")
			m.tool("find", "d", "-type", "f", "-delete")
		}},
		{Name: "directory-100k-entries", make: func(m *maker) { m.fill(".", 100_000, "entry-") }},
		{Name: "directory-many-subdirectories", make: func(m *maker) {
			for i := range 1000 {
				m.dir(fmt.Sprint(i))
			}
		}},
		{Name: "deep-500-levels", make: func(m *maker) {
			path := "."
			for range 500 {
				path += "/d"
				m.dir(path)
			}
			m.file(path+"/f", "at the bottom")
		}},
		{Name: "deep-beyond-PATH_MAX", Far: true, make: beyondPathMax},
	}
}

func (m *maker) fill(dir string, n int, prefix string) {
	d, err := unix.Open(m.path(dir), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	m.check("open", err)
	for i := 0; i < n && m.err == nil; i++ {
		m.check("mknod", unix.Mknodat(d, fmt.Sprintf("%s%d", prefix, i), unix.S_IFREG|0o644, 0))
	}
	m.check("close", unix.Close(d))
}

// beyondPathMax makes 500 levels of directories with names of 60 bytes: 30,000
// bytes of path, which no path argument of a system call can hold.
func beyondPathMax(m *maker) {
	fd, err := unix.Open(m.root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	m.check("open", err)
	for i := 0; i < 500 && m.err == nil; i++ {
		name := fmt.Sprintf("%060d", i)
		m.check("mkdirat", unix.Mkdirat(fd, name, 0o755))
		sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		m.check("openat", err)
		m.check("close", unix.Close(fd))
		fd = sub
	}
	if m.err == nil {
		m.check("mknodat", unix.Mknodat(fd, "at the bottom", unix.S_IFIFO|0o600, 0))
		m.check("close", unix.Close(fd))
	}
}
