package launch

import (
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
)

// readBlock is the granularity in which reads are noted, in bytes.
const readBlock = 4096

// Reads notes which ranges of a disk were read first, and in what order: a boot
// trace. It may be used concurrently.
type Reads struct {
	mu     sync.Mutex
	seen   []uint64 // a bit a block
	ranges []chunked.Range
	ended  bool
}

// NewReads is for a disk of size bytes, of which it takes a bit every 4 KiB.
func NewReads(size int64) *Reads {
	blocks := (size + readBlock - 1) / readBlock
	return &Reads{seen: make([]uint64, (blocks+63)/64)}
}

// Note takes note of a read of n bytes at off. What was read before, and what
// comes after as many ranges as a trace has, is passed over.
func (r *Reads) Note(off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended || off < 0 || n <= 0 {
		return
	}
	last := min((off+n-1)/readBlock, int64(len(r.seen))*64-1)
	for b := off / readBlock; b <= last; b++ {
		word, bit := &r.seen[b/64], uint64(1)<<(b%64)
		if *word&bit != 0 {
			continue
		}
		*word |= bit
		pos := b * readBlock
		if k := len(r.ranges); k > 0 && r.ranges[k-1].Position+r.ranges[k-1].Length == pos {
			r.ranges[k-1].Length += readBlock
			continue
		}
		if len(r.ranges) == chunked.MaxRanges {
			return
		}
		r.ranges = append(r.ranges, chunked.Range{Position: pos, Length: readBlock})
	}
}

// End ends the noting and returns what was read, in order.
func (r *Reads) End() []chunked.Range {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	return r.ranges
}
