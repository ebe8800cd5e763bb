// Package qcow2 reads and writes disk images in QEMU's qcow2 format (QEMU,
// docs/interop/qcow2.rst; versions 2 and 3 are read, 3 is written).
//
// A Writer is laid out from a map of the disk's data alone and then takes the
// data in any order; a Reader gives the bytes of an image and the map of what is
// not zero. Backing files, encryption, external data files and snapshots' states
// are refused, not ignored. The package touches only the files it is given.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/instar-image/instar/bundle/sparse"
)

const (
	magic         = 0x514649fb // "QFI\xfb"
	clusterBits   = 16
	cluster       = 1 << clusterBits
	headerSize    = 112
	perL2         = cluster / 8
	perBlock      = cluster / 2 // 16-bit reference counts in a refcount block
	copied        = 1 << 63     // the cluster is used once: it may be written in place
	compressed    = 1 << 62
	offsetMask    = 0x00fffffffffffe00
	maxSize       = 1 << 60  // bytes of a disk
	maxL1         = 32 << 20 // bytes of a level 1 table, as QEMU has it
	allZero       = 1        // of a level 2 entry
	incompatDirty = 1 << 0
	incompatBad   = 1 << 1
	incompatData  = 1 << 2
	incompatComp  = 1 << 3
	incompatL2    = 1 << 4
)

// ErrSize is wrapped by errors about a disk size the format does not have.
var ErrSize = errors.New("no disk can have this size")

// Writer lays out a qcow2 file for a disk whose data is known by its map, and
// takes that data. Its methods may be called concurrently after NewWriter.
type Writer struct {
	f      io.WriterAt
	size   int64
	starts []int64 // first cluster of the disk of each run of allocated clusters
	counts []int64 // clusters up to and including the run
	data   int64   // offset of the first data cluster in the file
}

// NewWriter writes all but the data of a disk of size bytes, whose data is m,
// to f, which must be empty. Clusters are of 64 KiB; those without data take no room.
func NewWriter(f io.WriterAt, size int64, m sparse.Map) (*Writer, error) {
	if size < 0 || size > maxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrSize, size)
	}
	if err := m.Check(size); err != nil {
		return nil, fmt.Errorf("laying out a qcow2 file: %w", err)
	}
	w := &Writer{f: f, size: size}
	var total, next int64 // next: first cluster not seen yet
	var tables int64      // level 2 tables
	lastTable := int64(-1)
	for _, e := range m {
		first, end := max(e.Off>>clusterBits, next), (e.End()+cluster-1)>>clusterBits
		if end <= first {
			continue
		}
		if n := len(w.starts); n > 0 && first == next {
			w.counts[n-1] += end - first
		} else {
			w.starts = append(w.starts, first)
			w.counts = append(w.counts, total+end-first)
		}
		total += end - first
		a, b := max(first/perL2, lastTable+1), (end-1)/perL2
		tables += max(b-a+1, 0)
		next, lastTable = end, b
	}
	entries := max((size+cluster*perL2-1)/(cluster*perL2), 1)
	if entries*8 > maxL1 {
		return nil, fmt.Errorf("%w: %d bytes need a level 1 table of %d MiB", ErrSize, size, entries*8>>20)
	}
	l1 := (entries*8 + cluster - 1) / cluster
	// header, refcount table, refcount blocks, level 1, level 2, data: the
	// blocks count themselves and the table too
	var blocks, table int64
	for {
		all := 1 + table + blocks + l1 + tables + total
		b := (all + perBlock - 1) / perBlock
		t := (b*8 + cluster - 1) / cluster
		if b == blocks && t == table {
			break
		}
		blocks, table = b, t
	}
	l1At := (1 + table + blocks) * cluster
	l2At := l1At + l1*cluster
	w.data = l2At + tables*cluster

	h := make([]byte, headerSize)
	be := binary.BigEndian
	be.PutUint32(h, magic)
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], clusterBits)
	be.PutUint64(h[24:], uint64(size))
	be.PutUint32(h[36:], uint32(entries))
	be.PutUint64(h[40:], uint64(l1At))
	be.PutUint64(h[48:], cluster)
	be.PutUint32(h[56:], uint32(table))
	be.PutUint32(h[96:], 4) // reference counts of 2^4 bits
	be.PutUint32(h[100:], headerSize)
	if err := w.counted(1+table+blocks+l1+tables+total, table, blocks); err != nil {
		return nil, err
	}
	if err := w.tables(l1At, l2At); err != nil {
		return nil, err
	}
	if err := w.put(h, 0); err != nil {
		return nil, err
	}
	// The last cluster in full: a file cut short within it has no such table or
	// data. It is data, or nothing but the level 1 table: without data there are no
	// level 2 tables, and no entries.
	if err := w.put([]byte{0}, w.data+total*cluster-1); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *Writer) put(p []byte, off int64) error {
	if _, err := w.f.WriteAt(p, off); err != nil {
		return fmt.Errorf("writing the qcow2 file: %w", err)
	}
	return nil
}

// counted writes the refcount table and its blocks: every cluster of the file
// is used once.
func (w *Writer) counted(all, table, blocks int64) error {
	buf := make([]byte, cluster)
	for i := range table {
		clear(buf)
		for j := range min(blocks-i*perL2, perL2) {
			binary.BigEndian.PutUint64(buf[j*8:], uint64((1+table+i*perL2+j)*cluster))
		}
		if err := w.put(buf, (1+i)*cluster); err != nil {
			return err
		}
	}
	for i := range blocks {
		clear(buf)
		for j := range min(all-i*perBlock, perBlock) {
			binary.BigEndian.PutUint16(buf[j*2:], 1)
		}
		if err := w.put(buf, (1+table+i)*cluster); err != nil {
			return err
		}
	}
	return nil
}

// tables writes the level 1 table and the level 2 tables.
func (w *Writer) tables(l1At, l2At int64) error {
	l2 := make([]byte, cluster)
	at, current := l2At, int64(-1)
	var entry [8]byte
	flush := func() error {
		if current < 0 {
			return nil
		}
		if err := w.put(l2, at); err != nil {
			return err
		}
		binary.BigEndian.PutUint64(entry[:], uint64(at)|copied)
		at += cluster
		clear(l2)
		return w.put(entry[:], l1At+current*8)
	}
	var before int64
	for i, first := range w.starts {
		for c := range w.counts[i] - before {
			if t := (first + c) / perL2; t != current {
				if err := flush(); err != nil {
					return err
				}
				current = t
			}
			binary.BigEndian.PutUint64(l2[(first+c)%perL2*8:], uint64(w.data+(before+c)*cluster)|copied)
		}
		before = w.counts[i]
	}
	return flush()
}

// WriteAt writes data of the disk, within the map the file was laid out for.
func (w *Writer) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		pos := off + int64(done)
		at, room, ok := w.find(pos)
		if !ok {
			return done, fmt.Errorf("writing the qcow2 file: byte %d of the disk has no cluster", pos)
		}
		n := int(min(room, int64(len(p)-done)))
		if err := w.put(p[done:done+n], at); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// find is where a byte of the disk lies in the file, and how many bytes lie
// there behind each other.
func (w *Writer) find(pos int64) (at, room int64, ok bool) {
	c := pos >> clusterBits
	lo, hi := 0, len(w.starts)
	for lo < hi {
		if mid := (lo + hi) / 2; w.starts[mid] <= c {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 || pos < 0 {
		return 0, 0, false
	}
	i, before := lo-1, int64(0)
	if i > 0 {
		before = w.counts[i-1]
	}
	n := w.counts[i] - before
	if c >= w.starts[i]+n {
		return 0, 0, false
	}
	in := pos - w.starts[i]<<clusterBits
	return w.data + before*cluster + in, n<<clusterBits - in, true
}
