package rootfs_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// mounted gives a directory with a fresh filesystem mounted.
func mounted(t *testing.T, typ string, mkfs ...string) string {
	t.Helper()
	dir := t.TempDir()
	switch typ {
	case "tmpfs":
		run(t, "mount", "-t", "tmpfs", "-o", "size=256m,nr_inodes=0", "tmpfs", dir)
	case "overlay":
		base := t.TempDir()
		run(t, "mount", "-t", "tmpfs", "tmpfs", base)
		t.Cleanup(func() { run(t, "umount", "-l", base) })
		for _, d := range []string{"l", "u", "w"} {
			must(t, os.Mkdir(filepath.Join(base, d), 0o755))
		}
		run(t, "mount", "-t", "overlay", "-o", fmt.Sprintf("lowerdir=%s/l,upperdir=%s/u,workdir=%s/w", base, base, base), "overlay", dir)
	default:
		img := filepath.Join(t.TempDir(), "img")
		run(t, "truncate", "-s", "320M", img)
		run(t, "mkfs."+typ, append(mkfs, "-q", img)...)
		run(t, "mount", "-o", "loop", img, dir)
	}
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// zoo makes one of every kind of file.
func zoo(t *testing.T, dir, typ string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	write(t, dir, map[string]string{
		"plain": "content", "empty": "", "zoo/setuid": "s", "zoo/owned": "o", "zoo/old": "x", "zoo/future": "x", "zoo/none": "x", "zoo/xattr": "x",
		"zoo/caps": "x", "zoo/acl": "x", "zoo/flags": "x", "zoo/noatime": "x", "zoo/hard1": "linked", "zoo/sub/": "", "zoo/emptydir/": "", "zoo/.hidden": "h",
		"zoo/tab\tnewline\n": "x", "zoo/quote'\"$`": "x", "zoo/bad\xff\xfeutf8": "x", "zoo/" + strings.Repeat("n", 255): "x", "zoo/-dash": "x", "zoo/ ": "x",
	})
	must(t, os.Link(at("zoo/hard1"), at("zoo/sub/hard2")))
	must(t, os.Link(at("zoo/hard1"), at("hard0")))
	must(t, os.Symlink("nowhere/"+strings.Repeat("y", 900), at("zoo/dangling")))
	must(t, os.Symlink("plain", at("zoo/link")))
	must(t, unix.Mkfifo(at("zoo/fifo"), 0o640))
	must(t, os.Link(at("zoo/fifo"), at("zoo/fifo2")))
	must(t, unix.Mknod(at("zoo/socket"), unix.S_IFSOCK|0o755, 0))
	must(t, unix.Mknod(at("zoo/char"), unix.S_IFCHR|0o600, int(unix.Mkdev(5, 300))))
	must(t, unix.Mknod(at("zoo/block"), unix.S_IFBLK|0o660, int(unix.Mkdev(254, 70000))))
	must(t, os.Lchown(at("zoo/owned"), 1<<31, 4294967294))
	must(t, os.Lchown(at("zoo/link"), 12, 13))
	must(t, unix.Chmod(at("zoo/setuid"), 0o7755))
	must(t, unix.Chmod(at("zoo/none"), 0))
	must(t, unix.Chmod(at("zoo/sub"), 0o1777))
	for _, x := range []struct{ path, name, value string }{
		{"zoo/xattr", "user.one", "1"},
		{"zoo/xattr", "user.empty", ""},
		{"zoo/xattr", "trusted.two", strings.Repeat("2", 700)},
		{"zoo/caps", "security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"zoo/sub", "user.dir", "d"},
		{"zoo/link", "trusted.link", "l"},
		{"zoo/fifo", "trusted.fifo", "f"},
	} {
		if err := unix.Lsetxattr(at(x.path), x.name, []byte(x.value), 0); err != nil {
			t.Fatalf("setting %s of %s: %v", x.name, x.path, err)
		}
	}
	run(t, "setfacl", "-m", "u:1234:rw,g:99:r", at("zoo/acl"))
	run(t, "setfacl", "-d", "-m", "u:1234:rx", at("zoo/sub"))
	f, err := os.Create(at("zoo/sparse"))
	must(t, err)
	for _, off := range []int64{1 << 20, 64 << 20} {
		_, err = f.WriteAt(bytes.Repeat([]byte{9}, 5000), off)
		must(t, err)
	}
	must(t, f.Truncate(200<<20))
	must(t, f.Close())
	f, err = os.Create(at("zoo/hole"))
	must(t, err)
	must(t, f.Truncate(1<<30))
	must(t, f.Close())
	if typ != "overlay" && typ != "tmpfs" {
		run(t, "chattr", "+A", at("zoo/noatime"))
		run(t, "chattr", "+ai", at("zoo/flags"))
		t.Cleanup(func() { run(t, "chattr", "-ai", at("zoo/flags")) })
	}
	for path, sec := range map[string]int64{"zoo/old": -86400 * 365, "zoo/future": 5e9, "zoo/link": 1e9, "zoo/fifo": 77} {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(path), []unix.Timespec{{Sec: sec, Nsec: 1}, {Sec: sec, Nsec: 123456789}}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// shape is what can be compared of an inode.
type shape struct {
	Mode, UID, GID, Major, Minor, Flags uint32
	Size                                int64
	Mtime                               filetree.Time
	Target                              string
	Xattrs                              map[string]string
	Content                             string
	Holes                               bool
	Links                               string // all names
}

// kernelShape looks at a file with calls of its own.
func kernelShape(t *testing.T, path string) shape {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	s := shape{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: filetree.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}, Xattrs: map[string]string{}}
	buf := make([]byte, 64<<10)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		s.Target, _ = os.Readlink(path)
		s.Size = int64(len(s.Target))
	case unix.S_IFCHR, unix.S_IFBLK:
		s.Major, s.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	case unix.S_IFREG:
		s.Size = st.Size
		s.Holes = st.Blocks*512 < st.Size
		if st.Size < 1<<20 {
			s.Content = string(mustRead(os.ReadFile(path)))
		}
	}
	if m := st.Mode & unix.S_IFMT; m == unix.S_IFREG || m == unix.S_IFDIR {
		fields := strings.Fields(run(t, "lsattr", "-d", "--", path))
		for i, c := range "SiadAD" {
			if strings.ContainsRune(fields[0], c) {
				s.Flags |= []uint32{0x8, 0x10, 0x20, 0x40, 0x80, 0x10000}[i]
			}
		}
	}
	n, err := unix.Llistxattr(path, buf)
	must(t, err)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name != "" {
			v := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(path, name, v)
			must(t, err)
			s.Xattrs[name] = string(v[:n])
		}
	}
	return s
}

func treeShape(t *testing.T, r *rootfs.Root, path string) shape {
	t.Helper()
	id := r.Tree.Find(path)
	if id == filetree.None {
		t.Fatalf("%q is not in the tree", path)
	}
	a := r.Tree.Attr(id)
	s := shape{
		Mode: a.Mode, UID: a.UID, GID: a.GID, Major: a.Major, Minor: a.Minor, Flags: a.Flags, Size: a.Size, Mtime: a.Mtime,
		Target: string(r.Tree.Target(id)), Xattrs: map[string]string{},
	}
	for _, x := range r.Tree.Xattrs(id) {
		s.Xattrs[x.Name] = string(x.Value)
	}
	if a.Type() == unix.S_IFREG {
		s.Holes = r.Tree.Data(id).Bytes() < a.Size
		if a.Size < 1<<20 {
			s.Content = read(t, r, path)
		}
	}
	return s
}

func mustRead(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestEveryKindOnEveryFilesystem(t *testing.T) {
	for _, fs := range []struct {
		typ  string
		mkfs []string
	}{{"ext4", []string{"-L", "zoo-ext4", "-I", "256"}}, {"xfs", []string{"-L", "zoo-xfs"}}, {"btrfs", []string{"-L", "zoo-btrfs"}}, {"tmpfs", nil}, {"overlay", nil}} {
		t.Run(fs.typ, func(t *testing.T) {
			dir := mounted(t, fs.typ, fs.mkfs...)
			zoo(t, dir, fs.typ)
			r := scan(t, rootfs.Options{Volume: dir})
			if len(r.Problems) != 0 {
				t.Fatalf("problems: %v", r.Problems)
			}
			var paths []string
			must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
				rel, _ := filepath.Rel(dir, path)
				if strings.HasPrefix(rel, ".instar-snapshot-") {
					return filepath.SkipDir // it is there until the Root is closed
				}
				if rel != "lost+found" && rel != "." {
					paths = append(paths, rel)
				}
				return err
			}))
			if len(paths) < 34 {
				t.Fatalf("only %d files", len(paths))
			}
			for _, path := range paths {
				want, got := kernelShape(t, filepath.Join(dir, path)), treeShape(t, r, path)
				if d := cmp.Diff(want, got); d != "" {
					t.Errorf("%q (-kernel +tree):\n%s", path, d)
				}
			}
			unchanged(t, r)
			h := r.Tree.Find("hard0")
			if r.Tree.Names(h) != 3 || r.Tree.Find("zoo/hard1") != h || r.Tree.Find("zoo/sub/hard2") != h {
				t.Errorf("hard links are not one inode")
			}
			if r.Tree.Find("zoo/fifo") != r.Tree.Find("zoo/fifo2") {
				t.Errorf("a FIFO's hard links are not one inode")
			}
			if n := r.Tree.Data(r.Tree.Find("zoo/sparse")).Bytes(); n == 0 || n > 1<<20 {
				t.Errorf("sparse file has %d bytes of data", n)
			}
			if len(r.Tree.Data(r.Tree.Find("zoo/hole"))) != 0 {
				t.Errorf("a hole has data")
			}
			if r.Facts.Type != fs.typ || !r.Facts.MountPoint || r.Facts.Size < 1<<20 || r.Facts.Machine == "" {
				t.Errorf("facts: %+v", r.Facts)
			}
			if len(fs.mkfs) > 0 {
				if r.Facts.Label != "zoo-"+fs.typ {
					t.Errorf("label %q", r.Facts.Label)
				}
				uuid := strings.TrimSpace(run(t, "blkid", "-p", "-s", "UUID", "-o", "value", r.Facts.Device))
				if got := r.Facts.SpecUUID(); got != "UUID="+uuid {
					t.Errorf("%s, blkid says %s", got, uuid)
				}
			}
			if snap := slices.ContainsFunc(r.Notes, func(s string) bool { return strings.Contains(s, "snapshot") }); snap != (fs.typ == "btrfs") {
				t.Errorf("notes: %q", r.Notes)
			}
		})
	}
}

// TestDeep has paths far longer than PATH_MAX, and more levels than handles.
func TestDeep(t *testing.T) {
	const levels, width = 500, 60
	dir := t.TempDir()
	name := strings.Repeat("d", width)
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	for i := range levels {
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_RDONLY, 0)
		must(t, err)
		if i%100 == 7 {
			must(t, unix.Mkdirat(fd, "zz", 0o700)) // read after the long way down
			must(t, unix.Symlinkat("target", fd, "zy"))
		}
		unix.Close(fd)
		fd = next
	}
	f, err := unix.Openat(fd, "leaf", unix.O_CREAT|unix.O_WRONLY, 0o644)
	must(t, err)
	_, err = unix.Write(f, []byte("deep"))
	must(t, err)
	unix.Close(f)
	unix.Close(fd)
	t.Cleanup(func() { run(t, "rm", "-rf", dir) })

	handles := func() int { return len(mustDir(os.ReadDir("/proc/self/fd"))) }
	before, most := handles(), 0
	r, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir})
	must(t, err)
	most = handles() - before
	if len(r.Problems) != 0 {
		t.Fatalf("problems: %v", r.Problems)
	}
	leaf := strings.Repeat(name+"/", levels) + "leaf"
	if got := read(t, r, leaf); got != "deep" {
		t.Errorf("the leaf reads %q", got)
	}
	if most > 80 {
		t.Errorf("%d handles are open", most)
	}
	must(t, r.Close())
	if n := handles(); n > before {
		t.Errorf("%d handles before, %d after", before, n)
	}
}

func mustDir(d []os.DirEntry, err error) []os.DirEntry {
	if err != nil {
		panic(err)
	}
	return d
}

// TestWide has a directory of 100,000 names.
func TestWide(t *testing.T) {
	const n = 100_000
	dir := mounted(t, "tmpfs")
	sub := filepath.Join(dir, "wide")
	must(t, os.Mkdir(sub, 0o755))
	fd, err := unix.Open(sub, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(fd)
	for i := range n {
		f, err := unix.Openat(fd, fmt.Sprintf("%x-%d", i*2654435761%n, i), unix.O_CREAT|unix.O_WRONLY, 0o644)
		must(t, err)
		unix.Close(f)
	}
	var last rootfs.Progress
	r := scan(t, rootfs.Options{Volume: dir, Report: func(p rootfs.Progress) {
		if p.Files <= last.Files {
			t.Errorf("progress went from %d to %d files", last.Files, p.Files)
		}
		last = p
	}})
	if got := r.Tree.NumChildren(r.Tree.Find("wide")); got != n {
		t.Errorf("%d names, want %d", got, n)
	}
	if last.Files < n/2 {
		t.Errorf("progress ended at %d", last.Files)
	}
	prev := ""
	for name := range r.Tree.Children(r.Tree.Find("wide")) {
		if string(name) <= prev {
			t.Fatalf("%q after %q", name, prev)
		}
		prev = string(name)
	}
}
