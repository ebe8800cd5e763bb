package chunked

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/instar-image/instar/bundle/sparse"
)

// tree is files and metadata of a filesystem image, as they are given to a
// Cutter.
type tree struct {
	files []treeFile
	meta  []treePiece
	size  int64
}

type treeFile struct {
	path string
	data []byte
}

type treePiece struct {
	pos int64
	p   []byte
}

// randomTree has n small files, a few large ones, and metadata behind.
func randomTree(seed uint64, n int) *tree {
	r := rand.New(rand.NewPCG(seed, 5))
	t := &tree{}
	for i := range n {
		t.files = append(t.files, treeFile{fmt.Sprintf("/small/%d", i), text(r, r.IntN(40_000))})
	}
	for i := range 3 {
		p := text(r, 700_000+r.IntN(2_000_000))
		clear(p[100_000:200_000])
		t.files = append(t.files, treeFile{fmt.Sprintf("/large/%d", i), p})
	}
	for i := range 40 {
		p := text(r, 4096*(1+r.IntN(40)))
		if i%4 == 0 {
			clear(p[:4096])
		}
		t.meta = append(t.meta, treePiece{0, p})
	}
	return t
}

// lay gives everything a position and makes the image.
func (t *tree) lay(shift int64) []byte {
	pos := shift
	for _, f := range t.files {
		pos += (int64(len(f.data)) + 4095) / 4096 * 4096
	}
	for i := range t.meta {
		if t.meta[i].pos == 0 {
			t.meta[i].pos = pos
		}
		pos = t.meta[i].pos + int64(len(t.meta[i].p)) + 8192
	}
	t.size = pos
	img := make([]byte, pos)
	at := shift
	for _, f := range t.files {
		copy(img[at:], f.data)
		at += (int64(len(f.data)) + 4095) / 4096 * 4096
	}
	for _, m := range t.meta {
		copy(img[m.pos:], m.p)
	}
	return img
}

// give hands the tree to a cutter, in pieces; each is released once.
func (t *tree) give(tb testing.TB, c *Cutter, img []byte, shift int64) {
	tb.Helper()
	var out atomic.Int64
	lend := func(p []byte) ([]byte, func()) {
		own := bytes.Clone(p)
		out.Add(1)
		var once atomic.Bool
		return own, func() {
			if once.Swap(true) {
				tb.Error("a piece is released twice")
			}
			for i := range own { // nobody may read it now
				own[i] = 0xdb
			}
			out.Add(-1)
		}
	}
	pos := shift
	for _, f := range t.files {
		check(tb, c.File(f.path, int64(len(f.data))))
		n := (int64(len(f.data)) + 4095) / 4096 * 4096
		for off := int64(0); off < n; {
			k := min(1<<20, n-off)
			if off == 0 && len(f.path)%2 == 0 {
				k = min(k, 300*4096)
			}
			p, release := lend(img[pos+off : pos+off+k])
			check(tb, c.Data(off, pos+off, p, release))
			off += k
		}
		pos += n
	}
	for _, m := range t.meta {
		p, release := lend(m.p)
		check(tb, c.Metadata(m.pos, p, release))
	}
	check(tb, c.Finish())
	check(tb, c.w.wait(&c.w.busy))
	if n := out.Load(); n != 0 {
		tb.Errorf("%d pieces were not released", n)
	}
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// written is an image that was written, and opened again.
type written struct {
	res *Result
	x   *Index
	s   *Stream
}

func openResult(tb testing.TB, src Source, res *Result) *written {
	tb.Helper()
	x, err := OpenIndex(tb.Context(), src, res.Root.Name, res.Root.Size, res.IndexKey)
	check(tb, err)
	s, err := x.Stream("disk")
	check(tb, err)
	return &written{res, x, s}
}

// write puts a tree into the store and checks that it comes back.
func (t *tree) write(tb testing.TB, m *memoryStore, o WriterOptions, parent *written, shift int64) *written {
	tb.Helper()
	o.Domain, o.Sink, o.Known = testDomain(1), m, m
	var co CutterOptions
	if parent != nil {
		o.Parent, co.Parent = parent.x, parent.s
	}
	w, err := NewWriter(tb.Context(), o)
	check(tb, err)
	defer w.Close()
	img := t.lay(shift)
	s, err := w.Stream("disk", t.size)
	check(tb, err)
	c := w.Cutter(tb.Context(), s, co)
	t.give(tb, c, img, shift)
	if n, err := c.ParentUnread(); n > 0 {
		tb.Logf("%d pieces of the parent could not be read: %v", n, err)
	}
	res, err := w.Finish(tb.Context())
	check(tb, err)
	m.learn(tb, o.Domain)
	got := openResult(tb, m, res)
	out := make(image, t.size)
	check(tb, Restore(tb.Context(), got.s, out, RestoreOptions{}))
	if !bytes.Equal(out, img) {
		tb.Fatal("the image came back changed")
	}
	data := int64(0)
	for i := 0; i < len(img); i += 4096 {
		if !bytes.Equal(img[i:i+4096], make([]byte, 4096)) {
			data += 4096
		}
	}
	if res.Data != data {
		tb.Errorf("%d bytes are mapped, %d are in blocks that are not zero", res.Data, data)
	}
	return got
}

func TestCutterChanges(t *testing.T) {
	m := newMemoryStore()
	tr := randomTree(1, 400)
	first := tr.write(t, m, WriterOptions{}, nil, 0)
	if first.res.Counters.Chunks > 120 {
		t.Errorf("%d chunks", first.res.Counters.Chunks)
	}
	grown := func(w *written, most int64, what string) {
		t.Helper()
		if n := w.res.Counters.NewBytes; n > most {
			t.Errorf("%s: %d new bytes, %d at most", what, n, most)
		}
	}
	same := tr.write(t, m, WriterOptions{}, first, 0)
	grown(same, 0, "nothing changed")
	if same.res.AddedIndex != same.res.Root.Size {
		t.Errorf("nothing changed: %d bytes of index", same.res.AddedIndex)
	}
	// Elsewhere in the image: the same chunks.
	moved := randomTree(1, 400)
	grown(moved.write(t, m, WriterOptions{}, nil, 123*4096), 2*metaSize*int64(len(tr.meta)), "moved by some blocks")
	// A small file more disturbs the chunk it comes into.
	more := randomTree(1, 400)
	more.files = append(more.files[:150:150], append([]treeFile{{"/small/new", text(rand.New(rand.NewPCG(9, 9)), 9000)}}, more.files[150:]...)...)
	grown(more.write(t, m, WriterOptions{}, nil, 0), 2*groupMax+2*metaSize*int64(len(tr.meta)), "a small file more")
	// A byte in a large file: one cell.
	large := randomTree(1, 400)
	large.files[401].data[600_000]++
	w := large.write(t, m, WriterOptions{}, first, 0)
	grown(w, cellSize, "a byte in a large file")
	if w.res.Counters.NewChunks != 1 {
		t.Errorf("%d new chunks", w.res.Counters.NewChunks)
	}
}

func TestCutterParentMetadata(t *testing.T) {
	m := newMemoryStore()
	first := randomTree(2, 10).write(t, m, WriterOptions{}, nil, 0)
	change := func(n int) *tree {
		tr := randomTree(2, 10)
		tr.lay(0)
		for i := range n {
			tr.meta[1+3*i].p[5000]++
		}
		return tr
	}
	second := change(5).write(t, m, WriterOptions{}, first, 0)
	if n := second.res.Counters.NewBytes; n != 5*4096 {
		t.Errorf("%d new bytes for 5 blocks", n)
	}
	if second.res.Counters.NewChunks != 1 {
		t.Errorf("%d new chunks", second.res.Counters.NewChunks)
	}
	// The third generation points into the chunks of both.
	third := change(7).write(t, m, WriterOptions{}, second, 0)
	if n := third.res.Counters.NewBytes; n != 2*4096 {
		t.Errorf("%d new bytes for 2 blocks", n)
	}
	// What may not be referred to is stored again.
	none := func(Name) bool { return false }
	clear(m.known)
	fourth := change(8).write(t, m, WriterOptions{UsablePack: none, UsableIndex: none}, second, 0)
	for _, p := range fourth.res.Packs {
		if p.Size == 0 {
			t.Errorf("pack %s is not this writer's", p.Name)
		}
	}
	// What cannot be read, too.
	lost := newMemoryStore()
	lost.index = m.index
	src, err := OpenIndex(t.Context(), lost, second.res.Root.Name, second.res.Root.Size, second.res.IndexKey)
	check(t, err)
	ss, err := src.Stream("disk")
	check(t, err)
	fifth := change(5).write(t, newMemoryStore(), WriterOptions{}, &written{second.res, src, ss}, 0)
	if fifth.res.Counters.NewBytes == 0 {
		t.Error("a parent that is gone was used")
	}
}

func TestCopyFrom(t *testing.T) {
	m := newMemoryStore()
	tr := randomTree(3, 50)
	first := tr.write(t, m, WriterOptions{}, nil, 0)
	img := tr.lay(0)
	w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: m, UsablePack: func(n Name) bool { return true }})
	check(t, err)
	defer w.Close()
	s, err := w.Stream("disk", 2*tr.size)
	check(t, err)
	ok, err := s.CanCopy(t.Context(), first.s, 0, tr.size)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	want := make([]byte, 2*tr.size)
	// Three parts in another order.
	a, b := tr.size/3, tr.size/2
	for _, c := range []struct{ from, pos, length int64 }{{b, 0, tr.size - b}, {0, tr.size, a}, {a, tr.size + b, b - a}} {
		check(t, s.CopyFrom(t.Context(), first.s, c.from, c.pos, c.length))
		copy(want[c.pos:], img[c.from:c.from+c.length])
	}
	res, err := w.Finish(t.Context())
	check(t, err)
	if res.Added != 0 {
		t.Errorf("%d bytes added", res.Added)
	}
	out := make(image, len(want))
	check(t, Restore(t.Context(), openResult(t, m, res).s, out, RestoreOptions{}))
	if !bytes.Equal(out, want) {
		t.Error("other bytes")
	}
	foreign, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(2), Sink: m})
	check(t, err)
	defer foreign.Close()
	s, err = foreign.Stream("disk", tr.size)
	check(t, err)
	if err := s.CopyFrom(t.Context(), first.s, 0, 0, tr.size); !errors.Is(err, ErrForeign) {
		t.Errorf("chunks of another domain: %v", err)
	}
}

func TestCopyPlain(t *testing.T) {
	for _, size := range []int{0, 1, 4096, cellSize, cellSize + 1, 3*cellSize - 5} {
		m := newMemoryStore()
		w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: m})
		check(t, err)
		p := text(rand.New(rand.NewPCG(1, uint64(size))), size)
		s, err := w.Stream("disk", Unsized)
		check(t, err)
		c := w.Cutter(t.Context(), s, CutterOptions{})
		n, err := c.Copy(bytes.NewReader(p))
		check(t, err)
		if n != int64(size) {
			t.Errorf("%d bytes of %d", n, size)
		}
		check(t, c.Finish())
		check(t, s.SetSize(n))
		res, err := w.Finish(t.Context())
		check(t, err)
		got, err := io.ReadAll(io.NewSectionReader(openResult(t, m, res).s.ReaderAt(t.Context(), 1<<20), 0, 1<<30))
		check(t, err)
		if !bytes.Equal(got, p) {
			t.Errorf("%d bytes came back as %d others", size, len(got))
		}
		w.Close()
	}
}

func TestCopySparse(t *testing.T) {
	m := newMemoryStore()
	w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: m, PackSize: 5 << 20})
	check(t, err)
	defer w.Close()
	const size = 3*segmentRange + 12345
	img := make([]byte, size)
	r := rand.New(rand.NewPCG(4, 4))
	var sm sparse.Map
	for pos := int64(0); pos < size; pos += int64(1+r.IntN(400)) * 101 * 1024 {
		n := min(size-pos, int64(1+r.IntN(2_000_000)))
		if last := len(sm) - 1; last >= 0 && sm[last].End() >= pos {
			continue
		}
		copy(img[pos:], text(r, int(n)))
		sm = sm.Append(sparse.Extent{Off: pos, Len: n})
	}
	s, err := w.Stream("disk", size)
	check(t, err)
	c := w.Cutter(t.Context(), s, CutterOptions{})
	check(t, c.CopySparse(bytes.NewReader(img), sm))
	if err := s.Map(0, 1, Ref{1}, 0); !errors.Is(err, ErrUsage) {
		t.Errorf("mapped where all is settled: %v", err)
	}
	check(t, c.Finish())
	check(t, w.wait(&w.busy))
	w.flush(t.Context())
	check(t, w.wait(&w.loose))
	if n := len(m.index); n < 2 {
		t.Errorf("only %d segments are stored before the end", n)
	}
	res, err := w.Finish(t.Context())
	check(t, err)
	got := openResult(t, m, res)
	out := make(image, size)
	check(t, Restore(t.Context(), got.s, out, RestoreOptions{}))
	if !bytes.Equal(out, img) {
		t.Error("other bytes")
	}
	// Over something else, what is not data is made zero.
	for i := range out {
		out[i] = 0xff
	}
	check(t, Restore(t.Context(), got.s, out, RestoreOptions{Zero: out.zero}))
	if !bytes.Equal(out, img) {
		t.Error("other bytes where there was something before")
	}
	// What is there already is left alone.
	clear(out)
	half := int64(size / 2)
	check(t, Restore(t.Context(), got.s, out, RestoreOptions{Have: func(off, length int64) bool { return off < half }}))
	for i := range half {
		if out[i] != 0 {
			t.Fatalf("byte %d was there, and is written", i)
		}
	}
	if !bytes.Equal(out[half+MaxChunk:], img[half+MaxChunk:]) {
		t.Error("what was not there is not restored")
	}
}

func TestRecords(t *testing.T) {
	m := newMemoryStore()
	write := func(change int) (*written, []byte) {
		w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: m, Known: m})
		check(t, err)
		defer w.Close()
		s, err := w.Stream("disk", Unsized)
		check(t, err)
		rec := w.Cutter(t.Context(), s, CutterOptions{}).Records()
		var all []byte
		r := rand.New(rand.NewPCG(6, 6))
		for i := range 2000 {
			p := text(r, r.IntN(500))
			if i == 77 {
				p = text(r, 3_000_000)
			}
			if i == change {
				p = append(p, "changed"...)
			}
			n, err := rec.Write(p)
			check(t, err)
			if n != len(p) {
				t.Fatalf("%d of %d bytes are written", n, len(p))
			}
			all = append(all, p...)
		}
		check(t, rec.Close())
		res, err := w.Finish(t.Context())
		check(t, err)
		m.learn(t, testDomain(1))
		got := openResult(t, m, res)
		out := make(image, got.s.Size())
		check(t, Restore(t.Context(), got.s, out, RestoreOptions{}))
		if !bytes.Equal(out, all) {
			t.Fatal("other bytes")
		}
		return got, all
	}
	write(-1)
	again, _ := write(-1)
	if again.res.Counters.NewBytes != 0 {
		t.Errorf("the same again: %d new bytes", again.res.Counters.NewBytes)
	}
	changed, _ := write(1000)
	if n := changed.res.Counters.NewBytes; n == 0 || n > recordsMax {
		t.Errorf("a record changed: %d new bytes", n)
	}
}
