package lazyroot

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
)

// ReadAt reads all of p. It waits for what is not there as long as the image's
// patience lasts.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	end, err := d.begin("read", off, int64(len(p)), false)
	if err != nil {
		return err
	}
	defer end()
	d.onRead(off, int64(len(p)))
	return d.read(ctx, p, off)
}

func (d *Device) read(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		first, last := off/Block, (off+int64(len(p))+Block-1)/Block
		local, end := false, last
		if d.disk != nil {
			local, end = d.bits.run(first, last)
		}
		n := min(int64(len(p)), end*Block-off)
		var err error
		if local {
			err = d.readLocal(p[:n], off)
		} else {
			err = d.readImage(ctx, p[:n], off)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readLocal reads what is on the disk, which takes whole blocks.
func (d *Device) readLocal(p []byte, off int64) error {
	if skip := off % Block; skip > 0 || len(p) < Block {
		b := aligned(Block)
		if err := d.diskRead(b, off-skip); err != nil {
			return err
		}
		n := copy(p, b[skip:])
		p, off = p[n:], off+int64(n)
	}
	if whole := len(p) / Block * Block; whole > 0 {
		if err := d.diskRead(p[:whole], off); err != nil {
			return err
		}
		p, off = p[whole:], off+int64(whole)
	}
	if len(p) > 0 {
		return d.readLocal(p, off)
	}
	return nil
}

// readImage reads what the image has, which is on the disk then, or soon.
func (d *Device) readImage(ctx context.Context, p []byte, off int64) error {
	end := off + int64(len(p))
	fail := func(err error) error { return fmt.Errorf("read %d bytes at %d of the image: %w", len(p), off, err) }
	near, err := d.img.extents(ctx, max(0, off-reach)/Block*Block, (end+reach+Block-1)/Block*Block)
	if err != nil {
		return fail(err)
	}
	var needed []chunked.Extent
	hits := map[chunked.Digest]bool{}
	for _, e := range near {
		if e.Pos < end && e.Pos+e.Length > off {
			needed = append(needed, e)
			hits[e.Chunk.Digest] = true
		}
	}
	var mine, beside []chunked.Extent
	for _, e := range near {
		if hits[e.Chunk.Digest] {
			mine = append(mine, e)
		}
	}
	// What is at hand is no reason to ask a store for what lies around or ahead of it.
	far := slices.IndexFunc(needed, func(e chunked.Extent) bool { return !d.img.held(&e.Chunk) })
	if d.img.o.Around > 0 && far >= 0 {
		if beside, err = d.around(ctx, &needed[far].Chunk, max(off, needed[far].Pos), hits); err != nil {
			return fail(err)
		}
	}
	list := wants(mine)
	pieces := d.fetch.get(list, wants(beside))
	byDigest := make(map[chunked.Digest]*piece, len(pieces))
	for _, x := range pieces {
		byDigest[x.c.Digest] = x
	}
	if far >= 0 {
		d.readAhead(ctx, off, end)
	}
	at := off
	for n := range needed {
		e := needed[n]
		b, err := byDigest[e.Chunk.Digest].wait(ctx)
		if err == nil {
			b, err = part(b, &e)
		}
		if err != nil {
			return fail(err)
		}
		if skip := off - e.Pos; skip > 0 {
			e.Pos, b = off, b[skip:]
		}
		clear(p[at-off : e.Pos-off])
		at = e.Pos + int64(copy(p[e.Pos-off:], b))
	}
	clear(p[at-off:])
	return nil
}

// around gives the extents whose chunks lie beside one in its pack, as far as one
// range brings them with it.
func (d *Device) around(ctx context.Context, c *chunked.Chunk, off int64, but map[chunked.Digest]bool) ([]chunked.Extent, error) {
	const span = 256 << 20 // a segment has what the others of it have
	list, err := d.img.extents(ctx, off/span*span, off/span*span+span)
	if err != nil {
		return nil, err
	}
	at := c.At
	var beside []chunked.Extent
	for _, e := range list {
		if a := e.Chunk.At; a.Pack == at.Pack && a.Offset > at.Offset-d.img.o.Around && a.Offset < at.Offset+d.img.o.Around &&
			!but[e.Chunk.Digest] && !d.img.held(&e.Chunk) {
			beside = append(beside, e)
		}
	}
	return oneRange(c, d.missing(beside)), nil
}

// oneRange leaves of extents those that a range with c in it has room for.
func oneRange(c *chunked.Chunk, list []chunked.Extent) []chunked.Extent {
	slices.SortStableFunc(list, func(a, b chunked.Extent) int { return cmp.Compare(a.Chunk.At.Offset, b.Chunk.At.Offset) })
	right, _ := slices.BinarySearchFunc(list, c.At.Offset, func(e chunked.Extent, off int64) int { return cmp.Compare(e.Chunk.At.Offset, off) })
	left := right - 1
	from, to := c.At.Offset, c.At.Offset+int64(c.At.Sealed)
	bytes, plain := farFactor*int64(rangeBytes), farFactor*plainBytes-c.Size
	taken := map[chunked.Digest]bool{}
	take := func(x *chunked.Chunk) bool {
		lo, hi := min(from, x.At.Offset), max(to, x.At.Offset+int64(x.At.Sealed))
		if gap := (hi - lo) - (to - from) - int64(x.At.Sealed); !taken[x.Digest] && (gap > rangeGap || hi-lo > bytes || x.Size > plain) {
			return false
		}
		if !taken[x.Digest] {
			taken[x.Digest] = true
			from, to, plain = lo, hi, plain-x.Size
		}
		return true
	}
	// Outwards, and on the side that is nearer first.
	first, last := right, right
	for left >= 0 || right < len(list) {
		if left >= 0 && (right == len(list) || from-list[left].Chunk.At.Offset <= list[right].Chunk.At.Offset-to) {
			if !take(&list[left].Chunk) {
				left = -1
				continue
			}
			first = left
			left--
			continue
		}
		if !take(&list[right].Chunk) {
			right = len(list)
			continue
		}
		right++
		last = right
	}
	return list[first:last]
}

// sequences remembers where the last reads from the image ended.
type sequences struct {
	mu   sync.Mutex
	last [8]struct{ end, window int64 }
	next int
}

// follow tells how far to read ahead of a read that ended at end.
func (s *sequences) follow(off, end int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.last {
		l := &s.last[i]
		if l.window > 0 && off >= l.end && off-l.end <= firstAhead {
			l.end, l.window = end, min(2*l.window, ahead)
			return l.window / 2
		}
	}
	s.last[s.next] = struct{ end, window int64 }{end, firstAhead}
	s.next = (s.next + 1) % len(s.last)
	return 0
}

// readAhead fetches what a sequential reader will want.
func (d *Device) readAhead(ctx context.Context, off, end int64) {
	window := d.readers.follow(off, end)
	if window == 0 || ctx.Err() != nil {
		return
	}
	list, err := d.img.extents(ctx, end, end+window)
	if err != nil {
		return // who needs it is told
	}
	list = d.missing(list)
	if len(list) > 0 {
		d.fetch.tryAhead(wants(list))
	}
}

// missing leaves out extents that are on the disk.
func (d *Device) missing(list []chunked.Extent) []chunked.Extent {
	if d.disk == nil {
		return list
	}
	kept := list[:0]
	for _, e := range list {
		if !d.bits.all(e.Pos/Block, (e.Pos+e.Length+Block-1)/Block) {
			kept = append(kept, e)
		}
	}
	return kept
}

// WriteAt writes all of p. It is durable after a [Device.Flush].
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) error {
	end, err := d.begin("write", off, int64(len(p)), true)
	if err != nil {
		return err
	}
	defer end()
	return d.write(ctx, p, off)
}

func (d *Device) write(ctx context.Context, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	last := off + int64(len(p))
	from, to := off/Block, (last+Block-1)/Block
	// What stays of blocks that are written in part: fetched before others are kept waiting.
	edges := map[int64][]byte{}
	for _, b := range []int64{from, to - 1} {
		if part := off > b*Block || last < (b+1)*Block; part && edges[b] == nil {
			x, err := d.before(ctx, b)
			if err != nil {
				return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
			}
			edges[b] = x
		}
	}
	unlock, err := d.locks.lock(ctx, from, to)
	if err != nil {
		return err
	}
	defer unlock()
	for b := from; b < to; {
		x, ok := edges[b]
		if !ok {
			n := to - b
			if edges[to-1] != nil {
				n--
			}
			if err := d.diskWrite(p[b*Block-off:(b+n)*Block-off], b*Block); err != nil {
				return err
			}
			d.bits.set(b, b+n)
			b += n
			continue
		}
		if d.bits.has(b) { // also if it came to the disk meanwhile
			if err := d.diskRead(x, b*Block); err != nil {
				return err
			}
		}
		if b == from {
			copy(x[off-b*Block:], p)
		} else {
			copy(x, p[b*Block-off:])
		}
		if err := d.diskWrite(x, b*Block); err != nil {
			return err
		}
		d.bits.set(b, b+1)
		b++
	}
	return nil
}

// before gives a block as the image has it, unless it is on the disk already.
func (d *Device) before(ctx context.Context, b int64) ([]byte, error) {
	x := aligned(Block)
	if d.bits.has(b) {
		return x, nil
	}
	return x, d.readImage(ctx, x[:min(Block, d.lay.image-b*Block)], b*Block)
}

// WriteZeroes makes a range zero. It is durable after a [Device.Flush].
func (d *Device) WriteZeroes(ctx context.Context, off, n int64) error {
	end, err := d.begin("zero", off, n, true)
	if err != nil {
		return err
	}
	defer end()
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		k := min(n, zeroAtOnce-off%zeroAtOnce)
		if err := d.zero(ctx, off, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// zeroAtOnce is how many bytes others may have to wait for.
const zeroAtOnce = 64 << 20

// Discard says that a range is of no use any more. It reads as zeros.
func (d *Device) Discard(ctx context.Context, off, n int64) error { return d.WriteZeroes(ctx, off, n) }

func (d *Device) zero(ctx context.Context, off, n int64) error {
	if skip := off % Block; skip > 0 {
		k := min(n, Block-skip)
		if err := d.write(ctx, zeroBlock[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	from, to := off/Block, (off+n)/Block
	rest := n - (to-from)*Block
	if off+n == d.size && rest > 0 { // a last block that is not whole
		to, rest = to+1, 0
	}
	if from < to {
		if err := d.zeroBlocks(ctx, from, to); err != nil {
			return err
		}
	}
	if rest > 0 {
		return d.write(ctx, zeroBlock[:rest], to*Block)
	}
	return nil
}

func (d *Device) zeroBlocks(ctx context.Context, from, to int64) error {
	unlock, err := d.locks.lock(ctx, from, to)
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.diskZero(from*Block, (to-from)*Block); err != nil {
		return err
	}
	d.bits.set(from, to)
	return nil
}

// Flush returns when all that was written before it was called is durable.
// Once it has failed it fails always: nobody knows what of it is there.
func (d *Device) Flush(ctx context.Context) error {
	if d.disk == nil || d.volatile {
		return nil
	}
	return d.commits.flush(ctx)
}

// NextZero tells whether off is in a range that is zero because the image has
// nothing there and nobody wrote, and where that ends, at to at most.
func (d *Device) NextZero(ctx context.Context, off, to int64) (zero bool, end int64, err error) {
	to = min(to, d.size)
	if off >= to {
		return false, to, nil
	}
	local := off >= d.lay.image
	if d.disk != nil && !local {
		var stop int64
		if local, stop = d.bits.run(off/Block, (to+Block-1)/Block); stop*Block < to {
			to = stop * Block
		}
	}
	if local {
		return false, to, nil
	}
	const look = 64 << 20
	list, err := d.img.extents(ctx, off, min(to, off+look))
	if err != nil {
		return false, 0, fmt.Errorf("look for zeros at %d: %w", off, err)
	}
	to = min(to, off+look)
	end = off
	for _, e := range list {
		if e.Pos > end {
			break
		}
		end = e.Pos + e.Length
	}
	switch {
	case end > off:
		return false, end, nil
	case len(list) > 0:
		return true, list[0].Pos, nil
	}
	return true, to, nil
}
