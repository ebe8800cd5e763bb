package ext4_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// directory makes a tree of one directory, "d", with n empty files or directories.
func directory(t testing.TB, n int, mode uint32, name func(int) string) *filetree.Tree {
	t.Helper()
	b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(t, err)
	check(t, b.Begin(filetree.Root))
	d, err := b.Add(&filetree.Entry{Name: "d", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFDIR | 0o755}})
	check(t, err)
	check(t, b.Begin(d))
	for i := range n {
		_, err := b.Add(&filetree.Entry{Name: name(i), Link: filetree.None, Attr: filetree.Attr{Mode: mode, Mtime: filetree.Time{Sec: int64(i)}}})
		check(t, err)
	}
	return b.Tree()
}

// The kernel finds each name of a large directory by the index, and goes on with it.
func TestLargeDirectories(t *testing.T) {
	for _, tt := range []struct {
		n     int
		width int
		level string
	}{
		{210, 9, "0"}, {1000, 9, "0"}, {100_000, 9, "1"}, {10_000, 200, "1"},
	} {
		t.Run(fmt.Sprintf("%d of %d", tt.n, tt.width), func(t *testing.T) {
			name := func(i int) string { return fmt.Sprintf("%0*d", tt.width, i) }
			tree := directory(t, tt.n, unix.S_IFREG|0o644, name)
			p := plan(t, tree, ext4.Options{})
			img := image(t, p, &memSource{t: tree}, nil)
			fsck(t, img)
			if out := run(t, "debugfs", "-R", "htree_dump d", img); !strings.Contains(out, "Indirect levels: "+tt.level) || !strings.Contains(out, "Hash Version: 1") {
				t.Errorf("htree: %.500s", out)
			}
			dir := filepath.Join(mount(t, img), "d")
			for i := range tt.n {
				var st unix.Stat_t
				if err := unix.Lstat(filepath.Join(dir, name(i)), &st); err != nil || st.Mtim.Sec != int64(i) {
					t.Fatalf("%s: %v, %v", name(i), st.Mtim, err)
				}
			}
			if _, err := os.Lstat(filepath.Join(dir, name(tt.n))); !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
			list, err := os.ReadDir(dir)
			check(t, err)
			if len(list) != tt.n {
				t.Errorf("%d names", len(list))
			}
			for i := range tt.n {
				if i%3 == 0 {
					check(t, os.Remove(filepath.Join(dir, name(i))))
				} else if i%3 == 1 {
					check(t, os.Link(filepath.Join(dir, name(i)), filepath.Join(dir, "new"+name(i))))
				}
			}
			check(t, unix.Unmount(filepath.Dir(dir), 0))
			fsck(t, img)
			run(t, "sh", "-c", `e2fsck -fyD "$0"; test $? -le 1`, img)
			fsck(t, img)
		})
	}
}

func TestManySubdirectories(t *testing.T) {
	const n = 66_000
	tree := directory(t, n, unix.S_IFDIR|0o755, func(i int) string { return fmt.Sprintf("%06d", i) })
	img := image(t, plan(t, tree, ext4.Options{}), &memSource{t: tree}, nil)
	fsck(t, img)
	dir := filepath.Join(mount(t, img, "ro"), "d")
	var st unix.Stat_t
	check(t, unix.Stat(dir, &st))
	if st.Nlink != 1 {
		t.Errorf("%d links", st.Nlink)
	}
}

func TestManyLinks(t *testing.T) {
	const n = 65_100
	b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(t, err)
	check(t, b.Begin(filetree.Root))
	id := filetree.None
	for i := range n {
		id, err = b.Add(&filetree.Entry{Name: fmt.Sprintf("%06d", i), Link: id, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644}})
		check(t, err)
	}
	tree := b.Tree()
	p := plan(t, tree, ext4.Options{})
	warnings := 0
	for w := range p.Warnings() {
		if warnings++; !errors.Is(w.Err, ext4.ErrLinks) {
			t.Error(w.Err)
		}
	}
	if warnings != 1 {
		t.Errorf("%d warnings", warnings)
	}
	fsck(t, image(t, p, &memSource{t: tree}, nil))
}

// Files of one extent more than fits at each depth of the tree, and of more
// blocks than an extent or a group has.
func TestDeepExtents(t *testing.T) {
	for _, tt := range []struct {
		extents int64
		levels  string
	}{{4, " 0/ 0"}, {5, " 1/ 1"}, {4 * 340, " 1/ 1"}, {4*340 + 1, " 2/ 2"}, {4000, " 2/ 2"}} {
		t.Run(fmt.Sprint(tt.extents), func(t *testing.T) {
			var m sparse.Map
			for i := range tt.extents {
				m = m.Append(sparse.Extent{Off: i * 3 * 4096, Len: 4096})
			}
			tree := files(t, map[string]int64{"f": tt.extents * 3 * 4096}, map[string]sparse.Map{"f": m})
			img := image(t, plan(t, tree, ext4.Options{}), &memSource{t: tree}, nil)
			fsck(t, img)
			if out := run(t, "debugfs", "-R", "dump_extents -l d/f", img); !strings.Contains(out, tt.levels) {
				t.Errorf("extents: %.300s", out)
			}
			dir := mount(t, img, "ro")
			compare(t, &memSource{t: tree}, dir)
		})
	}
}

func TestLargeFile(t *testing.T) {
	// More than 4 GiB, of which the source gives zeros, so that the image stays sparse.
	tree := files(t, map[string]int64{"a": 1, "f": 4*gib + 300*mib + 5, "z": 3}, nil)
	p := plan(t, tree, ext4.Options{})
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	check(t, err)
	check(t, f.Truncate(p.Size()))
	w := &holeWriter{mapWriter{f, append(sparse.Map(nil), p.Map()...)}}
	check(t, p.Write(t.Context(), w, zeros{tree}, nil))
	check(t, f.Close())
	fsck(t, path)
	dir := mount(t, path, "ro")
	st, err := os.Stat(filepath.Join(dir, "d/f"))
	check(t, err)
	if st.Size() != 4*gib+300*mib+5 {
		t.Errorf("size %d", st.Size())
	}
}

var zeroBlock [4096]byte

// holeWriter leaves zeros out.
type holeWriter struct{ mapWriter }

func (w *holeWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		part := b[:min(len(b), 4096)]
		b = b[len(part):]
		if !bytes.Equal(part, zeroBlock[:len(part)]) {
			if _, err := w.mapWriter.Write(part); err != nil {
				return 0, err
			}
			continue
		}
		w.m[0].Off += int64(len(part))
		if w.m[0].Len -= int64(len(part)); w.m[0].Len == 0 {
			w.m = w.m[1:]
		}
	}
	return n, nil
}

// zeros is a source of files full of zeros.
type zeros struct{ t *filetree.Tree }

type zeroFile struct {
	size int64
}

func (z zeros) Open(_ context.Context, id filetree.ID) (filetree.File, error) {
	return zeroFile{z.t.Size(id)}, nil
}
func (zeroFile) Close() error           { return nil }
func (zeroFile) Changed() (bool, error) { return false, nil }
func (f zeroFile) ReadAt(b []byte, off int64) (int, error) {
	n := min(int64(len(b)), f.size-off)
	clear(b[:n])
	if n < int64(len(b)) {
		return int(n), io.EOF
	}
	return int(n), nil
}
