package lazytest

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
)

// ErrCut is what a disk without power fails with.
var ErrCut = errors.New("power cut")

const sector = 512

// Disk is a disk in memory. What was not synced when its power is cut is, sector by
// sector, as it was at some moment since the last Sync.
type Disk struct {
	mu      sync.Mutex
	now     []byte
	durable []byte
	pending map[int64][][]byte // sector: what was written to it, one after the other
	ops     int
	cutAt   int // operations that change anything until the cut; negative: never
	dead    bool

	Syncs int
}

// NewDisk is a disk of size bytes that holds fill again and again.
func NewDisk(size int64, fill string) *Disk {
	d := &Disk{now: make([]byte, size), cutAt: -1, pending: map[int64][][]byte{}}
	if fill != "" {
		for i := range d.now {
			d.now[i] = fill[i%len(fill)]
		}
	}
	d.durable = append([]byte(nil), d.now...)
	return d
}

// Size in bytes.
func (d *Disk) Size() int64 { return int64(len(d.now)) }

// CutAfter cuts the power after n more operations; negative: never.
func (d *Disk) CutAfter(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ops, d.cutAt = 0, n
}

// Ops is how many operations there were since CutAfter.
func (d *Disk) Ops() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ops
}

func (d *Disk) op() bool {
	if d.dead || d.cutAt >= 0 && d.ops >= d.cutAt {
		d.dead = true
		return false
	}
	d.ops++
	return true
}

// ReadAt reads what was written last.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return 0, ErrCut
	}
	if off%sector != 0 || len(p)%sector != 0 || off < 0 || off+int64(len(p)) > int64(len(d.now)) {
		return 0, errors.New("not whole sectors of the disk")
	}
	return copy(p, d.now[off:]), nil
}

// WriteAt writes; when the power is cut, in part.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return 0, ErrCut
	}
	if off%sector != 0 || len(p)%sector != 0 || off < 0 || off+int64(len(p)) > int64(len(d.now)) {
		return 0, errors.New("not whole sectors of the disk")
	}
	alive := d.op()
	copy(d.now[off:], p)
	for s := off / sector; s < (off+int64(len(p)))/sector; s++ {
		d.pending[s] = append(d.pending[s], append([]byte(nil), d.now[s*sector:(s+1)*sector]...))
	}
	if !alive {
		return 0, ErrCut
	}
	return len(p), nil
}

// Zero writes zeros.
func (d *Disk) Zero(off, n int64) error {
	_, err := d.WriteAt(make([]byte, n), off)
	return err
}

// Sync makes all durable.
func (d *Disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.op() {
		return ErrCut
	}
	d.Syncs++
	for s, v := range d.pending {
		copy(d.durable[s*sector:], v[len(v)-1])
	}
	clear(d.pending)
	return nil
}

// Kill is what remains for another process when this one is gone: everything.
func (d *Disk) Kill() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := &Disk{now: append([]byte(nil), d.now...), durable: append([]byte(nil), d.durable...), cutAt: -1, pending: map[int64][][]byte{}}
	for s, v := range d.pending {
		n.pending[s] = append([][]byte(nil), v...)
	}
	d.dead = true
	return n
}

// Cut is what remains when the power is gone: pick says for each sector that was not
// synced which of its n versions it has, 0 being the durable one; nil is at random.
func (d *Disk) Cut(r *rand.Rand, pick func(sector int64, n int) int) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	n := &Disk{now: append([]byte(nil), d.durable...), cutAt: -1, pending: map[int64][][]byte{}}
	for s, v := range d.pending {
		k := 0
		if pick != nil {
			k = pick(s, len(v)+1)
		} else {
			k = r.IntN(len(v) + 1)
		}
		if k > 0 {
			copy(n.now[s*sector:], v[k-1])
		}
	}
	n.durable = append([]byte(nil), n.now...)
	return n
}

// Pending is how many sectors are not durable.
func (d *Disk) Pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.pending)
}

// Bytes is what the disk holds now.
func (d *Disk) Bytes() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]byte(nil), d.now...)
}

// PendingBlocks are the blocks of size bytes that are not durable, ascending.
func (d *Disk) PendingBlocks(size int64) []int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	blocks := map[int64]bool{}
	for s := range d.pending {
		blocks[s*sector/size] = true
	}
	return slices.Sorted(maps.Keys(blocks))
}
