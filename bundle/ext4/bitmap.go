package ext4

// groupInodes is the number of inodes of a group up to the last one in use.
func (p *Plan) groupInodes(group int64) int64 {
	if k := p.kept; k != nil {
		from := group * p.g.ipg
		return k.used.last(from, from+p.g.ipg) + 1 - from
	}
	return min(max(int64(p.usedInodes())-group*p.g.ipg, 0), p.g.ipg)
}

// groupUsed is the number of inodes of a group in use.
func (p *Plan) groupUsed(group int64) int64 {
	if k := p.kept; k != nil {
		return k.used.count(group*p.g.ipg, (group+1)*p.g.ipg)
	}
	return p.groupInodes(group)
}

// used yields the runs of blocks of a group that are in use, counted from the group's start.
func (g *geometry) used(group int64, yield func(from, to int64)) {
	start := group * groupBlocks
	n := min(g.blocks-start, groupBlocks)
	clip := func(from, to int64) {
		from, to = max(from-start, 0), min(to-start, n)
		if from < to {
			yield(from, to)
		}
	}
	at := int64(0)
	for _, gap := range g.gaps {
		clip(at, gap.start)
		at = gap.start + gap.n
	}
	clip(at, g.end)
	if start >= g.end && hasSuper(group) {
		clip(start, start+g.supersLen)
	}
}

func (g *geometry) groupFree(group int64) int64 {
	n := min(g.blocks-group*groupBlocks, groupBlocks)
	if g.bits != nil {
		return n - g.bits.count(group*groupBlocks, group*groupBlocks+n)
	}
	g.used(group, func(from, to int64) { n -= to - from })
	return n
}

// uninit tells whether a group's block bitmap may be left to the kernel: it is
// made of the superblock's copy alone. The last group's is always written.
func (g *geometry) uninit(group int64) bool {
	if g.bits == nil {
		return group*groupBlocks >= g.end && group < g.groups-1
	}
	n := int64(groupBlocks)
	if hasSuper(group) {
		n -= g.supersLen
	}
	return group > 0 && group < g.groups-1 && g.groupFree(group) == n
}

// blockBitmap fills b with the block bitmap of a group.
func (g *geometry) blockBitmap(b []byte, group int64) {
	clear(b)
	if start := group * groupBlocks; g.bits != nil {
		g.bits.bytes(b, start, min(g.blocks, start+groupBlocks))
	} else {
		g.used(group, func(from, to int64) { setBits(b, from, to) })
	}
	setBits(b, min(g.blocks-group*groupBlocks, groupBlocks), groupBlocks)
}

func (p *Plan) inodeBitmap(b []byte, group int64) {
	clear(b)
	if k := p.kept; k != nil {
		for i := range p.g.ipg {
			if !k.used.none(group*p.g.ipg+i, group*p.g.ipg+i+1) {
				setBits(b, i, i+1)
			}
		}
	} else {
		setBits(b, 0, p.groupInodes(group))
	}
	setBits(b, p.g.ipg, groupBlocks)
}

func setBits(b []byte, from, to int64) {
	for ; from < to && from%8 != 0; from++ {
		b[from/8] |= 1 << (from % 8)
	}
	for ; from+8 <= to; from += 8 {
		b[from/8] = 0xff
	}
	for ; from < to; from++ {
		b[from/8] |= 1 << (from % 8)
	}
}

// bitmapSums computes the checksums of bitmaps, those of full ones once.
type bitmapSums struct {
	p                      *Plan
	b                      [BlockSize]byte
	fullBlocks, fullInodes *uint32
}

func (s *bitmapSums) blocks(group int64) uint32 {
	full := s.p.g.groupFree(group) == 0
	if full && s.fullBlocks != nil {
		return *s.fullBlocks
	}
	s.p.g.blockBitmap(s.b[:], group)
	sum := crc32c(s.p.seed, s.b[:])
	if full {
		s.fullBlocks = &sum
	}
	return sum
}

func (s *bitmapSums) inodes(group int64) uint32 {
	full := s.p.groupUsed(group) == s.p.g.ipg
	if full && s.fullInodes != nil {
		return *s.fullInodes
	}
	s.p.inodeBitmap(s.b[:], group)
	sum := crc32c(s.p.seed, s.b[:s.p.g.ipg/8])
	if full {
		s.fullInodes = &sum
	}
	return sum
}
