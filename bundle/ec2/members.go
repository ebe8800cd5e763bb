package ec2

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"

	"github.com/klauspost/compress/flate"
)

// The archive is compressed as many gzip members one after the other, which
// is gzip as RFC 1952 has it: any gunzip reads it. Members are compressed in
// parallel, and so that they can be found again and inflated in parallel,
// each begins with a header whose FEXTRA field (subfield "Is") holds two
// little-endian 32-bit numbers: the length in bytes of the whole member, and
// the length of what it inflates to.
const (
	// memberSize is what a member inflates to. Each member starts without
	// history; at 1 MiB that costs 0.2 % of size against 8 MiB, which would
	// take 100 MiB more memory.
	memberSize = 1 << 20

	memberHeader  = 10 + 2 + 4 + 8
	memberTrailer = 8

	// maxMember bounds both numbers when reading, hence memory.
	maxMember = 4 << 20
)

// level is the deflate level. On a 1 GiB ext4 image of a Debian root, against
// `pigz -6` in the same pipe (29.7 CPU s, 322 MB), the whole of bundling took
//
//	level 4:  8.2 CPU s (0.28), 327 MB (1.018)
//	level 5:  9.6 CPU s (0.32), 320 MB (0.996)
//	level 6:  9.8 CPU s (0.33), 318 MB (0.988)
//	level 7: 13.9 CPU s (0.47), 313 MB (0.972)
//
// of which about 3 s are digests, encryption and copying. What is lost in size
// depends on the content: a root with more binaries in it came to 1.08 of the
// pipe's size at level 4, for 0.30 of its wall time.
const level = 4

var memberMagic = []byte{0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 3, 12, 0, 'I', 's', 8, 0}

// memberBound is the most bytes that a member for n bytes takes: n stored.
func memberBound(n int) int {
	return memberHeader + n + 5*(n/storedBlock+1) + memberTrailer
}

const storedBlock = 65535 // most bytes in a stored deflate block

// A deflater makes members; it serves one goroutine.
type deflater struct {
	w    *flate.Writer
	buf  bytes.Buffer
	zero []byte // the member for memberSize zeros, once it was made
}

// member appends the gzip member for raw to dst.
func (d *deflater) member(dst, raw []byte) ([]byte, error) {
	zero := len(raw) == memberSize && isZero(raw)
	if zero && d.zero != nil {
		return append(dst, d.zero...), nil
	}
	d.buf.Reset()
	d.buf.Write(make([]byte, memberHeader))
	if d.w == nil {
		w, err := flate.NewWriter(&d.buf, level)
		if err != nil {
			return nil, err
		}
		d.w = w
	} else {
		d.w.Reset(&d.buf)
	}
	if _, err := d.w.Write(raw); err != nil {
		return nil, err
	}
	if err := d.w.Close(); err != nil {
		return nil, err
	}
	if d.buf.Len()+memberTrailer > memberBound(len(raw)) {
		d.buf.Truncate(memberHeader)
		appendStored(&d.buf, raw)
	}
	var trailer [memberTrailer]byte
	binary.LittleEndian.PutUint32(trailer[0:], crc32.ChecksumIEEE(raw))
	binary.LittleEndian.PutUint32(trailer[4:], uint32(len(raw)))
	d.buf.Write(trailer[:])
	m := d.buf.Bytes()
	copy(m, memberMagic)
	binary.LittleEndian.PutUint32(m[16:], uint32(len(m)))
	binary.LittleEndian.PutUint32(m[20:], uint32(len(raw)))
	if zero {
		d.zero = bytes.Clone(m)
	}
	return append(dst, m...), nil
}

// appendStored writes raw as stored deflate blocks.
func appendStored(b *bytes.Buffer, raw []byte) {
	for {
		n := min(len(raw), storedBlock)
		final := byte(0)
		if n == len(raw) {
			final = 1
		}
		b.Write([]byte{final, byte(n), byte(n >> 8), ^byte(n), ^byte(n >> 8)})
		b.Write(raw[:n])
		if raw = raw[n:]; final == 1 {
			return
		}
	}
}

// memberLengths reads the header of a member of ours: how long the member is
// and how long what it inflates to. ok is false for any other gzip header,
// and for lengths beyond what we write.
func memberLengths(h []byte) (packed, raw int, ok bool) {
	if len(h) < memberHeader || !bytes.Equal(h[:len(memberMagic)], memberMagic) {
		return 0, 0, false
	}
	p, r := binary.LittleEndian.Uint32(h[16:]), binary.LittleEndian.Uint32(h[20:])
	if p < memberHeader+memberTrailer+1 || p > maxMember+maxMember/64 || r > maxMember {
		return 0, 0, false
	}
	return int(p), int(r), true
}

// An inflater opens members of ours; it serves one goroutine.
type inflater struct {
	src bytes.Reader
	r   io.ReadCloser
}

// member inflates packed, a whole member, to raw, whose length is what the
// header says. The deflate stream must take exactly the member's bytes and
// give exactly raw's: then reading member by member and reading the stream
// as one, as others do, cannot differ.
func (d *inflater) member(raw, packed []byte) error {
	body := packed[memberHeader : len(packed)-memberTrailer]
	trailer := packed[len(packed)-memberTrailer:]
	d.src.Reset(body)
	if d.r == nil {
		d.r = flate.NewReader(&d.src)
	} else if err := d.r.(flate.Resetter).Reset(&d.src, nil); err != nil {
		return err
	}
	if _, err := io.ReadFull(d.r, raw); err != nil {
		return gzipError(err)
	}
	var more [1]byte
	if n, err := d.r.Read(more[:]); n != 0 || err != io.EOF || d.src.Len() != 0 {
		return fail(ErrFormat, objArchive, "gzip member is not as long as its header says")
	}
	if binary.LittleEndian.Uint32(trailer[0:]) != crc32.ChecksumIEEE(raw) || binary.LittleEndian.Uint32(trailer[4:]) != uint32(len(raw)) {
		return fail(ErrFormat, objArchive, "gzip checksum or length differs")
	}
	return nil
}

func gzipError(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fail(ErrTruncated, objArchive, "its gzip stream ends too early")
	}
	return &Error{Class: ErrFormat, Object: objArchive, Detail: "its gzip stream", Err: err}
}

func isZero(p []byte) bool {
	if len(p) == 0 {
		return true
	}
	// Compares with itself, one byte on: memequal is as fast as memory.
	return p[0] == 0 && bytes.Equal(p[:len(p)-1], p[1:])
}
