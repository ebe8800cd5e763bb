package ec2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/sparse"
)

// Limits of an archive that is read.
const (
	maxLongName   = 64 << 10 // of the member: it is not used
	maxPAX        = 1 << 20  // extended header
	maxExtents    = 1 << 21  // 32 MiB of map
	maxPadding    = 1 << 20  // zeros after the member; tar -b may be large
	maxPAXRecords = 1000
)

// tarStream reads the one member of an archive. What it accepts is the image
// as a plain or sparse regular file (old-GNU or PAX map), possibly with a long
// name before it; the name is ignored, so it cannot do harm. A second member,
// a link, a device or anything else is refused.
type tarStream struct {
	r *spanReader
}

func (t *tarStream) errorf(format string, args ...any) error {
	return fail(ErrFormat, objArchive, format, args...)
}

// block reads the next 512 bytes; they are valid until the next read.
func (t *tarStream) block() ([]byte, error) {
	b := make([]byte, tarBlock)
	if _, err := io.ReadFull(t.r, b); err != nil {
		return nil, t.eof(err)
	}
	return b, nil
}

// eof makes an early end of the archive an error of class ErrTruncated.
func (t *tarStream) eof(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fail(ErrTruncated, objArchive, "ends within its header or data")
	}
	return err
}

// readHeader reads up to the data.
func (t *tarStream) readHeader() (*member, error) {
	pax := map[string]string(nil)
	var name string
	for {
		h, err := t.block()
		if err != nil {
			return nil, err
		}
		if err := t.checksum(h); err != nil {
			return nil, err
		}
		size, err := t.number(h[offSize:offSize+12], "size")
		if err != nil {
			return nil, err
		}
		switch h[offType] {
		case 'L', 'K':
			if name != "" || size > maxLongName || size < 1 || h[offType] == 'K' {
				return nil, t.errorf("misplaced or overlong long-name record")
			}
			b, err := t.record(size)
			if err != nil {
				return nil, err
			}
			name = string(b)
		case 'x':
			if pax != nil || size > maxPAX {
				return nil, t.errorf("misplaced or overlong extended header")
			}
			b, err := t.record(size)
			if err != nil {
				return nil, err
			}
			if pax, err = t.records(b); err != nil {
				return nil, err
			}
		case '0', 0, '7', 'S':
			m, err := t.member(h, size, pax)
			if err != nil {
				return nil, err
			}
			m.name = strings.TrimRight(name, "\x00")
			if name == "" {
				m.name = cString(h[:100])
			}
			return m, nil
		default:
			return nil, t.errorf("member of type %q where the image, a regular file, is due", h[offType])
		}
	}
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

func (t *tarStream) checksum(h []byte) error {
	want, err := t.number(h[offSum:offSum+8], "checksum")
	if err != nil {
		return err
	}
	var sum int64
	for i, c := range h {
		if i >= offSum && i < offSum+8 {
			c = ' '
		}
		sum += int64(c)
	}
	if sum != want {
		return t.errorf("is no tar archive, or its header is damaged (checksum %o, says %o)", sum, want)
	}
	return nil
}

// number reads an octal or base-256 field; negative and huge values are
// refused, and mtime is read by time, which knows negative ones.
func (t *tarStream) number(field []byte, what string) (int64, error) {
	if field[0] == 0x80 && len(field) == 12 {
		n := binary.BigEndian.Uint64(field[4:])
		if n > 1<<62 || !bytes.Equal(field[1:4], []byte{0, 0, 0}) {
			return 0, t.errorf("%s in its header is out of range", what)
		}
		return int64(n), nil
	}
	s := strings.Trim(string(field), " \x00")
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 8, 62)
	if err != nil || s[0] == '+' || strings.Contains(s, "_") {
		return 0, t.errorf("%s in its header is not a number", what)
	}
	return int64(n), nil
}

// record reads the content of a record of size bytes and its padding.
func (t *tarStream) record(size int64) ([]byte, error) {
	b := make([]byte, (size+tarBlock-1)/tarBlock*tarBlock)
	if _, err := io.ReadFull(t.r, b); err != nil {
		return nil, t.eof(err)
	}
	return b[:size], nil
}

// records reads the "length key=value\n" records of an extended header. The
// keys of sparse format 0.0, which come in pairs, are gathered into one map.
func (t *tarStream) records(b []byte) (map[string]string, error) {
	kv := make(map[string]string)
	var pairs strings.Builder
	for n := 0; len(b) > 0; n++ {
		digits, _, ok := bytes.Cut(b[:min(len(b), 12)], []byte(" "))
		size, err := strconv.ParseUint(string(digits), 10, 31)
		if !ok || err != nil || int(size) > len(b) || int(size) < len(digits)+3 || b[size-1] != '\n' {
			return nil, t.errorf("malformed extended header")
		}
		key, value, ok := strings.Cut(string(b[len(digits)+1:size-1]), "=")
		if !ok || key == "" || n > maxPAXRecords && key != paxOffset && key != paxNumBytes {
			return nil, t.errorf("malformed extended header")
		}
		b = b[size:]
		if key == paxOffset || key == paxNumBytes {
			if pairs.Len() > 0 {
				pairs.WriteByte(',')
			}
			pairs.WriteString(value)
			continue
		}
		if _, twice := kv[key]; twice {
			return nil, t.errorf("extended header has %q twice", shorten(key))
		}
		kv[key] = value
	}
	if pairs.Len() > 0 {
		if kv[paxMap] != "" {
			return nil, t.errorf("two sparse maps")
		}
		kv[paxMap] = pairs.String()
	}
	return kv, nil
}

const (
	paxMap      = "GNU.sparse.map"
	paxOffset   = "GNU.sparse.offset"
	paxNumBytes = "GNU.sparse.numbytes"
)

// member makes sense of the image's own header h, whose size field is stored.
func (t *tarStream) member(h []byte, stored int64, pax map[string]string) (*member, error) {
	m := &member{size: stored}
	if mode, err := t.number(h[offMode:offMode+8], "mode"); err == nil {
		m.mode = uint32(mode & 0o7777)
	}
	if at, err := t.number(h[offMtime:offMtime+12], "mtime"); err == nil {
		m.mtime = time.Unix(at, 0)
	}
	if v, ok := pax["size"]; ok {
		n, err := strconv.ParseUint(v, 10, 62)
		if err != nil {
			return nil, t.errorf("size %q in its extended header", shorten(v))
		}
		stored, m.size = int64(n), int64(n)
	}
	if h[offType] == 'S' {
		if pax != nil {
			return nil, t.errorf("an old-GNU sparse member with an extended header")
		}
		return m, t.oldSparse(m, h, stored)
	}
	for key := range pax {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return m, t.paxSparse(m, stored, pax)
		}
	}
	m.data = sparse.Dense(stored)
	return m, nil
}

func (t *tarStream) oldSparse(m *member, h []byte, stored int64) (err error) {
	if m.size, err = t.number(h[offRealSize:offRealSize+12], "size"); err != nil {
		return err
	}
	more, err := t.oldMap(m, h[offSparse:], sparseInHeader)
	extended := h[offExtended] != 0
	for err == nil && extended {
		if !more {
			return t.errorf("map goes on after its end")
		}
		var b []byte
		if b, err = t.block(); err != nil {
			return err
		}
		more, err = t.oldMap(m, b, sparseInBlock)
		extended = b[offMoreMaps] != 0
	}
	if err != nil {
		return err
	}
	return t.checkMap(m, stored)
}

// oldMap adds up to n entries; it tells whether more may follow.
func (t *tarStream) oldMap(m *member, b []byte, n int) (more bool, err error) {
	for i := range n {
		f := b[24*i : 24*i+24]
		if f[0] == 0 { // unused
			return false, nil
		}
		off, err := t.number(f[:12], "map")
		if err != nil {
			return false, err
		}
		size, err := t.number(f[12:], "map")
		if err != nil {
			return false, err
		}
		if err := t.addExtent(m, off, size); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (t *tarStream) addExtent(m *member, off, size int64) error {
	if off > m.size || size > m.size-off {
		return t.errorf("its map passes the end of the image")
	}
	if size == 0 {
		return nil
	}
	if len(m.data) == maxExtents {
		return fail(ErrLimit, objArchive, "its map has more than %d extents", maxExtents)
	}
	m.data = append(m.data, sparse.Extent{Off: off, Len: size})
	return nil
}

// checkMap holds the map against its own rules and the amount stored. Only
// the last extent may end within a block: otherwise readers do not agree on
// where the next one's data begin.
func (t *tarStream) checkMap(m *member, stored int64) error {
	if err := m.data.Check(m.size); err != nil {
		return &Error{Class: ErrFormat, Object: objArchive, Detail: "its map", Err: err}
	}
	if m.data.Bytes() != stored {
		return t.errorf("its map has %d bytes of data, its header says %d", m.data.Bytes(), stored)
	}
	for i, e := range m.data {
		if i < len(m.data)-1 && e.Len%tarBlock != 0 {
			return t.errorf("extent %d of its map, %d bytes long, does not end on a block", i, e.Len)
		}
	}
	return nil
}

// paxSparse reads the map of a sparse member in PAX format 0.0, 0.1 or 1.0.
func (t *tarStream) paxSparse(m *member, stored int64, pax map[string]string) error {
	real := pax["GNU.sparse.realsize"]
	if real == "" {
		real = pax["GNU.sparse.size"]
	}
	n, err := strconv.ParseUint(real, 10, 62)
	if err != nil {
		return t.errorf("sparse member without its real size")
	}
	m.size = int64(n)
	major, minor := pax["GNU.sparse.major"], pax["GNU.sparse.minor"]
	switch {
	case major == "1" && minor == "0":
		used, err := t.mapInData(m)
		if err != nil {
			return err
		}
		return t.checkMap(m, stored-used)
	case pax[paxMap] != "" && (major == "" || major == "0"):
		var pair [2]int64
		fields := strings.Split(pax[paxMap], ",")
		if len(fields)%2 != 0 {
			return t.errorf("sparse map of odd length")
		}
		for i, f := range fields {
			n, err := strconv.ParseUint(f, 10, 62)
			if err != nil {
				return t.errorf("sparse map with %q", shorten(f))
			}
			if pair[i%2] = int64(n); i%2 == 1 {
				if err := t.addExtent(m, pair[0], pair[1]); err != nil {
					return err
				}
			}
		}
		return t.checkMap(m, stored)
	}
	return t.errorf("sparse format %s.%s", shorten(major), shorten(minor))
}

// mapInData reads the map that stands before the data in format 1.0: decimal
// numbers on lines of their own, the count first, padded to a whole block.
func (t *tarStream) mapInData(m *member) (used int64, err error) {
	var b []byte
	line := func() (int64, error) {
		var digits []byte
		for {
			if len(b) == 0 {
				if b, err = t.block(); err != nil {
					return 0, err
				}
				used += tarBlock
			}
			c := b[0]
			b = b[1:]
			if c == '\n' {
				break
			}
			if digits = append(digits, c); len(digits) > 20 {
				return 0, t.errorf("malformed sparse map")
			}
		}
		n, err := strconv.ParseUint(string(digits), 10, 62)
		if err != nil {
			return 0, t.errorf("malformed sparse map")
		}
		return int64(n), nil
	}
	count, err := line()
	if err != nil {
		return 0, err
	}
	if count > maxExtents {
		return 0, fail(ErrLimit, objArchive, "its map has more than %d extents", maxExtents)
	}
	for range count {
		off, err := line()
		if err != nil {
			return 0, err
		}
		size, err := line()
		if err != nil {
			return 0, err
		}
		if err := t.addExtent(m, off, size); err != nil {
			return 0, err
		}
	}
	return used, nil
}

// copyData passes the image to out, then makes sure that nothing but zeros
// follows.
func (t *tarStream) copyData(m *member, out Output) error {
	var at int64
	for _, e := range m.data {
		if e.Off > at {
			if err := out.Skip(e.Off - at); err != nil {
				return err
			}
		}
		for left := e.Len; left > 0; {
			b, err := t.r.span(left)
			if err != nil {
				return t.eof(err)
			}
			if _, err := out.Write(b); err != nil {
				return err
			}
			left -= int64(len(b))
		}
		at = e.End()
	}
	if at < m.size {
		if err := out.Skip(m.size - at); err != nil {
			return err
		}
	}
	return t.trailer((tarBlock - m.data.Bytes()%tarBlock) % tarBlock)
}

// trailer reads the padding of the data, at least one block of zeros (GNU tar
// writes two) and the padding of the archive. The bytes that pad the data are
// whatever the writer left there.
func (t *tarStream) trailer(pad int64) error {
	for pad > 0 {
		b, err := t.r.span(pad)
		if err != nil {
			return t.eof(err)
		}
		pad -= int64(len(b))
	}
	for total := 0; ; {
		b, err := t.r.span(maxPadding)
		if errors.Is(err, io.EOF) {
			if total < tarBlock || total%tarBlock != 0 {
				return fail(ErrTruncated, objArchive, "ends without its trailer")
			}
			return nil
		}
		if err != nil {
			return err
		}
		if len(bytes.Trim(b, "\x00")) > 0 {
			return t.errorf("more than one member, or data after the image")
		}
		if total += len(b); total > maxPadding {
			return fail(ErrLimit, objArchive, "more than %d bytes of padding", maxPadding)
		}
	}
}
