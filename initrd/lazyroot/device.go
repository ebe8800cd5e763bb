// Package lazyroot is a block device that is an image from the first moment and
// fetches it later: what is read is fetched, verified, given away and kept on
// a local disk, what is written goes to that disk, and in the background the rest
// comes too, until the disk holds all and the device is needed no more.
//
// In goes an image's index with the sources of its chunks, and a disk; out come
// reads and writes, durable when [Device.Flush] says so. It touches the disk
// alone, on which it remembers, in a tail behind what the guest sees, which
// blocks are there (docs/lazyroot.md). Without a disk, or on one that is thrown away,
// it is the same view for a workstation.
//
// No byte is given before its chunk was verified. What was written is never
// lost to what is fetched. The package does not log.
package lazyroot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// ErrReadOnly: the device has no disk to write to.
var ErrReadOnly = errors.New("the device is read-only")

// ErrRange: the device does not reach that far.
var ErrRange = errors.New("beyond the end of the device")

// Options of [Open].
type Options struct {
	Image *Image // required, but for a disk that is complete
	// Disk is where things are kept. nil: in memory only, and nothing can be written.
	Disk Disk
	// Identity of the image on the disk; not needed for one that is Volatile.
	Identity Identity
	// Volatile is for a disk that begins as zeros and is thrown away: it has no
	// tail, and need be no larger than the image, in whole blocks.
	Volatile bool
	// Session, if it is not nil, is a file in memory, read and written (a memfd, or
	// one of a tmpfs), that must not outlive the machine's power: with it a
	// device that is opened again after its process was killed has also what was
	// written and not flushed. Only one device uses it, and the disk, at a time.
	Session *os.File
	// OnRead is told what the guest reads, before it is read.
	OnRead func(off, n int64)
}

// Device is a block device. Its methods may be called concurrently, also for the
// same bytes: then each write is whole.
type Device struct {
	img      *Image
	disk     Disk // nil: none
	id       Identity
	volatile bool
	onRead   func(off, n int64)
	lay      layout
	super    super
	size     int64
	bits     *bitmap
	locks    ranges
	commits  *committer
	fetch    *fetcher
	stop     context.CancelCauseFunc
	unmap    func() error
	readers  sequences

	// gate is held to read by whoever touches the disk, and to write while the
	// head is put in its place.
	gate   sync.RWMutex
	shadow bool // the head is in the tail

	busy  atomic.Int64 // guest's requests under way
	asked atomic.Int64 // when the guest last asked for something, ns
	born  time.Time
}

// Open opens a device. A disk must have been prepared by [Format], or be one
// that a device of the same identity used before; else: [ErrForeign].
func Open(ctx context.Context, o Options) (*Device, error) {
	d := &Device{img: o.Image, disk: o.Disk, id: o.Identity, volatile: o.Volatile, onRead: o.OnRead, born: time.Now(), unmap: func() error { return nil }}
	if d.onRead == nil {
		d.onRead = func(int64, int64) {}
	}
	var err error
	switch {
	case o.Disk == nil || o.Volatile:
		if o.Image == nil {
			return nil, errors.New("open a lazy device: there is no image")
		}
		err = d.openVolatile()
	default:
		err = d.openDisk(o.Session)
	}
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, errors.Join(err, d.unmap())
	}
	if d.img != nil {
		inner, stop := context.WithCancelCause(context.WithoutCancel(ctx))
		d.stop = stop
		var fill func(int64, []byte) error
		if d.disk != nil {
			fill = d.fill
		}
		d.fetch = newFetcher(inner, d.img, fill)
	}
	return d, nil
}

func (d *Device) openVolatile() error {
	d.size = d.img.Size()
	blocks := (d.size + Block - 1) / Block
	if d.disk != nil && d.disk.Size() < blocks*Block {
		return fmt.Errorf("open a lazy device: the overlay has %d bytes, the image needs %d", d.disk.Size(), blocks*Block)
	}
	d.lay = layout{image: d.size, device: d.size, blocks: blocks}
	words := 0
	if d.disk != nil {
		words = int((blocks+pageBits-1)/pageBits) * pageWords
	}
	d.bits = newBitmap(make([]uint64, words), blocks)
	d.commits = &committer{disk: d.disk, lay: &d.lay, bits: d.bits}
	return nil
}

func (d *Device) openDisk(session *os.File) error {
	if err := d.id.check(); err != nil {
		return err
	}
	if d.img != nil && d.img.Size() != d.id.Size {
		return fmt.Errorf("open a lazy device: the image has %d bytes, its identity says %d", d.img.Size(), d.id.Size)
	}
	s, err := d.id.find(d.disk)
	if err != nil {
		return err
	}
	if s.State == None {
		return ErrForeign
	}
	if d.lay, err = layoutOf(d.disk.Size(), d.id.Size); err != nil {
		return err
	}
	d.super, d.size, d.shadow = s, d.lay.device, s.State == Filling
	words := make([]uint64, d.lay.pages*pageWords)
	d.commits = &committer{disk: d.disk, lay: &d.lay}
	if s.State == Complete {
		d.bits = newBitmap(words, d.lay.blocks)
		d.bits.set(0, d.lay.blocks)
		d.commits.bits = d.bits
		d.commits.plain.Store(true)
		return nil
	}
	if d.img == nil {
		return errors.New("open a lazy device: the disk is not complete and there is no image")
	}
	key := d.id.pageKey(&s)
	generations, err := readPages(d.disk, &d.lay, key, words)
	if err != nil {
		return err
	}
	current := append([]uint64(nil), words...)
	if session != nil {
		shared, unmap, _, err := mapSession(session, key, s.nonce[:], len(words))
		if err != nil {
			return err
		}
		d.unmap = unmap
		for i, w := range words {
			shared[i] |= w
		}
		current = shared
	}
	d.bits = newBitmap(current, d.lay.blocks)
	d.commits.bits, d.commits.key, d.commits.generations = d.bits, key, generations
	d.commits.compare(words)
	return d.clearHead()
}

// clearHead makes sure that nobody takes a disk that is not complete for one
// that is: a cut while it was made so may have left the head in its place.
func (d *Device) clearHead() error {
	b := aligned(HeadSize)
	if _, err := d.disk.ReadAt(b, 0); err != nil {
		return fmt.Errorf("read the disk's head: %w", err)
	}
	if isZero(b) {
		return nil
	}
	if err := d.disk.Zero(0, HeadSize); err != nil {
		return fmt.Errorf("clear the disk's head: %w", err)
	}
	if err := d.disk.Sync(); err != nil {
		return fmt.Errorf("clear the disk's head: %w", err)
	}
	return nil
}

// Size is what the guest sees, in bytes.
func (d *Device) Size() int64 { return d.size }

// ReadOnly tells whether nothing can be written.
func (d *Device) ReadOnly() bool { return d.disk == nil }

// Close ends what is under way, and flushes. No other method may be called at
// the same time or later. The disk stays open.
func (d *Device) Close() error {
	if d.fetch != nil {
		d.stop(errors.New("the device is closed"))
		d.fetch.close()
	}
	var err error
	if d.disk != nil && !d.volatile {
		err = d.commits.flush(context.Background())
	}
	return errors.Join(err, d.unmap())
}

// Stats is what a device did.
type Stats struct {
	State        State
	Blocks       int64 // of the image
	Local        int64 // of them on the disk
	Demand       int64 // ranges fetched for who waited
	DemandBytes  int64
	Ahead        int64 // ranges fetched ahead of need
	AheadBytes   int64
	Joined       int64         // reads that found what they need under way
	SinceRequest time.Duration // 0 while the guest waits for an answer
}

// Stats of now.
func (d *Device) Stats() Stats {
	s := Stats{State: d.state(), Blocks: d.bits.n, Local: d.bits.n - d.bits.left.Load()}
	if d.busy.Load() == 0 {
		s.SinceRequest = time.Duration(time.Since(d.born).Nanoseconds() - d.asked.Load())
	}
	if f := d.fetch; f != nil {
		s.Demand, s.DemandBytes, s.Ahead, s.AheadBytes, s.Joined = f.requests.Load(), f.fetched.Load(), f.backRequests.Load(), f.backFetched.Load(), f.joined.Load()
	}
	return s
}

func (d *Device) state() State {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if d.shadow {
		return Filling
	}
	if d.disk == nil || d.volatile {
		return None
	}
	return Complete
}

// begin checks a request and notes that the guest is at work.
func (d *Device) begin(what string, off, n int64, write bool) (end func(), err error) {
	if off < 0 || n < 0 || off > d.size-n {
		return nil, fmt.Errorf("%s %d bytes at %d of %d: %w", what, n, off, d.size, ErrRange)
	}
	if write && d.disk == nil {
		return nil, fmt.Errorf("%s: %w", what, ErrReadOnly)
	}
	d.busy.Add(1)
	return func() {
		d.asked.Store(time.Since(d.born).Nanoseconds())
		d.busy.Add(-1)
	}, nil
}

// onDisk splits a range of whole blocks where the head ends, which until the
// disk is complete is elsewhere.
func (d *Device) onDisk(off, n int64, do func(at, n int64) error) error {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if d.shadow && off < HeadSize {
		k := min(n, HeadSize-off)
		if err := do(d.lay.head+off, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	if n == 0 {
		return nil
	}
	return do(off, n)
}

func (d *Device) diskRead(p []byte, off int64) error {
	return d.onDisk(off, int64(len(p)), func(at, n int64) error {
		b := p[:n]
		p = p[n:]
		if _, err := d.disk.ReadAt(b, at); err != nil {
			return fmt.Errorf("read %d bytes at %d of the disk: %w", n, at, err)
		}
		return nil
	})
}

func (d *Device) diskWrite(p []byte, off int64) error {
	return d.onDisk(off, int64(len(p)), func(at, n int64) error {
		b := p[:n]
		p = p[n:]
		if _, err := d.disk.WriteAt(b, at); err != nil {
			return fmt.Errorf("write %d bytes at %d of the disk: %w", n, at, err)
		}
		return nil
	})
}

func (d *Device) diskZero(off, n int64) error {
	return d.onDisk(off, n, func(at, n int64) error {
		if err := d.disk.Zero(at, n); err != nil {
			return fmt.Errorf("zero %d bytes at %d of the disk: %w", n, at, err)
		}
		return nil
	})
}

// fill puts bytes of the image on the disk where nothing was put before. Blocks
// of which p has only a part are left out, but for the image's last.
func (d *Device) fill(pos int64, p []byte) error {
	from, to := (pos+Block-1)/Block, (pos+int64(len(p)))/Block
	if pos+int64(len(p)) == d.lay.image {
		to = d.lay.blocks
	}
	for from < to {
		local, end := d.bits.run(from, to)
		if local {
			from = end
			continue
		}
		end = min(end, from+(1<<20)/Block)
		if err := d.fillRun(from, end, p[from*Block-pos:]); err != nil {
			return err
		}
		from = end
	}
	return nil
}

func (d *Device) fillRun(from, to int64, p []byte) error {
	unlock, err := d.locks.lock(context.Background(), from, to)
	if err != nil {
		return err
	}
	defer unlock()
	for b := from; b < to; {
		local, end := d.bits.run(b, to)
		if !local {
			q := p[(b-from)*Block:]
			if n := (end - b) * Block; int64(len(q)) >= n {
				q = q[:n]
			} else { // the image's last block is not whole
				q = append(aligned(int(n))[:0], q...)[:n]
			}
			if err := d.diskWrite(q, b*Block); err != nil {
				return err
			}
			d.bits.set(b, end)
		}
		b = end
	}
	return nil
}
