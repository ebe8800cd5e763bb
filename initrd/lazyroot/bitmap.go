package lazyroot

import (
	"crypto/hmac"
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync/atomic"
)

// bitmap says of each block of the image whether it is on the disk: fetched,
// written or zeroed. Bits are only ever set. Its methods may be called concurrently.
type bitmap struct {
	words []uint64
	n     int64        // blocks
	left  atomic.Int64 // that are not set
	dirty []atomic.Bool
}

// newBitmap takes over words, pageWords for each page, of n blocks.
func newBitmap(words []uint64, n int64) *bitmap {
	m := &bitmap{words: words, n: n, dirty: make([]atomic.Bool, len(words)/pageWords)}
	m.recount()
	return m
}

func (m *bitmap) recount() {
	set := int64(0)
	for i := range m.words {
		set += int64(bits.OnesCount64(atomic.LoadUint64(&m.words[i])))
	}
	m.left.Store(m.n - set)
}

// has tells of one block; what is behind the image is on the disk.
func (m *bitmap) has(b int64) bool {
	return b >= m.n || atomic.LoadUint64(&m.words[b/64])>>(b%64)&1 == 1
}

// mask covers the bits of word w that are in [from, to).
func mask(w, from, to int64) uint64 {
	m := ^uint64(0)
	if from > w*64 {
		m <<= from - w*64
	}
	if end := (w + 1) * 64; to < end {
		m &= ^uint64(0) >> (end - to)
	}
	return m
}

// set sets the blocks from up to to.
func (m *bitmap) set(from, to int64) {
	to = min(to, m.n)
	if from >= to {
		return
	}
	fresh := 0
	for w := from / 64; w*64 < to; w++ {
		add := mask(w, from, to)
		if old := atomic.OrUint64(&m.words[w], add); old&add != add {
			fresh += bits.OnesCount64(add &^ old)
			m.dirty[w/pageWords].Store(true)
		}
	}
	if fresh > 0 {
		m.left.Add(-int64(fresh))
	}
}

// run tells whether block from is on the disk, and up to which block before to
// the same is true.
func (m *bitmap) run(from, to int64) (local bool, end int64) {
	if from >= m.n {
		return true, to
	}
	local = m.has(from)
	limit := min(to, m.n)
	for b := from; b < limit; {
		w := b / 64
		x := atomic.LoadUint64(&m.words[w])
		if !local {
			x = ^x
		}
		// Bits of x are set as long as it goes on.
		if k := int64(bits.TrailingZeros64(^(x >> (b % 64)))); k < 64-b%64 {
			if b+k < limit {
				return local, b + k
			}
			b = limit
		} else {
			b = (w + 1) * 64
		}
	}
	if local {
		return true, to // also behind the image
	}
	return false, limit
}

// all tells whether all blocks from up to to are on the disk.
func (m *bitmap) all(from, to int64) bool {
	if from >= to {
		return true
	}
	local, end := m.run(from, to)
	return local && end >= to
}

// encodePage writes page number p, of its words, into b.
func encodePage(b, key []byte, p int64, generation uint64, words []uint64) {
	clear(b[:pageHeader])
	binary.LittleEndian.PutUint64(b, generation)
	binary.LittleEndian.PutUint32(b[8:], uint32(p))
	for i, w := range words {
		binary.LittleEndian.PutUint64(b[pageHeader+8*i:], w)
	}
	copy(b[32:], mac(key, "instar lazy page\x00", b[:32], b[pageHeader:Block]))
}

// decodePage reads page number p: false if it is not one that was written whole.
func decodePage(b, key []byte, p int64) (generation uint64, words []uint64, ok bool) {
	if len(b) != Block || int64(binary.LittleEndian.Uint32(b[8:])) != p ||
		!hmac.Equal(b[32:64], mac(key, "instar lazy page\x00", b[:32], b[pageHeader:])) {
		return 0, nil, false
	}
	words = make([]uint64, pageWords)
	for i := range words {
		words[i] = binary.LittleEndian.Uint64(b[pageHeader+8*i:])
	}
	return binary.LittleEndian.Uint64(b), words, true
}

// readPages reads the bitmap of a disk into words, and gives each page's
// generation.
func readPages(d Disk, l *layout, key []byte, words []uint64) ([]uint64, error) {
	generations := make([]uint64, l.pages)
	b := aligned(Block)
	for p := range l.pages {
		for slot := range uint64(2) {
			if _, err := d.ReadAt(b, l.page(p, slot)); err != nil {
				return nil, fmt.Errorf("read page %d of the disk's bitmap: %w", p, err)
			}
			g, w, ok := decodePage(b, key, p)
			if ok && g%2 == slot && g > generations[p] {
				generations[p] = g
				copy(words[p*pageWords:], w)
			}
		}
		if generations[p] == 0 {
			return nil, fmt.Errorf("%w: page %d of the bitmap, about bytes %d to %d", ErrDamaged, p, p*pageBits*Block, min((p+1)*pageBits*Block, l.image))
		}
	}
	// Blocks that the image does not have.
	for b := l.blocks; b < l.pages*pageBits; b++ {
		words[b/64] &^= 1 << (b % 64)
	}
	return generations, nil
}
