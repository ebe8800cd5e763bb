package lazyroot

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func identity(s *lazytest.Store) Identity {
	return Identity{Manifest: chunked.Name{1, 2}, Size: int64(len(s.Data)), Instance: "i-1", Secret: s.Key[:]}
}

func image(t testing.TB, s *lazytest.Store, o ImageOptions) *Image {
	t.Helper()
	if o.Pause == 0 {
		o.Pause = time.Microsecond
	}
	img, err := NewImage(s.Index, o)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// open opens a device, which is closed with the test.
func open(t testing.TB, o Options) *Device {
	t.Helper()
	d, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func shut(t testing.TB, d *Device) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func contents(t testing.TB, d *Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := d.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestReadOnly reads an image without a disk.
func TestReadOnly(t *testing.T) {
	for _, odd := range []bool{false, true} {
		s := lazytest.New(t, lazytest.Layout{Size: 3<<20 + 777, Chunk: 40_000, Holes: 3, Odd: odd, Seed: 5})
		d := open(t, Options{Image: image(t, s, ImageOptions{})})
		defer shut(t, d)
		if d.Size() != int64(len(s.Data)) || !d.ReadOnly() {
			t.Fatalf("%d bytes", d.Size())
		}
		if !bytes.Equal(contents(t, d), s.Data) {
			t.Error("other bytes")
		}
		p := make([]byte, 999)
		for off := int64(0); off+999 <= d.Size(); off += 123_457 {
			if err := d.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, s.Data[off:off+999]) {
				t.Fatalf("at %d: %v", off, err)
			}
		}
		if err := d.WriteAt(t.Context(), p, 0); !errors.Is(err, ErrReadOnly) {
			t.Errorf("written: %v", err)
		}
		if err := d.ReadAt(t.Context(), p, d.Size()-998); !errors.Is(err, ErrRange) {
			t.Errorf("read beyond the end: %v", err)
		}
	}
}

// TestHydrate fills a disk that is not empty, is written to meanwhile, and ends plain.
func TestHydrate(t *testing.T) {
	for _, odd := range []bool{false, true} {
		s := lazytest.New(t, lazytest.Layout{Size: 2<<20 + 4096*3, Chunk: 50_000, Holes: 4, Odd: odd, Seed: 6})
		id := identity(s)
		disk := lazytest.NewDisk(DiskSize(id.Size)+1<<20, "somebody else's ")
		if _, err := Open(t.Context(), Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id}); !errors.Is(err, ErrForeign) {
			t.Fatalf("opened: %v", err)
		}
		if err := Format(disk, id); err != nil {
			t.Fatal(err)
		}
		d := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id})
		want := append(append([]byte(nil), s.Data...), disk.Bytes()[len(s.Data):d.Size()]...)
		if !bytes.Equal(contents(t, d), want) {
			t.Fatal("other bytes before")
		}
		edit := func(off int, p []byte) {
			copy(want[off:], p)
			if err := d.WriteAt(t.Context(), p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		edit(100, bytes.Repeat([]byte("w"), 5000))
		edit(500_000, bytes.Repeat([]byte("x"), 70_000))
		clear(want[900_000:1_100_001])
		if err := d.Discard(t.Context(), 900_000, 200_001); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(disk.Bytes()[:HeadSize], make([]byte, HeadSize)) {
			t.Error("the disk's head is not zero")
		}
		if err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(disk.Bytes()[:d.Size()], want) {
			t.Error("the disk is not the image and what was written")
		}
		edit(0, []byte("also later"))
		if !bytes.Equal(disk.Bytes()[:d.Size()], want) {
			t.Error("a later write is not on the disk")
		}
		if r, err := StateOf(disk, disk.Size()); err != nil || r.State != Complete || r.DeviceSize != d.Size() || r.Instance != "i-1" {
			t.Errorf("%+v, %v", r, err)
		}
		shut(t, d)
		again := open(t, Options{Disk: disk, Identity: id})
		if !bytes.Equal(contents(t, again), want) {
			t.Error("other bytes when opened again, without the image")
		}
		shut(t, again)
		if err := Clear(disk); err != nil {
			t.Fatal(err)
		}
		if r, err := StateOf(disk, disk.Size()); err != nil || r.State != None {
			t.Errorf("%+v, %v", r, err)
		}
	}
}

// TestContinues: what was fetched and flushed before is not fetched again.
func TestContinues(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 4 << 20, Chunk: 64 << 10, Seed: 7})
	id := identity(s)
	disk := lazytest.NewDisk(DiskSize(id.Size), "")
	if err := Format(disk, id); err != nil {
		t.Fatal(err)
	}
	d := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id})
	half := func(yield func(chunked.Range) bool) { yield(chunked.Range{Position: 0, Length: 2 << 20}) }
	if err := d.Prefetch(t.Context(), half); err != nil {
		t.Fatal(err)
	}
	shut(t, d)
	down := lazytest.NewFlaky(s, 1)
	down.Down.Store(true)
	d = open(t, Options{
		Image: image(t, s, ImageOptions{Sources: []NamedSource{{Name: "down", Source: down}}, Patience: time.Millisecond}),
		Disk:  disk, Identity: id,
	})
	defer shut(t, d)
	p := make([]byte, 2<<20)
	if err := d.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, s.Data[:2<<20]) {
		t.Fatalf("what was there: %v", err)
	}
	if err := d.ReadAt(t.Context(), p[:4096], 3<<20); !errors.Is(err, ErrStore) || !errors.Is(err, lazytest.ErrDown) {
		t.Errorf("what was not there: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.Hydrate(ctx, nil, Throttle{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hydrated: %v", err)
	}
	down.Down.Store(false)
	if err := d.Hydrate(t.Context(), nil, Throttle{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(disk.Bytes()[:4<<20], s.Data) {
		t.Error("other bytes")
	}
}

// faulty fails once.
type faulty struct {
	*lazytest.Disk
	syncs, writes atomic.Int32 // until it does; negative: never again
}

var errFault = errors.New("input/output error")

func (f *faulty) Sync() error {
	if f.syncs.Add(-1) == 0 {
		return errFault
	}
	return f.Disk.Sync()
}

func (f *faulty) WriteAt(p []byte, off int64) (int, error) {
	if f.writes.Add(-1) == 0 {
		return 0, errFault
	}
	return f.Disk.WriteAt(p, off)
}

// TestFaults: a flush that failed, wherever, has all later ones fail; a write that
// failed once does not keep the disk from being filled.
func TestFaults(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 24 * Block, Chunk: 40_000, Seed: 14})
	id := identity(s)
	fresh := func() (*faulty, *Device) {
		disk := &faulty{Disk: lazytest.NewDisk(DiskSize(id.Size), "")}
		if err := Format(disk, id); err != nil {
			t.Fatal(err)
		}
		return disk, open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id})
	}
	for n := int32(1); ; n++ {
		disk, d := fresh()
		disk.syncs.Store(n)
		err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1})
		if err == nil {
			disk.syncs.Store(-1)
			if n < 4 {
				t.Errorf("it is filled with %d flushes", n-1)
			}
			shut(t, d)
			break
		}
		if !errors.Is(err, errFault) || !errors.Is(d.Flush(t.Context()), errFault) || !errors.Is(d.Close(), errFault) {
			t.Errorf("flush %d failed, and was forgotten: %v", n, err)
		}
	}
	disk, d := fresh()
	defer shut(t, d)
	disk.writes.Store(1)
	if err := d.ReadAt(t.Context(), make([]byte, Block), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1})
		if err == nil {
			break
		}
		if !errors.Is(err, errFault) {
			t.Fatal(err)
		}
	}
	if err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1}); err != nil {
		t.Errorf("after one write that failed: %v", err)
	}
}

// badSource has nothing, for a reason.
type badSource struct{ err error }

func (b badSource) ReadPack(context.Context, chunked.Name, int64, []byte) error { return b.err }

func (b badSource) ReadIndex(context.Context, chunked.Name, int64) ([]byte, error) { return nil, b.err }

// TestHint: a cache that cannot be reached does not keep what the store lacks
// from being told as lost; nor is an image of hints alone opened.
func TestHint(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 8 * Block, Chunk: 8 * Block, Seed: 15})
	hint := NamedSource{Name: "cache", Source: badSource{errors.New("no route")}, Hint: true}
	store := NamedSource{Name: "store", Source: badSource{chunked.ErrMissing}}
	d := open(t, Options{Image: image(t, s, ImageOptions{Sources: []NamedSource{hint, store}, Patience: 10 * time.Second})})
	defer shut(t, d)
	if err := d.ReadAt(t.Context(), make([]byte, Block), 0); !errors.Is(err, chunked.ErrMissing) || errors.Is(err, ErrStore) {
		t.Errorf("what the store lacks: %v", err)
	}
	if _, err := NewImage(s.Index, ImageOptions{Sources: []NamedSource{hint}}); err == nil {
		t.Error("an image of hints was opened")
	}
}
