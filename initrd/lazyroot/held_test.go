package lazyroot

import (
	"bytes"
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

// TestHeld: what is at hand is read without a store, for itself and for what lies around
// it; what is not brings its surroundings in one range.
func TestHeld(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 24 << 20, Chunk: 64 << 10, Seed: 9})
	st, err := s.Index.Stream(chunked.StreamDisk)
	if err != nil {
		t.Fatal(err)
	}
	var all []chunked.Extent
	for e, err := range st.Extents(t.Context(), 0, st.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	// Of the first third, every chunk.
	o := &chunked.Opening{}
	held := map[chunked.Digest]bool{}
	end := all[len(all)/3].Pos
	var chunks []chunked.Chunk
	for _, e := range all {
		if e.Pos < end && !held[e.Chunk.Digest] {
			held[e.Chunk.Digest] = true
			chunks = append(chunks, e.Chunk)
		}
	}
	slices.SortFunc(chunks, func(a, b chunked.Chunk) int {
		if c := a.At.Pack.Compare(b.At.Pack); c != 0 {
			return c
		}
		return int(a.At.Offset - b.At.Offset)
	})
	for _, c := range chunks {
		b := make([]byte, c.At.Sealed)
		if err := s.ReadPack(t.Context(), c.At.Pack, c.At.Offset, b); err != nil {
			t.Fatal(err)
		}
		if n := len(o.Ranges); n > 0 && o.Ranges[n-1].Pack == c.At.Pack && o.Ranges[n-1].Offset+int64(len(o.Ranges[n-1].Bytes)) == c.At.Offset {
			o.Ranges[n-1].Bytes = append(o.Ranges[n-1].Bytes, b...)
			continue
		}
		o.Ranges = append(o.Ranges, chunked.OpeningRange{Pack: c.At.Pack, Offset: c.At.Offset, Bytes: b})
	}
	img, err := NewImage(s.Index.With(o.Before(s)), ImageOptions{Around: 1 << 20, Memory: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, Options{Image: img})
	defer shut(t, d)
	read := func(off int64) {
		t.Helper()
		p := make([]byte, 4096)
		if err := d.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, s.Data[off:off+4096]) {
			t.Fatalf("at %d: other bytes (%v)", off, err)
		}
		d.fetch.wg.Wait() // also for what nobody waits for
	}
	before := s.Reads.Load()
	for off := int64(0); off+4096 <= end; off += 4096 { // one after the other: what else would be read ahead of
		read(off)
	}
	if n := s.Reads.Load() - before; n != 0 {
		t.Errorf("a store was asked %d times for what is at hand", n)
	}
	// In the middle of what is not.
	far := all[len(all)*2/3]
	if held[far.Chunk.Digest] {
		t.Fatal("the layout has it at hand: choose another")
	}
	read(far.Pos)
	if n := s.Reads.Load() - before; n != 1 {
		t.Errorf("one read and what lies around it took %d requests", n)
	}
	fetched := s.Bytes.Load()
	near := 0
	for _, e := range slices.Backward(all) { // so that nothing is read ahead
		if a, b := e.Chunk.At, far.Chunk.At; a.Pack == b.Pack && a.Offset > b.Offset-512<<10 && a.Offset < b.Offset+512<<10 && !held[e.Chunk.Digest] {
			near++
			read(e.Pos)
		}
	}
	if near < 5 || s.Reads.Load() != before+1 || s.Bytes.Load() != fetched {
		t.Errorf("%d extents around it took %d requests more", near, s.Reads.Load()-before-1)
	}
}

// claiming says of all that it is at hand, which it is not, and counts who reads at a time.
type claiming struct {
	chunked.Source
	now, most atomic.Int64
}

func (*claiming) Holds(chunked.Location) bool { return true }

func (c *claiming) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	now := c.now.Add(1)
	defer c.now.Add(-1)
	for most := c.most.Load(); now > most && !c.most.CompareAndSwap(most, now); most = c.most.Load() {
	}
	time.Sleep(time.Millisecond) // others come meanwhile
	return c.Source.ReadPack(ctx, n, off, p)
}

// TestHeldWrong: what is at hand may be wrong, so that a store is asked after all: not
// for all of a read at once.
func TestHeldWrong(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 8 << 20, Chunk: 64 << 10, Seed: 9})
	src := &claiming{Source: s}
	img, err := NewImage(s.Index.With(src), ImageOptions{Memory: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, Options{Image: img})
	defer shut(t, d)
	p := make([]byte, 8<<20)
	if err := d.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, s.Data) {
		t.Fatalf("other bytes (%v)", err)
	}
	if n := src.most.Load(); n > demandSlots {
		t.Errorf("%d requests at a time", n)
	}
}
