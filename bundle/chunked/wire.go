package chunked

import (
	"encoding/binary"
	"math"
)

// wire reads an encoding from front to end. The first thing that is wrong
// sticks, and everything after it reads as zero.
type wire struct {
	object string // for errors
	b      []byte
	err    error
}

func (w *wire) fail(class error, format string, a ...any) {
	if w.err == nil {
		w.err = bad(class, w.object, format, a...)
		w.b = nil
	}
}

// bytes takes the next n bytes; they are a part of what is read.
func (w *wire) bytes(n int) []byte {
	if n > len(w.b) {
		w.fail(ErrFormat, "it ends early")
		return nil
	}
	p := w.b[:n]
	w.b = w.b[n:]
	return p
}

func (w *wire) array32() (a [32]byte) {
	copy(a[:], w.bytes(len(a)))
	return a
}

func (w *wire) u32() uint32 {
	if p := w.bytes(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

// uvarint takes a number in its shortest form that fits an int64.
func (w *wire) uvarint() int64 {
	if w.err != nil {
		return 0
	}
	v, n := binary.Uvarint(w.b)
	switch {
	case n <= 0:
		w.fail(ErrFormat, "a number ends early or has more than 64 bits")
		return 0
	case n > 1 && w.b[n-1] == 0:
		w.fail(ErrFormat, "a number is not in its shortest form")
		return 0
	case v > math.MaxInt64:
		w.fail(ErrFormat, "number %d is out of range", v)
		return 0
	}
	w.b = w.b[n:]
	return int64(v)
}

// within takes a number from low to high.
func (w *wire) within(what string, low, high int64) int64 {
	v := w.uvarint()
	if w.err == nil && (v < low || v > high) {
		w.fail(ErrFormat, "%s is %d, not %d to %d", what, v, low, high)
		return 0
	}
	return v
}

// count takes the length of a list whose elements have at least size bytes
// each: it never asks for more memory than a small multiple of what is there.
func (w *wire) count(what string, size int) int {
	n := w.uvarint()
	if n > int64(len(w.b)/size) {
		w.fail(ErrFormat, "%d %s do not fit into it", n, what)
		return 0
	}
	return int(n)
}

// magic takes 8 bytes that say what this is and a version.
func (w *wire) magic(magic string) {
	if got := w.bytes(len(magic)); w.err == nil && string(got) != magic {
		w.fail(ErrFormat, "it begins with %q, not %q", got, magic)
	}
	if v := w.u32(); w.err == nil && v != version {
		w.fail(ErrVersion, "version %d; this program knows version %d: use a newer one", v, version)
	}
}

// end is the error, of which bytes that are left over are one.
func (w *wire) end() error {
	if w.err == nil && len(w.b) > 0 {
		w.fail(ErrFormat, "%d bytes follow its end", len(w.b))
	}
	return w.err
}

// version of packs, segments, roots and moved objects.
const version = 1

func appendMagic(b []byte, magic string) []byte {
	return binary.LittleEndian.AppendUint32(append(b, magic...), version)
}

func appendUvarint[T int | int64 | uint32](b []byte, v T) []byte {
	return binary.AppendUvarint(b, uint64(v))
}
