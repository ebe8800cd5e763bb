package lazyroot

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

// script is a short life of a device: it ends with the first error.
func script(t *testing.T, disk *lazytest.Disk, s *lazytest.Store, m *model) error {
	img := image(t, s, ImageOptions{})
	d, err := Open(t.Context(), Options{Image: img, Disk: disk, Identity: identity(s)})
	if err != nil {
		return err
	}
	defer d.Close()
	ctx := t.Context()
	write := func(off int64, n int, b byte) error {
		p := bytes.Repeat([]byte{b}, n)
		return m.change(off, p, func() error { return d.WriteAt(ctx, p, off) })
	}
	flush := func() error {
		err := d.Flush(ctx)
		if err == nil {
			m.flushed()
		}
		return err
	}
	zeros := func(off, n int64) error {
		return m.change(off, make([]byte, n), func() error { return d.Discard(ctx, off, n) })
	}
	some := func(off, n int64) func(func(chunked.Range) bool) {
		return func(yield func(chunked.Range) bool) { yield(chunked.Range{Position: off, Length: n}) }
	}
	for _, step := range []func() error{
		func() error { return write(300, 700, 'a') }, // in the head, in part
		flush,
		func() error { return write(300, 100, 'b') }, // on the disk already
		func() error { return write(3*Block, Block, 'c') },
		flush,
		func() error { return d.Prefetch(ctx, some(40*Block, Block)) },
		func() error { return write(41*Block+512, 512, 'd') },
		func() error { return zeros(33*Block, 2*Block) },
		flush,
		func() error { return write(41*Block, Block, 'e') },
		func() error { return write(34*Block+1024, 1024, 'f') },
		func() error { return d.Hydrate(ctx, nil, Throttle{Idle: -1, Workers: 1}) },
		func() error { return write(41*Block, 512, 'g') },
		flush,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// TestPowerCuts cuts the power at every operation of a short life, and tries all
// that may be left of what was not flushed, block by block; where that is too
// much, and for torn blocks, samples of it.
func TestPowerCuts(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 48 * Block, Chunk: 8 * Block, Holes: 3, Seed: 11})
	id := identity(s)
	size := DiskSize(id.Size)
	fresh := func() (*lazytest.Disk, *model) {
		disk := lazytest.NewDisk(size, "before ")
		l, err := layoutOf(size, id.Size)
		if err != nil {
			t.Fatal(err)
		}
		m := newModel(disk.Bytes()[:l.device])
		copy(m.now, s.Data)
		return disk, m
	}
	// Also while the disk is prepared: then it is foreign, or as it should be.
	disk, _ := fresh()
	disk.CutAfter(-1)
	if err := Format(disk, id); err != nil {
		t.Fatal(err)
	}
	formatting := disk.Ops()
	r := rand.New(rand.NewPCG(3, 3))
	states := 0
	for cut := range formatting {
		disk, _ := fresh()
		disk.CutAfter(cut)
		if err := Format(disk, id); !errors.Is(err, lazytest.ErrCut) {
			t.Fatal(err)
		}
		for range 20 {
			after := disk.Cut(r, nil)
			d, err := Open(t.Context(), Options{Image: image(t, s, ImageOptions{}), Disk: after, Identity: id})
			if errors.Is(err, ErrForeign) {
				continue
			}
			if err != nil {
				t.Fatalf("cut at operation %d of preparing: %v", cut, err)
			}
			if got := contents(t, d); !bytes.Equal(got[:id.Size], s.Data) {
				t.Fatalf("cut at operation %d of preparing: other bytes", cut)
			}
			shut(t, d)
			states++
		}
	}
	for cut := 0; ; cut++ {
		disk, m := fresh()
		if err := Format(disk, id); err != nil {
			t.Fatal(err)
		}
		disk.CutAfter(cut)
		err := script(t, disk, s, m)
		if err == nil {
			if !bytes.Equal(disk.Bytes()[:m.size], m.now) {
				t.Fatal("the plain disk is not the image and what was written")
			}
			t.Logf("%d cuts, %d states", cut, states)
			return
		}
		if !errors.Is(err, lazytest.ErrCut) {
			t.Fatal(err)
		}
		blocks := disk.PendingBlocks(Block)
		tries := 1 << min(len(blocks), 9)
		samples := 40
		if raced {
			tries, samples = 1, 2
		}
		for try := range tries + samples {
			var after *lazytest.Disk
			switch {
			case try >= tries || len(blocks) > 9 && try > 1:
				after = disk.Cut(r, nil)
			default:
				after = disk.Cut(r, func(sector int64, n int) int {
					for i, b := range blocks {
						if b == sector/(Block/512) && try>>min(i, 8)&1 == 1 {
							return n - 1
						}
					}
					return 0
				})
			}
			states++
			copyOf := &model{now: bytes.Clone(m.now), may: m.may, open: map[int64][][]byte{}, size: m.size}
			d, err := Open(t.Context(), Options{Image: image(t, s, ImageOptions{}), Disk: after, Identity: id})
			if err != nil {
				t.Fatalf("cut at operation %d, try %d: %v", cut, try, err)
			}
			got := contents(t, d)
			for sec := int64(0); sec*sector < m.size; sec++ {
				ok := false
				a, b := sec*sector, (sec+1)*sector
				for _, v := range append([][]byte{copyOf.now[a:b]}, m.may[sec]...) {
					ok = ok || bytes.Equal(got[a:b], v)
				}
				if !ok {
					t.Fatalf("cut at operation %d, try %d: sector %d is neither as it was flushed nor as it was written since", cut, try, sec)
				}
			}
			if try%16 == 0 {
				if err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1}); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(after.Bytes()[:m.size], got) {
					t.Fatalf("cut at operation %d, try %d: the plain disk is not what was read before", cut, try)
				}
			}
			shut(t, d)
		}
	}
}

// TestStaleTails: no tail, page or session of another filling is believed.
func TestStaleTails(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 48 * Block, Chunk: 8 * Block, Holes: 3, Seed: 12})
	id := identity(s)
	size := DiskSize(id.Size)
	l, err := layoutOf(size, id.Size)
	if err != nil {
		t.Fatal(err)
	}
	filled := func(id Identity) *lazytest.Disk {
		disk := lazytest.NewDisk(size, "old ")
		if err := Format(disk, id); err != nil {
			t.Fatal(err)
		}
		d := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id})
		if err := d.WriteAt(t.Context(), bytes.Repeat([]byte("x"), 40*Block), 0); err != nil {
			t.Fatal(err)
		}
		shut(t, d)
		return disk
	}
	put := func(disk *lazytest.Disk, off int64, p []byte) {
		if _, err := disk.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	old := filled(id).Bytes()
	for _, c := range []struct {
		name   string
		change func(*Identity)
	}{
		{"another image", func(i *Identity) { i.Manifest[5]++ }},
		{"another instance", func(i *Identity) { i.Instance = "i-2" }},
		{"another secret", func(i *Identity) { i.Secret = bytes.Repeat([]byte("k"), 32) }},
		{"another size", func(i *Identity) { i.Size -= Block }},
	} {
		other := id
		c.change(&other)
		disk := lazytest.NewDisk(size, "")
		put(disk, 0, old)
		if _, err := Open(t.Context(), Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: other}); err == nil {
			t.Errorf("%s: opened", c.name)
		}
	}
	// Pages of a former filling of the same disk, under a new superblock.
	disk := lazytest.NewDisk(size, "")
	put(disk, 0, old)
	if err := Format(disk, id); err != nil {
		t.Fatal(err)
	}
	put(disk, l.page(0, 0), old[l.page(0, 0) : l.page(0, 1)+Block][:Block])
	d := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id})
	if !bytes.Equal(contents(t, d)[:id.Size], s.Data) {
		t.Error("a page of a former filling was believed")
	}
	shut(t, d)
	// Both versions of a page gone: nothing is made up.
	disk = lazytest.NewDisk(size, "")
	put(disk, 0, old)
	put(disk, l.page(0, 0), make([]byte, Block))
	put(disk, l.page(0, 1), make([]byte, Block))
	if _, err := Open(t.Context(), Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id}); !errors.Is(err, ErrDamaged) {
		t.Errorf("a bitmap that is gone: %v", err)
	}
	// A session of another filling.
	f := memfd(t)
	disk = lazytest.NewDisk(size, "")
	if err := Format(disk, id); err != nil {
		t.Fatal(err)
	}
	d = open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id, Session: f})
	if err := d.WriteAt(t.Context(), make([]byte, 9*Block), 0); err != nil {
		t.Fatal(err)
	}
	shut(t, d)
	if err := Format(disk, id); err != nil {
		t.Fatal(err)
	}
	d = open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id, Session: f})
	if !bytes.Equal(contents(t, d)[:id.Size], s.Data) {
		t.Error("a session of a former filling was believed")
	}
	shut(t, d)
	// A head that a cut left in its place is not one to mount.
	put(disk, 0, bytes.Repeat([]byte("superblock"), HeadSize/10+1)[:HeadSize])
	shut(t, open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id}))
	if !isZero(disk.Bytes()[:HeadSize]) {
		t.Error("a disk that is not complete has a head")
	}
}

// badSync is a disk whose flush fails once.
type badSync struct {
	*lazytest.Disk
	in int
}

func (b *badSync) Sync() error {
	if b.in--; b.in == 0 {
		return errors.New("input/output error")
	}
	return b.Disk.Sync()
}

// TestFlushFails: after a flush has failed none succeeds.
func TestFlushFails(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 48 * Block, Chunk: 8 * Block, Seed: 13})
	for in := 1; in <= 2; in++ {
		disk := &badSync{lazytest.NewDisk(DiskSize(int64(len(s.Data))), ""), 0}
		if err := Format(disk, identity(s)); err != nil {
			t.Fatal(err)
		}
		d := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: identity(s)})
		if err := d.WriteAt(t.Context(), make([]byte, Block), 0); err != nil {
			t.Fatal(err)
		}
		disk.in = in
		for range 3 {
			if err := d.Flush(t.Context()); err == nil {
				t.Error("a flush that failed is forgotten")
			}
		}
		if err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1}); err == nil {
			t.Error("the disk is complete all the same")
		}
		d.Close()
	}
}

// tailDisk is the end of a disk.
type tailDisk struct {
	Disk
	b  []byte
	at int64
}

func (d *tailDisk) Size() int64 { return d.at + int64(len(d.b)) }

func (d *tailDisk) ReadAt(p []byte, off int64) (int, error) { return copy(p, d.b[off-d.at:]), nil }

// FuzzTail reads superblocks and pages that anybody may have written.
func FuzzTail(f *testing.F) {
	id := Identity{Manifest: chunked.Name{1}, Size: 30 * Block, Instance: "i-1", Secret: bytes.Repeat([]byte("s"), 32)}
	size := DiskSize(id.Size)
	disk := lazytest.NewDisk(size, "")
	if err := Format(disk, id); err != nil {
		f.Fatal(err)
	}
	l, err := layoutOf(size, id.Size)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(disk.Bytes()[l.bitmap:])
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := &tailDisk{b: make([]byte, size-l.bitmap), at: l.bitmap}
		copy(d.b, b)
		rec, err := StateOf(d, size)
		if err != nil {
			t.Fatal(err)
		}
		if rec.State != None && (rec.DeviceSize < rec.ImageSize || rec.DeviceSize > size) {
			t.Errorf("%+v", rec)
		}
		s, err := id.find(d)
		if err != nil {
			t.Fatal(err)
		}
		if s.State == None {
			s = super{}
		}
		words := make([]uint64, l.pages*pageWords)
		if g, err := readPages(d, &l, id.pageKey(&s), words); err == nil && g[0] == 0 {
			t.Error("a page without a generation")
		}
	})
}

// TestClearCuts cuts the power while a complete disk's tail is cleared: it is
// complete, or has no tail, but is never again one that is being filled.
func TestClearCuts(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 8 * Block, Chunk: 8 * Block, Seed: 13})
	id := identity(s)
	complete := func() *lazytest.Disk {
		disk := lazytest.NewDisk(DiskSize(id.Size), "")
		if err := Format(disk, id); err != nil {
			t.Fatal(err)
		}
		d := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id})
		if err := d.Hydrate(t.Context(), nil, Throttle{Idle: -1}); err != nil {
			t.Fatal(err)
		}
		shut(t, d)
		return disk
	}
	for cut := 0; ; cut++ {
		disk := complete()
		disk.CutAfter(cut)
		err := Clear(disk)
		if err != nil && !errors.Is(err, lazytest.ErrCut) {
			t.Fatal(err)
		}
		blocks := disk.PendingBlocks(Block)
		for try := range 1 << len(blocks) {
			after := disk.Cut(nil, func(sector int64, n int) int {
				for i, b := range blocks {
					if b == sector/(Block/512) && try>>i&1 == 1 {
						return n - 1
					}
				}
				return 0
			})
			r, serr := StateOf(after, after.Size())
			if serr != nil || r.State == Filling || err == nil && r.State != None {
				t.Fatalf("cut at operation %d, try %d: the disk is %v, %v", cut, try, r.State, serr)
			}
		}
		if err == nil {
			return
		}
	}
}
