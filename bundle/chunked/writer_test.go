package chunked

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
)

// memoryStore is a Sink, a Source and a Known.
type memoryStore struct {
	mu    sync.Mutex
	packs packMap
	index map[Name][]byte
	known map[ID]Location
	reads int
}

func newMemoryStore() *memoryStore {
	return &memoryStore{packs: packMap{}, index: map[Name][]byte{}, known: map[ID]Location{}}
}

func (m *memoryStore) PutPack(_ context.Context, n Name, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.packs[n] = bytes.Clone(data)
	return nil
}

func (m *memoryStore) PutIndex(_ context.Context, n Name, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.index[n] = bytes.Clone(data)
	return nil
}

func (m *memoryStore) ReadPack(ctx context.Context, n Name, off int64, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	return m.packs.ReadPack(ctx, n, off, p)
}

func (m *memoryStore) ReadIndex(_ context.Context, n Name, size int64) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	data, ok := m.index[n]
	if !ok {
		return nil, fmt.Errorf("index object %s: %w", n, ErrMissing)
	}
	return bytes.Clone(data), nil
}

func (m *memoryStore) Lookup(id ID) (Location, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, ok := m.known[id]
	return at, ok
}

// learn makes everything in the store's packs known.
func (m *memoryStore) learn(t testing.TB, d *Domain) {
	t.Helper()
	for n, data := range m.packs {
		f, err := d.OpenPack(n, data)
		if err != nil {
			t.Fatal(err)
		}
		for e, at := range f.All(n) {
			m.known[e.ID] = at
		}
	}
}

// text gives n bytes that compress about as well as programs do.
func text(r *rand.Rand, n int) []byte {
	p := make([]byte, 0, n+16)
	for len(p) < n {
		p = fmt.Appendf(p, "%x ", r.Uint32N(1<<20))
	}
	return p[:n]
}

func TestWriterRoundTrip(t *testing.T) {
	d := testDomain(1)
	m := newMemoryStore()
	r := rand.New(rand.NewPCG(1, 2))
	w, err := NewWriter(t.Context(), WriterOptions{Domain: d, Sink: m, Known: m, PackSize: 5 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	const size = 600 << 20 // three segments
	s, err := w.Stream("disk", size)
	if err != nil {
		t.Fatal(err)
	}
	want := map[int64][]byte{}
	for i := range 200 {
		p := text(r, 1+r.IntN(300<<10))
		if i%3 == 0 {
			for j := range p {
				p[j] = byte(r.Uint32())
			}
		}
		ref := w.Add(p, nil)
		pos := int64(i) * 3 << 20
		if i == 85 { // across the segments' border
			pos = 256<<20 - 17
		}
		if err := s.Map(pos, int64(len(p)), ref, 0); err != nil {
			t.Fatal(err)
		}
		want[pos] = p
		if i%7 == 0 {
			if err := s.Map(pos+1<<20, int64(len(p)+1)/2, ref, int64(len(p)/2)); err != nil {
				t.Fatal(err)
			}
			want[pos+1<<20] = p[len(p)/2:]
		}
	}
	res, err := w.Finish(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", res.Counters)
	if len(res.Segments) != 3 || res.Data == 0 || res.Added == 0 {
		t.Errorf("%d segments, %d bytes of data, %d added", len(res.Segments), res.Data, res.Added)
	}
	x, err := OpenIndex(t.Context(), m, res.Root.Name, res.Root.Size, res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	st, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	out := make(image, size)
	if err := Restore(t.Context(), st, out, RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	at := st.ReaderAt(t.Context(), 4<<20)
	for pos, p := range want {
		got := make([]byte, len(p)+10)
		for i := range got {
			got[i] = 0xee
		}
		if _, err := at.ReadAt(got, pos-5*min(1, pos)); err != nil {
			t.Fatal(err)
		}
		full := append(make([]byte, 5*min(1, pos)), p...)
		full = append(full, make([]byte, len(got)-len(full))...)
		if !bytes.Equal(got, full) {
			t.Fatalf("%d bytes at %d differ", len(p), pos)
		}
		if !bytes.Equal(out[pos:pos+int64(len(p))], p) {
			t.Fatalf("%d restored bytes at %d differ", len(p), pos)
		}
		clear(out[pos : pos+int64(len(p))])
	}
	if i := bytes.IndexFunc(out, func(r rune) bool { return r != 0 }); i >= 0 {
		t.Fatalf("byte %d is not zero", i)
	}
}

// image is an output in memory.
type image []byte

func (m image) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(m)) {
		return 0, fmt.Errorf("%d bytes at %d of %d", len(p), off, len(m))
	}
	return copy(m[off:], p), nil
}

func (m image) zero(_ context.Context, off, length int64) error {
	clear(m[off : off+length])
	return nil
}
