package ext4_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
)

// TestZoo captures one of every kind of file from a directory of the machine
// and has rsync, getfacl, getcap and getfattr compare the mounted image with it.
func TestZoo(t *testing.T) {
	// On an ext4 of its own: attributes and flags are all to be had there.
	file := filepath.Join(t.TempDir(), "source")
	run(t, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-I", "256", "-O", "ea_inode", file, "64M")
	root := mount(t, file)
	in := func(name string) string { return filepath.Join(root, name) }
	put := func(name, content string) string {
		check(t, os.WriteFile(in(name), []byte(content), 0o644))
		return in(name)
	}
	check(t, os.MkdirAll(in("deep/"+strings.Repeat("d/", 100)), 0o755))
	check(t, os.Mkdir(in("empty"), 0o000))
	check(t, os.Mkdir(in("sticky"), 0o755))
	check(t, os.Chmod(in("sticky"), 0o1777|os.ModeSticky))
	put("one", "1")
	put("none", "")
	for i, n := range []string{"new\nline", "tab\t", `"quoted"`, "\xff\xfe invalid", " leading", "-dash", strings.Repeat("long", 63) + "255", "emoji 🦎"} {
		put(n, fmt.Sprint(i))
	}
	for mode := range 8 {
		n := put(fmt.Sprintf("mode-%o", mode), "x")
		check(t, unix.Chmod(n, uint32(mode)<<9|0o111))
	}
	check(t, os.Chown(put("owner", "x"), 1<<32-2, 1<<32-2))
	check(t, os.Chown(put("owner16", "x"), 65536, 65535))
	for i, sec := range []int64{-1, -1 << 31, 1<<31 - 1, 1 << 31, 1<<32 + 5, 1<<31 - 1 + 3<<32, 0, 1_700_000_000} {
		check(t, os.Chtimes(put(fmt.Sprintf("time-%d", i), "x"), time.Time{}, time.Unix(sec, int64(i)*123456789)))
	}
	hard := put("hard-a", "linked")
	check(t, os.Link(hard, in("hard-b")))
	check(t, os.Link(hard, in("deep/hard-c")))
	for _, n := range []int{1, 58, 59, 60, 61, 4094, 4095} {
		check(t, os.Symlink(strings.Repeat("s", n), in(fmt.Sprintf("symlink-%d", n))))
	}
	check(t, unix.Mkfifo(in("fifo"), 0o622))
	check(t, unix.Mknod(in("socket"), unix.S_IFSOCK|0o755, 0))
	for i, dev := range [][2]uint32{{1, 3}, {255, 255}, {256, 0}, {0, 256}, {4095, 1<<20 - 1}} {
		check(t, unix.Mknod(in(fmt.Sprintf("char-%d", i)), unix.S_IFCHR|0o600, int(unix.Mkdev(dev[0], dev[1]))))
		check(t, unix.Mknod(in(fmt.Sprintf("block-%d", i)), unix.S_IFBLK|0o600, int(unix.Mkdev(dev[0], dev[1]))))
	}
	sparse, err := os.Create(in("sparse"))
	check(t, err)
	for _, off := range []int64{4096, 1 << 20, 5<<30 + 123, 1 << 40} {
		_, err := sparse.WriteAt([]byte("island"), off)
		check(t, err)
	}
	check(t, sparse.Truncate(2<<40))
	check(t, sparse.Close())
	holes, err := os.Create(in("all-hole"))
	check(t, err)
	check(t, holes.Truncate(1<<33))
	check(t, holes.Close())

	// Attributes in the inode, in a block, shared, over 4 KiB.
	xattr := func(name, key string, value []byte) {
		check(t, unix.Lsetxattr(in(name), key, value, 0))
	}
	for i, n := range []int{0, 1, 60, 100, 3000, 5000, 60000} {
		name := fmt.Sprintf("xattr-%d", i)
		put(name, "x")
		xattr(name, "user.value", bytes.Repeat([]byte{'v', byte(i)}, n)[:n])
		xattr(name, "trusted.small", []byte("t"))
		xattr(name, "security.selinux", []byte("system_u:object_r:etc_t:s0\x00"))
	}
	xattr("sticky", "user.on-a-directory", []byte("d"))
	xattr("fifo", "trusted.on-a-fifo", []byte("f"))
	check(t, unix.Lsetxattr(in("symlink-60"), "trusted.on-a-symlink", bytes.Repeat([]byte("l"), 500), 0))
	run(t, "setcap", "cap_net_raw,cap_net_admin+ep", put("capable", "x"))
	put("acl", "x")
	run(t, "setfacl", "-m", "u:1000:rwx,u:70000:r--,g:1001:-w-,m::rw-", in("acl"))
	check(t, os.Mkdir(in("acl-dir"), 0o755))
	run(t, "setfacl", "-m", "u:1000:rwx,d:u:1000:rwx,d:g:5:r-x", in("acl-dir"))
	put("acl-dir/inherits", "x")
	for flag, name := range map[string]string{"i": "immutable", "a": "append", "d": "nodump", "A": "noatime", "S": "sync"} {
		run(t, "chattr", "+"+flag, put("flag-"+name, "x"))
	}
	t.Cleanup(func() { run(t, "chattr", "-ia", in("flag-immutable"), in("flag-append")) })

	tree, src := walk(t, root)
	p := plan(t, tree, ext4.Options{Label: "zoo", NotAfter: 1_750_000_000})
	for w := range p.Warnings() {
		t.Errorf("warning: %s: %v", tree.Path(w.ID), w.Err)
	}
	img := image(t, p, src, func(c ext4.Change) { t.Error(c.String()) })
	fsck(t, img)

	// With itself as parent nothing changes, however the image is put out.
	again := plan(t, tree, ext4.Options{Label: "zoo", NotAfter: 1_750_000_000, Parent: layout(t, p, later)})
	if !again.Kept() {
		t.Error("laid out afresh")
	}
	sameOrigins(t, again, layout(t, again, later), p)
	second := filepath.Join(t.TempDir(), "again")
	emitImage(t, second, again, src, ext4.EmitOptions{Report: func(c ext4.Change) { t.Error(c.String()) }})
	sameImage(t, img, second)
	sameImage(t, second, img)
	dir := mount(t, img)

	if out := run(t, "rsync", "-aHAXni", "--delete", root+"/", dir+"/"); out != "" {
		t.Errorf("rsync finds differences:\n%s", out)
	}
	list := func(dir string, command ...string) string {
		args := []string{"-c", `cd "$0" && find . -xdev ! -name lost+found -print0 | sort -z | xargs -0 "$@" 2>&1; true`, dir}
		return run(t, "sh", append(args, command...)...)
	}
	for _, command := range [][]string{
		{"getfacl", "-n", "-p"},
		{"getcap"},
		{"getfattr", "-h", "-d", "-m", "-", "-e", "hex"},
		{"stat", "--printf", "%n %f %u %g %s %.9Y %t:%T %h\n"},
		{"sh", "-c", `for f; do case $f in ./sparse|./all-hole) ;; *) [ -f "$f" ] && [ ! -h "$f" ] && sha256sum "$f";; esac; done; true`, "-"},
		{"sh", "-c", `for f; do { [ -f "$f" ] || [ -d "$f" ]; } && [ ! -h "$f" ] && lsattr -d "$f" | sed s/-*I-*//; done; true`, "-"},
	} {
		if a, b := list(root, command...), list(dir, command...); a != b {
			t.Errorf("%s differs:\n%s", command[0], diff(a, b))
		}
	}
	for _, off := range []int64{0, 4096, 1 << 20, 5<<30 + 123, 1 << 40, 1<<41 - 6} {
		var a, b [6]byte
		for f, buf := range map[string][]byte{in("sparse"): a[:], filepath.Join(dir, "sparse"): b[:]} {
			f, err := os.Open(f)
			check(t, err)
			_, err = f.ReadAt(buf, off)
			check(t, err)
			check(t, f.Close())
		}
		if a != b {
			t.Errorf("sparse file differs at %d: %q, %q", off, a, b)
		}
	}
	check(t, os.WriteFile(filepath.Join(dir, "xattr-6"), []byte("changed"), 0o644))
	check(t, unix.Setxattr(filepath.Join(dir, "xattr-4"), "user.value", []byte("smaller"), 0))
	check(t, unix.Removexattr(filepath.Join(dir, "xattr-6"), "user.value"))
	check(t, os.RemoveAll(filepath.Join(dir, "xattr-5")))
	check(t, unix.Unmount(dir, 0))
	fsck(t, img)
}

func diff(a, b string) (d string) {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range max(len(x), len(y)) {
		var l, m string
		if i < len(x) {
			l = x[i]
		}
		if i < len(y) {
			m = y[i]
		}
		if l != m {
			d += "-" + l + "\n+" + m + "\n"
		}
	}
	return d
}
