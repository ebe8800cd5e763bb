package chunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

func sampleOpening() *Opening {
	object := func(s string) OpeningObject { return OpeningObject{NameOf([]byte(s)), []byte(s)} }
	o := &Opening{
		Objects: []OpeningObject{object("root"), object("segment")},
		Ranges:  []OpeningRange{{Name{1}, 16, []byte("abcdef")}, {Name{1}, 23, []byte("gh")}, {Name{2}, 16, []byte("ij")}},
	}
	slices.SortFunc(o.Objects, func(a, b OpeningObject) int { return a.Name.Compare(b.Name) })
	return o
}

func FuzzOpening(f *testing.F) {
	p, err := sampleOpening().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		o, err := DecodeOpening(p)
		if err != nil {
			fuzzTyped(t, err)
			return
		}
		if got, err := o.Encode(); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%x is encoded as %x (%v)", p, got, err)
		}
	})
}

// TestOpeningForm: there is one form, and what breaks a rule is refused on both ways.
func TestOpeningForm(t *testing.T) {
	p, err := sampleOpening().Encode()
	check(t, err)
	got, err := DecodeOpening(p)
	check(t, err)
	if fmt.Sprint(got) != fmt.Sprint(sampleOpening()) {
		t.Errorf("%v came back as %v", sampleOpening(), got)
	}
	for n := range p {
		if _, err := DecodeOpening(p[:n]); !errors.Is(err, ErrFormat) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := DecodeOpening(append(slices.Clone(p), 0)); !errors.Is(err, ErrFormat) {
		t.Errorf("with a byte behind: %v", err)
	}
	later := slices.Clone(p)
	later[8] = 2
	if _, err := DecodeOpening(later); !errors.Is(err, ErrVersion) {
		t.Errorf("of version 2: %v", err)
	}
	if _, err := DecodeOpening(make([]byte, MaxOpening+1)); !errors.Is(err, ErrLimit) {
		t.Errorf("too large: %v", err)
	}
	for what, change := range map[string]func(*Opening){
		"nothing":                  func(o *Opening) { *o = Opening{} },
		"objects in another order": func(o *Opening) { slices.Reverse(o.Objects) },
		"an object twice":          func(o *Opening) { o.Objects[1] = o.Objects[0] },
		"an empty object":          func(o *Opening) { o.Objects[0].Bytes = nil },
		"ranges in another order":  func(o *Opening) { slices.Reverse(o.Ranges) },
		"ranges that meet":         func(o *Opening) { o.Ranges[1].Offset = 22 },
		"ranges that overlap":      func(o *Opening) { o.Ranges[1].Offset = 18 },
		"a range in a pack's head": func(o *Opening) { o.Ranges[0].Offset = 15 },
		"a range behind all packs": func(o *Opening) { o.Ranges[2].Offset = MaxPack - 1 },
		"an empty range":           func(o *Opening) { o.Ranges[2].Bytes = nil },
	} {
		o := sampleOpening()
		change(o)
		if _, err := o.Encode(); !errors.Is(err, ErrUsage) {
			t.Errorf("%s is written: %v", what, err)
		}
	}
	o := sampleOpening()
	o.Ranges[2].Bytes = make([]byte, MaxOpening)
	if _, err := o.Encode(); !errors.Is(err, ErrLimit) {
		t.Errorf("more than an opening holds: %v", err)
	}
}

// asking notes what a source is asked for.
type asking struct {
	*memoryStore
	noting sync.Mutex
	asked  []string
}

func (s *asking) note(what string) {
	s.noting.Lock()
	defer s.noting.Unlock()
	s.asked = append(s.asked, what)
}

func (s *asking) ReadPack(ctx context.Context, n Name, off int64, p []byte) error {
	s.note(fmt.Sprintf("pack %d+%d", off, len(p)))
	return s.memoryStore.ReadPack(ctx, n, off, p)
}

func (s *asking) ReadIndex(ctx context.Context, n Name, size int64) ([]byte, error) {
	s.note("index " + n.String()[:8])
	return s.memoryStore.ReadIndex(ctx, n, size)
}

// TestOpeningBefore: what an opening has is not asked for, what it has wrong is read
// from the store, and no byte is wrong for it.
func TestOpeningBefore(t *testing.T) {
	m := newMemoryStore()
	tr := randomTree(7, 40)
	img := tr.lay(0)
	w := tr.write(t, m, WriterOptions{}, nil, 0)
	o := &Opening{}
	for n, b := range m.index {
		o.Objects = append(o.Objects, OpeningObject{n, b})
	}
	slices.SortFunc(o.Objects, func(a, b OpeningObject) int { return a.Name.Compare(b.Name) })
	var chunks []Chunk
	for e, err := range w.s.Extents(t.Context(), 0, tr.size) {
		check(t, err)
		if !slices.ContainsFunc(chunks, func(c Chunk) bool { return c.At == e.Chunk.At }) {
			chunks = append(chunks, e.Chunk)
		}
	}
	slices.SortFunc(chunks, func(a, b Chunk) int {
		return strings.Compare(fmt.Sprintf("%s%12d", a.At.Pack, a.At.Offset), fmt.Sprintf("%s%12d", b.At.Pack, b.At.Offset))
	})
	for i, c := range chunks {
		if i%2 == 0 { // of neighbours one: nothing meets
			b := make([]byte, c.At.Sealed)
			check(t, m.packs.ReadPack(t.Context(), c.At.Pack, c.At.Offset, b))
			o.Ranges = append(o.Ranges, OpeningRange{c.At.Pack, c.At.Offset, b})
		}
	}
	p, err := o.Encode()
	check(t, err)
	read := func(p []byte) (asked []string) {
		t.Helper()
		o, err := DecodeOpening(p)
		check(t, err)
		src := &asking{memoryStore: m}
		x, err := OpenIndex(t.Context(), o.Before(src), w.res.Root.Name, w.res.Root.Size, w.res.IndexKey)
		check(t, err)
		s, err := x.Stream("disk")
		check(t, err)
		for i, c := range chunks {
			if x.Holds(&c) != (i%2 == 0) {
				t.Fatalf("chunk %d: held is %v", i, x.Holds(&c))
			}
			b, err := x.ReadChunk(t.Context(), c)
			check(t, err)
			if DigestOf(b) != c.Digest {
				t.Fatalf("chunk %d has other bytes", i)
			}
		}
		out := make(image, tr.size)
		check(t, Restore(t.Context(), s, out, RestoreOptions{}))
		if !bytes.Equal(out, img) {
			t.Fatal("the image came back changed")
		}
		asked = slices.Clone(src.asked)
		return asked
	}
	for _, a := range read(p) {
		for i, c := range chunks {
			if i%2 == 0 && a == fmt.Sprintf("pack %d+%d", c.At.Offset, c.At.Sealed) || strings.HasPrefix(a, "index") {
				t.Errorf("the store is asked for %s, of which there is a copy", a)
			}
		}
	}
	// One byte wrong: in one of the objects, in one of the ranges.
	var copies [][]byte
	for _, x := range o.Objects {
		copies = append(copies, x.Bytes)
	}
	for i := 0; i < len(o.Ranges); i += max(1, len(o.Ranges)/3) {
		copies = append(copies, o.Ranges[i].Bytes)
	}
	for i, c := range copies {
		bad := slices.Clone(p)
		bad[bytes.Index(bad, c)+len(c)/2] ^= 0x10
		if len(read(bad)) == 0 {
			t.Errorf("copy %d is wrong, and the store is not asked", i)
		}
	}
}

// TestOpeningForwards: what a source knows besides is asked of it.
func TestOpeningForwards(t *testing.T) {
	o := sampleOpening()
	plain := o.Before(newMemoryStore())
	if _, err := plain.(Mover).Moved(t.Context(), Location{}); !errors.Is(err, ErrNotMoved) {
		t.Errorf("of a source that knows nothing of moving: %v", err)
	}
	if err := plain.(Rereader).RereadPack(t.Context(), Name{9}, 16, make([]byte, 4)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("read again of a source that is the store: %v", err)
	}
	knows := o.Before(&knowing{newMemoryStore()})
	if at, err := knows.(Mover).Moved(t.Context(), Location{Offset: 1}); err != nil || at.Offset != 2 {
		t.Errorf("moved to %v, %v", at, err)
	}
	b := make([]byte, 4)
	if err := knows.(Rereader).RereadPack(t.Context(), Name{9}, 16, b); err != nil || string(b) != "anew" {
		t.Errorf("read again: %q, %v", b, err)
	}
	if err := knows.ReadPack(t.Context(), Name{1}, 18, b); err != nil || string(b) != "cdef" {
		t.Errorf("a part of a copy: %q, %v", b, err)
	}
	if err := knows.ReadPack(t.Context(), Name{1}, 20, b); !errors.Is(err, ErrMissing) {
		t.Errorf("what begins in a copy and ends behind it: %q, %v", b, err)
	}
}

// TestOpeningWrong: of a range that is wrong nothing is at hand any more; whoever had read
// it before is given the store's bytes, past a cache if there is one.
func TestOpeningWrong(t *testing.T) {
	o := sampleOpening()
	m := newMemoryStore()
	r := o.Ranges[0]
	at := Location{Pack: r.Pack, Offset: r.Offset, Sealed: len(r.Bytes)}
	m.packs[r.Pack] = bytes.Repeat([]byte("x"), int(r.Offset)+len(r.Bytes))
	for _, src := range []Source{m, &knowing{m}} {
		s := o.Before(src)
		want := strings.Repeat("x", len(r.Bytes))
		b := make([]byte, len(r.Bytes))
		for n := range 3 {
			if got := s.(Holder).Holds(at); got != (n == 0) {
				t.Errorf("reading it for the %dth time: at hand is %v", n+1, got)
			}
			check(t, s.(Rereader).RereadPack(t.Context(), at.Pack, at.Offset, b))
			if string(b) != want {
				t.Errorf("%T, time %d: %q", src, n+1, b)
			}
			if _, ok := src.(*knowing); ok {
				want = "anew" + want[4:]
			}
			check(t, s.ReadPack(t.Context(), at.Pack, at.Offset, b))
			if string(b) != strings.Repeat("x", len(b)) {
				t.Errorf("%T: %q is not the store's", src, b)
			}
		}
	}
}

type knowing struct{ *memoryStore }

func (*knowing) Moved(_ context.Context, at Location) (Location, error) { at.Offset++; return at, nil }

func (*knowing) RereadPack(_ context.Context, _ Name, _ int64, p []byte) error {
	copy(p, "anew")
	return nil
}
