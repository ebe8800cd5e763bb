package chunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

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

// broken is an output that fails.
type broken struct{ err error }

func (b broken) WriteAt([]byte, int64) (int, error) { return 0, b.err }

func TestRestoreFails(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	im := makeSmall(t, 1)
	w := openResult(t, im.m, im.res)
	full := errors.New("no space left")
	if err := Restore(t.Context(), w.s, broken{full}, RestoreOptions{}); !errors.Is(err, full) {
		t.Error(err)
	}
	zero := func(context.Context, int64, int64) error { return full }
	if err := Restore(t.Context(), w.s, nil, RestoreOptions{Zero: zero}); !errors.Is(err, full) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the operator said so")
	n := 0
	err := Restore(ctx, w.s, nil, RestoreOptions{Workers: 1, Progress: func(int64) {
		n++
		cancel(why)
	}})
	if !errors.Is(err, why) || n == 8 {
		t.Errorf("after %d extents: %v", n, err)
	}
	// A pack that is gone, and no Mover: the error says which.
	var gone Name
	for gone = range im.m.packs {
		break
	}
	delete(im.m.packs, gone)
	err = Restore(t.Context(), w.s, nil, RestoreOptions{})
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), gone.String()) {
		t.Error(err)
	}
}
