package ext4

import (
	"encoding/binary"
	"math/bits"
)

// bitset is a set of numbers from 0 on.
type bitset []uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

// words calls f for the words that hold the bits from..to-1, with the bits of each that are meant.
func (s bitset) words(from, to int64, f func(i int64, mask uint64) bool) bool {
	for from < to {
		n := min(64-from%64, to-from)
		if !f(from/64, (^uint64(0)>>(64-n))<<(from%64)) {
			return false
		}
		from += n
	}
	return true
}

func (s bitset) add(from, to int64) {
	s.words(from, to, func(i int64, m uint64) bool { s[i] |= m; return true })
}

func (s bitset) remove(from, to int64) {
	s.words(from, to, func(i int64, m uint64) bool { s[i] &^= m; return true })
}

// none tells whether none of from..to-1 is in the set.
func (s bitset) none(from, to int64) bool {
	return s.words(from, to, func(i int64, m uint64) bool { return s[i]&m == 0 })
}

func (s bitset) count(from, to int64) (n int64) {
	s.words(from, to, func(i int64, m uint64) bool { n += int64(bits.OnesCount64(s[i] & m)); return true })
	return n
}

// next is the first number from at on, below end, that is in the set, or is not; end if there is none.
func (s bitset) next(at, end int64, in bool) int64 {
	for at < end {
		w := s[at/64]
		if !in {
			w = ^w
		}
		if w >>= at % 64; w != 0 {
			return min(at+int64(bits.TrailingZeros64(w)), end)
		}
		at += 64 - at%64
	}
	return end
}

// last is the greatest number below end and not below from that is in the set, or from-1.
func (s bitset) last(from, end int64) int64 {
	for end > from {
		w := s[(end-1)/64] << (63 - (end-1)%64)
		if w != 0 {
			return max(end-1-int64(bits.LeadingZeros64(w)), from-1)
		}
		end -= (end-1)%64 + 1
	}
	return from - 1
}

// bytes puts the numbers from..to-1 into b as ext4 has its bitmaps; from is a multiple of 64.
func (s bitset) bytes(b []byte, from, to int64) {
	for i := int64(0); i*64 < to-from; i++ {
		w := s[from/64+i]
		if rest := to - from - i*64; rest < 64 {
			w &= 1<<rest - 1
		}
		binary.LittleEndian.PutUint64(b[i*8:], w)
	}
}

// freeRuns are runs of free blocks, ascending.
type freeRuns struct {
	runs []run
	most []int64 // a tree over the runs: the longest one below each node, of which the children are 2i and 2i+1
	half int
}

// newFreeRuns finds what is free from..to-1.
func newFreeRuns(used bitset, from, to int64) *freeRuns {
	f := &freeRuns{}
	for {
		start := used.next(from, to, false)
		if start == to {
			break
		}
		from = used.next(start, to, true)
		f.runs = append(f.runs, run{start, from - start})
	}
	f.half = 1
	for f.half < len(f.runs) {
		f.half *= 2
	}
	f.most = make([]int64, 2*f.half)
	for i, r := range f.runs {
		f.most[f.half+i] = r.n
	}
	for i := f.half - 1; i > 0; i-- {
		f.most[i] = max(f.most[2*i], f.most[2*i+1])
	}
	return f
}

// take takes n blocks of the first run that has so many.
func (f *freeRuns) take(n int64) (run, bool) {
	if f.most[1] < n {
		return run{}, false
	}
	i := 1
	for i < f.half {
		if i *= 2; f.most[i] < n {
			i++
		}
	}
	r := &f.runs[i-f.half]
	out := run{r.start, n}
	r.start += n
	r.n -= n
	f.most[i] = r.n
	for i /= 2; i > 0; i /= 2 {
		f.most[i] = max(f.most[2*i], f.most[2*i+1])
	}
	return out, true
}

// pieces takes n blocks in as few runs as there can be if none has so many,
// the longest first; false if there are too few.
func (f *freeRuns) pieces(n int64) (out []run, ok bool) {
	for n > 0 {
		r, ok := f.take(min(n, max(f.most[1], 1)))
		if !ok {
			return nil, false
		}
		out = append(out, r)
		n -= r.n
	}
	return out, true
}
