package ext4_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// later is after all times of the trees of this package.
var later = ext4.LayoutOptions{Started: filetree.Time{Sec: 1 << 40}}

// encoded is the layout of a plan, with the lengths of its writes.
func encoded(t reporter, p *ext4.Plan, o ext4.LayoutOptions) ([]byte, []int) {
	t.Helper()
	var b bytes.Buffer
	var cuts []int
	check(t, p.WriteLayout(writerFunc(func(p []byte) (int, error) {
		cuts = append(cuts, len(p))
		return b.Write(p)
	}), o))
	return b.Bytes(), cuts
}

func layout(t reporter, p *ext4.Plan, o ext4.LayoutOptions) *ext4.Layout {
	t.Helper()
	b, _ := encoded(t, p, o)
	l, err := ext4.ReadLayout(bytes.NewReader(b))
	check(t, err)
	return l
}

// A tree is recognised by the layout of its own image, and each file's data
// are where the image has them.
func TestRecognise(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tree := randomTree(rt)
		p, err := ext4.NewPlan(tree, ext4.Options{})
		check(rt, err)
		l := layout(rt, p, later)
		if l.Size() != p.Size() || l.Names() != tree.Entries() {
			rt.Errorf("layout of %d bytes and %d names, the image has %d and %d", l.Size(), l.Names(), p.Size(), tree.Entries())
		}
		q, err := ext4.NewPlan(tree, ext4.Options{Size: 1 << 30})
		check(rt, err)
		sameOrigins(rt, q, l, p)
	})
}

// sameOrigins expects q to recognise all files where p has them.
func sameOrigins(t reporter, q *ext4.Plan, l *ext4.Layout, p *ext4.Plan) {
	t.Helper()
	tree := q.Tree()
	m := q.Recognise(l)
	want := map[filetree.ID][]ext4.Origin{}
	for s := range p.Segments() {
		if s.Kind == ext4.KindData {
			o := want[s.ID]
			if n := len(o); n > 0 && o[n-1].Off+o[n-1].Len == s.Off && o[n-1].Pos+o[n-1].Len == s.Pos {
				o[n-1].Len += s.Len
			} else {
				o = append(o, ext4.Origin{Off: s.Off, Pos: s.Pos, Len: s.Len})
			}
			want[s.ID] = o
		}
	}
	for i := range tree.Len() {
		id := filetree.ID(i)
		var o []ext4.Origin
		for _, e := range m.Origin(id) {
			if n := len(o); n > 0 && o[n-1].Off+o[n-1].Len == e.Off && o[n-1].Pos+o[n-1].Len == e.Pos {
				o[n-1].Len += e.Len
				continue
			}
			o = append(o, e)
		}
		regular := tree.Mode(id)&unix.S_IFMT == unix.S_IFREG
		if got := m.Standing(id); (got == ext4.Same) != regular {
			t.Errorf("%s: standing %d", tree.Path(id), got)
		}
		if fmt.Sprint(o) != fmt.Sprint(want[id]) {
			t.Errorf("%s: from %v, but its data are at %v", tree.Path(id), o, want[id])
		}
	}
}

// A layout names all files, with their data where the image has them.
func TestLayoutFiles(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tree := randomTree(rt)
		p, err := ext4.NewPlan(tree, ext4.Options{})
		check(rt, err)
		l := layout(rt, p, ext4.LayoutOptions{Unsure: func(id filetree.ID) bool { return id%3 == 0 }})
		m := p.Recognise(layout(rt, p, later))
		inos := map[uint32]filetree.ID{}
		n := 0
		for f := range l.Files() {
			n++
			id := tree.Find(f.Path)
			if id == filetree.None {
				rt.Fatalf("%q is not in the tree", f.Path)
			}
			first, again := inos[f.Ino]
			inos[f.Ino] = id
			if f.Link != again || again && first != id {
				rt.Errorf("%q: another name: %v, inode %d", f.Path, f.Link, f.Ino)
			}
			a := tree.Attr(id)
			switch {
			case f.Link:
				if f.Mode != 0 || f.Data != nil {
					rt.Errorf("%+v", f)
				}
			case f.Mode != a.Type():
				rt.Errorf("%q: type %o", f.Path, f.Mode)
			case a.Type() == unix.S_IFREG:
				if f.Size != a.Size || f.Facts != (id%3 != 0) || f.Facts && (f.Mtime != a.Mtime || f.Ctime != a.Ctime) || !slices.Equal(f.Data, m.Origin(id)) {
					rt.Errorf("%+v, but the tree has %+v at %v", f, a, m.Origin(id))
				}
			}
		}
		if n != tree.Entries() {
			rt.Errorf("%d names, the tree has %d", n, tree.Entries())
		}
		for range l.Files() { // may be left early
			break
		}
	})
}

// What differs is not recognised.
func TestRecogniseChanges(t *testing.T) {
	base := filetree.Attr{
		Mode: unix.S_IFREG | 0o644, Size: 10_000, Dev: 5, Ino: 77,
		Mtime: filetree.Time{Sec: 1000, Nsec: 1}, Ctime: filetree.Time{Sec: 2000, Nsec: 2},
	}
	tree := func(name string, a filetree.Attr, m sparse.Map, dev uint64) *filetree.Tree {
		b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755, Dev: dev}, nil)
		check(t, err)
		check(t, b.Begin(filetree.Root))
		_, err = b.Add(&filetree.Entry{Name: name, Link: filetree.None, Attr: a, Data: m})
		check(t, err)
		return b.Tree()
	}
	old := plan(t, tree("f", base, nil, 5), ext4.Options{})
	started := filetree.Time{Sec: 3000}
	for _, tt := range []struct {
		what string
		name string
		edit func(*filetree.Attr)
		m    sparse.Map
		o    ext4.LayoutOptions
		want ext4.Standing
		dev  uint64 // of the root, if not 5
	}{
		{what: "nothing", want: ext4.Same},
		{what: "owner and mode", edit: func(a *filetree.Attr) { a.UID, a.Mode = 7, a.Mode|0o4000 }, want: ext4.Same},
		{what: "name", name: "g"},
		{what: "size", edit: func(a *filetree.Attr) { a.Size++ }},
		{what: "mtime", edit: func(a *filetree.Attr) { a.Mtime.Nsec++ }},
		{what: "mtime's second", edit: func(a *filetree.Attr) { a.Mtime.Sec-- }},
		{what: "ctime", edit: func(a *filetree.Attr) { a.Ctime.Nsec++ }},
		{what: "ctime's second", edit: func(a *filetree.Attr) { a.Ctime.Sec++ }},
		{what: "device", edit: func(a *filetree.Attr) { a.Dev++ }},
		{what: "the volume's device", edit: func(a *filetree.Attr) { a.Dev = 9 }, dev: 9, want: ext4.Same},
		{what: "the volume's device, but not the file's", dev: 9},
		{what: "inode", edit: func(a *filetree.Attr) { a.Ino++ }},
		{what: "holes", m: sparse.Map{{Off: 0, Len: 4096}}},
		{what: "type", edit: func(a *filetree.Attr) { a.Mode, a.Size = unix.S_IFIFO|0o644, 0 }},
		{what: "ctime in doubt", o: ext4.LayoutOptions{Started: filetree.Time{Sec: 2002}}, want: ext4.Doubtful},
		{what: "ctime just not in doubt", o: ext4.LayoutOptions{Started: filetree.Time{Sec: 2003}}, want: ext4.Same},
		{what: "capture long before", o: ext4.LayoutOptions{Started: filetree.Time{Sec: 100}}, want: ext4.Doubtful},
		{what: "unsure", o: ext4.LayoutOptions{Started: started, Unsure: func(filetree.ID) bool { return true }}},
	} {
		if tt.o.Started.Sec == 0 {
			tt.o.Started = started
		}
		if tt.name == "" {
			tt.name = "f"
		}
		if tt.dev == 0 {
			tt.dev = 5
		}
		a := base
		if tt.edit != nil {
			tt.edit(&a)
		}
		m := plan(t, tree(tt.name, a, tt.m, tt.dev), ext4.Options{}).Recognise(layout(t, old, tt.o))
		if got := m.Standing(1); got != tt.want || (m.Origin(1) != nil) != (tt.want != ext4.Changed) {
			t.Errorf("%s: standing %d, origin %v, want %d", tt.what, got, m.Origin(1), tt.want)
		}
	}
}

// TestRecogniseFuture: a file dated in the future is in no doubt if it was
// changed long ago.
func TestRecogniseFuture(t *testing.T) {
	for _, tt := range []struct {
		ctime int64
		want  ext4.Standing
	}{{2000, ext4.Same}, {2999, ext4.Doubtful}, {9000, ext4.Doubtful}} {
		b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
		check(t, err)
		check(t, b.Begin(filetree.Root))
		a := filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 10_000, Mtime: filetree.Time{Sec: 9000}, Ctime: filetree.Time{Sec: tt.ctime}, Ino: 12}
		_, err = b.Add(&filetree.Entry{Name: "f", Link: filetree.None, Attr: a})
		check(t, err)
		p := plan(t, b.Tree(), ext4.Options{})
		l := layout(t, p, ext4.LayoutOptions{Started: filetree.Time{Sec: 3000}})
		if got := p.Recognise(l).Standing(1); got != tt.want {
			t.Errorf("changed at %d: standing %d, want %d", tt.ctime, got, tt.want)
		}
	}
}

func FuzzReadLayout(f *testing.F) {
	for _, tree := range []*filetree.Tree{
		files(f, map[string]int64{"a": 5000, "ab": 1, "b": 0}, map[string]sparse.Map{"a": {{Off: 4096, Len: 100}}}), some(f),
	} {
		p := plan(f, tree, ext4.Options{})
		b, _ := encoded(f, p, later)
		f.Add(b)
	}
	tree := files(f, map[string]int64{"a": 5000, "ab": 1, "b": 0, "c": 100_000}, nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ext4.ReadLayout(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ext4.ErrLayout) {
				t.Fatal(err)
			}
			return
		}
		p, err := ext4.NewPlan(tree, ext4.Options{Parent: l})
		check(t, err)
		p.Recognise(l)
		if !p.Kept() {
			return
		}
		used := map[int64]bool{}
		for s := range p.Segments() {
			for at := s.Pos; at < s.Pos+s.Len; at += 4096 {
				if used[at] || at >= p.Size() {
					t.Fatalf("%+v: taken, or outside", s)
				}
				used[at] = true
			}
		}
	})
}

// Damage is found, and told as such.
func TestReadLayoutRefuses(t *testing.T) {
	p := plan(t, some(t), ext4.Options{})
	b, _ := encoded(t, p, later)
	for n := range min(len(b), 3000) {
		if _, err := ext4.ReadLayout(bytes.NewReader(b[:n])); !errors.Is(err, ext4.ErrLayout) {
			t.Fatalf("the first %d bytes: %v", n, err)
		}
	}
	if _, err := ext4.ReadLayout(bytes.NewReader(append(b[:len(b):len(b)], 0))); !errors.Is(err, ext4.ErrLayout) {
		t.Errorf("a byte too many: %v", err)
	}
	if _, err := ext4.ReadLayout(bytes.NewReader(bytes.Replace(b, []byte("layout 1"), []byte("layout 2"), 1))); !errors.Is(err, ext4.ErrLayout) {
		t.Errorf("another version: %v", err)
	}
	if _, err := ext4.ReadLayout(&failingReader{strings.NewReader(string(b[:10]))}); !errors.Is(err, unix.EIO) {
		t.Errorf("a reader that fails: %v", err)
	}
}

type failingReader struct{ r *strings.Reader }

func (r *failingReader) Read(b []byte) (int, error) {
	if r.r.Len() == 0 {
		return 0, unix.EIO
	}
	return r.r.Read(b)
}

// A file that is added or changes leaves the layout's other directories as they were.
func TestLayoutIsLocal(t *testing.T) {
	sizes := map[string]int64{}
	for i := range 3000 {
		sizes[fmt.Sprintf("%d", i)] = 1000
	}
	cuts := func(p *ext4.Plan) map[string]bool {
		b, n := encoded(t, p, later)
		m := map[string]bool{}
		for _, n := range n {
			m[string(b[:n])] = true
			b = b[n:]
		}
		return m
	}
	many := func(extra string) *filetree.Tree {
		b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
		check(t, err)
		check(t, b.Begin(filetree.Root))
		var dirs []filetree.ID
		for i := range 100 {
			d, err := b.Add(&filetree.Entry{Name: fmt.Sprint(100 + i), Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFDIR | 0o755}})
			check(t, err)
			dirs = append(dirs, d)
		}
		for i, d := range dirs {
			check(t, b.Begin(d))
			for j := range 30 {
				_, err := b.Add(&filetree.Entry{Name: fmt.Sprint(100 + j), Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 5000, Ino: uint64(i*100 + j)}})
				check(t, err)
			}
			if i == 30 && extra != "" {
				_, err := b.Add(&filetree.Entry{Name: extra, Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 12345, Ino: 99999}})
				check(t, err)
			}
		}
		return b.Tree()
	}
	p := plan(t, many(""), ext4.Options{UUID: [16]byte{1}})
	q := plan(t, many("new"), ext4.Options{UUID: [16]byte{1}, Parent: layout(t, p, later)})
	if !q.Kept() {
		t.Fatal("laid out afresh")
	}
	a, b := cuts(p), cuts(q)
	same := 0
	for c := range b {
		if a[c] {
			same++
		}
	}
	if len(a) < 102 || same < len(b)-2 {
		t.Errorf("of %d pieces %d are as they were", len(b), same)
	}
}
