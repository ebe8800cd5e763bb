package ext4_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// files makes a tree of regular files of given sizes, each in the directory "d".
func files(t testing.TB, sizes map[string]int64, maps map[string]sparse.Map) *filetree.Tree {
	t.Helper()
	b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(t, err)
	check(t, b.Begin(filetree.Root))
	d, err := b.Add(&filetree.Entry{Name: "d", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFDIR | 0o755}})
	check(t, err)
	check(t, b.Begin(d))
	var names []string
	for n := range sizes {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		_, err := b.Add(&filetree.Entry{
			Name: n, Link: filetree.None, Data: maps[n],
			Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: sizes[n], Mtime: filetree.Time{Sec: 1_600_000_000}},
		})
		check(t, err)
	}
	return b.Tree()
}

func TestChanges(t *testing.T) {
	const size = 100_000
	holes := sparse.Map{{Off: 8192, Len: 4096}, {Off: 40960, Len: 8192}} // and a hole to the end
	tests := []struct {
		name  string
		fault fault
		m     sparse.Map
		want  string                 // the change
		size  int64                  // of the file in the image, -1 for none
		zero  func(block int64) bool // blocks that lost their data
	}{
		{name: "vanished", fault: fault{open: filetree.ErrVanished}, want: `"d/f" vanished: opening: file vanished`, size: -1},
		{name: "replaced", fault: fault{open: filetree.ErrReplaced}, want: `"d/f" replaced: opening: file was replaced`, size: -1},
		{name: "forbidden", fault: fault{open: unix.EACCES}, want: `"d/f" unreadable at byte 0, 100000 bytes lost: opening: permission denied`, size: 0},
		{name: "shrank", fault: fault{size: 50_000}, want: `"d/f" shrank at 50000 bytes`, size: 50_000},
		{name: "shrank to a block's end", fault: fault{size: 40960}, want: `"d/f" shrank at 40960 bytes`, size: 40960},
		{name: "shrank to nothing", fault: fault{size: -1}, want: `"d/f" shrank at 0 bytes`, size: 0},
		{name: "shrank by a byte", fault: fault{size: size - 1}, want: `"d/f" shrank at 99999 bytes`, size: size - 1},
		{name: "shrank into a hole", m: holes, fault: fault{size: 20_000}, want: `"d/f" shrank at 20000 bytes`, size: 20_000},
		{name: "shrank into the last hole", m: holes, fault: fault{size: 60_000, changed: true}, want: `"d/f" shrank at 60000 bytes`, size: 60_000},
		{name: "grew", fault: fault{size: 200_000, changed: true}, want: `"d/f" grew at 100000 bytes`, size: size},
		{name: "modified", fault: fault{changed: true}, want: `"d/f" modified`, size: size},
		{name: "unknown", fault: fault{unknown: unix.ESTALE}, want: `"d/f" modified: stale file handle`, size: size},
		{
			name: "one bad block", fault: fault{bad: []sparse.Extent{{Off: 8192, Len: 4096}}},
			want: `"d/f" unreadable at byte 8192, 4096 bytes lost: input/output error`, size: size, zero: func(b int64) bool { return b == 2 },
		},
		{
			name: "part of a block", fault: fault{bad: []sparse.Extent{{Off: 5000, Len: 1}}},
			want: `"d/f" unreadable at byte 4096, 4096 bytes lost: input/output error`, size: size, zero: func(b int64) bool { return b == 1 },
		},
		{
			name: "bad end", fault: fault{bad: []sparse.Extent{{Off: 98304, Len: 4096}}},
			want: `"d/f" unreadable at byte 98304, 1696 bytes lost: input/output error`, size: size, zero: func(b int64) bool { return b == 24 },
		},
		{
			name: "every other block bad", fault: fault{bad: alternate(25)},
			want: `"d/f" unreadable at byte 0, 50848 bytes lost: input/output error`, size: size, zero: func(b int64) bool { return b%2 == 0 },
		},
		{
			name: "wholly bad", fault: fault{bad: []sparse.Extent{{Off: 0, Len: size}}},
			want: `"d/f" unreadable at byte 0, 100000 bytes lost: input/output error`, size: size, zero: func(int64) bool { return true },
		},
		{
			name: "bad, then shrank", fault: fault{size: 30_000, bad: []sparse.Extent{{Off: 0, Len: 4096}}},
			want: `"d/f" unreadable at byte 0, 4096 bytes lost: input/output error` + "\nunexpected EOF", size: 30_000, zero: func(b int64) bool { return b == 0 },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tree := files(t, map[string]int64{"e": 9999, "f": size, "g": 12345}, map[string]sparse.Map{"f": tt.m})
			id := tree.Find("d/f")
			p := plan(t, tree, ext4.Options{Headroom: -1})
			var got []string
			img := image(t, p, &memSource{t: tree, faults: map[filetree.ID]fault{id: tt.fault}}, func(c ext4.Change) { got = append(got, c.String()) })
			if len(got) != 1 || got[0] != tt.want {
				t.Errorf("changes %q, want %q", got, tt.want)
			}
			fsck(t, img)
			dir := mount(t, img)
			data, err := os.ReadFile(filepath.Join(dir, "d/f"))
			if tt.size < 0 {
				if !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the file is there: %v", err)
				}
				st := statOf(t, filepath.Join(dir, fmt.Sprintf("lost+found/#%d", 11+id)))
				if st.Size != 0 || st.Mode != unix.S_IFREG|0o644 {
					t.Errorf("lost file: %+v", st)
				}
			} else {
				check(t, err)
				want := make([]byte, size)
				content(id, tree.Data(id), want, 0)
				want = want[:tt.size]
				for i := range want {
					if tt.zero != nil && tt.zero(int64(i/4096)) {
						want[i] = 0
					}
				}
				if !bytes.Equal(data, want) {
					t.Errorf("%d bytes, want %d", len(data), len(want))
				}
			}
			// Its blocks can be had, and the neighbours are what they were.
			check(t, os.WriteFile(filepath.Join(dir, "d/f"), bytes.Repeat([]byte{1}, 200_000), 0o600))
			for _, n := range []string{"e", "g"} {
				id := tree.Find("d/" + n)
				want := make([]byte, tree.Size(id))
				content(id, tree.Data(id), want, 0)
				if data, err := os.ReadFile(filepath.Join(dir, "d", n)); !bytes.Equal(data, want) {
					t.Errorf("%s: differs (%v)", n, err)
				}
			}
			check(t, unix.Unmount(dir, 0))
			fsck(t, img)
		})
	}
}

func alternate(n int64) (bad []sparse.Extent) {
	for i := int64(0); i < n; i += 2 {
		bad = append(bad, sparse.Extent{Off: i * 4096, Len: 4096})
	}
	return bad
}

// A file that crumbles into more extents than fit into all spare blocks keeps
// what can be described, and it is said that readable parts were given up.
func TestCrumbledFile(t *testing.T) {
	const blocks = 60_000
	tree := files(t, map[string]int64{"f": blocks * 4096}, nil)
	id := tree.Find("d/f")
	p := plan(t, tree, ext4.Options{Headroom: -1})
	var got []ext4.Change
	img := image(t, p, &memSource{t: tree, faults: map[filetree.ID]fault{id: {bad: alternate(blocks)}}}, func(c ext4.Change) { got = append(got, c) })
	if len(got) != 1 || got[0].Kind != ext4.Unreadable || !strings.Contains(got[0].Err.Error(), "given up") {
		t.Errorf("changes %v", got)
	}
	fsck(t, img)
	dir := mount(t, img)
	m := statOf(t, filepath.Join(dir, "d/f")).Data
	if len(m) < 2000 {
		t.Errorf("only %d runs of data are left", len(m))
	}
	run(t, "ls", "-laR", dir)
}

func TestManyVanished(t *testing.T) {
	sizes := map[string]int64{}
	for i := range 9000 {
		sizes[fmt.Sprintf("file-%d", i)] = int64(i % 7 * 1000)
	}
	tree := files(t, sizes, nil)
	src := &memSource{t: tree, faults: map[filetree.ID]fault{}}
	for i := 2; i < tree.Len(); i++ {
		src.faults[filetree.ID(i)] = fault{open: filetree.ErrVanished}
	}
	p := plan(t, tree, ext4.Options{})
	kept, gone := 0, 0
	img := image(t, p, src, func(c ext4.Change) {
		if errors.Is(c.Err, ext4.ErrKept) {
			kept++
		} else {
			gone++
		}
	})
	fsck(t, img)
	dir := mount(t, img)
	d, err := os.ReadDir(filepath.Join(dir, "d"))
	check(t, err)
	l, err := os.ReadDir(filepath.Join(dir, "lost+found"))
	check(t, err)
	if len(d) != kept || len(l) != gone || kept+gone != 9000 || gone < 5000 {
		t.Errorf("%d kept, %d in the directory; %d gone, %d in lost+found", kept, len(d), gone, len(l))
	}
}

// Whatever goes wrong with any files, the image is consistent and its length as planned.
func TestRandomFaults(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	rapid.Check(t, func(rt *rapid.T) {
		tree := randomTree(rt)
		p, err := ext4.NewPlan(tree, ext4.Options{Headroom: 1 << 20, NotAfter: 1_700_000_000})
		if err != nil {
			rt.Fatal(err)
		}
		src := &memSource{t: tree, faults: randomFaults(rt, tree)}
		check(rt, os.RemoveAll(path))
		writeImage(rt, path, p, src, func(c ext4.Change) {
			if f := src.faults[c.ID]; f.open == nil && !f.changed && f.bad == nil {
				rt.Errorf("no fault, but %s", c.String())
			}
		})
		fsck(rt, path)
	})
}

// randomFaults draws what happens to the files of a tree.
func randomFaults(rt *rapid.T, tree *filetree.Tree) map[filetree.ID]fault {
	faults := map[filetree.ID]fault{}
	for i := range tree.Len() {
		id := filetree.ID(i)
		var f fault
		size := tree.Size(id)
		switch rapid.IntRange(0, 6).Draw(rt, "fault") {
		case 0:
			f.open = rapid.SampledFrom([]error{filetree.ErrVanished, filetree.ErrReplaced, unix.EIO}).Draw(rt, "error")
		case 1:
			f.size = rapid.Int64Range(-1, size+5000).Draw(rt, "new size")
			f.changed = true
		case 2:
			f.bad = rapid.SliceOfN(rapid.Map(rapid.Int64Range(0, size), func(o int64) sparse.Extent { return sparse.Extent{Off: o, Len: 1 + o%7777} }), 1, 10).Draw(rt, "bad")
			slices.SortFunc(f.bad, func(a, b sparse.Extent) int { return int(a.Off - b.Off) })
		}
		faults[id] = f
	}
	return faults
}

func TestWriteErrors(t *testing.T) {
	tree := files(t, map[string]int64{"a": 5 << 20, "b": 3 << 20}, nil)
	p := plan(t, tree, ext4.Options{})
	report := func(c ext4.Change) { t.Errorf("blamed on a file: %s", c.String()) }
	for limit := int64(0); limit < p.Map().Bytes(); limit += 1 << 20 {
		w := &limitedWriter{limit}
		if err := p.Write(t.Context(), w, &memSource{t: tree}, report); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("writer that fails after %d bytes: %v", limit, err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stopped")
	w := writerFunc(func(b []byte) (int, error) { cancel(stop); return len(b), nil })
	if err := p.Write(ctx, w, &memSource{t: tree}, report); !errors.Is(err, stop) {
		t.Errorf("cancelled: %v", err)
	}
}

type limitedWriter struct{ left int64 }

func (w *limitedWriter) Write(b []byte) (int, error) {
	if w.left < int64(len(b)) {
		return int(w.left), unix.ENOSPC
	}
	w.left -= int64(len(b))
	return len(b), nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// TestReadsAhead: several files are opened at a time, and closed whatever happens.
func TestReadsAhead(t *testing.T) {
	sizes := map[string]int64{}
	for i := range 500 {
		sizes[fmt.Sprint(i)] = int64(i) * 300 // some larger than is read ahead
	}
	tree := files(t, sizes, nil)
	p := plan(t, tree, ext4.Options{})
	for _, limit := range []int64{1 << 40, 3 * mib, 20 * mib} {
		src := &waitingSource{memSource: memSource{t: tree}, met: make(chan struct{})}
		err := p.Write(t.Context(), &limitedWriter{limit}, src, func(c ext4.Change) { t.Error(c.String()) })
		if failed := errors.Is(err, unix.ENOSPC); failed != (limit < 1<<40) || err != nil && !failed {
			t.Errorf("limit %d: %v", limit, err)
		}
		if n := src.open.Load(); n != 0 {
			t.Errorf("limit %d: %d files left open", limit, n)
		}
	}
}

// waitingSource opens no file before three opens are asked for at the same time.
type waitingSource struct {
	memSource
	asked, open atomic.Int64
	met         chan struct{}
}

type countedFile struct {
	filetree.File
	open *atomic.Int64
}

func (f countedFile) Close() error {
	f.open.Add(-1)
	return f.File.Close()
}

func (s *waitingSource) Open(ctx context.Context, id filetree.ID) (filetree.File, error) {
	if s.asked.Add(1) == 3 {
		close(s.met)
	}
	select {
	case <-s.met:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	f, err := s.memSource.Open(ctx, id)
	s.open.Add(1)
	return countedFile{f, &s.open}, err
}
