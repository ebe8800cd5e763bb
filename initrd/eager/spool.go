package eager

import (
	"encoding/binary"
	"fmt"
)

// slotAlign is the alignment of the spool, in bytes.
const slotAlign = 4096

const slotMagic = "instar part v1\r\n"

// Spool keeps the parts of an image that can only be read in order (an EC2
// bundle is one encrypted, compressed stream) at the end of the disk, until
// the image is whole: after a power cut they need not be fetched again. Each
// part has a slot, the last one ending with the disk:
//
//	0     16  magic
//	16    32  SHA-256 of the manifest
//	48    4   number of the part, little-endian
//	52    8   bytes of the part
//	4096  …   the part
//
// The slots need not be free: the image's own end may lie there, and wins.
// Nothing in a slot is believed: a part counts if its digest is the one that
// the signed manifest has.
type Spool struct {
	t      *Target
	parts  int
	first  int64 // of the first slot; may be negative
	stride int64
	stored int64 // bytes of parts that headers told of at the beginning
	count  int
	known  []bool
}

// NewSpool returns the spool of an image in so many parts, which have total
// bytes together and all one size but the last. On a disk that the image was
// not being written to before, it is empty.
func NewSpool(t *Target, parts int, total int64) (*Spool, error) {
	if parts < 1 || total < int64(parts) {
		return nil, fmt.Errorf("a spool of %d bytes in %d parts", total, parts)
	}
	// The manifest does not say the size s of a part, but (n-1)·s < total.
	largest := total
	if parts > 1 {
		largest = (total - 1) / int64(parts-1)
	}
	s := &Spool{t: t, parts: parts, known: make([]bool, parts)}
	s.stride = slotAlign + (largest+slotAlign-1)/slotAlign*slotAlign
	s.first = t.m.Size()/slotAlign*slotAlign - int64(parts)*s.stride
	if !t.again {
		return s, nil
	}
	for i := range parts {
		if n, err := s.length(i); err != nil {
			return nil, fmt.Errorf("reading the spool: %w", err)
		} else if n > 0 {
			s.known[i] = true
			s.stored += n
			s.count++
		}
	}
	return s, nil
}

// Stored is how many parts, and bytes of them, the disk seems to have from
// before.
func (s *Spool) Stored() (parts int, bytes int64) { return s.count, s.stored }

// slot is where a part's slot is; false if the disk has no room for it.
func (s *Spool) slot(i int) (int64, bool) {
	off := s.first + int64(i)*s.stride
	return off, off >= HeadSize
}

func (s *Spool) header(i int, n int64) []byte {
	b := make([]byte, slotAlign)
	copy(b, slotMagic)
	copy(b[16:], s.t.image.Manifest[:])
	binary.LittleEndian.PutUint32(b[48:], uint32(i))
	binary.LittleEndian.PutUint64(b[52:], uint64(n))
	return b
}

// length reads how long a slot says its part is; 0 if it is no such slot.
func (s *Spool) length(i int) (int64, error) {
	off, ok := s.slot(i)
	if !ok {
		return 0, nil
	}
	b := make([]byte, slotAlign)
	if _, err := s.t.m.ReadAt(b, off); err != nil {
		return 0, err
	}
	n := int64(binary.LittleEndian.Uint64(b[52:]))
	if n <= 0 || n > s.stride-slotAlign || string(b) != string(s.header(i, n)) {
		return 0, nil
	}
	return n, nil
}

// Load returns what the disk has of a part from before, nil if nothing. The
// caller verifies it.
func (s *Spool) Load(i int) []byte {
	if i < 0 || i >= s.parts || !s.known[i] {
		return nil
	}
	// The image may have come to lie over it since.
	n, err := s.length(i)
	if err != nil || n == 0 {
		return nil
	}
	off, _ := s.slot(i)
	b := make([]byte, n)
	if _, err := s.t.m.ReadAt(b, off+slotAlign); err != nil {
		return nil
	}
	return b
}

// Store keeps a part, durably, if there is room for it. It may be called
// concurrently for different parts.
func (s *Spool) Store(i int, data []byte) error {
	off, ok := s.slot(i)
	if !ok || i < 0 || i >= s.parts || len(data) == 0 || int64(len(data)) > s.stride-slotAlign {
		return nil
	}
	stored, err := s.put(off, i, data)
	if err != nil {
		return fmt.Errorf("spooling part %d: %w", i, err)
	}
	if !stored {
		return nil
	}
	// One Sync for both: a header without its part is found out by the digest.
	if err := s.t.sync(); err != nil {
		return fmt.Errorf("spooling part %d: %w", i, err)
	}
	return nil
}

// put writes a slot unless the image has come that far. Where the image comes
// later, it is written later.
func (s *Spool) put(off int64, i int, data []byte) (bool, error) {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if off < s.t.high {
		return false, nil
	}
	if _, err := s.t.m.WriteAt(data, off+slotAlign); err != nil {
		return false, err
	}
	_, err := s.t.m.WriteAt(s.header(i, int64(len(data))), off)
	return err == nil, err
}
