package ec2

import (
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
)

// Members of ours are inflated whole, from one slice to another whose length
// is known. A reader has to be able to stop at any byte and keeps a window of
// its own: with it, unbundling took 5.5 CPU seconds where this takes 3.9. What is a valid stream is decided
// exactly as compress/flate does (FuzzInflate compares them).

var errDeflate = errors.New("corrupt deflate stream")

// An entry of a decoding table:
//
//	bits 0-7   length of the code, what is to be consumed
//	bits 8-12  number of extra bits; of a subtable: its index bits
//	bits 16-30 literal, base of a length or distance, or start of a subtable
//
// and flags:
const (
	entryLiteral = 1 << 31
	entryOther   = 1 << 15 // one of the following two, or the end of the block
	entrySub     = 1 << 14
	entryInvalid = 1 << 13
)

const (
	litBits, distBits = 11, 8     // index bits of the tables
	litSize, distSize = 2400, 512 // with all subtables: 2342 and 402 at most
	maxCode           = 15
)

// inflateState is the tables of one goroutine.
type inflateState struct {
	lit      [litSize]uint32
	dist     [distSize]uint32
	lengths  [288 + 32]uint8
	perm     [288]uint16
	fixed    bool // lit and dist are those of the fixed code
	codeLens [128]uint32
}

var (
	lengthBase  = [29]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	lengthExtra = [29]uint8{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
	distBase    = [30]uint16{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
	distExtra   = [30]uint8{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13}
	clOrder     = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
)

func litEntry(sym int) uint32 {
	switch {
	case sym < 256:
		return entryLiteral | uint32(sym)<<16
	case sym == 256:
		return entryOther
	case sym < 286:
		return uint32(lengthBase[sym-257])<<16 | uint32(lengthExtra[sym-257])<<8
	}
	return entryOther | entryInvalid
}

func distEntry(sym int) uint32 {
	if sym < 30 {
		return uint32(distBase[sym])<<16 | uint32(distExtra[sym])<<8
	}
	return entryOther | entryInvalid
}

func plainEntry(sym int) uint32 { return uint32(sym) << 16 }

// build fills table for the code with these lengths. A code has to be
// complete, or consist of a single code of one bit, or of none at all.
func (s *inflateState) build(table []uint32, index uint, lengths []uint8, entry func(int) uint32) bool {
	var count [maxCode + 1]int
	for _, n := range lengths {
		count[n]++
	}
	longest := maxCode
	for longest > 0 && count[longest] == 0 {
		longest--
	}
	for i := range 1 << index {
		table[i] = entryOther | entryInvalid
	}
	if longest == 0 {
		return true
	}
	var next [maxCode + 2]int
	code := 0
	for n := 1; n <= longest; n++ {
		code <<= 1
		next[n] = code
		code += count[n]
	}
	if code != 1<<longest && !(code == 1 && longest == 1) {
		return false
	}
	// Symbols in the order of their codes: long codes of one prefix are
	// neighbours then, the longest last.
	var at [maxCode + 2]int
	for n := 1; n <= maxCode; n++ {
		at[n+1] = at[n] + count[n]
	}
	total := at[maxCode+1]
	for sym, n := range lengths {
		if n > 0 {
			s.perm[at[n]] = uint16(sym)
			at[n]++
		}
	}
	free := 1 << index // where the next subtable goes
	prefix, subStart, subBits := -1, 0, uint(0)
	for i := range total {
		sym := int(s.perm[i])
		n := uint(lengths[sym])
		rev := int(bits.Reverse16(uint16(next[n])) >> (16 - n))
		next[n]++
		e := entry(sym)
		if n <= index {
			for j := rev; j < 1<<index; j += 1 << n {
				table[j] = e | uint32(n)
			}
			continue
		}
		if p := rev & (1<<index - 1); p != prefix {
			// As many bits as it takes to use up the prefix's share.
			prefix, subStart, subBits = p, free, n-index
			left := 1 << subBits
			for k := n; ; {
				left -= count[k]
				if k == n {
					left += s.usedBefore(i, lengths)
				}
				if left <= 0 || k == uint(longest) {
					break
				}
				left <<= 1
				k++
				subBits++
			}
			if free += 1 << subBits; free > len(table) {
				return false
			}
			table[p] = entryOther | entrySub | uint32(subStart)<<16 | uint32(subBits)<<8 | uint32(index)
		}
		for j := rev >> index; j < 1<<subBits; j += 1 << (n - index) {
			table[subStart+j] = e | uint32(n-index)
		}
	}
	return true
}

// usedBefore counts the symbols before number i in the order of codes whose
// codes are as long.
func (s *inflateState) usedBefore(i int, lengths []uint8) int {
	used := 0
	for n := lengths[s.perm[i]]; used < i && lengths[s.perm[i-1-used]] == n; {
		used++
	}
	return used
}

// inflate decodes src, one complete deflate stream, to dst, which it has to
// fill exactly; it must end with src's last byte.
func (s *inflateState) inflate(dst, src []byte) error {
	b := bitReader{src: src}
	n := 0
	for final := false; !final; {
		b.refill()
		if b.n < 3 {
			return io.ErrUnexpectedEOF
		}
		final = b.take(1) == 1
		kind := b.take(2)
		var err error
		switch kind {
		case 0:
			n, err = b.stored(dst, n)
		case 1:
			s.fixedCode()
			n, err = s.block(dst, n, &b)
		case 2:
			if err = s.dynamicCode(&b); err == nil {
				n, err = s.block(dst, n, &b)
			}
		default:
			err = errDeflate
		}
		if err != nil {
			return err
		}
	}
	if n != len(dst) || len(src)-b.at+int(b.n/8) != 0 {
		return errDeflate
	}
	return nil
}

// bitReader hands out bits from the low end of v. Beyond the end of src there
// are none: n tells how many are valid, and is at least 56 after refill but
// near the end.
type bitReader struct {
	src []byte
	at  int
	v   uint64
	n   uint
}

func (b *bitReader) refill() {
	if len(b.src)-b.at >= 8 {
		b.v |= binary.LittleEndian.Uint64(b.src[b.at:]) << b.n
		b.at += int((63 - b.n) >> 3)
		b.n |= 56 // what v has beyond that is right, and will be counted later
		return
	}
	for b.n <= 56 && b.at < len(b.src) {
		b.v |= uint64(b.src[b.at]) << b.n
		b.at++
		b.n += 8
	}
}

// take consumes n bits, which the caller knows to be there.
func (b *bitReader) take(n uint) uint64 {
	v := b.v & (1<<n - 1)
	b.v >>= n
	b.n -= n
	return v
}

func (b *bitReader) stored(dst []byte, n int) (int, error) {
	b.take(b.n % 8)
	b.at -= int(b.n / 8) // back to the first byte not used
	b.v, b.n = 0, 0
	if len(b.src)-b.at < 4 {
		return n, io.ErrUnexpectedEOF
	}
	size := int(binary.LittleEndian.Uint16(b.src[b.at:]))
	if size != int(^binary.LittleEndian.Uint16(b.src[b.at+2:])) {
		return n, errDeflate
	}
	b.at += 4
	if len(b.src)-b.at < size {
		return n, io.ErrUnexpectedEOF
	}
	if len(dst)-n < size {
		return n, errDeflate
	}
	copy(dst[n:], b.src[b.at:b.at+size])
	b.at += size
	return n + size, nil
}

func (s *inflateState) fixedCode() {
	if s.fixed {
		return
	}
	l := s.lengths[:288]
	for i := range l {
		switch {
		case i < 144, i >= 280:
			l[i] = 8
		case i < 256:
			l[i] = 9
		default:
			l[i] = 7
		}
	}
	s.build(s.lit[:], litBits, l, litEntry)
	for i := range 32 {
		s.lengths[i] = 5
	}
	s.build(s.dist[:], distBits, s.lengths[:32], distEntry)
	s.fixed = true
}

func (s *inflateState) dynamicCode(b *bitReader) error {
	s.fixed = false
	b.refill()
	if b.n < 14 {
		return io.ErrUnexpectedEOF
	}
	nlit, ndist, ncl := int(b.take(5))+257, int(b.take(5))+1, int(b.take(4))+4
	if nlit > 286 || ndist > 30 {
		return errDeflate
	}
	clear(s.lengths[:19])
	for _, i := range clOrder[:ncl] {
		if b.refill(); b.n < 3 {
			return io.ErrUnexpectedEOF
		}
		s.lengths[i] = uint8(b.take(3))
	}
	if !s.build(s.codeLens[:], 7, s.lengths[:19], plainEntry) {
		return errDeflate
	}
	for i := 0; i < nlit+ndist; {
		b.refill()
		e := s.codeLens[b.v&127]
		if e&entryInvalid != 0 && b.n >= 7 {
			return errDeflate
		}
		if uint(e&0xff) > b.n || e&entryInvalid != 0 {
			return io.ErrUnexpectedEOF
		}
		b.take(uint(e & 0xff))
		sym := e >> 16
		if sym < 16 {
			s.lengths[i] = uint8(sym)
			i++
			continue
		}
		var value uint8
		extra, repeat := uint(2), 3
		switch sym {
		case 16:
			if i == 0 {
				return errDeflate
			}
			value = s.lengths[i-1]
		case 17:
			extra = 3
		default:
			extra, repeat = 7, 11
		}
		if b.n < extra {
			return io.ErrUnexpectedEOF
		}
		repeat += int(b.take(extra))
		if i+repeat > nlit+ndist {
			return errDeflate
		}
		for range repeat {
			s.lengths[i] = value
			i++
		}
	}
	if !s.build(s.lit[:], litBits, s.lengths[:nlit], litEntry) || !s.build(s.dist[:], distBits, s.lengths[nlit:nlit+ndist], distEntry) {
		return errDeflate
	}
	return nil
}

// block decodes literals and matches up to the end of the block.
func (s *inflateState) block(dst []byte, n int, b *bitReader) (int, error) {
	for {
		b.refill()
		e := s.lit[b.v&(1<<litBits-1)]
		// A length and its distance take 48 bits: more literals first, as
		// long as that many are left.
		for e&entryLiteral != 0 {
			k := uint(e & 0xff)
			if k > b.n || n >= len(dst) {
				return n, stop(k > b.n)
			}
			dst[n] = byte(e >> 16)
			n++
			b.v >>= k
			b.n -= k
			if b.n < 48 {
				b.refill()
			}
			e = s.lit[b.v&(1<<litBits-1)]
		}
		if e&entryOther != 0 {
			if e&entrySub != 0 {
				i := uint32(b.v>>litBits)&(1<<(e>>8&31)-1) + e>>16
				if b.n < litBits {
					return n, io.ErrUnexpectedEOF
				}
				b.take(litBits)
				e = s.lit[i]
			}
			if e&entryInvalid != 0 {
				return n, stop(b.n < maxCode)
			}
			k := uint(e & 0xff)
			if k > b.n {
				return n, io.ErrUnexpectedEOF
			}
			if e&entryLiteral != 0 {
				if n >= len(dst) {
					return n, errDeflate
				}
				dst[n] = byte(e >> 16)
				n++
				b.take(k)
				continue
			}
			if e&entryOther != 0 { // end of the block
				b.take(k)
				return n, nil
			}
		}
		k, x := uint(e&0xff), uint(e>>8&31)
		if k+x > b.n {
			return n, io.ErrUnexpectedEOF
		}
		b.take(k)
		length := int(e>>16) + int(b.take(x))
		d := s.dist[b.v&(1<<distBits-1)]
		if d&entryOther != 0 {
			if d&entrySub != 0 {
				i := uint32(b.v>>distBits)&(1<<(d>>8&31)-1) + d>>16
				if b.n < distBits {
					return n, io.ErrUnexpectedEOF
				}
				b.take(distBits)
				d = s.dist[i]
			}
			if d&entryInvalid != 0 {
				return n, stop(b.n < maxCode)
			}
		}
		k, x = uint(d&0xff), uint(d>>8&31)
		if k+x > b.n {
			return n, io.ErrUnexpectedEOF
		}
		b.take(k)
		distance := int(d>>16) + int(b.take(x))
		if distance > n || length > len(dst)-n {
			return n, errDeflate
		}
		n = copyMatch(dst, n, distance, length)
	}
}

// stop is the error where a stream ends, or is wrong.
func stop(ended bool) error {
	if ended {
		return io.ErrUnexpectedEOF
	}
	return errDeflate
}

// copyMatch appends length bytes from distance before n; both are in bounds.
func copyMatch(dst []byte, n, distance, length int) int {
	end := n + length
	if distance >= 8 && len(dst)-n >= length+8 {
		// In words, up to 7 bytes too many, which are written again later.
		for from := n - distance; n < end; n, from = n+8, from+8 {
			binary.LittleEndian.PutUint64(dst[n:], binary.LittleEndian.Uint64(dst[from:]))
		}
		return end
	}
	for n < end { // each round doubles what may be copied at once
		n += copy(dst[n:end], dst[n-distance:n])
		distance *= 2
	}
	return end
}
