package ext4_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

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
