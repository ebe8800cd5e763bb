package ext4_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// memSource gives files a content that follows from their ID, and the faults
// listed. Where the tree has holes the content is zero.
type memSource struct {
	t      *filetree.Tree
	faults map[filetree.ID]fault
	seed   func(filetree.ID) filetree.ID // if not nil: what the content follows from in place of the ID
}

func (s *memSource) of(id filetree.ID) filetree.ID {
	if s.seed != nil {
		return s.seed(id)
	}
	return id
}

type fault struct {
	open    error
	size    int64 // if not 0: what the file has become; -1 for empty
	bad     []sparse.Extent
	changed bool
	unknown error // instead of an answer whether it changed
}

type memFile struct {
	s    *memSource
	id   filetree.ID
	size int64
	m    sparse.Map
	fault
}

func (s *memSource) Open(_ context.Context, id filetree.ID) (filetree.File, error) {
	f := s.faults[id]
	if f.open != nil {
		return nil, fmt.Errorf("opening: %w", f.open)
	}
	size := s.t.Size(id)
	if f.size != 0 {
		size = max(f.size, 0)
	}
	return &memFile{s, id, size, s.t.Data(id), f}, nil
}

func (f *memFile) Close() error           { return nil }
func (f *memFile) Changed() (bool, error) { return f.changed, f.unknown }

func (f *memFile) ReadAt(b []byte, off int64) (int, error) {
	n := int64(len(b))
	for _, e := range f.bad {
		if off >= e.Off && off < e.End() {
			return 0, unix.EIO
		}
		if off < e.Off {
			n = min(n, e.Off-off)
		}
	}
	var err error
	if n < int64(len(b)) {
		err = unix.EIO
	}
	if off+n > f.size {
		n, err = max(f.size-off, 0), io.EOF
	}
	content(f.s.of(f.id), f.m, b[:n], off)
	return int(n), err
}

// content fills b with what a file has from off on.
func content(id filetree.ID, m sparse.Map, b []byte, off int64) {
	clear(b)
	for _, e := range m {
		end := min(e.End(), off+int64(len(b)))
		for at := max(e.Off, off); at < end; {
			word := (uint64(at/8)+1)*0x9e3779b97f4a7c15 ^ uint64(id)<<20
			if at%8 == 0 && end-at >= 8 {
				binary.LittleEndian.PutUint64(b[at-off:], word)
				at += 8
				continue
			}
			var bytes [8]byte
			binary.LittleEndian.PutUint64(bytes[:], word)
			at += int64(copy(b[at-off:end-off], bytes[at%8:]))
		}
	}
}

// randomTree draws a tree of up to a few hundred inodes.
func randomTree(t *rapid.T) *filetree.Tree {
	u32 := rapid.OneOf(rapid.SampledFrom([]uint32{0, 1000, 65535, 65536, 1<<32 - 2}), rapid.Uint32Max(1<<32-2))
	sec := rapid.OneOf(rapid.SampledFrom([]int64{0, -1, -1 << 31, 1<<31 - 1, 1 << 31, 1<<31 - 1 + 3<<32}), rapid.Int64Range(0, 1<<31))
	attr := func(mode uint32) filetree.Attr {
		return filetree.Attr{
			Mode: mode | rapid.Uint32Range(0, 0o7777).Draw(t, "permissions"), UID: u32.Draw(t, "uid"), GID: u32.Draw(t, "gid"),
			Flags: rapid.Uint32().Draw(t, "flags") &^ 0x40000000, // of casefold there is a warning
			Mtime: filetree.Time{Sec: sec.Draw(t, "sec"), Nsec: rapid.Uint32Range(0, 999_999_999).Draw(t, "nsec")},
			Ctime: filetree.Time{Sec: rapid.OneOf(sec, rapid.SampledFrom([]int64{-1 << 33, 1 << 33})).Draw(t, "csec"), Nsec: rapid.Uint32Range(0, 999_999_999).Draw(t, "cnsec")},
			Dev:   rapid.SampledFrom([]uint64{0, 2049, 1<<64 - 1}).Draw(t, "dev"), Ino: rapid.Uint64().Draw(t, "ino"),
		}
	}
	xattrs := func() []filetree.Xattr {
		if rapid.IntRange(0, 3).Draw(t, "has attributes") > 0 {
			return nil
		}
		m := rapid.MapOfN(rapid.SampledFrom([]string{
			"user.a", "user." + strings.Repeat("n", 200), "trusted.overlay.opaque", "security.selinux",
			"user.b", "user.c", "trusted.\xff\xe9", "user.d",
		}), rapid.OneOf(rapid.SampledFrom([]int{0, 1, 3, 4, 30, 92, 100}), rapid.IntRange(0, 1500), rapid.SampledFrom([]int{3900, 4096, 9000, 65536})), 0, 6).Draw(t, "attributes")
		var xs []filetree.Xattr
		for name, n := range m {
			xs = append(xs, filetree.Xattr{Name: name, Value: bytes.Repeat([]byte{byte(n), 'v'}, n)[:n]})
		}
		return xs
	}
	size := rapid.OneOf(rapid.SampledFrom([]int64{0, 1, 4095, 4096, 4097}), rapid.Int64Range(0, 300_000))
	data := func(size int64) sparse.Map {
		if rapid.IntRange(0, 2).Draw(t, "is sparse") > 0 {
			return nil
		}
		m := sparse.Map{}
		for at := int64(0); ; {
			e := sparse.Extent{Off: at + rapid.Int64Range(0, 30_000).Draw(t, "hole"), Len: rapid.Int64Range(1, 9000).Draw(t, "data")}
			if e.End() > size {
				return m
			}
			m = m.Append(e)
			at = e.End()
		}
	}
	b, err := filetree.NewBuilder(attr(unix.S_IFDIR), nil)
	if err != nil {
		t.Fatal(err)
	}
	dirs := []filetree.ID{filetree.Root}
	var files []filetree.ID
	left := rapid.SampledFrom([]int{0, 10, 60, 300}).Draw(t, "inodes")
	name := rapid.OneOf(rapid.StringMatching(`[a-z]{1,12}`), rapid.StringMatching(`[ -.0-~]{200,255}`), rapid.Map(rapid.SliceOfN(rapid.ByteRange(128, 255), 1, 255), func(b []byte) string { return string(b) }))
	for len(dirs) > 0 && left > 0 {
		if err := b.Begin(dirs[0]); err != nil {
			t.Fatal(err)
		}
		names := rapid.SliceOfNDistinct(name, 0, min(left, 150), rapid.ID[string]).Draw(t, "names")
		if dirs[0] == filetree.Root && rapid.Bool().Draw(t, "has lost+found") {
			names = append(slices.DeleteFunc(names, func(n string) bool { return n == "lost+found" }), "lost+found")
		}
		names = slices.DeleteFunc(names, func(n string) bool { return n == "." || n == ".." })
		slices.Sort(names)
		left -= len(names)
		for _, n := range names {
			e := filetree.Entry{Name: n, Link: filetree.None, Xattrs: xattrs()}
			kind := rapid.IntRange(0, 12).Draw(t, "kind")
			if n == "lost+found" {
				kind = 1
			}
			switch {
			case kind == 0 && len(files) > 0:
				e.Link = rapid.SampledFrom(files).Draw(t, "link")
			case kind <= 2:
				e.Attr = attr(unix.S_IFDIR)
			case kind == 3:
				e.Attr = attr(unix.S_IFLNK)
				e.Xattrs = nil
				e.Target = strings.Repeat("t", rapid.OneOf(rapid.SampledFrom([]int{1, 59, 60, 4095}), rapid.IntRange(1, 100)).Draw(t, "target"))
			case kind == 4:
				e.Attr = attr(rapid.SampledFrom([]uint32{unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK}).Draw(t, "special"))
				if e.Type() == unix.S_IFCHR || e.Type() == unix.S_IFBLK {
					e.Major, e.Minor = rapid.Uint32Range(0, 4095).Draw(t, "major"), rapid.Uint32Range(0, 1<<20-1).Draw(t, "minor")
				}
				e.Xattrs = slices.DeleteFunc(e.Xattrs, func(x filetree.Xattr) bool { return strings.HasPrefix(x.Name, "user.") })
			default:
				e.Attr = attr(unix.S_IFREG)
				e.Size = size.Draw(t, "size")
				e.Data = data(e.Size)
			}
			id, err := b.Add(&e)
			if err != nil {
				t.Fatal(err)
			}
			switch e.Type() {
			case unix.S_IFDIR:
				if e.Link == filetree.None {
					dirs = append(dirs, id)
				}
			case unix.S_IFREG:
				files = append(files, id)
			}
		}
		dirs = dirs[1:]
	}
	return b.Tree()
}

func TestRandomTrees(t *testing.T) {
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		tree := randomTree(rt)
		p, err := ext4.NewPlan(tree, ext4.Options{Headroom: 1 << 20, NotAfter: 1_700_000_000})
		if err != nil {
			rt.Fatal(err)
		}
		n++
		path := filepath.Join(dir, fmt.Sprint(n))
		writeImage(rt, path, p, &memSource{t: tree}, func(c ext4.Change) { rt.Error(c.String()) })
		for w := range p.Warnings() {
			rt.Errorf("%s: %v", tree.Path(w.ID), w.Err)
		}
		fsck(rt, path)
		mnt := mount(t, path, "ro")
		compare(rt, &memSource{t: tree}, mnt)
		check(t, unix.Unmount(mnt, 0))
		check(t, os.Remove(path))
	})
}

// compare tells all differences between what a source has and what lies in a directory.
func compare(t reporter, src *memSource, dir string) {
	t.Helper()
	tree := src.t
	got, _ := walk(t, dir)
	ids := map[filetree.ID]filetree.ID{}
	var visit func(a, b filetree.ID)
	visit = func(a, b filetree.ID) {
		if was, ok := ids[a]; ok {
			if was != b {
				t.Errorf("%s: hard link broken", tree.Path(a))
			}
			return
		}
		ids[a] = b
		path := tree.Path(a)
		x, y := tree.Attr(a), got.Attr(b)
		x.Ctime, x.Dev, x.Ino, x.Flags = y.Ctime, y.Dev, y.Ino, y.Flags
		if x != y {
			t.Errorf("%q:\nwas %+v\nis  %+v", path, x, y)
		}
		if !slices.EqualFunc(tree.Xattrs(a), got.Xattrs(b), func(x, y filetree.Xattr) bool {
			return x.Name == y.Name && bytes.Equal(x.Value, y.Value)
		}) {
			t.Errorf("%q: attributes: was %.200q, is %.200q", path, tree.Xattrs(a), got.Xattrs(b))
		}
		if !bytes.Equal(tree.Target(a), got.Target(b)) {
			t.Errorf("%q: target %q", path, got.Target(b))
		}
		switch x.Type() {
		case unix.S_IFREG:
			want := make([]byte, x.Size)
			content(src.of(a), tree.Data(a), want, 0)
			have, err := os.ReadFile(filepath.Join(dir, path))
			if err != nil || !bytes.Equal(want, have) {
				t.Errorf("%q: content differs (%v)", path, err)
			}
			if n, m := len(got.Data(b)), len(tree.Data(a)); n > m {
				t.Errorf("%q: %d runs of data, had %d", path, n, m)
			}
		case unix.S_IFDIR:
			type child struct {
				name string
				id   filetree.ID
			}
			list := func(t *filetree.Tree, id filetree.ID) (l []child) {
				for name, c := range t.Children(id) {
					if id == filetree.Root && string(name) == "lost+found" && tree.Find("lost+found") == filetree.None {
						continue
					}
					l = append(l, child{string(name), c})
				}
				return l
			}
			l, m := list(tree, a), list(got, b)
			if !slices.EqualFunc(l, m, func(x, y child) bool { return x.name == y.name }) {
				t.Errorf("%q: names differ: was %v, is %v", path, l, m)
				return
			}
			for i := range l {
				visit(l[i].id, m[i].id)
			}
		}
	}
	visit(filetree.Root, filetree.Root)
}
