package lazyroot

import (
	"cmp"
	clist "container/list"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/instar-image/instar/bundle/chunked"
)

// Limits of what is fetched at a time: with them a device needs some 20 MiB
// beside what it keeps.
const (
	demandSlots = 4         // ranges for who waits
	backSlots   = 2         // ranges ahead of need
	rangeBytes  = 1 << 20   // of a pack in one range, but for a chunk that is larger
	plainBytes  = 2 << 20   // of plaintext from one range, likewise
	farFactor   = 4         // times more of both for who reads around what is asked for
	rangeGap    = 64 << 10  // bytes nobody wants in a range, at once
	reach       = 2 << 20   // how far from a read a chunk's other extents are looked for
	ahead       = 4 << 20   // how far a sequential reader is read ahead of, at most
	firstAhead  = 256 << 10 // and at first
)

// want is a chunk and all that is known of where it goes.
type want struct {
	c  chunked.Chunk
	at []chunked.Extent
}

// piece is a chunk that is being fetched, or kept.
type piece struct {
	want
	done chan struct{}  // closed when p or err is there
	kept *clist.Element // nil while it is fetched
	p    []byte
	err  error
}

// fetcher gets chunks, each once however many ask for it at a time, and hands
// what came to fill.
type fetcher struct {
	ctx    context.Context //nolint:containedctx // of the device: a fetch outlives who asked first
	img    *Image
	fill   func(pos int64, p []byte) error // nil if nothing is kept
	limit  int64
	demand chan struct{}
	back   chan struct{}
	wg     sync.WaitGroup

	requests, fetched         atomic.Int64 // ranges and their bytes, for who waited
	backRequests, backFetched atomic.Int64 // and ahead of need
	joined                    atomic.Int64 // reads that found a fetch under way

	mu     sync.Mutex
	pieces map[chunked.Digest]*piece
	order  *clist.List // of *piece that are kept, the last used in front
	used   int64       // bytes
	filled error       // the first error of fill that nobody was told of
}

func newFetcher(ctx context.Context, img *Image, fill func(int64, []byte) error) *fetcher {
	return &fetcher{
		ctx: ctx, img: img, fill: fill, limit: img.o.Memory, demand: make(chan struct{}, demandSlots), back: make(chan struct{}, backSlots),
		pieces: map[chunked.Digest]*piece{}, order: clist.New(),
	}
}

// wants groups extents by their chunks, in the order of first use.
func wants(list []chunked.Extent) []want {
	at := make(map[chunked.Digest]int, len(list))
	var all []want
	for _, e := range list {
		n, ok := at[e.Chunk.Digest]
		if !ok {
			n = len(all)
			at[e.Chunk.Digest] = n
			all = append(all, want{c: e.Chunk})
		}
		all[n].at = append(all[n].at, e)
	}
	return all
}

// claim gives the pieces of the wants, and of them those that the caller must
// fetch.
func (f *fetcher) claim(list []want) (pieces, mine []*piece) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range list {
		x := f.pieces[w.c.Digest]
		switch {
		case x == nil:
			x = &piece{want: w, done: make(chan struct{})}
			f.pieces[w.c.Digest] = x
			mine = append(mine, x)
		case x.kept != nil:
			f.order.MoveToFront(x.kept)
		default:
			f.joined.Add(1)
		}
		pieces = append(pieces, x)
	}
	return pieces, mine
}

// get fetches what is not there, and gives the pieces of the wants; each is
// to be waited for. extra is fetched along where it lies in between or beside.
func (f *fetcher) get(list, extra []want) []*piece {
	pieces, mine := f.claim(list)
	if len(mine) > 0 && len(extra) > 0 {
		_, more := f.claim(extra)
		mine = append(mine, more...)
	}
	fresh := make(map[*piece]bool, len(mine))
	for _, x := range mine {
		fresh[x] = true
	}
	for n, x := range pieces {
		if f.fill != nil && !fresh[x] {
			// Who fetched it may not know of all the places it goes to.
			f.wg.Go(func() {
				if p, err := x.wait(f.ctx); err == nil {
					f.note(f.put(p, list[n].at))
				}
			})
		}
	}
	// What is at hand is no part of a range that a store is asked for, and waits for none.
	var held, far []*piece
	for _, x := range mine {
		if f.img.held(&x.c) {
			held = append(held, x)
		} else {
			far = append(far, x)
		}
	}
	if len(held) > 0 {
		// One after the other: what is at hand may be wrong, and a store is asked then.
		f.wg.Go(func() {
			for _, x := range held {
				f.fetch([]*piece{x})
			}
		})
	}
	for _, batch := range f.batches(far) {
		f.wg.Go(func() {
			select {
			case f.demand <- struct{}{}:
				defer func() { <-f.demand }()
			case <-f.ctx.Done():
			}
			f.requests.Add(1)
			f.fetched.Add(f.fetch(batch))
		})
	}
	return pieces
}

// getAhead fetches what is not there ahead of need and returns when it is
// there, or with what prevented it, and how many bytes were read for it.
func (f *fetcher) getAhead(ctx context.Context, list []want) (int64, error) {
	select {
	case f.back <- struct{}{}:
		defer func() { <-f.back }()
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-f.ctx.Done():
		return 0, context.Cause(f.ctx)
	}
	pieces, mine := f.claim(list)
	var read int64
	for _, batch := range f.batches(mine) {
		f.backRequests.Add(1)
		n := f.fetch(batch)
		f.backFetched.Add(n)
		read += n
	}
	var first error
	for n, x := range pieces {
		p, err := x.wait(ctx)
		if err == nil {
			err = f.put(p, list[n].at)
		}
		if first == nil {
			first = err
		}
	}
	return read, first
}

// tryAhead is getAhead in the background, unless others are at it.
func (f *fetcher) tryAhead(list []want) {
	select {
	case f.back <- struct{}{}:
	default:
		return
	}
	_, mine := f.claim(list)
	f.wg.Go(func() {
		defer func() { <-f.back }()
		for _, batch := range f.batches(mine) {
			f.backRequests.Add(1)
			f.backFetched.Add(f.fetch(batch))
		}
	})
}

func (x *piece) wait(ctx context.Context) ([]byte, error) {
	select {
	case <-x.done:
		return x.p, x.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// batches makes ranges of packs of what is to be fetched.
func (f *fetcher) batches(list []*piece) [][]*piece {
	rangeBytes, plainBytes := int64(rangeBytes), plainBytes
	if f.img.o.Around > 0 {
		rangeBytes, plainBytes = farFactor*rangeBytes, farFactor*plainBytes
	}
	slices.SortStableFunc(list, func(a, b *piece) int {
		return cmp.Or(a.c.At.Pack.Compare(b.c.At.Pack), cmp.Compare(a.c.At.Offset, b.c.At.Offset))
	})
	var all [][]*piece
	for from := 0; from < len(list); {
		first := list[from].c.At
		end, plain := first.Offset+int64(first.Sealed), list[from].c.Size
		to := from + 1
		for ; to < len(list); to++ {
			c := &list[to].c
			if c.At.Pack != first.Pack || c.At.Offset < end || c.At.Offset-end > rangeGap ||
				c.At.Offset+int64(c.At.Sealed)-first.Offset > rangeBytes || plain+c.Size > plainBytes {
				break
			}
			end, plain = c.At.Offset+int64(c.At.Sealed), plain+c.Size
		}
		all = append(all, list[from:to])
		from = to
	}
	return all
}

// fetch reads one range, lets go of who waits, and fills.
func (f *fetcher) fetch(batch []*piece) int64 {
	chunks := make([]chunked.Chunk, len(batch))
	for n, x := range batch {
		chunks[n] = x.c
	}
	first, last := chunks[0].At, chunks[len(chunks)-1].At
	f.img.read(f.ctx, chunks, func(n int, p []byte, err error) {
		x := batch[n]
		if err == nil && len(p) != x.c.Size {
			err = fmt.Errorf("chunk %s has %d bytes, not %d: %w", x.c.Digest, len(p), x.c.Size, chunked.ErrFormat)
		}
		x.p, x.err = p, err
		close(x.done)
	})
	for _, x := range batch {
		<-x.done
		f.keep(x)
	}
	return last.Offset + int64(last.Sealed) - first.Offset
}

// part is what an extent has of a chunk's plaintext.
func part(p []byte, e *chunked.Extent) ([]byte, error) {
	if e.Start+e.Length > int64(len(p)) {
		return nil, fmt.Errorf("chunk %s has %d bytes here and %d elsewhere in the index: %w", e.Chunk.Digest, e.Chunk.Size, len(p), chunked.ErrFormat)
	}
	return p[e.Start : e.Start+e.Length], nil
}

// put puts a chunk's plaintext where it goes.
func (f *fetcher) put(p []byte, at []chunked.Extent) error {
	if f.fill == nil {
		return nil
	}
	for n := range at {
		b, err := part(p, &at[n])
		if err == nil {
			err = f.fill(at[n].Pos, b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// note remembers the first error of put.
func (f *fetcher) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.filled == nil {
		f.filled = err
	}
}

// keep puts a piece that came to where it goes, and keeps it for a while.
func (f *fetcher) keep(x *piece) {
	if x.err == nil {
		f.note(f.put(x.p, x.at))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if x.err != nil {
		delete(f.pieces, x.c.Digest) // who asks later has it tried again
		return
	}
	x.at = nil
	x.kept = f.order.PushFront(x)
	f.used += int64(cap(x.p))
	for f.used > f.limit {
		old := f.order.Remove(f.order.Back()).(*piece)
		delete(f.pieces, old.c.Digest)
		f.used -= int64(cap(old.p))
	}
}

// failure is the first error of writing what came to the disk since it was
// asked last.
func (f *fetcher) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.filled
	f.filled = nil
	return err
}

// close waits for what is under way; its context must have ended.
func (f *fetcher) close() { f.wg.Wait() }
