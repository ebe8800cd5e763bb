package ext4_test

import (
	"bytes"
	"context"
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
	"pgregory.net/rapid"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/test/evidence"
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

// A tree that has not changed gives the parent's image, byte for byte.
func TestKeepUnchanged(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	rapid.Check(t, func(rt *rapid.T) {
		tree := randomTree(rt)
		o := ext4.Options{Headroom: 1 << 20, NotAfter: 1_700_000_000}
		p, err := ext4.NewPlan(tree, o)
		check(rt, err)
		o.Parent = layout(rt, p, later)
		q, err := ext4.NewPlan(tree, o)
		check(rt, err)
		if !q.Kept() {
			rt.Error("laid out afresh")
		}
		if err := q.Write(context.Background(), io.Discard, &memSource{t: tree}, nil); !errors.Is(err, ext4.ErrScattered) {
			rt.Errorf("written by position: %v", err)
		}
		sameOrigins(rt, q, o.Parent, p)
		src := &memSource{t: tree, faults: randomFaults(rt, tree)}
		check(rt, os.RemoveAll(a))
		check(rt, os.RemoveAll(b))
		writeImage(rt, a, p, src, nil)
		emitImage(rt, b, q, src, ext4.EmitOptions{})
		sameImage(rt, a, b)
		sameImage(rt, b, a)
		if !slices.Equal(p.Map(), q.Map()) {
			rt.Errorf("maps differ:\n%v\n%v", p.Map(), q.Map())
		}
	})
}

// Whatever goes wrong with the files of a tree that changed, the image is consistent.
func TestKeepFaults(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	rapid.Check(t, func(rt *rapid.T) {
		h := newHost(rapid.Uint64().Draw(rt, "seed"), 300_000)
		for range rapid.IntRange(0, 40).Draw(rt, "before") {
			h.mutate()
		}
		tree, _ := h.scan(rt)
		o := ext4.Options{Headroom: 16 << 20, UUID: [16]byte{1}}
		p, err := ext4.NewPlan(tree, o)
		check(rt, err)
		for range rapid.IntRange(1, 20).Draw(rt, "after") {
			h.mutate()
		}
		o.Parent = layout(rt, p, later)
		tree, src := h.scan(rt)
		p, err = ext4.NewPlan(tree, o)
		check(rt, err)
		src.faults = randomFaults(rt, tree)
		check(rt, os.RemoveAll(path))
		emitImage(rt, path, p, src, ext4.EmitOptions{Report: func(c ext4.Change) {
			if f := src.faults[c.ID]; f.open == nil && !f.changed && f.bad == nil {
				rt.Errorf("no fault, but %s", c.String())
			}
		}})
		fsck(rt, path)
	})
}

// Several groups, with copies of the superblock in the way; directories with
// an index of two levels; sets of attributes that many files share.
func TestKeepLarge(t *testing.T) {
	h := newHost(1, 100_000)
	many, shared := h.node(unix.S_IFDIR|0o755), h.node(unix.S_IFDIR|0o755)
	h.root.names["many"], h.root.names["shared"] = many, shared
	for i := range 10_000 {
		many.names[fmt.Sprintf("%0200d", i)] = h.node(unix.S_IFREG | 0o644)
	}
	attributes := []filetree.Xattr{{Name: "trusted.a", Value: bytes.Repeat([]byte("a"), 500)}, {Name: "trusted.b", Value: bytes.Repeat([]byte("b"), 5000)}}
	for i := range 2500 {
		n := h.node(unix.S_IFREG | 0o644)
		n.Xattrs = attributes
		shared.names[fmt.Sprint(i)] = n
	}
	big := h.node(unix.S_IFREG | 0o644)
	big.Size = 150 << 20
	h.root.names["big"] = big
	dir := t.TempDir()
	o := ext4.Options{Size: 3 << 30, UUID: [16]byte{7}}
	var g *generation
	for nr := range 4 {
		g = g.next(t, dir, nr, h, o)
		if nr > 0 && !g.p.Kept() {
			t.Error("laid out afresh")
		}
		mnt := mount(t, g.img, "ro")
		compare(t, g.src, mnt)
		check(t, unix.Unmount(mnt, 0))
		if out := run(t, "debugfs", "-R", "htree_dump many", g.img); !strings.Contains(out, "Indirect levels: 1") {
			t.Errorf("htree: %.500s", out)
		}
		for i := range 300 {
			many.names[fmt.Sprintf("new-%d-%0150d", nr, i)] = h.node(unix.S_IFREG | 0o644)
			delete(many.names, fmt.Sprintf("%0200d", i*7+nr))
			delete(shared.names, fmt.Sprint(i*8+nr))
		}
		for i := range 100 {
			n := h.node(unix.S_IFREG | 0o644)
			n.Xattrs = attributes
			shared.names[fmt.Sprintf("new-%d-%d", nr, i)] = n
		}
		switch nr {
		case 0:
			second := h.node(unix.S_IFREG | 0o644)
			second.Size = 300 << 20
			h.root.names["second"] = second
		case 1:
			delete(h.root.names, "big")
		case 2:
			h.resize(h.root.names["second"], 1<<20)
		}
	}
}

// Where no free run is long enough a file is put into many, until there is
// not enough room: then all is laid out afresh.
func TestKeepFragmented(t *testing.T) {
	h := newHost(1, 1)
	names := func(n int) *node { return h.root.names[fmt.Sprint("f", n)] }
	for i := range 5000 {
		n := h.node(unix.S_IFREG | 0o644)
		n.Size = 4096
		h.root.names[fmt.Sprint("f", i)] = n
	}
	dir := t.TempDir()
	o := ext4.Options{Headroom: -1, ReservedPercent: -1, JournalBlocks: 1024, UUID: [16]byte{9}, Inodes: 6000}
	var g *generation
	var pieces int
	step := func(nr int) {
		g = g.next(t, dir, nr, h, o)
		mnt := mount(t, g.img, "ro")
		compare(t, g.src, mnt)
		check(t, unix.Unmount(mnt, 0))
		pieces = 0
		id := g.p.Tree().Find("large")
		for s := range g.p.Segments() {
			if s.Kind == ext4.KindData && s.ID == id {
				pieces++
			}
		}
	}
	step(0)
	for i := 0; i < 5000; i += 2 {
		if names(i) != nil {
			delete(h.root.names, fmt.Sprint("f", i))
		}
	}
	large := h.node(unix.S_IFREG | 0o644)
	large.Size = 2200 * 4096
	h.root.names["large"] = large
	step(1)
	if !g.p.Kept() || pieces < 1361 {
		t.Errorf("kept: %v, in %d pieces", g.p.Kept(), pieces)
	}
	h.resize(large, 3<<20)
	large.Data = nil
	step(2)
	if !g.p.Kept() || pieces > 800 {
		t.Errorf("kept: %v, in %d pieces", g.p.Kept(), pieces)
	}
	large.Size = 30 << 20
	h.touch(large)
	step(3)
	if g.p.Kept() || pieces > 2 {
		t.Errorf("kept: %v, in %d pieces", g.p.Kept(), pieces)
	}
}

// What the options ask for comes before what the parent has.
func TestKeepOptions(t *testing.T) {
	tree := files(t, map[string]int64{"a": 10 * mib, "b": 5}, nil)
	p := plan(t, tree, ext4.Options{})
	total, _ := p.Inodes()
	for _, tt := range []struct {
		what string
		o    ext4.Options
		kept bool
	}{
		{"nothing", ext4.Options{}, true},
		{"what there is", ext4.Options{Size: p.Size(), UUID: p.UUID(), Inodes: total}, true},
		{"label and reserve", ext4.Options{Label: "new", ReservedPercent: 7}, true},
		{"another size", ext4.Options{Size: p.Size() + mib}, false},
		{"another UUID", ext4.Options{UUID: [16]byte{1}}, false},
		{"more inodes", ext4.Options{Inodes: total + 1}, false},
		{"another journal", ext4.Options{JournalBlocks: 5000}, false},
		{"much more room", ext4.Options{Headroom: gib}, false},
		{"a little more room", ext4.Options{Headroom: 140 * mib}, true},
	} {
		tt.o.Parent = layout(t, p, later)
		q := plan(t, tree, tt.o)
		if q.Kept() != tt.kept {
			t.Errorf("%s: kept %v", tt.what, q.Kept())
		}
		if tt.o.UUID == [16]byte{} && q.UUID() != p.UUID() {
			t.Errorf("%s: another UUID", tt.what)
		}
		path := filepath.Join(t.TempDir(), "image")
		emitImage(t, path, q, &memSource{t: tree}, ext4.EmitOptions{})
		fsck(t, path)
	}
}
