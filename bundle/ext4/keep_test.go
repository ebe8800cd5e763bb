package ext4_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// node is an inode of a hierarchy that changes from one image to the next.
type node struct {
	filetree.Entry // what its content follows from is its Ino
	names          map[string]*node
}

// host is such a hierarchy.
type host struct {
	r    *rand.Rand
	root *node
	now  int64
	inos uint64
	big  int64 // most bytes of a file
}

func newHost(seed uint64, big int64) *host {
	h := &host{r: rand.New(rand.NewPCG(seed, 1)), now: 1_000_000, big: big}
	h.root = h.node(unix.S_IFDIR | 0o755)
	return h
}

func (h *host) node(mode uint32) *node {
	n := &node{}
	n.Link, n.Mode = filetree.None, mode
	if mode&unix.S_IFMT == unix.S_IFDIR {
		n.names = map[string]*node{}
	}
	h.touch(n)
	return n
}

// touch makes a node's content another.
func (h *host) touch(n *node) {
	h.now++
	h.inos++
	n.Ino = h.inos
	n.Mtime, n.Ctime = filetree.Time{Sec: h.now, Nsec: h.r.Uint32N(1e9)}, filetree.Time{Sec: h.now, Nsec: h.r.Uint32N(1e9)}
}

// resize gives a file a size, and holes or not.
func (h *host) resize(n *node, size int64) {
	h.touch(n)
	n.Size, n.Data = size, nil
	if h.r.IntN(4) > 0 {
		return
	}
	n.Data = sparse.Map{}
	for at := h.r.Int64N(20_000); at < size; {
		l := min(1+h.r.Int64N(30_000), size-at)
		n.Data = n.Data.Append(sparse.Extent{Off: at, Len: l})
		at += l + 1 + h.r.Int64N(20_000)
	}
}

func (h *host) size() int64 {
	switch h.r.IntN(5) {
	case 0:
		return h.r.Int64N(2) * 4096
	case 1:
		return h.r.Int64N(h.big)
	}
	return h.r.Int64N(20_000)
}

// dirs and files are all there are, in an order that follows from the seed.
func (h *host) all() (dirs, others []*node) {
	var visit func(n *node)
	visit = func(n *node) {
		dirs = append(dirs, n)
		for _, name := range sorted(n.names) {
			if c := n.names[name]; c.names != nil {
				visit(c)
			} else if !slices.Contains(others, c) {
				others = append(others, c)
			}
		}
	}
	visit(h.root)
	return dirs, others
}

func sorted(m map[string]*node) (names []string) {
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

func pick[T any](h *host, s []T) T { return s[h.r.IntN(len(s))] }

func (h *host) xattrs(n *node) {
	n.Xattrs = nil
	for i := range h.r.IntN(4) {
		size := []int{3, 40, 800, 3000, 9000}[h.r.IntN(5)]
		n.Xattrs = append(n.Xattrs, filetree.Xattr{Name: fmt.Sprintf("trusted.%d", i), Value: bytes.Repeat([]byte{byte(size)}, size)})
	}
}

func (h *host) add(dir *node, name string) {
	var n *node
	switch h.r.IntN(12) {
	case 0:
		n = h.node(unix.S_IFDIR | 0o750)
	case 1:
		n = h.node(unix.S_IFLNK | 0o777)
		n.Target = strings.Repeat("t", 1+h.r.IntN(120))
	case 2:
		n = h.node(unix.S_IFCHR | 0o600)
		n.Major, n.Minor = 1, 3
	default:
		n = h.node(unix.S_IFREG | 0o644)
		h.resize(n, h.size())
	}
	if h.r.IntN(6) == 0 && n.Mode&unix.S_IFMT != unix.S_IFLNK {
		h.xattrs(n)
	}
	dir.names[name] = n
}

// mutate makes some change.
func (h *host) mutate() {
	defer func() {
		if n := h.root.names["lost+found"]; n != nil && n.names == nil {
			delete(h.root.names, "lost+found") // no image can have that
		}
	}()
	dirs, others := h.all()
	dir := pick(h, dirs)
	names := sorted(dir.names)
	name := fmt.Sprintf("n%d%s", h.r.IntN(1000), strings.Repeat("-", h.r.IntN(3)*60))
	switch op := h.r.IntN(13); {
	case op == 0:
		for i := range h.r.IntN(60) {
			h.add(dir, fmt.Sprintf("%s-%d", name, i))
		}
	case op == 1 && h.r.IntN(3) == 0: // enough for an index
		for i := range 400 {
			dir.names[fmt.Sprintf("many-%d-%s", i, name)] = h.node(unix.S_IFREG | 0o600)
		}
	case len(names) == 0 || op == 2:
		h.add(dir, name)
	case op == 3 && len(others) > 10:
		delete(dir.names, pick(h, names))
	case op == 4: // rename, perhaps over something
		from := pick(h, names)
		n := dir.names[from]
		delete(dir.names, from)
		dir.names[name] = n
	case op == 5: // another type
		from := pick(h, names)
		delete(dir.names, from)
		h.add(dir, from)
	case op == 6 && len(others) > 0:
		dir.names[name] = pick(h, others)
	case op == 7:
		h.xattrs(dir)
	case op == 8: // lost+found
		if h.root.names["lost+found"] == nil {
			h.root.names["lost+found"] = h.node(unix.S_IFDIR | 0o700)
		} else if len(h.root.names["lost+found"].names) == 0 {
			delete(h.root.names, "lost+found")
		}
	default:
		var files []*node
		for _, n := range others {
			if n.Mode&unix.S_IFMT == unix.S_IFREG {
				files = append(files, n)
			}
		}
		if len(files) == 0 {
			return
		}
		n := pick(h, files)
		switch op {
		case 9:
			h.touch(n) // rewritten in place
		case 10:
			h.resize(n, n.Size+h.size())
		case 11:
			h.resize(n, h.r.Int64N(n.Size+1))
		default:
			h.xattrs(n)
		}
	}
}

// scan makes a tree, and a source of what is in it.
func (h *host) scan(t reporter) (*filetree.Tree, *memSource) {
	t.Helper()
	b, err := filetree.NewBuilder(h.root.Attr, h.root.Xattrs)
	check(t, err)
	ids := map[*node]filetree.ID{}
	type todo struct {
		id filetree.ID
		n  *node
	}
	for queue := []todo{{filetree.Root, h.root}}; len(queue) > 0; queue = queue[1:] {
		check(t, b.Begin(queue[0].id))
		dir := queue[0].n
		for _, name := range sorted(dir.names) {
			n := dir.names[name]
			e := n.Entry
			e.Name = name
			if id, ok := ids[n]; ok {
				e.Link = id
			}
			id, err := b.Add(&e)
			check(t, err)
			ids[n] = id
			if n.names != nil {
				queue = append(queue, todo{id, n})
			}
		}
	}
	tree := b.Tree()
	return tree, &memSource{t: tree, seed: func(id filetree.ID) filetree.ID { return filetree.ID(tree.Attr(id).Ino) }}
}

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
	at = 0
	for _, e := range append(slices.Clone(g.p.Map()), sparse.Extent{Off: g.p.Size()}) {
		b := make([]byte, 1<<20)
		for at < e.Off {
			n := min(e.Off-at, 1<<20)
			_, err := f.ReadAt(b[:n], at)
			if err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if len(bytes.Trim(b[:n], "\x00")) > 0 {
				t.Fatalf("not zero within %d bytes from %d, which the map has not", n, at)
			}
			at += n
		}
		at = e.End()
	}
}

// held expects what is as it was to lie where it was.
func (g *generation) held(t reporter, n *generation) {
	t.Helper()
	if !n.p.Kept() {
		return
	}
	type places map[string]string
	find := func(g *generation) (at places, shape places) {
		at, shape = places{}, places{}
		tree := g.p.Tree()
		for s := range g.p.Segments() {
			if s.Kind == ext4.KindData || s.Kind == ext4.KindDir {
				k := tree.Path(s.ID)
				at[k] += fmt.Sprint(s.Off, s.Pos, s.Len, ";")
				for i := int64(0); i < s.Len; i += 4096 {
					shape[k] += fmt.Sprint(s.Off+i, ";")
				}
				shape[k] += "x"
			}
		}
		for k, s := range shape {
			shape[k] = strings.ReplaceAll(s, "x", "")
		}
		return at, shape
	}
	was, before := find(g)
	is, now := find(n)
	moved := 0
	for k, a := range is {
		id, old := n.p.Tree().Find(k), g.p.Tree().Find(k)
		if was[k] != "" && now[k] == before[k] && a != was[k] &&
			n.p.Tree().Mode(id)&unix.S_IFMT == g.p.Tree().Mode(old)&unix.S_IFMT {
			moved++
			if n.p.Tree().Names(id) == 1 && g.p.Tree().Names(old) == 1 {
				t.Errorf("%s moved from %s to %s", k, was[k], a)
			}
		}
	}
}

// Chains of images, each with the one before as parent: whatever has changed,
// each is consistent and has the files.
func TestChains(t *testing.T) {
	for seed := range uint64(10) {
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
