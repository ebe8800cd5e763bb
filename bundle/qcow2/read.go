package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/instar-image/instar/bundle/sparse"
)

// Errors of a Reader, to be found with errors.Is.
var (
	ErrFormat      = errors.New("malformed qcow2 image")
	ErrUnsupported = errors.New("unsupported qcow2 image")
)

// IsImage reports whether a file that begins with p is a qcow2 image.
func IsImage(p []byte) bool { return len(p) >= 4 && binary.BigEndian.Uint32(p) == magic }

// Reader reads a qcow2 image. It may be used concurrently.
type Reader struct {
	r       io.ReaderAt
	file    int64 // bytes of the file
	size    int64
	bits    uint32 // of a cluster
	zstd    bool   // compressed clusters are zstd, else deflate
	l1      []uint64
	perL2   int64
	version uint32

	mu     sync.Mutex
	tables [8]table // most recently used last
}

type table struct {
	at      uint64
	entries []uint64
}

// NewReader reads the header and the level 1 table of the image in r, a file of
// size bytes. Its errors wrap ErrFormat, ErrUnsupported or what reading failed with.
func NewReader(r io.ReaderAt, size int64) (*Reader, error) {
	h := make([]byte, headerSize)
	n, err := r.ReadAt(h, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the qcow2 header: %w", err)
	}
	be := binary.BigEndian
	if n < 72 || be.Uint32(h) != magic {
		return nil, fmt.Errorf("%w: no header", ErrFormat)
	}
	q := &Reader{r: r, file: size, version: be.Uint32(h[4:]), bits: be.Uint32(h[20:]), size: int64(be.Uint64(h[24:]))}
	switch {
	case q.version != 2 && q.version != 3:
		return nil, fmt.Errorf("%w: version %d", ErrUnsupported, q.version)
	case be.Uint64(h[8:]) != 0:
		return nil, fmt.Errorf("%w: it has a backing file; flatten it with qemu-img convert", ErrUnsupported)
	case be.Uint32(h[32:]) != 0:
		return nil, fmt.Errorf("%w: it is encrypted", ErrUnsupported)
	case q.bits < 9 || q.bits > 21:
		return nil, fmt.Errorf("%w: clusters of 2^%d bytes", ErrFormat, q.bits)
	case q.size < 0 || q.size > maxSize:
		return nil, fmt.Errorf("%w: a disk of %d bytes", ErrFormat, uint64(q.size))
	}
	if err := q.features(h[:n]); err != nil {
		return nil, err
	}
	q.perL2 = 1 << (q.bits - 3)
	entries, at := int64(be.Uint32(h[36:])), be.Uint64(h[40:])
	span := q.perL2 << q.bits
	if need := (q.size + span - 1) / span; entries < need {
		return nil, fmt.Errorf("%w: a level 1 table of %d entries for %d", ErrFormat, entries, need)
	} else {
		entries = need
	}
	if entries*8 > maxL1 {
		return nil, fmt.Errorf("%w: a level 1 table of %d bytes", ErrFormat, entries*8)
	}
	if q.l1, err = q.words(at, entries); err != nil {
		return nil, fmt.Errorf("reading the level 1 table: %w", err)
	}
	return q, nil
}

func (q *Reader) features(h []byte) error {
	if q.version < 3 {
		return nil
	}
	be := binary.BigEndian
	if len(h) < 104 {
		return fmt.Errorf("%w: header cut short", ErrFormat)
	}
	f := be.Uint64(h[72:])
	switch {
	case f&incompatBad != 0:
		return fmt.Errorf("%w: it is marked corrupt; see qemu-img check", ErrFormat)
	case f&incompatData != 0:
		return fmt.Errorf("%w: its data is in another file", ErrUnsupported)
	case f&incompatL2 != 0:
		return fmt.Errorf("%w: extended level 2 entries", ErrUnsupported)
	case f&^(incompatDirty|incompatComp) != 0:
		return fmt.Errorf("%w: unknown features %#x", ErrUnsupported, f)
	case f&incompatComp == 0:
		return nil
	case len(h) < 105 || be.Uint32(h[100:]) < 105:
		return fmt.Errorf("%w: no type of compression", ErrFormat)
	case h[104] != 1:
		return fmt.Errorf("%w: compression of type %d", ErrUnsupported, h[104])
	}
	q.zstd = true
	return nil
}

// words reads n big-endian words at an offset of the file.
func (q *Reader) words(at uint64, n int64) ([]uint64, error) {
	if at&511 != 0 || at > uint64(q.file) || n*8 > q.file-int64(at) {
		return nil, fmt.Errorf("%w: a table at %d, outside the file", ErrFormat, at)
	}
	p := make([]byte, n*8)
	if _, err := io.ReadFull(io.NewSectionReader(q.r, int64(at), n*8), p); err != nil {
		return nil, err
	}
	w := make([]uint64, n)
	for i := range w {
		w[i] = binary.BigEndian.Uint64(p[i*8:])
	}
	return w, nil
}

// Size is the size of the disk in bytes.
func (q *Reader) Size() int64 { return q.size }

// level2 is the table for a level 1 entry; nil if there is none.
func (q *Reader) level2(i int64) ([]uint64, error) {
	at := q.l1[i] & offsetMask
	if at == 0 {
		return nil, nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for j, t := range q.tables {
		if t.at == at {
			copy(q.tables[j:], q.tables[j+1:])
			q.tables[len(q.tables)-1] = t
			return t.entries, nil
		}
	}
	e, err := q.words(at, q.perL2)
	if err != nil {
		return nil, fmt.Errorf("reading a level 2 table: %w", err)
	}
	copy(q.tables[:], q.tables[1:])
	q.tables[len(q.tables)-1] = table{at, e}
	return e, nil
}

// isZero reports whether a level 2 entry stands for zeros.
func (q *Reader) isZero(e uint64) bool {
	return e&compressed == 0 && (e&offsetMask == 0 || q.version >= 3 && e&allZero != 0)
}

// Map tells which clusters of the disk are not known to be zero.
func (q *Reader) Map() (sparse.Map, error) {
	var m sparse.Map
	tables := int64(0) // each of its own: a file of a few tables shall not cost the time of millions
	for i := range q.l1 {
		l2, err := q.level2(int64(i))
		if err != nil {
			return nil, err
		}
		if l2 == nil {
			continue
		}
		if tables++; tables > q.file>>q.bits {
			return nil, fmt.Errorf("%w: more level 2 tables than the file has clusters", ErrFormat)
		}
		for j, e := range l2 {
			off := (int64(i)*q.perL2 + int64(j)) << q.bits
			if off >= q.size {
				break
			}
			if !q.isZero(e) {
				m = m.Append(sparse.Extent{Off: off, Len: min(1<<q.bits, q.size-off)})
			}
		}
	}
	return m, nil
}

// ReadAt reads bytes of the disk.
func (q *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("reading the disk at %d", off)
	}
	done := 0
	for done < len(p) {
		pos := off + int64(done)
		if pos >= q.size {
			return done, io.EOF
		}
		in := pos & (1<<q.bits - 1)
		n := int(min(1<<q.bits-in, q.size-pos, int64(len(p)-done)))
		if err := q.read(p[done:done+n], pos>>q.bits, in); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// read reads from one cluster of the disk.
func (q *Reader) read(p []byte, c, in int64) error {
	l2, err := q.level2(c / q.perL2)
	if err != nil {
		return err
	}
	e := uint64(0)
	if l2 != nil {
		e = l2[c%q.perL2]
	}
	switch {
	case q.isZero(e):
		clear(p)
		return nil
	case e&compressed != 0:
		data, err := q.inflate(e)
		if err != nil {
			return fmt.Errorf("cluster %d: %w", c, err)
		}
		copy(p, data[in:])
		return nil
	}
	at := int64(e & offsetMask)
	if at&(1<<q.bits-1) != 0 || at+in+int64(len(p)) > q.file {
		return fmt.Errorf("%w: cluster %d at %d, outside the file", ErrFormat, c, at)
	}
	_, err = io.ReadFull(io.NewSectionReader(q.r, at+in, int64(len(p))), p)
	return err
}

// inflate gives a whole compressed cluster.
func (q *Reader) inflate(e uint64) ([]byte, error) {
	x := 62 - (q.bits - 8)
	at := int64(e & (1<<x - 1))
	n := (int64(e&(compressed-1)>>x)+1)*512 - at&511
	if at >= q.file {
		return nil, fmt.Errorf("%w: compressed data at %d, outside the file", ErrFormat, at)
	}
	src := make([]byte, min(n, q.file-at))
	if _, err := io.ReadFull(io.NewSectionReader(q.r, at, int64(len(src))), src); err != nil {
		return nil, err
	}
	out := make([]byte, 1<<q.bits)
	var r io.Reader
	if q.zstd {
		d, err := zstd.NewReader(bytes.NewReader(src), zstd.WithDecoderMaxMemory(64<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		r = d
	} else {
		r = flate.NewReader(bytes.NewReader(src))
	}
	if _, err := io.ReadFull(r, out); err != nil {
		return nil, fmt.Errorf("%w: compressed data: %w", ErrFormat, err)
	}
	return out, nil
}
