package chunked

import (
	"encoding/binary"
	"sync"
)

// Ref stands for a chunk of a [Writer] while it is being made. The zero Ref
// stands for none.
type Ref struct{ n uint32 }

// slots are the chunks of a writer: 52 bytes each and about 14 in the map, for
// an image of a TiB has millions.
type slots struct {
	mu     sync.Mutex
	blocks [][]slot // of slotBlock each but the last
	n      uint32
	// seen finds the slot of a digest by its first 8 bytes. Should two digests
	// have the same, only the first is found: the other is stored again.
	seen map[uint64]uint32
}

type slot struct {
	digest Digest
	same   uint32 // the slot that has the same digest and more, if not 0
	pack   uint32 // number in the pack table + 1; 0: not placed yet
	offset int32
	sealed int32
	size   int32
}

const slotBlock = 1 << 10

func (s *slots) at(n uint32) *slot { return &s.blocks[(n-1)/slotBlock][(n-1)%slotBlock] }

// add makes a slot for a chunk of size bytes.
func (s *slots) add(size int32) Ref {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Ref{s.push(slot{size: size})}
}

func (s *slots) push(x slot) uint32 {
	if s.n%slotBlock == 0 {
		s.blocks = append(s.blocks, make([]slot, slotBlock))
	}
	s.n++
	*s.at(s.n) = x
	return s.n
}

// claim gives the slot its digest. If another has it already, that one stands
// for both, and claim is false: there is nothing to store.
func (s *slots) claim(r Ref, d Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.at(r.n)
	x.digest = d
	first, ok := s.find(d)
	if ok {
		x.same = first
	} else {
		s.note(d, r.n)
	}
	return !ok
}

func (s *slots) find(d Digest) (uint32, bool) {
	n, ok := s.seen[binary.LittleEndian.Uint64(d[:])]
	return n, ok && s.at(n).digest == d
}

func (s *slots) has(d Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.find(d)
	return ok
}

func (s *slots) note(d Digest, n uint32) {
	if s.seen == nil {
		s.seen = map[uint64]uint32{}
	}
	if short := binary.LittleEndian.Uint64(d[:]); s.seen[short] == 0 {
		s.seen[short] = n
	}
}

// place says where the chunk of a slot is, or will be once the pack is stored.
func (s *slots) place(r Ref, pack uint32, at Location) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.at(r.n)
	x.pack, x.offset, x.sealed = pack+1, int32(at.Offset), int32(at.Sealed)
}

// foreign gives the slot of a chunk that the store has, found by its digest or
// made by pack, which gives the number of the pack it is in.
func (s *slots) foreign(c Chunk, pack func() (uint32, error)) (Ref, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.find(c.Digest); ok {
		return Ref{n}, nil
	}
	p, err := pack()
	if err != nil {
		return Ref{}, err
	}
	n := s.push(slot{digest: c.Digest, pack: p + 1, offset: int32(c.At.Offset), sealed: int32(c.At.Sealed), size: int32(c.Size)})
	s.note(c.Digest, n)
	return Ref{n}, nil
}

func (s *slots) size(r Ref) int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.n == 0 || r.n > s.n {
		return 0
	}
	return s.at(r.n).size
}

// get gives the slot that stands for r, and its number.
func (s *slots) get(n uint32) (uint32, slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.at(n)
	if x.same != 0 {
		n = x.same
		x = s.at(n)
	}
	return n, *x
}
