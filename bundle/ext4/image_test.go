package ext4_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// walk makes a tree of a directory and remembers where its files are.
func walk(t reporter, root string) (*filetree.Tree, dirSource) {
	t.Helper()
	b, err := filetree.NewBuilder(statOf(t, root).Attr, xattrsOf(t, root))
	check(t, err)
	src := dirSource{}
	type todo struct {
		id   filetree.ID
		path string
	}
	for queue := []todo{{filetree.Root, root}}; len(queue) > 0; queue = queue[1:] {
		dir := queue[0]
		names, err := os.ReadDir(dir.path)
		check(t, err)
		check(t, b.Begin(dir.id))
		sort.Slice(names, func(i, j int) bool { return names[i].Name() < names[j].Name() })
		for _, n := range names {
			path := filepath.Join(dir.path, n.Name())
			e := statOf(t, path)
			e.Name, e.Link = n.Name(), b.Linked(e.Dev, e.Ino)
			e.Xattrs = xattrsOf(t, path)
			id, err := b.Add(&e)
			check(t, err)
			switch e.Type() {
			case unix.S_IFDIR:
				queue = append(queue, todo{id, path})
				continue
			case unix.S_IFREG:
				src[id] = path
			}
			b.Remember(e.Dev, e.Ino, id)
		}
	}
	return b.Tree(), src
}

func statOf(t reporter, path string) filetree.Entry {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Lstat(path, &st))
	e := filetree.Entry{Attr: filetree.Attr{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Size: st.Size, Dev: st.Dev, Ino: st.Ino,
		Mtime: filetree.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)},
		Ctime: filetree.Time{Sec: st.Ctim.Sec, Nsec: uint32(st.Ctim.Nsec)},
	}}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		var err error
		e.Target, err = os.Readlink(path)
		check(t, err)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	case unix.S_IFREG:
		f, err := os.Open(path)
		check(t, err)
		defer f.Close()
		e.Data, err = sparse.Scan(int(f.Fd()), st.Size)
		check(t, err)
		if e.Data == nil {
			e.Data = sparse.Map{}
		}
		flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		if err == nil {
			e.Flags = uint32(flags)
		}
	}
	return e
}

func xattrsOf(t reporter, path string) (xs []filetree.Xattr) {
	t.Helper()
	buf := make([]byte, 1<<17)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	check(t, err)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		v := make([]byte, 1<<17)
		n, err := unix.Lgetxattr(path, name, v)
		check(t, err)
		xs = append(xs, filetree.Xattr{Name: name, Value: v[:n]})
	}
	return xs
}

// dirSource is a source of files that lie in a directory.
type dirSource map[filetree.ID]string

type dirFile struct{ *os.File }

func (dirFile) Changed() (bool, error) { return false, nil }

func (s dirSource) Open(_ context.Context, id filetree.ID) (filetree.File, error) {
	f, err := os.Open(s[id])
	if errors.Is(err, fs.ErrNotExist) {
		err = filetree.ErrVanished
	}
	return dirFile{f}, err
}

// mapWriter puts a stream in the places that a map names.
type mapWriter struct {
	f *os.File
	m sparse.Map
}

func (w *mapWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		if len(w.m) == 0 {
			return 0, errors.New("more bytes than the map has")
		}
		n := min(int64(len(b)), w.m[0].Len)
		if _, err := w.f.WriteAt(b[:n], w.m[0].Off); err != nil {
			return 0, err
		}
		b = b[n:]
		w.m[0].Off += n
		if w.m[0].Len -= n; w.m[0].Len == 0 {
			w.m = w.m[1:]
		}
	}
	return total, nil
}

// image writes a plan to a file.
func image(t testing.TB, p *ext4.Plan, src filetree.Source, report func(ext4.Change)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	writeImage(t, path, p, src, report)
	return path
}

func writeImage(t reporter, path string, p *ext4.Plan, src filetree.Source, report func(ext4.Change)) {
	t.Helper()
	f, err := os.Create(path)
	check(t, err)
	defer f.Close()
	check(t, f.Truncate(p.Size()))
	check(t, p.Map().Check(p.Size()))
	w := &mapWriter{f, append(sparse.Map(nil), p.Map()...)}
	check(t, p.Write(context.Background(), w, src, report))
	if left := w.m.Bytes(); left != 0 {
		t.Fatalf("%d bytes of the map were not written, first %v", left, w.m[0])
	}
}

func plan(t testing.TB, tree *filetree.Tree, o ext4.Options) *ext4.Plan {
	t.Helper()
	p, err := ext4.NewPlan(tree, o)
	check(t, err)
	return p
}

// fsck fails the test unless e2fsck finds nothing at all to say.
func fsck(t reporter, image string) {
	t.Helper()
	out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput()
	lines := 0
	for l := range strings.Lines(string(out)) {
		switch {
		case strings.HasPrefix(l, "e2fsck 1."), strings.HasPrefix(l, "Pass "), strings.Contains(l, "% non-contiguous"):
			lines++
		default:
			t.Errorf("e2fsck: %s", l)
		}
	}
	if err != nil || lines != 7 || t.Failed() {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// mount mounts an image and returns where.
func mount(t testing.TB, image string, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	run(t, "mount", "-t", "ext4", "-o", strings.Join(append(options, "loop"), ","), image, dir)
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func run(t reporter, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// reporter is what testing.TB and rapid.T have in common.
type reporter interface {
	Helper()
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
}

func check(t reporter, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
