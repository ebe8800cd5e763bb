package lazyroot

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/instar-image/instar/bundle/chunked"
)

// Throttle says how gently a disk is filled. The zero value is usable: two
// ranges at a time, backing off while the guest reads or writes.
type Throttle struct {
	// Workers is how many ranges are fetched at a time; 0 is 2, the most too.
	Workers int
	// Rate is how many stored bytes a second are fetched at most; 0: any number.
	Rate int64
	// Idle is how long the guest must have asked for nothing before the next range
	// is fetched; 0 is 20 ms, less than 0 does not wait for the guest.
	Idle time.Duration
	// Least is how many bytes a second are fetched however busy the guest is, so
	// that it ends; 0 is 1 MiB.
	Least int64
	// Busy, if it is not nil, tells more of what keeps the guest busy; it is asked
	// before each range.
	Busy func() bool
}

const (
	window      = 64 << 20 // of the image that is filled together
	flushEvery  = 32 << 20 // bytes a power cut may take back
	orderBatch  = 64       // chunks of an order that are fetched together
	busyLook    = 5 * time.Millisecond
	defaultIdle = 20 * time.Millisecond
)

// pacer holds back what is fetched ahead of need.
type pacer struct {
	d     *Device
	t     Throttle
	limit *rate.Limiter
}

func (d *Device) pacer(t Throttle) *pacer {
	if t.Workers <= 0 || t.Workers > backSlots {
		t.Workers = backSlots
	}
	if t.Idle == 0 {
		t.Idle = defaultIdle
	}
	if t.Least <= 0 {
		t.Least = 1 << 20
	}
	p := &pacer{d: d, t: t}
	if t.Rate > 0 {
		p.limit = rate.NewLimiter(rate.Limit(t.Rate), int(max(t.Rate, 2*chunked.MaxChunk)))
	}
	return p
}

func (p *pacer) busy() bool {
	if p.t.Idle > 0 && (p.d.busy.Load() > 0 || time.Since(p.d.born).Nanoseconds()-p.d.asked.Load() < p.t.Idle.Nanoseconds()) {
		return true
	}
	return p.t.Busy != nil && p.t.Busy()
}

// wait returns when n bytes may be fetched.
func (p *pacer) wait(ctx context.Context, n int64) error {
	if p.limit != nil {
		if err := p.limit.WaitN(ctx, int(min(n, int64(p.limit.Burst())))); err != nil {
			return err
		}
	}
	patience := time.Duration(float64(n) / float64(p.t.Least) * float64(time.Second))
	for begun := time.Now(); p.busy() && time.Since(begun) < patience; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(busyLook):
		}
	}
	return ctx.Err()
}

// pull is the fetching of many chunks ahead of need.
type pull struct {
	d   *Device
	p   *pacer
	g   *errgroup.Group
	ctx context.Context //nolint:containedctx // of one call

	mu    sync.Mutex
	bad   error // the first that trying again does not help
	since int64 // bytes put on the disk since the last flush
}

func (d *Device) pull(ctx context.Context, t Throttle) *pull {
	u := &pull{d: d, p: d.pacer(t)}
	u.g, u.ctx = errgroup.WithContext(ctx)
	u.g.SetLimit(u.p.t.Workers)
	return u
}

// fetch fetches what is not there of the extents, in the order of the packs,
// and returns when the last range is under way.
func (u *pull) fetch(list []chunked.Extent) {
	var all []*piece
	for _, w := range wants(u.d.missing(list)) {
		all = append(all, &piece{want: w})
	}
	for _, b := range u.d.fetch.batches(all) {
		if u.ctx.Err() != nil {
			return
		}
		n := int64(0)
		batch := make([]want, len(b))
		for i, x := range b {
			batch[i] = x.want
			n += int64(x.c.At.Sealed)
		}
		u.g.Go(func() error { return u.one(batch, n) })
	}
}

// one fetches one range, however long the stores take.
func (u *pull) one(list []want, n int64) error {
	if err := u.p.wait(u.ctx, n); err != nil {
		return err
	}
	for {
		_, err := u.d.fetch.getAhead(u.ctx, list)
		switch {
		case err == nil:
			return u.wrote(list)
		case u.ctx.Err() != nil:
			return context.Cause(u.ctx)
		case errors.Is(err, ErrStore):
			continue // it was waited for
		case lost(err):
			u.mu.Lock()
			defer u.mu.Unlock()
			if u.bad == nil {
				u.bad = err
			}
			return nil // the others are fetched all the same
		default:
			return err
		}
	}
}

// wrote flushes now and then, so that a power cut does not take back all.
func (u *pull) wrote(list []want) error {
	if u.d.disk == nil {
		return nil
	}
	u.mu.Lock()
	for _, w := range list {
		u.since += int64(w.c.Size)
	}
	flush := u.since >= flushEvery
	if flush {
		u.since = 0
	}
	u.mu.Unlock()
	if flush {
		return u.d.Flush(u.ctx)
	}
	return nil
}

func (u *pull) end() error {
	err := u.g.Wait()
	if err == nil {
		err = u.bad
	}
	return err
}

// order fetches ranges in their order, some at a time by packs.
func (u *pull) order(order iter.Seq[chunked.Range]) error {
	var list []chunked.Extent
	chunks := map[chunked.Digest]bool{}
	for r := range order {
		if r.Position < 0 || r.Length < 1 || r.Position >= u.d.lay.image {
			continue // a hint
		}
		end := r.Position + min(r.Length, u.d.lay.image-r.Position)
		for at := r.Position; at < end; {
			to := min(end, at+window)
			if u.d.disk != nil && u.d.bits.all(at/Block, (to+Block-1)/Block) {
				at = to
				continue
			}
			near, err := u.d.extents(u.ctx, max(0, at-reach)/Block*Block, (to+reach+Block-1)/Block*Block)
			if err != nil {
				return err
			}
			hit := map[chunked.Digest]bool{}
			for _, e := range near {
				if e.Pos < to && e.Pos+e.Length > at {
					hit[e.Chunk.Digest] = true
				}
			}
			for _, e := range near {
				if hit[e.Chunk.Digest] {
					list = append(list, e)
					chunks[e.Chunk.Digest] = true
				}
			}
			at = to
			if len(chunks) >= orderBatch {
				u.fetch(list)
				list, chunks = nil, map[chunked.Digest]bool{}
			}
		}
	}
	u.fetch(list)
	return nil
}

// extents waits as long as it takes.
func (d *Device) extents(ctx context.Context, from, to int64) ([]chunked.Extent, error) {
	for {
		list, err := d.img.extents(ctx, from, to)
		if err == nil || !errors.Is(err, ErrStore) || ctx.Err() != nil {
			return list, err
		}
	}
}

// Prefetch fetches ranges of the image at once, in their order, as far as they
// are not there: what a boot is known to read. It returns when they are there; an
// error says of what this was not possible.
func (d *Device) Prefetch(ctx context.Context, ranges iter.Seq[chunked.Range]) error {
	u := d.pull(ctx, Throttle{Idle: -1})
	err := u.order(ranges)
	if gerr := u.end(); err == nil || gerr != nil {
		err = gerr
	}
	if err != nil {
		return fmt.Errorf("prefetch: %w", err)
	}
	return nil
}

// Hydrate brings what is not on the disk: first the ranges of order, if there is one,
// then the rest. When it returns nil the disk is, durably, the image with what was
// written to it, and nothing else is needed any more: reads and writes go
// straight to it, and [Device.Close] or a plain use of the disk may follow. It
// waits for stores as long as ctx lasts; chunks that no source has end it with an error when
// all else is there.
func (d *Device) Hydrate(ctx context.Context, order iter.Seq[chunked.Range], t Throttle) error {
	if d.disk == nil {
		return fmt.Errorf("fill the disk: %w", ErrReadOnly)
	}
	// By the bits, not by their count: another filler counts its blocks just after it set them.
	if !d.bits.all(0, d.bits.n) {
		if err := d.hydrate(ctx, order, t); err != nil {
			return fmt.Errorf("fill the disk: %w", err)
		}
		if !d.bits.all(0, d.bits.n) {
			return fmt.Errorf("fill the disk: blocks stay empty, %d of them", d.bits.left.Load())
		}
	}
	if d.volatile {
		return nil
	}
	if err := d.complete(ctx); err != nil {
		return fmt.Errorf("complete the disk: %w", err)
	}
	return nil
}

func (d *Device) hydrate(ctx context.Context, order iter.Seq[chunked.Range], t Throttle) error {
	d.fetch.failure() // of before: this tries it again
	u := d.pull(ctx, t)
	if order != nil {
		if err := u.order(order); err != nil {
			return errors.Join(err, u.end())
		}
	}
	var err error
	for from := int64(0); from < d.lay.image && err == nil; from += window {
		to := min(from+window, d.lay.image)
		if d.bits.all(from/Block, (to+Block-1)/Block) {
			continue
		}
		err = d.hydrateWindow(u, from, to)
	}
	if gerr := u.end(); err == nil || gerr != nil && ctx.Err() == nil {
		err = gerr
	}
	if err == nil {
		err = d.fetch.failure()
	}
	if err == nil {
		err = d.sweep(ctx)
	}
	return err
}

// hydrateWindow zeroes the holes of a window and fetches the rest.
func (d *Device) hydrateWindow(u *pull, from, to int64) error {
	list, err := d.extents(u.ctx, from, to)
	if err != nil {
		return err
	}
	at := from
	hole := func(end int64) error {
		first, last := (at+Block-1)/Block, end/Block
		if end == d.lay.image {
			last = d.lay.blocks
		}
		for first < last {
			local, stop := d.bits.run(first, last)
			stop = min(stop, first+zeroAtOnce/Block)
			if !local {
				if err := d.zeroHole(u.ctx, first, stop); err != nil {
					return err
				}
			}
			first = stop
		}
		return nil
	}
	for _, e := range list {
		if err := hole(e.Pos); err != nil {
			return err
		}
		at = e.Pos + e.Length
	}
	if err := hole(to); err != nil {
		return err
	}
	u.fetch(list)
	return nil
}

// zeroHole makes blocks zero that the image does not have, where nobody wrote.
func (d *Device) zeroHole(ctx context.Context, from, to int64) error {
	unlock, err := d.locks.lock(ctx, from, to)
	if err != nil {
		return err
	}
	defer unlock()
	for b := from; b < to; {
		local, end := d.bits.run(b, to)
		if !local {
			if err := d.diskZero(b*Block, (end-b)*Block); err != nil {
				return err
			}
			d.bits.set(b, end)
		}
		b = end
	}
	return nil
}

// sweep brings the blocks that several extents share.
func (d *Device) sweep(ctx context.Context) error {
	for b := int64(0); b < d.bits.n; {
		local, end := d.bits.run(b, d.bits.n)
		if local {
			b = end
			continue
		}
		x, err := d.before(ctx, b)
		if err != nil {
			if errors.Is(err, ErrStore) && ctx.Err() == nil {
				continue
			}
			return err
		}
		if err := d.fillRun(b, b+1, x); err != nil {
			return err
		}
		b++
	}
	return nil
}

// complete makes the disk one that needs no device: all is durable, then the
// head is put in its place, then the tail says so. Requests wait meanwhile.
func (d *Device) complete(ctx context.Context) error {
	if err := d.commits.flush(ctx); err != nil {
		return err
	}
	d.gate.Lock()
	defer d.gate.Unlock()
	if !d.shadow {
		return nil
	}
	b := aligned(HeadSize)
	disk := remembering{d.disk, d.commits}
	if _, err := disk.ReadAt(b, d.lay.head); err != nil {
		return err
	}
	if _, err := disk.WriteAt(b, 0); err != nil {
		return err
	}
	if err := disk.Sync(); err != nil {
		return err
	}
	s := d.super
	s.State = Complete
	s.generation++
	if err := writeSuper(disk, &d.lay, &s, d.id.Secret); err != nil {
		return err
	}
	d.super, d.shadow = s, false
	d.commits.plain.Store(true)
	return nil
}
