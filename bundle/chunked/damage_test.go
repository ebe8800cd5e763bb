package chunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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

// TestSealOfOtherKind: what is sealed as one thing does not open as another,
// nor under another key.
func TestSealOfOtherKind(t *testing.T) {
	types := []Type{TypeChunk, TypeFooter, TypeSegment, TypeRoot}
	for _, a := range types {
		for _, c := range []Codec{Stored, Zstd, 2} {
			sealed := AppendSeal(nil, Key{1}, a, c, []byte("something"))
			for _, b := range types {
				_, p, err := openSeal("it", Key{1}, b, bytes.Clone(sealed))
				switch {
				case a != b && !errors.Is(err, ErrCorrupt):
					t.Errorf("%c opens as %c: %v", a, b, err)
				case a == b && c > Zstd && !errors.Is(err, ErrVersion):
					t.Errorf("codec %d: %v", c, err)
				case a == b && c <= Zstd && (err != nil || string(p) != "something"):
					t.Errorf("%c, codec %d: %q, %v", a, c, p, err)
				}
			}
			if _, _, err := openSeal("it", Key{2}, a, bytes.Clone(sealed)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("another key: %v", err)
			}
		}
	}
}

// TestFrames: of zstd, one frame with the right length and nothing else.
func TestFrames(t *testing.T) {
	d := testDomain(1)
	p := bytes.Repeat([]byte("plaintext "), 100)
	good := tool(t, p, "zstd", "-c")
	empty := tool(t, nil, "zstd", "-c")
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0}, "skip"...)
	half := tool(t, p[:500], "zstd", "-c")
	long := tool(t, append(bytes.Clone(p), 'x'), "zstd", "-c")
	streamed := tool(t, p, "sh", "-c", "cat | zstd -c --no-check --stream-size=1000 | cat")
	for _, c := range []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"good", good, true},
		{"streamed", streamed, true},
		{"nothing", nil, false},
		{"no data", empty, false},
		{"too long", long, false},
		{"too short", half, false},
		{"two frames", append(bytes.Clone(half), half...), false},
		{"and an empty one", append(bytes.Clone(good), empty...), false},
		{"and one to skip", append(bytes.Clone(good), skippable...), false},
		{"one to skip first", append(bytes.Clone(skippable), good...), false},
		{"and a byte", append(bytes.Clone(good), 0), false},
		{"cut", good[:len(good)-5], false},
		{"plaintext", p, false},
	} {
		ch := Chunk{Digest: DigestOf(p), Size: len(p), At: Location{Offset: packHeaderSize}}
		ch.Key = d.ChunkKey(ch.Digest)
		sealed := AppendSeal(nil, ch.Key, TypeChunk, Zstd, c.frame)
		ch.At.Sealed = len(sealed)
		got, err := OpenChunk(ch, sealed)
		if c.ok && (err != nil || !bytes.Equal(got, p)) {
			t.Errorf("%s: %v", c.name, err)
		}
		if !c.ok && !typed(err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestPlaintextMustMatch: the right key and tag are not enough.
func TestPlaintextMustMatch(t *testing.T) {
	d := testDomain(1)
	ch := Chunk{Digest: DigestOf([]byte("what was promised")), Size: 17}
	ch.Key = d.ChunkKey(ch.Digest)
	sealed := AppendSeal(nil, ch.Key, TypeChunk, Stored, []byte("what is delivered"))
	ch.At = Location{Offset: packHeaderSize, Sealed: len(sealed)}
	if _, err := OpenChunk(ch, sealed); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

// TestNoncesNeverRepeat: under one key, a nonce is used for one message.
func TestNoncesNeverRepeat(t *testing.T) {
	d := testDomain(1)
	r := rand.New(rand.NewPCG(1, 1))
	type use struct {
		k Key
		n [nonceSize]byte
	}
	seen := map[use][]byte{}
	forms := 0
	for i := range 300 {
		p := text(r, 1+r.IntN(20_000))
		if i%3 == 0 {
			copy(p, make([]byte, len(p)/2))
		}
		k := d.ChunkKey(DigestOf(p))
		encodings := [][2]any{{Stored, p}}
		for _, l := range []Level{Fastest, Default, Better} {
			z, err := newPacker(l)
			if err != nil {
				t.Fatal(err)
			}
			encodings = append(encodings, [2]any{Zstd, z.enc.EncodeAll(p, nil)})
		}
		for _, e := range encodings {
			for _, typ := range []Type{TypeChunk, TypeSegment} {
				codec, b := e[0].(Codec), e[1].([]byte)
				sealed := AppendSeal(nil, k, typ, codec, b)
				u := use{k: k, n: [nonceSize]byte(sealed[1:])}
				m := append([]byte{byte(typ), byte(codec)}, b...)
				if old, ok := seen[u]; ok && !bytes.Equal(old, m) {
					t.Fatal("one nonce for two messages under one key")
				} else if !ok {
					forms++
				}
				seen[u] = m
			}
		}
	}
	t.Logf("%d messages, each with a nonce of its own", forms)
	if forms < 1500 {
		t.Error("levels do not differ: this shows nothing")
	}
}

// TestDamagedGoesOn: of what cannot be had, Restore tells and goes on.
func TestDamagedGoesOn(t *testing.T) {
	im := makeSmall(t, 1)
	var hurt []int64
	for n, data := range im.m.packs {
		f, err := im.d.OpenPack(n, data)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range f.All(n) {
			data[at.Offset+20] ^= 1
			break
		}
	}
	x, err := OpenIndex(t.Context(), im.m, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var wrong []error
	out := make(image, s.Size())
	err = Restore(t.Context(), s, out, RestoreOptions{Damaged: func(e Extent, err error) error {
		mu.Lock()
		defer mu.Unlock()
		hurt = append(hurt, e.Pos)
		if !errors.Is(err, ErrCorrupt) {
			wrong = append(wrong, err)
		}
		copy(out[e.Pos:], im.disk[e.Pos:e.Pos+e.Length])
		return nil
	}})
	if err != nil || len(wrong) > 0 {
		t.Fatal(err, wrong)
	}
	slices.Sort(hurt)
	if want := []int64{1, 4*4096 + 1}; !slices.Equal(hurt, want) {
		t.Errorf("hurt at %d, not %d", hurt, want)
	}
	if !bytes.Equal(out, im.disk) {
		t.Error("the rest is not restored")
	}
	stop := errors.New("enough")
	if err := Restore(t.Context(), s, nil, RestoreOptions{Damaged: func(Extent, error) error { return stop }}); !errors.Is(err, stop) {
		t.Error(err)
	}
}

// mover is a store some of whose packs were moved.
type mover struct {
	*memoryStore
	moved map[Location]Location
	asked int
}

func (m *mover) Moved(_ context.Context, at Location) (Location, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked++
	if to, ok := m.moved[at]; ok {
		return to, nil
	}
	return Location{}, fmt.Errorf("nothing: %w", ErrNotMoved)
}

func TestMoved(t *testing.T) {
	for hops := 1; hops <= maxHops+1; hops++ {
		im := makeSmall(t, 1)
		m := &mover{im.m, map[Location]Location{}, 0}
		for n, data := range maps.Clone(im.m.packs) {
			f, err := im.d.OpenPack(n, data)
			if err != nil {
				t.Fatal(err)
			}
			i := 0
			for e, at := range f.All(n) {
				sealed := data[at.Offset:][:at.Sealed]
				from := at
				for h := range hops - 1 {
					to := Location{Pack: Name{byte(h + 1), byte(i), n[0]}, Offset: 16, Sealed: at.Sealed + h}
					m.moved[from] = to
					from = to
				}
				if i == 0 { // recompressed on the way
					u, err := newUnpacker()
					if err != nil {
						t.Fatal(err)
					}
					c := find(t, im, e.ID)
					p, err := u.open(&c, bytes.Clone(sealed), nil)
					if err != nil {
						t.Fatal(err)
					}
					z, err := newPacker(Default)
					if err != nil {
						t.Fatal(err)
					}
					sealed = AppendSeal(nil, c.Key, TypeChunk, Zstd, z.enc.EncodeAll(p, nil))
				}
				last := Name{0xff, byte(i), n[0]}
				m.moved[from] = Location{Pack: last, Offset: 100, Sealed: len(sealed)}
				m.packs[last] = append(make([]byte, 100), sealed...)
				i++
			}
			delete(im.m.packs, n)
		}
		x, err := OpenIndex(t.Context(), m, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
		if err != nil {
			t.Fatal(err)
		}
		s, err := x.Stream("disk")
		if err != nil {
			t.Fatal(err)
		}
		out := make(image, s.Size())
		err = Restore(t.Context(), s, out, RestoreOptions{})
		p := make([]byte, 100)
		_, err2 := s.ReaderAt(t.Context(), 0).ReadAt(p, 0)
		switch {
		case hops <= maxHops && (err != nil || err2 != nil):
			t.Fatalf("%d hops: %v; %v", hops, err, err2)
		case hops <= maxHops && (!bytes.Equal(out, im.disk) || !bytes.Equal(p, im.disk[:100])):
			t.Fatalf("%d hops: other bytes", hops)
		case hops > maxHops && (!errors.Is(err, ErrMissing) || !errors.Is(err2, ErrMissing)):
			t.Fatalf("%d hops: %v; %v", hops, err, err2)
		}
	}
}

// find gives the chunk of an image with this id.
func find(t *testing.T, im *smallImage, id ID) Chunk {
	t.Helper()
	x, err := OpenIndex(t.Context(), im.m, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range s.Extents(t.Context(), 0, s.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if im.d.ID(e.Chunk.Digest) == id {
			return e.Chunk
		}
	}
	t.Fatal("no such chunk")
	return Chunk{}
}
