package chunked

import "bytes"

// What CutterOptions.First may take, and the chunks that are made of it.
const (
	firstMost  = 64 << 20 // bytes, kept in memory until Finish
	firstChunk = 256 << 10
)

// first gathers blocks that are to lie together, in their order.
type first struct {
	rank map[int64]int32 // by number of the block in the stream
	data [][]byte        // by rank; nil: not seen, or zero
	meta []bool          // by rank: it is the filesystem's own
}

func newFirst(ranges []Range, size int64) *first {
	f := &first{rank: map[int64]int32{}}
	for _, r := range ranges {
		if r.Position < 0 || r.Length < 1 || r.Position >= size {
			continue
		}
		end := r.Position + min(r.Length, size-r.Position)
		for b := r.Position / blockSize; b*blockSize < end; b++ {
			if len(f.rank) == firstMost/blockSize {
				break
			}
			if _, ok := f.rank[b]; !ok {
				f.rank[b] = int32(len(f.rank))
			}
		}
	}
	f.data, f.meta = make([][]byte, len(f.rank)), make([]bool, len(f.rank))
	return f
}

// has tells whether the block at pos is one.
func (f *first) has(pos int64) bool {
	if f == nil {
		return false
	}
	_, ok := f.rank[pos/blockSize]
	return ok && pos%blockSize == 0
}

// any tells whether one lies in n bytes from pos.
func (f *first) any(pos int64, n int) bool {
	if f == nil {
		return false
	}
	for i := 0; i < n; i += blockSize {
		if f.has(pos + int64(i)) {
			return true
		}
	}
	return false
}

// take copies a block if it is one, and reports whether it is.
func (f *first) take(pos int64, p []byte, meta bool) bool {
	if len(p) != blockSize || !f.has(pos) {
		return false
	}
	rank := f.rank[pos/blockSize]
	f.data[rank], f.meta[rank] = bytes.Clone(p), meta
	return true
}

// IsFirst tells whether the block at pos is one of CutterOptions.First, so that
// it has to be given by FirstOf, Data or Metadata, and by nobody else.
func (c *Cutter) IsFirst(pos int64) bool { return c.first.has(pos) }

// FirstOf gives bytes at pos of which those of CutterOptions.First alone are
// taken: the others are mapped already. p is not kept.
func (c *Cutter) FirstOf(pos int64, p []byte) {
	for len(p) > 0 {
		k := min(blockSize, len(p))
		if !bytes.Equal(p[:k], c.zero[:k]) {
			c.first.take(pos, p[:k], false)
		}
		pos, p = pos+int64(k), p[k:]
	}
}

// endFirst makes chunks of what was gathered: first of the filesystem's own blocks, which
// others than a boot want without the files' (SPEC.md §10.1), then of those.
func (c *Cutter) endFirst() error {
	if c.first == nil {
		return nil
	}
	at := make([]int64, len(c.first.data))
	for b, rank := range c.first.rank {
		at[rank] = b * blockSize
	}
	for _, meta := range []bool{true, false} {
		if err := c.firstOf(at, meta); err != nil {
			return err
		}
	}
	return nil
}

// firstOf makes chunks of the blocks of one kind; at are their positions, by rank.
func (c *Cutter) firstOf(at []int64, meta bool) error {
	var b []byte
	var runs []run
	flush := func() error {
		if len(b) == 0 {
			return nil
		}
		ref := c.w.add(b, nil, true)
		err := c.mapRuns(ref, runs)
		b, runs = nil, nil
		return err
	}
	for rank, p := range c.first.data {
		if p == nil || c.first.meta[rank] != meta {
			continue
		}
		if b == nil {
			b = make([]byte, 0, firstChunk)
		}
		runs = addRun(runs, run{at[rank], blockSize, int64(len(b))})
		b = append(b, p...)
		c.first.data[rank] = nil // the writer has it
		if len(b) == firstChunk {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}
