package chunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

// TestStreamModel: any mappings, against bytes in memory.
func TestStreamModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMemoryStore()
		w, err := NewWriter(context.Background(), WriterOptions{Domain: testDomain(1), Sink: m, Workers: 2})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		// Around the border of two segments, so that many cross it.
		const base = segmentRange - 20_000
		model := make([]byte, 40_000)
		size := base + int64(len(model)) - rapid.Int64Range(0, 5000).Draw(t, "less")
		s, err := w.Stream("disk", size)
		if err != nil {
			t.Fatal(err)
		}
		model = model[:size-base]
		seed := rapid.Uint64().Draw(t, "seed")
		r := rand.New(rand.NewPCG(seed, seed))
		var chunks [][]byte
		var refs []Ref
		for range rapid.IntRange(1, 8).Draw(t, "chunks") {
			p := text(r, 1+r.IntN(5000))
			if r.IntN(4) == 0 && len(chunks) > 0 {
				p = chunks[0] // twice
			}
			chunks = append(chunks, p)
			refs = append(refs, w.Add(bytes.Clone(p), nil))
		}
		type at struct{ pos, length, start, chunk int }
		var list []at
		for pos := r.IntN(3000); pos < len(model); {
			c := r.IntN(len(chunks))
			start := r.IntN(len(chunks[c]))
			length := min(1+r.IntN(len(chunks[c])-start), len(model)-pos)
			list = append(list, at{pos, length, start, c})
			copy(model[pos:], chunks[c][start:start+length])
			pos += length + r.IntN(3)*r.IntN(2000)
		}
		r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		for _, a := range list {
			if err := s.Map(base+int64(a.pos), int64(a.length), refs[a.chunk], int64(a.start)); err != nil {
				t.Fatal(err)
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
		ra := st.ReaderAt(context.Background(), rapid.Int64Range(0, 10_000).Draw(t, "cache"))
		for range 10 {
			from := r.IntN(len(model))
			p := make([]byte, r.IntN(len(model)))
			n, err := ra.ReadAt(p, base+int64(from))
			if want := min(len(p), len(model)-from); n != want || (err == io.EOF) != (n < len(p)) || (err != nil && err != io.EOF) {
				t.Fatalf("%d bytes of %d at %d of %d: %v", n, len(p), from, len(model), err)
			}
			if !bytes.Equal(p[:n], model[from:from+n]) {
				t.Fatalf("other bytes at %d", from)
			}
			to := from + r.IntN(len(model)-from)
			end := from
			for e, err := range st.Extents(context.Background(), base+int64(from), base+int64(to)) {
				if err != nil {
					t.Fatal(err)
				}
				pos := int(e.Pos - base)
				if pos < end || pos+int(e.Length) > to || e.Length < 1 || !bytes.Equal(model[end:pos], make([]byte, pos-end)) {
					t.Fatalf("extent %+v between %d and %d", e, end, to)
				}
				end = pos + int(e.Length)
			}
			if !bytes.Equal(model[end:to], make([]byte, to-end)) {
				t.Fatalf("nothing between %d and %d", end, to)
			}
		}
	})
}

// failing is a store that fails at one operation.
type failing struct {
	*memoryStore
	left atomic.Int64
}

var errStore = errors.New("the store is full")

func (f *failing) PutPack(ctx context.Context, n Name, data []byte) error {
	if f.left.Add(-1) == 0 {
		return errStore
	}
	return f.memoryStore.PutPack(ctx, n, data)
}

func (f *failing) PutIndex(ctx context.Context, n Name, data []byte) error {
	if f.left.Add(-1) == 0 {
		return errStore
	}
	return f.memoryStore.PutIndex(ctx, n, data)
}

// TestStoreFails: at every operation; the error comes out, nothing keeps
// running or waiting, and what is left is garbage at most.
func TestStoreFails(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	operations := 0
	random := noise(1, BufferSize)
	for at := int64(1); ; at++ {
		f := &failing{memoryStore: newMemoryStore()}
		f.left.Store(at)
		w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: f, PackSize: 4500 << 10})
		check(t, err)
		s, err := w.Stream("disk", 2*segmentRange)
		check(t, err)
		err = func() error {
			for i := range 20 {
				p, release := w.Buffer()
				copy(p, random)
				copy(p, fmt.Sprint(i))
				if err := s.Map(int64(i)*20<<20, int64(len(p)), w.Add(p, release), 0); err != nil {
					return err
				}
			}
			_, err := w.Finish(t.Context())
			return err
		}()
		w.Close()
		if f.left.Load() > 0 {
			check(t, err)
			break
		}
		if !errors.Is(err, errStore) {
			t.Fatalf("operation %d failed: %v", at, err)
		}
		if w.Err() == nil {
			t.Fatalf("operation %d failed: the writer does not know", at)
		}
		operations++
	}
	t.Logf("%d operations failed", operations)
	if operations < 7 {
		t.Error("these were too few")
	}
}

func TestWriterCancelled(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the operator said so")
	m := &gate{memoryStore: newMemoryStore(), entered: make(chan struct{}, 100)}
	w, err := NewWriter(ctx, WriterOptions{Domain: testDomain(1), Sink: m, PackSize: 4500 << 10})
	check(t, err)
	defer w.Close()
	s, err := w.Stream("disk", 1<<40)
	check(t, err)
	go func() {
		<-m.entered // a pack is being stored, which never ends
		cancel(why)
	}()
	random := noise(1, BufferSize)
	for i := int64(0); ; i++ {
		p, release := w.Buffer() // blocks in the end, until it is cancelled
		copy(p, random)
		copy(p, fmt.Sprint(i))
		if err = s.Map(i*BufferSize, BufferSize, w.Add(p, release), 0); err != nil {
			break
		}
	}
	if !errors.Is(err, why) {
		t.Error(err)
	}
	if _, err := w.Finish(ctx); !errors.Is(err, why) {
		t.Error(err)
	}
}

// gate is a store in which putting a pack lasts until it is cancelled.
type gate struct {
	*memoryStore
	entered chan struct{}
}

func (g *gate) PutPack(ctx context.Context, _ Name, _ []byte) error {
	g.entered <- struct{}{}
	<-ctx.Done()
	return ctx.Err()
}

func TestWriterContracts(t *testing.T) {
	begin := func(o WriterOptions) (*Writer, *StreamWriter) {
		o.Domain = testDomain(1)
		if o.Sink == nil {
			o.Sink = newMemoryStore()
		}
		w, err := NewWriter(t.Context(), o)
		check(t, err)
		t.Cleanup(w.Close)
		s, err := w.Stream("disk", 10_000)
		check(t, err)
		return w, s
	}
	usage := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", what, err)
		}
	}
	w, s := begin(WriterOptions{})
	a := w.Add([]byte("a chunk"), nil)
	usage("before the beginning", s.Map(-1, 3, a, 0))
	usage("beyond the end", s.Map(9_998, 3, a, 0))
	usage("nothing", s.Map(0, 0, a, 0))
	usage("more than the chunk", s.Map(0, 3, a, 5))
	usage("from before the chunk", s.Map(0, 3, a, -1))
	usage("no chunk", s.Map(0, 1, Ref{}, 0))
	usage("a chunk nobody made", s.Map(0, 1, Ref{77}, 0))
	_, err := w.Stream("disk", 5)
	usage("a stream twice", err)
	_, err = w.Stream("Disk", 5)
	usage("a stream's name", err)
	_, err = w.Stream("kernel", -2)
	usage("a stream's size", err)
	check(t, s.Map(0, 5, a, 0))
	check(t, s.Map(4, 1, a, 0))
	_, err = w.Finish(t.Context())
	usage("a position twice", err)

	w, _ = begin(WriterOptions{})
	w.Add(nil, nil)
	_, err = w.Finish(t.Context())
	usage("an empty chunk", err)
	w, _ = begin(WriterOptions{})
	w.Add(make([]byte, MaxChunk+1), nil)
	_, err = w.Finish(t.Context())
	usage("a chunk too large", err)

	w, _ = begin(WriterOptions{})
	u, err := w.Stream("layout", Unsized)
	check(t, err)
	check(t, u.Map(100, 5, w.Add([]byte("12345"), nil), 0))
	usage("too short", u.SetSize(104))
	_, err = w.Finish(t.Context())
	usage("no size", err)

	w, s = begin(WriterOptions{Known: lies{}})
	check(t, s.Map(0, 5, w.Add([]byte("12345"), nil), 0))
	_, err = w.Finish(t.Context())
	usage("known where nothing can be", err)

	for _, o := range []WriterOptions{
		{},
		{Domain: testDomain(1)},
		{Sink: newMemoryStore()},
		{Domain: testDomain(1), Sink: newMemoryStore(), PackSize: 1 << 20},
		{Domain: testDomain(1), Sink: newMemoryStore(), PackSize: MaxPack + 1},
		{Domain: testDomain(1), Sink: newMemoryStore(), Level: 7},
		{Domain: testDomain(1), Sink: newMemoryStore(), Workers: -1},
	} {
		_, err := NewWriter(t.Context(), o)
		usage(fmt.Sprintf("%+v", o), err)
	}
}

type lies struct{}

func (lies) Lookup(ID) (Location, bool) { return Location{Offset: 3, Sealed: 100}, true }

// TestReadOnce: many readers of the same bytes, one read of the store.
func TestReadOnce(t *testing.T) {
	im := makeSmall(t, 1)
	w := openResult(t, im.m, im.res)
	r := w.s.ReaderAt(t.Context(), 1<<20)
	before := im.m.reads
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			p := make([]byte, 64)
			if _, err := r.ReadAt(p, 1); err != nil || !bytes.Equal(p, im.disk[1:65]) {
				t.Error("other bytes", err)
			}
		})
	}
	all.Wait()
	if n := im.m.reads - before; n != 1 {
		t.Errorf("%d reads", n)
	}
}

// TestFirstByte takes three objects, wherever in a TiB it is.
func TestFirstByte(t *testing.T) {
	m := newMemoryStore()
	w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: m})
	check(t, err)
	defer w.Close()
	const size = 1 << 40
	s, err := w.Stream("disk", size)
	check(t, err)
	for i := range int64(4096) {
		check(t, s.Map(i*segmentRange, 8, w.Add(fmt.Appendf(nil, "%08d", i), nil), 0))
	}
	res, err := w.Finish(t.Context())
	check(t, err)
	if len(res.Segments) != 4096 {
		t.Errorf("%d segments", len(res.Segments))
	}
	src := &counted{Source: m}
	got := openResult(t, src, res)
	p := make([]byte, 8)
	if _, err := got.s.ReaderAt(t.Context(), 1<<20).ReadAt(p, 2222*segmentRange); err != nil || string(p) != "00002222" {
		t.Errorf("%q, %v", p, err)
	}
	if src.index.Load() != 2 || src.packs.Load() != 1 {
		t.Errorf("%d index objects and %d packs are read", src.index.Load(), src.packs.Load())
	}
}

type counted struct {
	Source
	index, packs atomic.Int64
}

func (c *counted) ReadIndex(ctx context.Context, n Name, size int64) ([]byte, error) {
	c.index.Add(1)
	return c.Source.ReadIndex(ctx, n, size)
}

func (c *counted) ReadPack(ctx context.Context, n Name, off int64, p []byte) error {
	c.packs.Add(1)
	return c.Source.ReadPack(ctx, n, off, p)
}

// TestCacheAfterCancel: a reader that is cancelled while it loads a chunk
// does not spoil it for another one.
func TestCacheAfterCancel(t *testing.T) {
	c := newCache[int, int](10)
	loading, cancelled := make(chan struct{}), make(chan struct{})
	go func() {
		_, err := c.get(context.Background(), 1, func() (int, int64, error) {
			close(loading)
			<-cancelled
			return 0, 0, fmt.Errorf("load: %w", context.Canceled)
		})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	<-loading
	done := make(chan struct{})
	go func() {
		defer close(done)
		v, err := c.get(context.Background(), 1, func() (int, int64, error) { return 7, 1, nil })
		if v != 7 || err != nil {
			t.Error(v, err)
		}
	}()
	close(cancelled)
	<-done
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	hold := make(chan struct{})
	began := make(chan struct{})
	go c.get(context.Background(), 2, func() (int, int64, error) { close(began); <-hold; return 1, 1, nil })
	<-began
	if _, err := c.get(ctx, 2, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(hold)
}

func TestCacheIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCache[int, int](100)
		for range 200 {
			k := rapid.IntRange(0, 50).Draw(t, "key")
			cost := int64(k * 3)
			v, err := c.get(context.Background(), k, func() (int, int64, error) { return k, cost, nil })
			if v != k || err != nil {
				t.Fatal(v, err)
			}
			sum := int64(0)
			for _, e := range c.entries {
				sum += e.cost
			}
			if sum != c.used || sum > 100 || c.order.Len() != len(c.entries) {
				t.Fatalf("%d, %d are used; %d and %d entries", sum, c.used, c.order.Len(), len(c.entries))
			}
		}
	})
}

// discard is a store that keeps nothing.
type discard struct{ bytes, packs atomic.Int64 }

func (d *discard) PutPack(_ context.Context, _ Name, data []byte) error {
	d.bytes.Add(int64(len(data)))
	d.packs.Add(1)
	return nil
}

func (d *discard) PutIndex(context.Context, Name, []byte) error { return nil }

// TestMemory: what a writer holds does not grow with what is written.
func TestMemory(t *testing.T) {
	w, err := NewWriter(t.Context(), WriterOptions{Domain: testDomain(1), Sink: &discard{}, Workers: 2})
	check(t, err)
	defer w.Close()
	const size = 1 << 40 // sparse, and dense here and there
	s, err := w.Stream("disk", size)
	check(t, err)
	random := noise(1, BufferSize)
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	most := uint64(0)
	for i := range int64(384) {
		p, release := w.Buffer()
		copy(p, random)
		copy(p, fmt.Sprint(i))
		pos := i * (size / 384) / BufferSize * BufferSize
		check(t, s.Map(pos, BufferSize, w.Add(p, release), 0))
		check(t, s.Settled(t.Context(), pos))
		if i%32 == 31 {
			runtime.GC()
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc-min(before.HeapAlloc, now.HeapAlloc))
		}
	}
	_, err = w.Finish(t.Context())
	check(t, err)
	t.Logf("384 MiB written, %d MiB of memory at most", most>>20)
	if most > 130<<20 {
		t.Error("that is too much")
	}
}
