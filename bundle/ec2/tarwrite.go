package ec2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/instar-image/instar/bundle/sparse"
)

// The archive within the parts is a tar stream of one member, the image, as
// `tar -S` of ec2-bundle-image makes it: an old-GNU header, typeflag S with a
// map of the data where the image has holes. archive/tar neither writes such
// members nor shows their maps.

const (
	tarBlock  = 512
	tarRecord = 20 * tarBlock // the archive is padded to a multiple

	// Layout of an old-GNU header.
	offMode, offUID, offGID    = 100, 108, 116
	offSize, offMtime, offSum  = 124, 136, 148
	offType, offMagic          = 156, 257
	offUname, offGname         = 265, 297
	offSparse, offExtended     = 386, 482
	offRealSize                = 483
	sparseInHeader             = 4
	sparseInBlock, offMoreMaps = 21, 504
	magicGNU                   = "ustar  \x00"
)

// member is what the tar header says of the image.
type member struct {
	name  string
	size  int64      // of the image
	data  sparse.Map // what is stored of it; each extent but the last is aligned to blocks
	mtime time.Time
	mode  uint32 // permission bits
}

// alignMap widens the extents of m to whole tar blocks (but not past size),
// because readers take the data of each extent in whole blocks.
func alignMap(m sparse.Map, size int64) sparse.Map {
	out := make(sparse.Map, 0, len(m))
	for _, e := range m {
		from := e.Off / tarBlock * tarBlock
		to := min((e.End()+tarBlock-1)/tarBlock*tarBlock, size)
		if n := len(out); n > 0 && out[n-1].End() >= from {
			out[n-1].Len = to - out[n-1].Off
			continue
		}
		out = append(out, sparse.Extent{Off: from, Len: to - from})
	}
	return out
}

// header returns all that stands before the data: header, map, long name.
func (m *member) header() []byte {
	var out []byte
	if len(m.name) > 100 {
		long := make([]byte, tarBlock, 2*tarBlock)
		copy(long, "././@LongLink")
		putHeader(long, 'L', int64(len(m.name)+1), 0, 0o644)
		long = append(long, m.name...)
		out = append(out, padded(long, 1)...)
	}
	h := make([]byte, tarBlock)
	copy(h[:100], m.name)
	stored := m.data.Bytes()
	if stored == m.size {
		putHeader(h, '0', stored, m.mtime.Unix(), m.mode)
		return append(out, h...)
	}
	// The map ends with an empty extent at the image's end.
	entries := append(m.data[:len(m.data):len(m.data)], sparse.Extent{Off: m.size})
	entries = putMap(h[offSparse:], entries, sparseInHeader)
	if len(entries) > 0 {
		h[offExtended] = 1
	}
	putNumber(h[offRealSize:offRealSize+12], m.size)
	putHeader(h, 'S', stored, m.mtime.Unix(), m.mode)
	out = append(out, h...)
	for len(entries) > 0 {
		b := make([]byte, tarBlock)
		entries = putMap(b, entries, sparseInBlock)
		if len(entries) > 0 {
			b[offMoreMaps] = 1
		}
		out = append(out, b...)
	}
	return out
}

// padded appends at least atLeast zeros, up to a whole block.
func padded(b []byte, atLeast int) []byte {
	n := len(b) + atLeast
	n = (n + tarBlock - 1) / tarBlock * tarBlock
	return append(b, make([]byte, n-len(b))...)
}

func putMap(b []byte, entries sparse.Map, n int) sparse.Map {
	n = min(n, len(entries))
	for i, e := range entries[:n] {
		putNumber(b[24*i:24*i+12], e.Off)
		putNumber(b[24*i+12:24*i+24], e.Len)
	}
	return entries[n:]
}

// putHeader fills in all but the name and the map, and the checksum last.
func putHeader(h []byte, typeflag byte, size, mtime int64, mode uint32) {
	putNumber(h[offMode:offMode+8], int64(mode))
	putNumber(h[offUID:offUID+8], 0)
	putNumber(h[offGID:offGID+8], 0)
	putNumber(h[offSize:offSize+12], size)
	putNumber(h[offMtime:offMtime+12], mtime)
	h[offType] = typeflag
	copy(h[offMagic:], magicGNU)
	copy(h[offUname:], "root")
	copy(h[offGname:], "root")
	copy(h[offSum:offSum+8], "        ")
	sum := 0
	for _, c := range h[:tarBlock] {
		sum += int(c)
	}
	copy(h[offSum:], fmt.Sprintf("%06o\x00 ", sum))
}

// putNumber writes v in octal with a final NUL, or, where that is too short
// or v negative, in GNU's base 256.
func putNumber(field []byte, v int64) {
	digits := len(field) - 1
	if v >= 0 && (3*digits >= 63 || v < 1<<(3*digits)) {
		copy(field, fmt.Sprintf("%0*o\x00", digits, v))
		return
	}
	var be [8]byte
	binary.BigEndian.PutUint64(be[:], uint64(v))
	fill := byte(0)
	if v < 0 {
		fill = 0xff
	}
	for i := range field {
		field[i] = fill
	}
	copy(field[len(field)-8:], be[:])
	field[0] |= 0x80
}

// archiveSize is the length of the whole tar stream.
func (m *member) archiveSize(header int) int64 {
	data := (m.data.Bytes() + tarBlock - 1) / tarBlock * tarBlock
	return (int64(header) + data + 2*tarBlock + tarRecord - 1) / tarRecord * tarRecord
}

var (
	errTooMuch   = errors.New("more data than its map says")
	errTooLittle = errors.New("less data than its map says")
)

// padWriter takes the bytes of one map and passes on those of a wider one,
// with zeros where only the latter has data.
type padWriter struct {
	w    io.Writer
	src  sparse.Map // what is still to come; src[0] possibly in part
	dst  sparse.Map // src[0] lies within dst[0]
	at   int64      // offset in the image, within or at the start of dst[0]
	zero [tarBlock]byte
}

func newPadWriter(w io.Writer, src, dst sparse.Map) *padWriter {
	p := &padWriter{w: w, src: src, dst: dst}
	if len(dst) > 0 {
		p.at = dst[0].Off
	}
	return p
}

// Write fails if more than the map's bytes come in.
func (p *padWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		if len(p.src) == 0 {
			return total - len(b), errTooMuch
		}
		if err := p.zerosTo(p.src[0].Off); err != nil {
			return total - len(b), err
		}
		n := min(int64(len(b)), p.src[0].End()-p.at)
		if _, err := p.w.Write(b[:n]); err != nil {
			return total - len(b), err
		}
		p.at += n
		b = b[n:]
		if p.at == p.src[0].End() {
			p.src = p.src[1:]
		}
	}
	return total, nil
}

// zerosTo writes zeros for what of dst lies between at and off.
func (p *padWriter) zerosTo(off int64) error {
	for p.at < off && len(p.dst) > 0 {
		for end := min(off, p.dst[0].End()); p.at < end; {
			n, err := p.w.Write(p.zero[:min(end-p.at, tarBlock)])
			if err != nil {
				return err
			}
			p.at += int64(n)
		}
		if p.at < p.dst[0].End() {
			return nil
		}
		if p.dst = p.dst[1:]; len(p.dst) > 0 {
			p.at = p.dst[0].Off
		}
	}
	return nil
}

// finish writes the last zeros; the whole map must have come in.
func (p *padWriter) finish() error {
	if len(p.src) > 0 {
		return errTooLittle
	}
	if n := len(p.dst); n > 0 {
		return p.zerosTo(p.dst[n-1].End())
	}
	return nil
}
