package ext4_test

import (
	"bytes"
	"context"
	"errors"
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
)

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
