// Package lazytest makes images, stores that fail and disks whose power is cut,
// for the tests of lazyroot and of what serves its devices.
package lazytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
)

// Store is an image in memory, as a chunked.Source.
type Store struct {
	Data  []byte // the image's plaintext
	Index *chunked.Index
	Key   chunked.Key

	mu    sync.RWMutex
	packs map[chunked.Name][]byte
	index map[chunked.Name][]byte

	Reads atomic.Int64 // of packs
	Bytes atomic.Int64
}

// Layout of [New].
type Layout struct {
	Size  int // of the image, bytes
	Chunk int // of a chunk at most
	Holes int // of ten chunks so many are zero
	// Odd has extents begin and end inside of blocks.
	Odd  bool
	Seed uint64
}

// New makes an image: text that compresses, noise, holes, and chunks that are
// used twice.
func New(t testing.TB, l Layout) *Store {
	t.Helper()
	s := &Store{Data: make([]byte, l.Size), packs: map[chunked.Name][]byte{}, index: map[chunked.Name][]byte{}}
	r := rand.New(rand.NewPCG(l.Seed, 77))
	var secret chunked.Secret
	for i := range secret {
		secret[i] = byte(r.Uint32())
	}
	ctx := context.Background()
	w, err := chunked.NewWriter(ctx, chunked.WriterOptions{Domain: secret.Domain(), Sink: s, Workers: 2, Level: chunked.Fastest})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	st, err := w.Stream(chunked.StreamDisk, int64(l.Size))
	if err != nil {
		t.Fatal(err)
	}
	type old struct {
		ref chunked.Ref
		p   []byte
	}
	var before []old
	for pos := 0; pos < l.Size; {
		n := min(l.Chunk, l.Size-pos)
		if l.Odd {
			n = min(1+r.IntN(l.Chunk), l.Size-pos)
		} else if r.IntN(3) == 0 && n > 4096 {
			n = (1 + r.IntN(n/4096)) * 4096
		}
		switch k := r.IntN(10); {
		case k < l.Holes:
		case k == 9 && len(before) > 0:
			o := before[r.IntN(len(before))]
			if n = min(n, len(o.p)); !l.Odd && pos+n < l.Size {
				n = n / 4096 * 4096
			}
			if n > 0 {
				copy(s.Data[pos:], o.p[:n])
				if err := st.Map(int64(pos), int64(n), o.ref, 0); err != nil {
					t.Fatal(err)
				}
			}
			n = max(n, 1)
			if !l.Odd {
				n = (n + 4095) / 4096 * 4096
			}
		default:
			p := make([]byte, n)
			if r.IntN(4) == 0 {
				for i := range p {
					p[i] = byte(r.Uint32())
				}
			} else {
				for i := 0; i < n; i += 16 {
					copy(p[i:], fmt.Sprintf("%08x at %05x\n", r.Uint32(), i))
				}
			}
			copy(s.Data[pos:], p)
			ref := w.Add(bytes.Clone(p), nil)
			before = append(before, old{ref, p})
			if err := st.Map(int64(pos), int64(n), ref, 0); err != nil {
				t.Fatal(err)
			}
		}
		pos += n
	}
	res, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s.Key = res.IndexKey
	if s.Index, err = chunked.OpenIndex(ctx, s, res.Root.Name, res.Root.Size, res.IndexKey); err != nil {
		t.Fatal(err)
	}
	return s
}

// PutPack stores a pack.
func (s *Store) PutPack(_ context.Context, n chunked.Name, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.packs[n] = bytes.Clone(data)
	return nil
}

// PutIndex stores an index object.
func (s *Store) PutIndex(_ context.Context, n chunked.Name, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index[n] = bytes.Clone(data)
	return nil
}

// ReadPack reads a range of a pack.
func (s *Store) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	s.Reads.Add(1)
	s.Bytes.Add(int64(len(p)))
	s.mu.RLock()
	defer s.mu.RUnlock()
	b, ok := s.packs[n]
	if !ok || int(off)+len(p) > len(b) {
		return fmt.Errorf("pack %s: %w", n, chunked.ErrMissing)
	}
	copy(p, b[off:])
	return ctx.Err()
}

// ReadIndex reads an index object.
func (s *Store) ReadIndex(_ context.Context, n chunked.Name, _ int64) ([]byte, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	b, ok := s.index[n]
	if !ok {
		return nil, fmt.Errorf("index object %s: %w", n, chunked.ErrMissing)
	}
	return bytes.Clone(b), nil
}

// ErrDown is what a [Flaky] source that is down fails with.
var ErrDown = errors.New("the store does not answer")

// Flaky is a source that fails: it is down, or does so and so many of a
// thousand reads wrong.
type Flaky struct {
	chunked.Source
	Down    atomic.Bool
	Errors  atomic.Int64 // reads of a thousand that fail
	Garbles atomic.Int64 // that give other bytes
	Missing atomic.Int64 // that say it is not there

	Failed, Garbled atomic.Int64 // how often
	mu              sync.Mutex
	r               *rand.Rand
}

// NewFlaky is a source in front of another.
func NewFlaky(s chunked.Source, seed uint64) *Flaky {
	return &Flaky{Source: s, r: rand.New(rand.NewPCG(seed, 3))}
}

func (f *Flaky) dice() (int64, int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.r.Int64N(1000), f.r.Int()
}

// ReadPack reads a range of a pack, or does not.
func (f *Flaky) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	if f.Down.Load() {
		f.Failed.Add(1)
		return ErrDown
	}
	k, at := f.dice()
	switch e, g, m := f.Errors.Load(), f.Garbles.Load(), f.Missing.Load(); {
	case k < e:
		f.Failed.Add(1)
		return ErrDown
	case k < e+m:
		f.Failed.Add(1)
		return fmt.Errorf("pack %s: %w", n, chunked.ErrMissing)
	case k < e+m+g:
		f.Garbled.Add(1)
		err := f.Source.ReadPack(ctx, n, off, p)
		p[at%len(p)] ^= 1 << (at % 7)
		return err
	}
	return f.Source.ReadPack(ctx, n, off, p)
}

// ReadIndex reads an index object, or does not.
func (f *Flaky) ReadIndex(ctx context.Context, n chunked.Name, size int64) ([]byte, error) {
	if k, _ := f.dice(); f.Down.Load() || k < f.Errors.Load() {
		f.Failed.Add(1)
		return nil, ErrDown
	}
	return f.Source.ReadIndex(ctx, n, size)
}

// FromBytes makes an image of what is there, in chunks of the given length.
func FromBytes(t testing.TB, data []byte, chunk int) *Store {
	t.Helper()
	s := &Store{Data: data, packs: map[chunked.Name][]byte{}, index: map[chunked.Name][]byte{}}
	ctx := context.Background()
	w, err := chunked.NewWriter(ctx, chunked.WriterOptions{Domain: chunked.Secret{1}.Domain(), Sink: s, Workers: 2, Level: chunked.Fastest})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	st, err := w.Stream(chunked.StreamDisk, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	for pos := 0; pos < len(data); pos += chunk {
		p := data[pos:min(pos+chunk, len(data))]
		if len(bytes.Trim(p, "\x00")) == 0 {
			continue
		}
		if err := st.Map(int64(pos), int64(len(p)), w.Add(bytes.Clone(p), nil), 0); err != nil {
			t.Fatal(err)
		}
	}
	res, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s.Key = res.IndexKey
	if s.Index, err = chunked.OpenIndex(ctx, s, res.Root.Name, res.Root.Size, res.IndexKey); err != nil {
		t.Fatal(err)
	}
	return s
}
