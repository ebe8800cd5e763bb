package nbd

import (
	"math/bits"
	"sync"
)

// buffers keeps the memory of requests for later ones: in a process that may have
// little of it, to make it anew for each is most of what the collector has to do.
// The zero value is ready for use.
type buffers struct {
	kept [maxKept - minKept + 1]sync.Pool
} // of *[]byte, by size

// Sizes that are kept, as powers of two.
const (
	minKept = 12
	maxKept = 20
)

// room is the size of what get takes for n bytes, and its place among those that
// are kept; -1: it is not.
func room(n int) (size, place int) {
	k := max(bits.Len(uint(max(n, 1)-1)), minKept)
	if k > maxKept {
		return n, -1
	}
	return 1 << k, k - minKept
}

// held is how much memory n bytes from get are, in bytes.
func held(n int) int {
	size, _ := room(n)
	return size + page
}

// get gives n bytes, of any content.
func (b *buffers) get(n int) []byte {
	size, place := room(n)
	if place >= 0 {
		if p, ok := b.kept[place].Get().(*[]byte); ok {
			return (*p)[:n]
		}
	}
	return buffer(size)[:n]
}

// put takes memory back that get gave, and nobody uses any more.
func (b *buffers) put(p []byte) {
	k := bits.Len(uint(cap(p))) - 1
	if k < minKept || k > maxKept || cap(p) != 1<<k {
		return // larger than those that are kept, or none
	}
	p = p[:cap(p)]
	b.kept[k-minKept].Put(&p)
}

// page is what memory that a disk reads to without a copy is aligned to, in bytes.
const page = 4096

// buffer is memory a disk opened with O_DIRECT takes without a copy.
func buffer(n int) []byte {
	b := make([]byte, n+page)
	off := int(-addressOf(b) & (page - 1))
	return b[off : off+n : off+n]
}
