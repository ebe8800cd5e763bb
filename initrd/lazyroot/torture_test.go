package lazyroot

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

const sector = 512

// model is what a device must hold: of each sector what it holds now, and what it may hold
// after a power cut.
type model struct {
	now  []byte
	may  map[int64][][]byte // sectors written since the last flush: what they held
	open map[int64][][]byte // sectors whose writing failed: what they held before
	mu   sync.Mutex         // of may and open
	all  sync.RWMutex       // held to write by operations on any bytes, to read by those on own ones
	size int64
}

func newModel(b []byte) *model {
	return &model{now: b, may: map[int64][][]byte{}, open: map[int64][][]byte{}, size: int64(len(b))}
}

// change notes that do changes bytes, or, if it fails, may have.
func (m *model) change(off int64, p []byte, do func() error) error {
	first, last := off/sector, (off+int64(len(p))+sector-1)/sector
	keep := func(in map[int64][][]byte) {
		for s := first; s < last; s++ {
			in[s] = append(in[s], bytes.Clone(m.now[s*sector:min((s+1)*sector, m.size)]))
		}
	}
	before := map[int64][][]byte{}
	m.mu.Lock()
	keep(m.may)
	keep(before)
	copy(m.now[off:], p)
	keep(m.may)
	m.mu.Unlock()
	err := do()
	if err != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		for s, v := range before {
			m.open[s] = append(m.open[s], v...)
		}
	}
	return err
}

func (m *model) flushed() { clear(m.may) }

// survived checks what a device holds after a power cut, which is what it
// holds from then on.
func (m *model) survived(got []byte) error {
	for s := int64(0); s*sector < m.size; s++ {
		a, b := s*sector, min((s+1)*sector, m.size)
		if bytes.Equal(got[a:b], m.now[a:b]) {
			continue
		}
		ok := false
		for _, v := range m.may[s] {
			ok = ok || bytes.Equal(v, got[a:b])
		}
		if !ok {
			return fmt.Errorf("sector %d is neither as it was flushed nor as it was written since (%d versions)", s, len(m.may[s]))
		}
	}
	copy(m.now, got)
	m.flushed()
	clear(m.open)
	return nil
}

// torture is one device under load.
type torture struct {
	t     *testing.T
	dev   *Device
	m     *model
	src   []*lazytest.Flaky
	seed  uint64
	ops   atomic.Int64
	bad   atomic.Pointer[error]
	ended atomic.Bool // the power is cut, or the process killed: errors are expected
}

const stripe = 3 * sector // bytes; not a divisor of a block, so that blocks have several owners

func (x *torture) fail(err error) {
	if !x.ended.Load() {
		x.bad.CompareAndSwap(nil, &err)
	}
}

// own does one operation on bytes that this worker alone changes.
func (x *torture) own(r *rand.Rand, worker, workers int64) {
	x.m.all.RLock()
	defer x.m.all.RUnlock()
	stripes := x.m.size / stripe / workers
	at := (r.Int64N(stripes)*workers + worker) * stripe
	off := at + r.Int64N(stripe)
	n := 1 + r.Int64N(at+stripe-off)
	if r.IntN(3) == 0 {
		off, n = at, stripe
	}
	x.one(r, off, n, false)
}

// any does one operation on bytes anywhere, alone.
func (x *torture) any(r *rand.Rand) {
	x.m.all.Lock()
	defer x.m.all.Unlock()
	off := r.Int64N(x.m.size)
	n := 1 + r.Int64N(min(200_000, x.m.size-off))
	if r.IntN(2) == 0 {
		off = off / Block * Block
		n = min((n+Block-1)/Block*Block, x.m.size-off)
	}
	x.one(r, off, n, true)
}

func (x *torture) one(r *rand.Rand, off, n int64, alone bool) {
	if x.bad.Load() != nil {
		return
	}
	x.ops.Add(1)
	ctx := x.t.Context()
	var err error
	switch k := r.IntN(100); {
	case k < 45:
		p := make([]byte, n)
		if err = x.dev.ReadAt(ctx, p, off); err == nil && !bytes.Equal(p, x.m.now[off:off+n]) {
			err = fmt.Errorf("a read of %d bytes at %d gave other bytes", n, off)
		}
	case k < 80:
		p := make([]byte, n)
		for i := 0; i < len(p); i += 8 {
			v := r.Uint64()
			for j := i; j < min(i+8, len(p)); j++ {
				p[j] = byte(v >> (8 * (j - i)))
			}
		}
		err = x.m.change(off, p, func() error { return x.dev.WriteAt(ctx, p, off) })
	case k < 87:
		err = x.m.change(off, make([]byte, n), func() error { return x.dev.WriteZeroes(ctx, off, n) })
	case k < 93:
		err = x.m.change(off, make([]byte, n), func() error { return x.dev.Discard(ctx, off, n) })
	default:
		if err = x.dev.Flush(ctx); err == nil && alone {
			x.m.flushed()
		}
	}
	if err != nil {
		x.fail(err)
	}
}

// run loads the device with n operations while it is filled, until the end or
// until stop is closed.
func (x *torture) run(n int64, stop <-chan struct{}) {
	const workers = 4
	ctx, cancel := context.WithCancel(x.t.Context())
	var filling, all sync.WaitGroup
	filling.Go(func() {
		r := rand.New(rand.NewPCG(x.seed, 100))
		order := func(yield func(chunked.Range) bool) {
			for range 200 {
				time.Sleep(100 * time.Microsecond)
				if !yield(chunked.Range{Position: r.Int64N(x.dev.lay.image), Length: 1 + r.Int64N(50_000)}) {
					return
				}
			}
		}
		err := x.dev.Hydrate(ctx, order, Throttle{Idle: -1, Rate: 64 << 20})
		if err != nil && ctx.Err() == nil {
			x.fail(err)
		}
	})
	left := atomic.Int64{}
	left.Store(n)
	for w := range int64(workers) {
		all.Go(func() {
			r := rand.New(rand.NewPCG(x.seed, uint64(w)))
			for left.Add(-1) >= 0 {
				select {
				case <-stop:
					return
				default:
				}
				if r.IntN(20) == 0 {
					x.any(r)
				} else {
					x.own(r, w, workers)
				}
			}
		})
	}
	all.Wait()
	cancel()
	filling.Wait()
}

// memfd is a session.
func memfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("session", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "session")
	t.Cleanup(func() { f.Close() })
	return f
}

// operations is how many a test does: few, or those of an evidence run.
func operations(few, many int64) int64 {
	if raced {
		return few / 20
	}
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		return many
	}
	return few
}

// TestTorture loads devices with reads, writes, zeroing, discards and flushes of
// any bytes while they are filled from stores that fail and give wrong bytes;
// kills them, cuts their power, opens them again, and ends with plain disks.
func TestTorture(t *testing.T) {
	total := operations(150_000, 1_000_000)
	var done, kills, cuts, complete int64
	for round := uint64(0); done < total; round++ {
		r := rand.New(rand.NewPCG(round, 1))
		s := lazytest.New(t, lazytest.Layout{Size: 4<<20 + r.IntN(2)*1234, Chunk: 8 << 10 << r.IntN(5), Holes: r.IntN(6), Odd: round%3 == 2, Seed: round})
		id := identity(s)
		disk := lazytest.NewDisk(DiskSize(id.Size)+int64(r.IntN(2)*300_000), "what was there ")
		if err := Format(disk, id); err != nil {
			t.Fatal(err)
		}
		l, err := layoutOf(disk.Size(), id.Size)
		if err != nil {
			t.Fatal(err)
		}
		// Behind the image the disk is as it was.
		m := newModel(disk.Bytes()[:l.device])
		copy(m.now, s.Data)
		clear(m.now[id.Size:min(l.blocks*Block, l.device)])
		session := memfd(t)
		for life := 0; ; life++ {
			x := &torture{t: t, m: m, seed: round*1000 + uint64(life)}
			sources := make([]NamedSource, 2)
			for i := range sources {
				f := lazytest.NewFlaky(s, x.seed+uint64(i))
				f.Errors.Store(50)
				f.Garbles.Store(20 * int64(1-i))
				f.Missing.Store(20 * int64(1-i))
				x.src = append(x.src, f)
				sources[i] = NamedSource{Name: fmt.Sprint("source ", i), Source: f}
			}
			x.dev = open(t, Options{
				Image: image(t, s, ImageOptions{Sources: sources, Pause: 10 * time.Microsecond, Memory: 256 << 10}),
				Disk:  disk, Identity: id, Session: session,
			})
			end := r.IntN(3)
			if life == 4 {
				end = 2
			}
			stop := make(chan struct{})
			n := 500 + r.Int64N(2500)
			var next *lazytest.Disk
			var killer sync.WaitGroup
			if end != 2 {
				killer.Go(func() {
					for x.ops.Load() < n/2 && x.bad.Load() == nil {
						time.Sleep(50 * time.Microsecond)
					}
					x.ended.Store(true)
					if end == 0 {
						next = disk.Kill()
					} else {
						next = disk.Cut(r, nil)
					}
					close(stop)
				})
			}
			x.run(n, stop)
			killer.Wait()
			done += x.ops.Load()
			if bad := x.bad.Load(); bad != nil {
				t.Fatalf("round %d, life %d: %v", round, life, *bad)
			}
			if end == 2 {
				if err := x.dev.Hydrate(t.Context(), nil, Throttle{Idle: -1}); err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				shut(t, x.dev)
				complete++
				if !bytes.Equal(disk.Bytes()[:l.device], m.now) {
					t.Fatalf("round %d: the disk is not the image and what was written to it", round)
				}
				break
			}
			x.dev.Close() // its disk is gone
			disk = next
			what := "kill"
			if end == 1 {
				what = "power cut"
				session = memfd(t)
				cuts++
			} else {
				kills++
			}
			after := open(t, Options{Image: image(t, s, ImageOptions{}), Disk: disk, Identity: id, Session: session})
			got := make([]byte, l.device)
			if err := after.ReadAt(t.Context(), got, 0); err != nil {
				t.Fatal(err)
			}
			shut(t, after)
			if end == 0 {
				// What was acknowledged is there, flushed or not. What was under way may be.
				if err := m.killed(got); err != nil {
					t.Fatalf("round %d, life %d: after a %s: %v", round, life, what, err)
				}
			} else if err := m.survived(got); err != nil {
				t.Fatalf("round %d, life %d: after a %s: %v", round, life, what, err)
			}
		}
	}
	t.Logf("%d operations, %d kills, %d power cuts, %d disks complete", done, kills, cuts, complete)
}

// killed checks what a device holds after its process was killed: of what was
// under way, old or new.
func (m *model) killed(got []byte) error {
	for s := int64(0); s*sector < m.size; s++ {
		a, b := s*sector, min((s+1)*sector, m.size)
		ok := bytes.Equal(got[a:b], m.now[a:b])
		for _, v := range m.open[s] {
			ok = ok || bytes.Equal(v, got[a:b])
		}
		if !ok {
			return fmt.Errorf("sector %d is not what was written last", s)
		}
	}
	clear(m.open)
	copy(m.now, got)
	return nil
}
