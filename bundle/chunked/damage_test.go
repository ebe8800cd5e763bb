package chunked

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// smallImage is an image of a few chunks, all but one of the same sealed
// length, in two packs, with two segments.
type smallImage struct {
	d    *Domain
	m    *memoryStore
	res  *Result
	disk []byte
}

func makeSmall(t *testing.T, seed uint64) *smallImage {
	t.Helper()
	d := testDomain(3)
	r := rand.New(rand.NewPCG(seed, 2))
	im := &smallImage{d: d, m: newMemoryStore()}
	const size = segmentRange + 1<<20
	im.disk = make([]byte, size)
	// Two writers, so that there are two packs.
	var at []Chunk
	for range 2 {
		w, err := NewWriter(t.Context(), WriterOptions{Domain: d, Sink: im.m, Known: im.m, Workers: 1})
		if err != nil {
			t.Fatal(err)
		}
		s, err := w.Stream("disk", size)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			p := make([]byte, 64)
			for j := range p {
				p[j] = byte(r.Uint32())
			}
			if i == 3 {
				p = bytes.Repeat([]byte("compressible"), 10)
				p = append(p, byte(len(at)))
			}
			pos := int64(len(at))*4096 + 1
			if i == 2 {
				pos += segmentRange
			}
			copy(im.disk[pos:], p)
			if err := s.Map(pos, int64(len(p)), w.Add(p, nil), 0); err != nil {
				t.Fatal(err)
			}
			at = append(at, Chunk{})
		}
		res, err := w.Finish(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		if im.res != nil {
			x, err := OpenIndex(t.Context(), im.m, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
			if err != nil {
				t.Fatal(err)
			}
			// The second image has both halves.
			return im.join(t, x, res)
		}
		im.res = res
	}
	return nil
}

// join makes one image of the two.
func (im *smallImage) join(t *testing.T, a *Index, res *Result) *smallImage {
	t.Helper()
	b, err := OpenIndex(t.Context(), im.m, res.Root.Name, res.Root.Size, res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWriter(t.Context(), WriterOptions{Domain: im.d, Sink: im.m})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s, err := w.Stream("disk", int64(len(im.disk)))
	if err != nil {
		t.Fatal(err)
	}
	old := maps.Clone(im.m.index)
	for _, x := range []*Index{a, b} {
		st, err := x.Stream("disk")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.CopyFrom(t.Context(), st, 0, 0, st.Size()); err != nil {
			t.Fatal(err)
		}
	}
	if im.res, err = w.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := range old {
		delete(im.m.index, n)
	}
	if len(im.m.packs) != 2 || len(im.m.index) != 3 {
		t.Fatalf("%d packs and %d index objects", len(im.m.packs), len(im.m.index))
	}
	return im
}

// onlyTrue is an output that remembers whether it was given a wrong byte.
type onlyTrue struct {
	want  []byte
	mu    sync.Mutex
	n     int64
	wrong bool
}

func (o *onlyTrue) WriteAt(p []byte, off int64) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n += int64(len(p))
	o.wrong = o.wrong || !bytes.Equal(o.want[off:off+int64(len(p))], p)
	return len(p), nil
}

// use restores the image and reads it at random; no byte that comes out may be
// wrong. It reports the error, if both ways fail; one that fails alone is a bug.
func (im *smallImage) use(t *testing.T) (written int64, err error) {
	t.Helper()
	x, err := OpenIndex(t.Context(), im.m, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
	if err != nil {
		return 0, err
	}
	s, err := x.Stream("disk")
	if err != nil {
		return 0, err
	}
	out := &onlyTrue{want: im.disk}
	err = Restore(t.Context(), s, out, RestoreOptions{Workers: 2})
	if out.wrong {
		t.Fatal("a wrong byte was restored")
	}
	r := s.ReaderAt(t.Context(), 1<<16)
	var second error
	for pos := int64(0); pos < s.Size(); pos += 4096 {
		if pos == 9*4096 {
			pos = segmentRange
		}
		if pos == segmentRange+9*4096 {
			break
		}
		p := make([]byte, 4096)
		if _, e := r.ReadAt(p, pos); e != nil {
			second = e
		} else if !bytes.Equal(p, im.disk[pos:pos+4096]) {
			t.Fatal("a wrong byte was read")
		}
	}
	if (err == nil) != (second == nil) {
		t.Fatalf("restoring: %v; reading: %v", err, second)
	}
	return out.n, err
}

func typed(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Object != "" &&
		slices.ContainsFunc([]error{ErrCorrupt, ErrFormat, ErrVersion, ErrForeign}, func(c error) bool { return errors.Is(err, c) })
}

func TestEveryBitFlip(t *testing.T) {
	im := makeSmall(t, 1)
	if n, err := im.use(t); err != nil || n == 0 {
		t.Fatalf("whole: %v, %d bytes", err, n)
	}
	var flips, packFlips int
	for _, data := range im.m.index {
		for i := range len(data) * 8 {
			data[i/8] ^= 1 << (i % 8)
			if _, err := im.use(t); !typed(err) {
				t.Fatalf("index object with bit %d flipped: %v", i, err)
			}
			data[i/8] ^= 1 << (i % 8)
			flips++
		}
	}
	for n, data := range im.m.packs {
		f, err := im.d.OpenPack(n, data)
		if err != nil {
			t.Fatal(err)
		}
		end := int64(packHeaderSize)
		for _, at := range f.All(n) {
			end = at.Offset + int64(at.Sealed)
		}
		for i := range len(data) * 8 {
			data[i/8] ^= 1 << (i % 8)
			if _, err := im.d.OpenPack(n, data); !typed(err) {
				t.Fatalf("pack with bit %d flipped: %v", i, err)
			}
			_, err := im.d.ReadFooter(t.Context(), im.m, n, int64(len(data)))
			switch at := int64(i / 8); {
			case at >= end && !typed(err):
				t.Fatalf("footer with bit %d flipped: %v", i, err)
			case at >= packHeaderSize && at < end:
				if _, err := im.use(t); !typed(err) {
					t.Fatalf("chunk with bit %d flipped: %v", i, err)
				}
			}
			data[i/8] ^= 1 << (i % 8)
			packFlips++
		}
	}
	if _, err := im.use(t); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bits of segments and root and %d bits of packs flipped, all refused", flips, packFlips)
	if flips < 3000 || packFlips < 3000 {
		t.Error("these were too few")
	}
}

func TestEverySwap(t *testing.T) {
	im := makeSmall(t, 1)
	swaps := 0
	// Objects for each other, under each other's names.
	var objects []struct {
		n    Name
		pack bool
	}
	for n := range im.m.index {
		objects = append(objects, struct {
			n    Name
			pack bool
		}{n, false})
	}
	for n := range im.m.packs {
		objects = append(objects, struct {
			n    Name
			pack bool
		}{n, true})
	}
	at := func(i int) map[Name][]byte {
		if objects[i].pack {
			return im.m.packs
		}
		return im.m.index
	}
	for i := range objects {
		for j := range i {
			a, b := at(i), at(j)
			x, y := a[objects[i].n], b[objects[j].n]
			a[objects[i].n], b[objects[j].n] = y, x
			if _, err := im.use(t); err == nil {
				t.Errorf("objects %d and %d swapped: no error", i, j)
			}
			a[objects[i].n], b[objects[j].n] = x, y
			swaps++
		}
	}
	// Another image's objects in place of this one's.
	other := makeSmall(t, 9)
	for n, data := range other.m.index {
		for k := range im.m.index {
			old := im.m.index[k]
			im.m.index[k] = data
			if _, err := im.use(t); err == nil {
				t.Errorf("index object %s of another image: no error", n)
			}
			im.m.index[k] = old
			swaps++
		}
	}
	// Sealed chunks of the same length for each other.
	type place struct {
		data []byte
		Location
	}
	var places []place
	for n, data := range im.m.packs {
		f, err := im.d.OpenPack(n, data)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range f.All(n) {
			places = append(places, place{data, l})
		}
	}
	for i, x := range places {
		for _, y := range places[:i] {
			if x.Sealed != y.Sealed {
				continue
			}
			a, b := x.data[x.Offset:][:x.Sealed], y.data[y.Offset:][:y.Sealed]
			swap := func() {
				for k := range a {
					a[k], b[k] = b[k], a[k]
				}
			}
			swap()
			if _, err := im.use(t); !typed(err) {
				t.Errorf("chunks swapped: %v", err)
			}
			swap()
			swaps++
		}
	}
	if _, err := im.use(t); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d swaps, all refused", swaps)
	if swaps < 30 {
		t.Error("these were too few")
	}
}

func TestEveryTruncation(t *testing.T) {
	im := makeSmall(t, 1)
	count := 0
	for n, data := range im.m.index {
		for i := range data {
			im.m.index[n] = data[:i]
			if _, err := im.use(t); !typed(err) {
				t.Fatalf("index object cut to %d of %d bytes: %v", i, len(data), err)
			}
			count++
		}
		im.m.index[n] = append(bytes.Clone(data), 0)
		if _, err := im.use(t); !typed(err) {
			t.Fatalf("index object with a byte behind it: %v", err)
		}
		im.m.index[n] = data
	}
	for n, data := range im.m.packs {
		for i := range data {
			short := data[:i]
			if _, err := im.d.OpenPack(n, short); !typed(err) {
				t.Fatalf("pack cut to %d of %d bytes: %v", i, len(data), err)
			}
			if _, err := im.d.OpenPack(NameOf(short), short); !typed(err) {
				t.Fatalf("pack cut to %d of %d bytes and named so: %v", i, len(data), err)
			}
			if _, err := im.d.ReadFooter(t.Context(), packMap{n: short}, n, int64(i)); !typed(err) {
				t.Fatalf("footer of a pack cut to %d of %d bytes: %v", i, len(data), err)
			}
			count++
		}
	}
	t.Logf("%d truncations, all refused", count)
}
