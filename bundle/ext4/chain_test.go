package ext4_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/test/evidence"
)

// generation is one of a chain of images.
type generation struct {
	p   *ext4.Plan
	src *memSource
	img string
}

// next makes an image whose parent is g; the files that g has are not read but
// taken from its image.
func (g *generation) next(t reporter, dir string, nr int, h *host, o ext4.Options) *generation {
	t.Helper()
	n := &generation{img: filepath.Join(dir, fmt.Sprint(nr))}
	var tree *filetree.Tree
	tree, n.src = h.scan(t)
	var err error
	var skip func(filetree.ID) bool
	if g == nil {
		n.p, err = ext4.NewPlan(tree, o)
		check(t, err)
	} else {
		o.Parent = layout(t, g.p, ext4.LayoutOptions{Started: filetree.Time{Sec: h.now + 100}})
		n.p, err = ext4.NewPlan(tree, o)
		check(t, err)
		m := n.p.Recognise(o.Parent)
		skip = func(id filetree.ID) bool { return m.Standing(id) == ext4.Same }
		g.held(t, n)
		check(t, os.WriteFile(n.img, nil, 0o600))
		n.carry(t, g, m)
	}
	f, err := os.OpenFile(n.img, os.O_RDWR|os.O_CREATE, 0o600)
	check(t, err)
	defer f.Close()
	check(t, f.Truncate(n.p.Size()))
	emitInto(t, f, n.p, n.src, ext4.EmitOptions{Skip: skip, Report: func(c ext4.Change) { t.Errorf("%s", c.String()) }})
	fsck(t, n.img)
	if g == nil {
		return n
	}
	// The same again, and all of it read: the same bytes.
	again, err := ext4.NewPlan(tree, o)
	check(t, err)
	path := filepath.Join(dir, "again")
	check(t, os.RemoveAll(path))
	emitImage(t, path, again, n.src, ext4.EmitOptions{})
	sameImage(t, n.img, path)
	sameImage(t, path, n.img)
	if err := n.p.Map().Check(n.p.Size()); err != nil {
		t.Errorf("map: %v", err)
	}
	n.mapped(t)
	return n
}

// carry copies what a parent has to an image.
func (g *generation) carry(t reporter, parent *generation, m *ext4.Matches) {
	t.Helper()
	from, err := os.Open(parent.img)
	check(t, err)
	defer from.Close()
	to, err := os.OpenFile(g.img, os.O_RDWR, 0)
	check(t, err)
	defer to.Close()
	origins := map[filetree.ID][]ext4.Origin{}
	for s := range g.p.Segments() {
		if s.Kind != ext4.KindData || m.Standing(s.ID) != ext4.Same {
			continue
		}
		o, ok := origins[s.ID]
		if !ok {
			o = m.Origin(s.ID)
			origins[s.ID] = o
		}
		left := s.Len
		for _, o := range o {
			lo, hi := max(o.Off, s.Off), min(o.Off+o.Len, s.Off+s.Len)
			if lo >= hi {
				continue
			}
			b := make([]byte, hi-lo)
			_, err := from.ReadAt(b, o.Pos+lo-o.Off)
			check(t, err)
			_, err = to.WriteAt(b, s.Pos+lo-s.Off)
			check(t, err)
			left -= hi - lo
		}
		if left != 0 {
			t.Errorf("%+v has no origin: %v", s, o)
		}
	}
}

// mapped expects all that is not zero in an image to be in its plan's map and
// its segments neither to overlap nor to descend.
func (g *generation) mapped(t reporter) {
	t.Helper()
	f, err := os.Open(g.img)
	check(t, err)
	defer f.Close()
	at := int64(0)
	for s := range g.p.Segments() {
		if s.Pos < at {
			t.Errorf("%+v begins before %d", s, at)
		}
		at = s.Pos + s.Len
	}
	st, err := f.Stat()
	check(t, err)
	data, err := sparse.Scan(int(f.Fd()), st.Size())
	check(t, err)
	m := g.p.Map()
	b := make([]byte, 4096)
	for _, e := range data {
		for at := e.Off; at < e.End(); at += 4096 {
			for len(m) > 0 && m[0].End() <= at {
				m = m[1:]
			}
			if len(m) > 0 && m[0].Off <= at {
				continue
			}
			_, err := f.ReadAt(b, at)
			if err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if !bytes.Equal(b, zeroBlock[:]) {
				t.Fatalf("the block at %d is not zero, but the map has not got it", at)
			}
		}
	}
}

// held expects what is as it was to lie where it was.
func (g *generation) held(t reporter, n *generation) {
	t.Helper()
	if !n.p.Kept() {
		return
	}
	type places map[string]sparse.Map
	find := func(g *generation) (at, shape places) {
		at, shape = places{}, places{}
		tree := g.p.Tree()
		for s := range g.p.Segments() {
			if s.Kind == ext4.KindData || s.Kind == ext4.KindDir {
				k := tree.Path(s.ID)
				at[k] = append(at[k], sparse.Extent{Off: s.Off, Len: s.Pos})
				shape[k] = append(shape[k], sparse.Extent{Off: s.Off, Len: s.Len})
			}
		}
		for k, s := range shape { // a file may lie in another order than it has
			slices.SortFunc(s, func(a, b sparse.Extent) int { return int(a.Off - b.Off) })
			var m sparse.Map
			for _, e := range s {
				m = m.Append(e)
			}
			shape[k] = m
		}
		return at, shape
	}
	was, before := find(g)
	is, now := find(n)
	for k, a := range is {
		id, old := n.p.Tree().Find(k), g.p.Tree().Find(k)
		if was[k] != nil && slices.Equal(now[k], before[k]) && !slices.Equal(a, was[k]) &&
			n.p.Tree().Mode(id)&unix.S_IFMT == g.p.Tree().Mode(old)&unix.S_IFMT && n.p.Tree().Names(id) == 1 && g.p.Tree().Names(old) == 1 {
			t.Errorf("%s moved from %v to %v", k, was[k], a)
		}
	}
}

// Chains of images, each with the one before as parent: whatever has changed,
// each is consistent and has the files.
func TestChains(t *testing.T) {
	chains := uint64(evidence.Cases(4, 100))
	for seed := range chains {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dir := t.TempDir()
			h := newHost(seed, 400_000)
			for range 60 {
				h.mutate()
			}
			o := ext4.Options{UUID: [16]byte{byte(seed), 1}, Headroom: 24 << 20, JournalBlocks: 1024}
			if seed%3 == 2 {
				o.Headroom = 1 << 20 // little room
			}
			var g *generation
			kept := 0
			for nr := range 10 {
				g = g.next(t, dir, nr, h, o)
				if g.p.Kept() {
					kept++
				}
				mnt := mount(t, g.img)
				compare(t, g.src, mnt)
				check(t, os.WriteFile(filepath.Join(mnt, "written"), make([]byte, 50_000), 0o600))
				check(t, unix.Unmount(mnt, 0))
				if t.Failed() {
					t.FailNow()
				}
				if nr > 0 {
					check(t, os.Remove(filepath.Join(dir, fmt.Sprint(nr-1))))
				}
				restore(t, g)
				for range 1 + h.r.IntN(12) {
					h.mutate()
				}
			}
			if seed%3 != 2 && kept < 5 {
				t.Errorf("only %d of 9 images kept their parent's places", kept)
			}
		})
	}
}

// restore makes an image again what it was before it was mounted.
func restore(t reporter, g *generation) {
	t.Helper()
	emitImage(t, g.img, g.p, g.src, ext4.EmitOptions{})
}
