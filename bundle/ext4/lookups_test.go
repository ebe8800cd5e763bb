package ext4_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
)

// TestLookups: what is told is enough for the kernel to mount an image and find all
// that is in it, also where metadata lie where a parent had them; and directories
// near the root come before those below.
func TestLookups(t *testing.T) {
	for seed := range uint64(3) {
		h := newHost(seed, 200_000)
		dir := t.TempDir()
		var g *generation
		for nr := range 3 {
			for range 60 {
				h.mutate()
			}
			g = g.next(t, dir, nr, h, ext4.Options{Headroom: 16 << 20, NotAfter: 1_700_000_000})
			part := filepath.Join(dir, fmt.Sprintf("part-%d", nr))
			lookups(t, g, part)
			mnt := mount(t, part, "ro")
			compare(t, g.src, mnt)
			check(t, unix.Unmount(mnt, 0))
		}
		if !g.p.Kept() {
			t.Error("no image keeps its parent's places: that is not tested")
		}
	}
}

// lookups makes a file of what is told of an image, and of its files' data.
func lookups(t *testing.T, g *generation, path string) {
	t.Helper()
	from, err := os.Open(g.img)
	check(t, err)
	defer from.Close()
	to, err := os.Create(path)
	check(t, err)
	defer to.Close()
	check(t, to.Truncate(g.p.Size()))
	take := func(off, n int64) {
		_, err := io.Copy(io.NewOffsetWriter(to, off), io.NewSectionReader(from, off, n))
		check(t, err)
	}
	told, root, deepest := int64(0), int64(-1), int64(0)
	level := map[int64]int{} // of directories, by position
	for s := range g.p.Segments() {
		switch s.Kind {
		case ext4.KindDir:
			depth := 0
			for id := s.ID; id != 0; id = g.p.Tree().Parent(id) {
				depth++
			}
			level[s.Pos] = depth
		case ext4.KindData:
			take(s.Pos, s.Len)
		}
	}
	for e := range g.p.Lookups() {
		if e.Off < 0 || e.Len < 1 || e.End() > g.p.Size() {
			t.Fatalf("%+v is told of an image of %d bytes", e, g.p.Size())
		}
		if depth, ok := level[e.Off]; ok {
			if int64(depth) < deepest {
				t.Errorf("a directory of depth %d comes behind one of %d", depth, deepest)
			}
			deepest = int64(depth)
			if depth == 0 && root < 0 {
				root = told
			}
		}
		take(e.Off, e.Len)
		told += e.Len
	}
	if root < 0 || root > 1<<20 {
		t.Errorf("%d bytes are told before the root directory", root)
	}
}
