// Package sparse describes which byte ranges of a file hold data and which
// are holes, finds that out for a file on disk, and reads and writes such
// files without touching their holes.
//
// A [Map] goes in or comes out; the package touches only the file it is given.
package sparse

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Extent is a run of data: Len bytes from byte Off of a file.
type Extent struct {
	Off, Len int64
}

// End is the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Map lists the data of a file: extents in ascending order that neither
// overlap nor are empty. What lies between them, and after the last one up to
// the file's size, reads as zeros.
type Map []Extent

// Dense is the map of a file of size bytes without holes.
func Dense(size int64) Map {
	if size == 0 {
		return nil
	}
	return Map{{Off: 0, Len: size}}
}

// Bytes is the amount of data the map describes.
func (m Map) Bytes() int64 {
	var n int64
	for _, e := range m {
		n += e.Len
	}
	return n
}

// ErrInvalid is wrapped by errors about maps that break the rules of [Map].
var ErrInvalid = errors.New("invalid sparse map")

// Check reports the first rule of [Map] that m breaks for a file of size bytes.
func (m Map) Check(size int64) error {
	var at int64
	for i, e := range m {
		switch {
		case e.Off < 0 || e.Len <= 0:
			return fmt.Errorf("%w: extent %d is (%d, %d)", ErrInvalid, i, e.Off, e.Len)
		case e.Off < at:
			return fmt.Errorf("%w: extent %d at %d begins before the end of the one before it, %d", ErrInvalid, i, e.Off, at)
		case e.Len > size-e.Off:
			return fmt.Errorf("%w: extent %d (%d, %d) passes the file's size %d", ErrInvalid, i, e.Off, e.Len, size)
		}
		at = e.End()
	}
	return nil
}

// Append adds an extent to the end of m, joining it to the last one where
// they touch. Empty extents are dropped.
func (m Map) Append(e Extent) Map {
	if e.Len == 0 {
		return m
	}
	if n := len(m); n > 0 && m[n-1].End() == e.Off {
		m[n-1].Len += e.Len
		return m
	}
	return append(m, e)
}

// Scan finds the data of the open file fd, whose size is size, by
// lseek(2) SEEK_DATA and SEEK_HOLE. A filesystem that does not know these
// answers as if all were data; a file that shrinks meanwhile yields what is
// left. The file offset is changed.
func Scan(fd int, size int64) (Map, error) {
	var m Map
	for at := int64(0); at < size; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return m, nil
		case errors.Is(err, unix.EINVAL) && at == 0:
			return Dense(size), nil
		case err != nil:
			return nil, fmt.Errorf("finding data from byte %d: %w", at, err)
		}
		if data >= size {
			return m, nil
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if errors.Is(err, unix.ENXIO) {
			return m, nil
		}
		if err != nil {
			return nil, fmt.Errorf("finding a hole from byte %d: %w", data, err)
		}
		hole = min(hole, size)
		m = m.Append(Extent{data, hole - data})
		at = hole
	}
	return m, nil
}

// Reader reads the data of a sparse file, one extent after the other, holes
// left out.
type Reader struct {
	src io.ReaderAt
	m   Map
	at  int64 // within m[0]
}

// NewReader returns a Reader of the extents m of src. Reading fails with
// [io.ErrUnexpectedEOF] where src ends within an extent.
func NewReader(src io.ReaderAt, m Map) *Reader { return &Reader{src: src, m: m} }

func (r *Reader) Read(p []byte) (int, error) {
	for len(r.m) > 0 && r.at == r.m[0].Len {
		r.m, r.at = r.m[1:], 0
	}
	if len(r.m) == 0 {
		return 0, io.EOF
	}
	if left := r.m[0].Len - r.at; int64(len(p)) > left {
		p = p[:left]
	}
	n, err := r.src.ReadAt(p, r.m[0].Off+r.at)
	r.at += int64(n)
	if n > 0 || err == nil {
		return n, nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// BlockSize is the granularity in bytes at which a [Writer] leaves holes.
const BlockSize = 4096

// Writer writes a stream to a new file and leaves a hole wherever a whole
// aligned block of [BlockSize] bytes is zero. It is to be given a file whose
// content reads as zeros (a new or freshly truncated one); it does not sync.
type Writer struct {
	f    *os.File
	at   int64  // offset of the next byte of the stream
	part []byte // bytes of the block at hand, fewer than BlockSize
}

// NewWriter returns a Writer that begins at offset 0 of f.
func NewWriter(f *os.File) *Writer {
	return &Writer{f: f, part: make([]byte, 0, BlockSize)}
}

// Skip leaves n bytes of hole.
func (w *Writer) Skip(n int64) error {
	if n < 0 {
		return fmt.Errorf("%w: hole of %d bytes", ErrInvalid, n)
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.at += n
	return nil
}

// Write appends p to the stream.
func (w *Writer) Write(p []byte) (int, error) {
	total := len(p)
	if over := int((w.at + int64(len(w.part))) % BlockSize); len(w.part) > 0 || over != 0 {
		k := min(len(p), BlockSize-over)
		w.part = append(w.part, p[:k]...)
		p = p[k:]
		if over+k < BlockSize {
			return total, nil
		}
		if err := w.flush(); err != nil {
			return 0, err
		}
	}
	for len(p) >= BlockSize {
		zero := isZero(p[:BlockSize])
		n := BlockSize
		for n+BlockSize <= len(p) && isZero(p[n:n+BlockSize]) == zero {
			n += BlockSize
		}
		if !zero {
			if _, err := w.f.WriteAt(p[:n], w.at); err != nil {
				return total - len(p), err
			}
		}
		w.at += int64(n)
		p = p[n:]
	}
	w.part = append(w.part, p...)
	return total, nil
}

func (w *Writer) flush() error {
	if len(w.part) == 0 {
		return nil
	}
	if !isZero(w.part) {
		if _, err := w.f.WriteAt(w.part, w.at); err != nil {
			return err
		}
	}
	w.at += int64(len(w.part))
	w.part = w.part[:0]
	return nil
}

// Finish writes what is held back and sets the file's size to the length of
// the stream, which it returns. The file stays open.
func (w *Writer) Finish() (int64, error) {
	if err := w.flush(); err != nil {
		return w.at, err
	}
	return w.at, w.f.Truncate(w.at)
}

func isZero(p []byte) bool {
	for len(p) >= 8 {
		if p[0]|p[1]|p[2]|p[3]|p[4]|p[5]|p[6]|p[7] != 0 {
			return false
		}
		p = p[8:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
