package eager

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

var errCut = errors.New("power cut")

// cutDisk is a disk in memory whose power is cut at a chosen operation: then
// each sector that was not synced is as it was at some moment since.
type cutDisk struct {
	now     []byte           // what reads see
	durable []byte           // what certainly survives
	pending map[int64][]byte // sector number: what may have been written to it, one after the other
	cutAt   int              // operations until the cut; negative: never
	ops     int
	rng     *rand.Rand
}

func newCutDisk(size int64, fill string, seed uint64) *cutDisk {
	d := &cutDisk{now: bytes.Repeat([]byte(fill), int(size)/len(fill)+1)[:size], cutAt: -1, rng: rand.New(rand.NewPCG(seed, 1))}
	d.durable = bytes.Clone(d.now)
	d.pending = make(map[int64][]byte)
	return d
}

// op is one operation; an error means that there is no power any more.
func (d *cutDisk) op() error {
	if d.cutAt >= 0 && d.ops >= d.cutAt {
		return errCut
	}
	d.ops++
	return nil
}

func (d *cutDisk) Size() int64 { return int64(len(d.now)) }

func (d *cutDisk) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, d.now[off:]), nil
}

func (d *cutDisk) WriteAt(p []byte, off int64) (int, error) {
	// A write that is cut has been done in part.
	err := d.op()
	copy(d.now[off:], p)
	for s := off / Sector; s*Sector < off+int64(len(p)); s++ {
		at := s * Sector
		d.pending[s] = append(d.pending[s], d.now[at:min(at+Sector, int64(len(d.now)))]...)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *cutDisk) Zero(off, n int64) error {
	_, err := d.WriteAt(make([]byte, n), off)
	return err
}

func (d *cutDisk) Sync() error {
	if err := d.op(); err != nil {
		return err
	}
	clear(d.pending)
	copy(d.durable, d.now)
	return nil
}

// restart is the disk when power is back.
func (d *cutDisk) restart() {
	for s, versions := range d.pending {
		size := min(Sector, len(d.durable)-int(s)*Sector)
		if v := d.rng.IntN(len(versions)/size + 1); v > 0 {
			copy(d.durable[s*Sector:], versions[(v-1)*size:v*size])
		}
	}
	clear(d.pending)
	copy(d.now, d.durable)
	d.ops = 0
}

// parted is an image in parts that can only be read in order: each opens to a
// run of data and a run of zeros.
type parted struct {
	data    []byte
	parts   [][]byte // part i is the data of the i-th piece
	sums    [][sha256.Size]byte
	piece   int
	fetched int64 // bytes, over all attempts
	local   int64
}

func newParted(t *testing.T, kind string, pieces, part int) *parted {
	t.Helper()
	rng := rand.New(rand.NewPCG(7, 7))
	p := &parted{piece: 2 * part}
	for range pieces {
		b := make([]byte, part)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		p.parts = append(p.parts, b)
		p.data = append(append(p.data, b...), make([]byte, part)...)
	}
	// What makes it one that can be mounted.
	clear(p.data[:Sector])
	switch kind {
	case "ext4":
		p.data[1024+0x38], p.data[1024+0x39] = 0x53, 0xef
	case "mbr":
		clear(p.data[Sector:4096])
		p.data[510], p.data[511] = 0x55, 0xaa
	case "xfs":
		copy(p.data, "XFSB")
	case "btrfs":
		clear(p.data[:64<<10]) // room for a boot loader
		b := p.data[64<<10 : 68<<10]
		copy(b[64:], "_BHRfS_M")
		sum := sha256.Sum256(b[:len(b)-sha256.Size])
		copy(b[len(b)-sha256.Size:], sum[:])
	}
	for i := range p.parts {
		copy(p.parts[i], p.data[i*p.piece:])
		p.sums = append(p.sums, sha256.Sum256(p.parts[i]))
	}
	return p
}

func (p *parted) image() Image {
	return Image{Manifest: sha256.Sum256(p.data), Size: int64(len(p.data)), Instance: "i-1", Secret: []byte("secret")}
}

func (p *parted) Fill(ctx context.Context, t *Target) error {
	spool, err := NewSpool(t, len(p.parts), int64(len(p.parts)*len(p.parts[0])))
	if err != nil {
		return err
	}
	out := NewStream(t)
	for i, part := range p.parts {
		got := spool.Load(i)
		if got != nil && sha256.Sum256(got) == p.sums[i] {
			p.local += int64(len(got))
		} else {
			got = part
			p.fetched += int64(len(got))
			if err := spool.Store(i, got); err != nil {
				return err
			}
		}
		if _, err := out.Write(got); err != nil {
			return err
		}
		if err := out.Skip(int64(p.piece - len(got))); err != nil {
			return err
		}
	}
	_, err = out.Finish()
	return err
}

// bootable tells whether there is something on the disk that can be mounted.
func bootable(b []byte) bool {
	super := b[64<<10 : 68<<10] // which has a checksum
	sum := sha256.Sum256(super[:len(super)-sha256.Size])
	return b[1024+0x38] == 0x53 && b[1024+0x39] == 0xef || b[510] == 0x55 && b[511] == 0xaa || string(b[:4]) == "XFSB" ||
		string(super[64:72]) == "_BHRfS_M" && bytes.Equal(super[len(super)-sha256.Size:], sum[:])
}

// isImage compares the disk with the image, but for the record.
func isImage(disk, image []byte) bool {
	b := bytes.Clone(disk[:len(image)])
	if string(b[:len(magic)]) == magic {
		clear(b[:recordSize])
	}
	return bytes.Equal(b, image)
}

// TestPowerCuts cuts the power at every operation of writing an image, and of
// the attempt after that, on disks with and without room behind the image.
func TestPowerCuts(t *testing.T) {
	const pieces, part = 6, 128 << 10
	for _, kind := range []string{"ext4", "mbr", "xfs", "btrfs"} {
		for _, room := range []int64{0, 8 << 10, pieces * part / 2, 2 * pieces * part} {
			t.Run(fmt.Sprintf("%s, %d KiB behind", kind, room>>10), func(t *testing.T) {
				p := newParted(t, kind, pieces, part)
				image := p.image()
				size := image.Size + room
				probe := newCutDisk(size, "left behind ", 1)
				if err := Write(t.Context(), probe, image, p); err != nil {
					t.Fatal(err)
				}
				all := probe.ops
				if all < 10 {
					t.Fatalf("only %d operations", all)
				}
				resumed := 0
				before := newCutDisk(size, "left behind ", 1).now
				for cut := range all {
					d := newCutDisk(size, "left behind ", uint64(cut))
					d.now[510], d.now[511] = 0x55, 0xaa // an old partition table
					d.durable[510], d.durable[511] = 0x55, 0xaa
					// Cut, cut again elsewhere, then let it finish.
					for attempt := 0; ; attempt++ {
						d.cutAt = -1
						switch attempt {
						case 0:
							d.cutAt = cut
						case 1:
							d.cutAt = (cut * 7) % all
						}
						state, err := StateOf(d, image)
						if err != nil {
							t.Fatal(err)
						}
						if state == Whole {
							break
						}
						p.fetched, p.local = 0, 0
						err = Write(t.Context(), d, image, p)
						if err == nil {
							if p.local > 0 {
								resumed++
							}
							break
						}
						if !errors.Is(err, errCut) {
							t.Fatal(err)
						}
						d.restart()
						// What was there before may still be, untouched but for its head.
						old := bytes.Equal(d.now[HeadSize:], before[HeadSize:])
						if bootable(d.now) && !isImage(d.now, p.data) && !old {
							t.Fatalf("cut at operation %d: bootable, but not the image", d.ops)
						}
					}
					if !isImage(d.now, p.data) || !isImage(d.durable, p.data) {
						t.Fatalf("cut at operation %d: the disk is not the image", cut)
					}
					if kind != "xfs" {
						if s, err := StateOf(d, image); err != nil || s != Whole {
							t.Fatalf("cut at operation %d: state %d, %v", cut, s, err)
						}
					}
					d.cutAt = -1
					if err := Clear(d, image); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(d.durable[:len(p.data)], p.data) {
						t.Fatalf("cut at operation %d: something of the record is left", cut)
					}
				}
				if room > pieces*part && resumed < all/3 {
					t.Errorf("only %d of %d attempts went on with what was there", resumed, all)
				}
			})
		}
	}
}

// TestResumeFetchesTheRest cuts after each part was stored: no part that is
// durable is fetched again.
func TestResumeFetchesTheRest(t *testing.T) {
	const pieces, part = 10, 128 << 10
	p := newParted(t, "ext4", pieces, part)
	image := p.image()
	for stored := 1; stored < pieces; stored++ {
		d := newCutDisk(image.Size+2*pieces*part, "x", uint64(stored))
		stop := &stopping{parted: p, after: stored}
		if err := Write(t.Context(), d, image, stop); !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		d.restart()
		p.fetched, p.local = 0, 0
		if err := Write(t.Context(), d, image, p); err != nil {
			t.Fatal(err)
		}
		if want := int64(stored * part); p.local != want || p.fetched != int64(pieces*part)-want {
			t.Errorf("after %d parts: %d bytes taken from the disk and %d fetched", stored, p.local, p.fetched)
		}
	}
}

// stopping stores some parts and then has its power cut.
type stopping struct {
	*parted
	after int
}

func (s *stopping) Fill(_ context.Context, t *Target) error {
	spool, err := NewSpool(t, len(s.parts), int64(len(s.parts)*len(s.parts[0])))
	if err != nil {
		return err
	}
	for i := range s.after {
		if err := spool.Store(i, s.parts[i]); err != nil {
			return err
		}
	}
	return errCut
}

// TestForeign has records, slots and parts on the disk that are not right.
func TestForeign(t *testing.T) {
	const pieces, part = 10, 128 << 10
	p := newParted(t, "ext4", pieces, part)
	image := p.image()
	size := image.Size + 2*pieces*part
	begun := func(i Image) *cutDisk {
		d := newCutDisk(size, "y", 3)
		if err := Write(t.Context(), d, i, &stopping{p, 6}); !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		return d
	}
	other := image
	other.Manifest[3]++
	stranger := image
	stranger.Instance = "i-2"
	forged := image
	forged.Secret = []byte("guess")
	larger := image
	larger.Size -= Sector
	for _, c := range []struct {
		name   string
		disk   *cutDisk
		change func(d *cutDisk)
		local  int // parts taken from the disk
	}{
		{"as it was", begun(image), func(*cutDisk) {}, 6},
		{"another image", begun(other), func(*cutDisk) {}, 0},
		{"another instance", begun(stranger), func(*cutDisk) {}, 0},
		{"another secret", begun(forged), func(*cutDisk) {}, 0},
		{"another size", begun(larger), func(*cutDisk) {}, 0},
		{"a bit of the record", begun(image), func(d *cutDisk) { d.now[40] ^= 1 }, 0},
		{"a record that says whole", begun(image), func(d *cutDisk) { d.now[16] = byte(Whole) }, 0},
		{"a bit of a slot's header", begun(image), func(d *cutDisk) { d.now[slotOf(d, p, 2)+50] ^= 1 }, 5},
		{"a length of a slot beyond it", begun(image), func(d *cutDisk) { d.now[slotOf(d, p, 2)+57] = 0xff }, 5},
		{"a bit of a part", begun(image), func(d *cutDisk) { d.now[slotOf(d, p, 2)+slotAlign+77] ^= 1 }, 5},
		{"two parts exchanged", begun(image), func(d *cutDisk) {
			a, b := slotOf(d, p, 1), slotOf(d, p, 2)
			x := bytes.Clone(d.now[a : a+part])
			copy(d.now[a:], d.now[b:b+part])
			copy(d.now[b:], x)
		}, 4},
	} {
		c.change(c.disk)
		p.fetched, p.local = 0, 0
		if err := Write(t.Context(), c.disk, image, p); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if p.local != int64(c.local*part) || p.fetched != int64((pieces-c.local)*part) {
			t.Errorf("%s: %d parts were taken from the disk, want %d", c.name, p.local/part, c.local)
		}
		if !isImage(c.disk.now, p.data) {
			t.Errorf("%s: the disk is not the image", c.name)
		}
	}
}

func slotOf(d *cutDisk, p *parted, i int) int64 {
	s, err := NewSpool(&Target{m: d, image: p.image()}, len(p.parts), int64(len(p.parts)*len(p.parts[0])))
	if err != nil {
		panic(err)
	}
	off, _ := s.slot(i)
	return off
}

func TestRefusals(t *testing.T) {
	p := newParted(t, "ext4", 10, 128<<10)
	good := p.image()
	small, unnamed, long, open := good, good, good, good
	small.Size, unnamed.Instance, open.Secret = 1000, "", nil
	long.Instance = string(make([]byte, 129))
	for _, i := range []Image{small, unnamed, long, open} {
		if err := Write(t.Context(), newCutDisk(good.Size, "z", 1), i, p); err == nil {
			t.Errorf("taken: %+v", i)
		}
	}
	if err := Write(t.Context(), newCutDisk(good.Size-1, "z", 1), good, p); err == nil {
		t.Error("a disk that is too small was taken")
	}
	d := newCutDisk(good.Size, "z", 1)
	more := good
	more.Size -= Sector
	if err := Write(t.Context(), d, more, p); err == nil || bootable(d.now) {
		t.Errorf("an image longer than it says: %v", err)
	}
}

// badSync is a disk whose Sync fails once.
type badSync struct {
	*cutDisk
	fail int
}

func (b *badSync) Sync() error {
	if b.fail--; b.fail == 0 {
		return errors.New("input/output error")
	}
	return b.cutDisk.Sync()
}

// TestSyncFailsOnce: the kernel tells of a lost write once, to whoever asks.
func TestSyncFailsOnce(t *testing.T) {
	p := newParted(t, "ext4", 10, 128<<10)
	for fail := 1; fail < 16; fail++ {
		d := &badSync{newCutDisk(p.image().Size*2, "z", 1), fail}
		if err := Write(t.Context(), d, p.image(), p); err == nil || bootable(d.now) && fail < 14 {
			t.Errorf("sync %d failed, and all was well: %v", fail, err)
		}
	}
}

// careless is a source that does not look at what Store says.
type careless struct{ *parted }

func (c careless) Fill(_ context.Context, t *Target) error {
	spool, err := NewSpool(t, len(c.parts), int64(len(c.parts)*len(c.parts[0])))
	if err != nil {
		return err
	}
	for i, part := range c.parts {
		_ = spool.Store(i, part)
	}
	_, err = t.WriteAt(c.data, 0)
	return err
}

// TestSyncErrorStays: an error that a source passed over is not forgotten.
func TestSyncErrorStays(t *testing.T) {
	p := newParted(t, "ext4", 10, 128<<10)
	for fail := 3; fail < 13; fail++ {
		d := &badSync{newCutDisk(p.image().Size*2, "z", 1), fail}
		if err := Write(t.Context(), d, p.image(), careless{p}); err == nil || bootable(d.now) {
			t.Errorf("sync %d failed, and all was well: %v", fail, err)
		}
	}
}

// TestSpoolGivesWay: where the image is written already, no part is spooled.
func TestSpoolGivesWay(t *testing.T) {
	const parts, part = 10, 128 << 10
	image := Image{Size: parts * part * 2, Instance: "i-1", Secret: []byte("s")}
	d := newCutDisk(image.Size, "z", 1) // as large as the image
	target := &Target{m: d, image: image, head: make([]byte, HeadSize)}
	spool, err := NewSpool(target, parts, parts*part)
	if err != nil {
		t.Fatal(err)
	}
	first, ok := spool.slot(0)
	if !ok || first >= image.Size {
		t.Fatalf("the first slot is at %d of %d", first, image.Size)
	}
	end := first + spool.stride + 1 // one byte into the second slot
	if err := target.Zero(0, end); err != nil {
		t.Fatal(err)
	}
	for i := range parts {
		if err := spool.Store(i, bytes.Repeat([]byte{byte('a' + i)}, part)); err != nil {
			t.Fatal(err)
		}
	}
	if len(bytes.Trim(d.now[HeadSize:end], "\x00")) > 0 {
		t.Error("a part was written over the image")
	}
	if n, err := spool.length(2); err != nil || n != part {
		t.Errorf("a slot behind the image holds %d bytes, %v", n, err)
	}
}

func FuzzRecord(f *testing.F) {
	i := Image{Size: 1 << 30, Instance: "i-1", Secret: []byte("s")}
	f.Add(i.record(Begun))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newCutDisk(HeadSize, "\x00", 1)
		copy(d.now, b)
		s, err := StateOf(d, i)
		if err != nil {
			t.Fatal(err)
		}
		if s != Foreign && !Claimed(d, "i-1") {
			t.Error("a record that is ours does not claim the disk")
		}
		if s != Foreign && !bytes.HasPrefix(d.now, i.record(s)) {
			t.Error("a record was made up")
		}
		Claimed(d, string(b))
	})
}
