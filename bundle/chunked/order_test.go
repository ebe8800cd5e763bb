package chunked

import (
	"bytes"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// orderImage is a stream of chunks some of which are at several places.
func orderImage(t interface{ Fatal(...any) }, r *rand.Rand, chunks int) (*memoryStore, *Stream, []byte) {
	m := newMemoryStore()
	w, err := NewWriter(context.Background(), WriterOptions{Domain: testDomain(1), Sink: m, Workers: 2, PackSize: 5 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	const base = segmentRange - 100_000 // so that there are two segments
	disk := make([]byte, 200_000)
	s, err := w.Stream("disk", segmentRange+100_000)
	if err != nil {
		t.Fatal(err)
	}
	pos := 0
	for range chunks {
		p := make([]byte, 1+r.IntN(3000))
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		ref := w.Add(bytes.Clone(p), nil)
		for range 1 + r.IntN(2) {
			start := r.IntN(len(p))
			n := 1 + r.IntN(len(p)-start)
			if pos+n > len(disk) {
				break
			}
			copy(disk[pos:], p[start:start+n])
			if err := s.Map(base+int64(pos), int64(n), ref, int64(start)); err != nil {
				t.Fatal(err)
			}
			pos += n + r.IntN(2)*r.IntN(500)
		}
	}
	res, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	x, err := OpenIndex(context.Background(), m, res.Root.Name, res.Root.Size, res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	st, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	return m, st, disk
}

// TestOrderBringsAll: whatever hints say, each byte comes once, and is right.
func TestOrderBringsAll(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		r := rand.New(rand.NewPCG(seed, 1))
		_, st, disk := orderImage(t, r, 1+r.IntN(60))
		base := st.Size() - int64(len(disk))
		ranges := func() (l []Range) {
			for range r.IntN(20) {
				x := Range{base + r.Int64N(int64(len(disk))), 1 + r.Int64N(5000)}
				switch r.IntN(8) {
				case 0:
					x.Position = -x.Position
				case 1:
					x.Length = math.MaxInt64
				case 2:
					x.Position = math.MaxInt64 - 5
				case 3:
					x.Length = 0
				}
				l = append(l, x)
			}
			return l
		}
		have := int64(-1)
		o := OrderOptions{Trace: ranges(), Metadata: ranges(), Span: r.Int64N(3) * 4000}
		if r.IntN(2) == 0 {
			have = base + r.Int64N(int64(len(disk)))
			o.Have = func(off, length int64) bool { return off+length <= have }
		}
		got := make([]byte, len(disk))
		last := PhaseTrace
		times := map[int64]int{}
		for b, err := range st.Order(t.Context(), o) {
			if err != nil {
				t.Fatal(err)
			}
			if b.Phase < last {
				t.Fatalf("%s comes after %s", b.Phase, last)
			}
			last = b.Phase
			if err := st.Fetch(t.Context(), b, func(e Extent, p []byte) error {
				copy(got[e.Pos-base:], p)
				times[e.Pos]++
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		from := max(0, have-base)
		for e, err := range st.Extents(t.Context(), 0, st.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if n := times[e.Pos]; n > 1 || n == 0 && e.Pos+e.Length > have {
				t.Fatalf("what is at %d came %d times", e.Pos, n)
			}
		}
		// A chunk of which a part is missing comes whole.
		if !bytes.Equal(got[from:], disk[from:]) {
			t.Fatal("other bytes")
		}
	})
}

// TestOrderBeginsWithTheTrace: the first ranges come first, each once, in few
// reads where they lie together.
func TestOrderBeginsWithTheTrace(t *testing.T) {
	m, st, _ := orderImage(t, rand.New(rand.NewPCG(7, 7)), 60)
	var all []Extent
	for e, err := range st.Extents(t.Context(), 0, st.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	trace := []Range{{all[20].Pos, 1}, {all[3].Pos, 1}, {all[20].Pos, 1}}
	var phases []Phase
	var wants []Digest
	m.reads = 0
	for b, err := range st.Order(t.Context(), OrderOptions{Trace: trace, Span: 1}) {
		if err != nil {
			t.Fatal(err)
		}
		phases = append(phases, b.Phase)
		wants = append(wants, b.Wants[0].Chunk.Digest)
	}
	if len(phases) < 3 || !slices.Equal(phases[:3], []Phase{PhaseTrace, PhaseTrace, PhaseRest}) || wants[0] != all[20].Chunk.Digest || wants[1] != all[3].Chunk.Digest {
		t.Errorf("phases %v", phases[:3])
	}
	if m.reads != 0 {
		t.Errorf("%d packs were read to put them in order", m.reads)
	}
	n := 0
	for _, err := range st.Order(t.Context(), OrderOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n > 2 {
		t.Errorf("%d reads for one pack and two segments", n)
	}
}

// TestFetchDamaged: one chunk that is gone does not keep the others.
func TestFetchDamaged(t *testing.T) {
	m, st, disk := orderImage(t, rand.New(rand.NewPCG(9, 9)), 30)
	base := st.Size() - int64(len(disk))
	var hurt Extent
	for e, err := range st.Extents(t.Context(), 0, st.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		hurt = e
	}
	m.packs[hurt.Chunk.At.Pack][hurt.Chunk.At.Offset+int64(hurt.Chunk.At.Sealed)-1] ^= 1
	missing := 0
	var failed error
	got := make([]byte, len(disk))
	for b, err := range st.Order(t.Context(), OrderOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Fetch(t.Context(), b, func(e Extent, p []byte) error { copy(got[e.Pos-base:], p); return nil }); err != nil {
			failed = err
			missing++
		}
	}
	if missing != 1 || !errors.Is(failed, ErrCorrupt) {
		t.Fatalf("%d reads failed: %v", missing, failed)
	}
	for e := range st.Extents(t.Context(), 0, st.Size()) {
		same := bytes.Equal(got[e.Pos-base:][:e.Length], disk[e.Pos-base:][:e.Length])
		if same != (e.Chunk.Digest != hurt.Chunk.Digest) {
			t.Errorf("what is at %d: right is %v", e.Pos, same)
		}
	}
}

// rereading is a store behind a cache that tells lies.
type rereading struct {
	*memoryStore
	lies, again int
}

func (r *rereading) ReadPack(ctx context.Context, n Name, off int64, p []byte) error {
	r.lies++
	if err := r.memoryStore.ReadPack(ctx, n, off, p); err != nil {
		return err
	}
	p[len(p)-1] ^= 1
	return nil
}

func (r *rereading) RereadPack(ctx context.Context, n Name, off int64, p []byte) error {
	r.again++
	return r.memoryStore.ReadPack(ctx, n, off, p)
}

// TestReread: what a cache has wrong is read from the store.
func TestReread(t *testing.T) {
	im := makeSmall(t, 4)
	src := &rereading{memoryStore: im.m}
	x, err := OpenIndex(t.Context(), src, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	out := make(image, s.Size())
	if err := Restore(t.Context(), s, out, RestoreOptions{Workers: 1}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, im.disk) || src.again == 0 {
		t.Errorf("%d reads again of %d lies; the disk is right: %v", src.again, src.lies, bytes.Equal(out, im.disk))
	}
}
