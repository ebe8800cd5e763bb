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

// get gives n bytes, of any content.
func (b *buffers) get(n int) []byte {
	k := max(bits.Len(uint(max(n, 1)-1)), minKept)
	if k > maxKept {
		return buffer(n)
	}
	if p, ok := b.kept[k-minKept].Get().(*[]byte); ok {
		return (*p)[:n]
	}
	return buffer(1 << k)[:n]
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

// buffer is memory a disk opened with O_DIRECT takes without a copy.
func buffer(n int) []byte {
	const page = 4096
	b := make([]byte, n+page)
	off := int(-addressOf(b) & (page - 1))
	return b[off : off+n : off+n]
}
