package chunked

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestCutterFirst: what is read first lies together and in its order, metadata before files, whatever
// ranges name it; the image is the same, and so is a later one's share of it.
func TestCutterFirst(t *testing.T) {
	tr := randomTree(4, 300)
	img := tr.lay(0)
	r := rand.New(rand.NewPCG(8, 8))
	var ranges []Range
	for range 60 {
		ranges = append(ranges, Range{r.Int64N(tr.size) / 4096 * 4096, int64(1+r.IntN(20)) * 4096})
	}
	ranges = append(ranges, Range{tr.size + 5, 10}, Range{-4096, 4096}, Range{tr.size - 1, 1 << 40})
	write := func(m *memoryStore, parent *written) *written {
		t.Helper()
		o := WriterOptions{Domain: testDomain(1), Sink: m, Known: m, Workers: 1}
		co := CutterOptions{First: ranges}
		if parent != nil {
			o.Parent, co.Parent = parent.x, parent.s
		}
		w, err := NewWriter(t.Context(), o)
		check(t, err)
		defer w.Close()
		s, err := w.Stream("disk", tr.size)
		check(t, err)
		c := w.Cutter(t.Context(), s, co)
		tr.give(t, c, img, 0)
		res, err := w.Finish(t.Context())
		check(t, err)
		m.learn(t, o.Domain)
		got := openResult(t, m, res)
		out := make(image, tr.size)
		check(t, Restore(t.Context(), got.s, out, RestoreOptions{}))
		if !bytes.Equal(out, img) {
			t.Fatal("the image came back changed")
		}
		return got
	}
	m := newMemoryStore()
	got := write(m, nil)
	var order []Location
	seen := map[Location]bool{}
	named := int64(0)
	blocks := map[int64]bool{}
	ofMeta := func(pos int64) bool {
		return slices.ContainsFunc(tr.meta, func(m treePiece) bool { return pos >= m.pos && pos < m.pos+int64(len(m.p)) })
	}
	// The filesystem's own blocks, and then those of files.
	var inOrder []Range
	for _, meta := range []bool{true, false} {
		for _, x := range ranges {
			for pos := x.Position; pos >= 0 && pos < min(x.Position+x.Length, tr.size); pos += 4096 {
				if ofMeta(pos) == meta {
					inOrder = append(inOrder, Range{pos / 4096 * 4096, 4096})
				}
			}
		}
	}
	for _, x := range inOrder {
		for e, err := range got.s.Extents(t.Context(), x.Position, min(tr.size, x.Position+x.Length)) {
			check(t, err)
			if !seen[e.Chunk.At] {
				seen[e.Chunk.At] = true
				order = append(order, e.Chunk.At)
			}
			for p := e.Pos; p < e.Pos+e.Length; p += 4096 {
				if !blocks[p] {
					blocks[p] = true
					named += 4096
				}
			}
		}
	}
	if !slices.IsSortedFunc(order, func(a, b Location) int { return int(a.Offset - b.Offset) }) {
		t.Error("what is read first is not laid out in its order")
	}
	sealed := int64(0)
	for _, at := range order {
		if at.Pack != order[0].Pack {
			t.Error("what is read first lies in two packs")
		}
		sealed += int64(at.Sealed)
	}
	last := order[len(order)-1]
	if span := last.Offset + int64(last.Sealed) - order[0].Offset; span != sealed {
		t.Errorf("%d bytes lie in %d", sealed, span)
	}
	if want := int(named/firstChunk) + 2; len(order) > want {
		t.Errorf("%d bytes are in %d chunks, not %d", named, len(order), want)
	}
	if again := write(m, got); again.res.Counters.NewBytes != 0 {
		t.Errorf("the same again stores %d new bytes", again.res.Counters.NewBytes)
	}
	// With a parent that was not laid out, only what is read first is new.
	m = newMemoryStore()
	plain := tr.write(t, m, WriterOptions{}, nil, 0)
	s, c := func() (*StreamWriter, *Cutter) {
		w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: m, Known: m, Parent: plain.x})
		check(t, err)
		t.Cleanup(w.Close)
		s, err := w.Stream("disk", tr.size)
		check(t, err)
		return s, w.Cutter(t.Context(), s, CutterOptions{Parent: plain.s, First: ranges})
	}()
	for pos := int64(0); pos < tr.size; pos += 4096 {
		n := min(4096, tr.size-pos)
		if c.IsFirst(pos) {
			c.FirstOf(pos, img[pos:pos+n])
			if n == 4096 {
				continue
			}
		}
		check(t, s.CopyFrom(t.Context(), plain.s, pos, pos, n))
	}
	check(t, c.Finish())
	res, err := c.w.Finish(t.Context())
	check(t, err)
	if res.Counters.NewBytes != named {
		t.Errorf("%d bytes are new, %d are read first", res.Counters.NewBytes, named)
	}
	out := make(image, tr.size)
	check(t, Restore(t.Context(), openResult(t, m, res).s, out, RestoreOptions{}))
	if !bytes.Equal(out, img) {
		t.Error("the image came back changed")
	}
}
