package ec2

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"crypto/sha1"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/sparse"
)

// partCases attack the set of parts.
func (f *forge) partCases(t *testing.T) (vs []*vector) {
	good := f.good(t)
	names := slices.Sorted(maps.Keys(good.parts))
	if len(names) < 4 {
		t.Fatalf("only %d parts", len(names))
	}
	add := func(name, comment, expect string, change func(parts map[string][]byte)) *vector {
		parts := maps.Clone(good.parts)
		if change != nil {
			change(parts)
		}
		v := &vector{name: "parts/" + name, comment: comment, expect: expect, bundle: bundle{good.doc, parts}}
		vs = append(vs, v)
		return v
	}
	last := names[len(names)-1]
	for _, n := range []string{names[0], names[1], last} {
		add("dropped "+n, "a part is not there", "missing", func(p map[string][]byte) { delete(p, n) })
		add("emptied "+n, "a part is empty", "digest", func(p map[string][]byte) { p[n] = nil })
		add("cut "+n, "a part lacks its last byte", "digest", func(p map[string][]byte) { p[n] = p[n][:len(p[n])-1] })
		add("cut in half "+n, "a part lacks its second half", "digest", func(p map[string][]byte) { p[n] = p[n][:len(p[n])/2] })
		add("extended "+n, "a byte more", "digest", func(p map[string][]byte) { p[n] = append(bytes.Clone(p[n]), 0) })
		add("flipped "+n, "a bit flipped", "digest", func(p map[string][]byte) { p[n] = bytes.Clone(p[n]); p[n][7] ^= 4 })
		add("endless "+n, "far more than the whole bundle", "size", func(p map[string][]byte) { p[n] = make([]byte, 2000) })
	}
	add("duplicated", "one part in another's place", "digest", func(p map[string][]byte) { p[names[1]] = p[names[0]] })
	add("swapped", "two parts swapped", "digest", func(p map[string][]byte) { p[names[0]], p[names[1]] = p[names[1]], p[names[0]] })
	add("extra", "a part that the manifest does not know", "ok", func(p map[string][]byte) { p["img.part.99"] = []byte("x") })
	other := f.make(t, sha1.Sum(f.tar()), f.encrypted(gzipped(append(f.tar(), make([]byte, tarRecord)...))), 96, nil)
	add("foreign", "another bundle's part of the same name, user and key", "digest", func(p map[string][]byte) { p[names[1]] = other.parts[names[1]] })

	manifest := func(name, comment, expect string, change func(*Manifest)) {
		b := f.archive(t, f.tar(), change)
		vs = append(vs, &vector{name: "parts/" + name, comment: comment, expect: expect, bundle: bundle{b.doc, good.parts}})
	}
	manifest("fewer listed", "signed, without the last part", "key|truncated", func(m *Manifest) {
		m.BundledSize -= int64(len(good.parts[last]))
		m.Parts = m.Parts[:len(m.Parts)-1]
	})
	manifest("listed twice", "signed, one part twice under one name", "format", func(m *Manifest) { m.Parts = append(m.Parts, m.Parts[0]) })
	manifest("one name", "signed, all parts of one name", "format", func(m *Manifest) { m.Parts[1].Filename = m.Parts[0].Filename })
	manifest("bundled size more", "signed, sum of the parts off by one", "size", func(m *Manifest) { m.BundledSize++ })
	manifest("bundled size less", "signed, sum of the parts off by one", "size", func(m *Manifest) { m.BundledSize-- })
	manifest("size more", "signed, image one byte larger than the archive's", "size", func(m *Manifest) { m.Size++ })
	manifest("size less", "signed, image one byte smaller", "size", func(m *Manifest) { m.Size-- })
	manifest("size zero", "signed, image of no bytes", "size", func(m *Manifest) { m.Size = 0 })
	manifest("archive digest", "signed, digest of another archive", "digest", func(m *Manifest) { m.Digest[3] ^= 1 })
	manifest("no parts", "signed, no parts", "format", func(m *Manifest) { m.Parts = nil })
	manifest("no keys", "signed, encrypted for nobody", "format", func(m *Manifest) { m.UserKey, m.UserIV, m.EC2Key, m.EC2IV = nil, nil, nil, nil })
	manifest("key of other", "signed, encrypted for somebody else", "key", func(m *Manifest) {
		m.UserKey, m.UserIV = m.EC2Key, m.EC2IV
	})
	manifest("key truncated", "signed, encrypted keys one byte short", "key", func(m *Manifest) {
		m.UserKey, m.EC2Key = m.UserKey[1:], m.EC2Key[1:]
	})
	manifest("key without iv", "signed, no initialisation vectors", "key", func(m *Manifest) { m.UserIV, m.EC2IV = nil, nil })

	whole := f.encrypted(gzipped(f.tar()))
	spell := func(name, comment, expect string, b bundle) {
		vs = append(vs, &vector{name: "parts/" + name, comment: comment, expect: expect, bundle: b})
	}
	digest := SHA1(sha1.Sum(f.tar()))
	spell("one", "all in one part", "ok", f.make(t, digest, whole, len(whole), nil))
	spell("empty last", "an empty last part, as euca2ools makes it", "ok", f.emptyLast(t, whole))
	spell("of seven bytes", "parts that are no multiple of the cipher's block", "ok", f.make(t, digest, whole, 7, nil))
	spell("of one block", "parts of 16 bytes", "ok", f.make(t, digest, whole, 16, nil))
	b := f.make(t, digest, whole, 96, func(m *Manifest) {
		for i := range m.Parts {
			m.Parts[i].Filename = fmt.Sprintf("other-%d", 100-i)
		}
	})
	renamed := make(map[string][]byte)
	for i, n := range names {
		renamed[fmt.Sprintf("other-%d", 100-i)] = good.parts[n]
	}
	spell("any names", "names that sort otherwise", "ok", bundle{b.doc, renamed})

	for name, e := range map[string][]byte{
		"nothing":           nil,
		"not blocks":        whole[:len(whole)-1],
		"last block gone":   whole[:len(whole)-16],
		"not gzip":          f.encrypted(bytes.Repeat([]byte("no gzip "), 40)),
		"padding zero":      f.cbc(append(gzippedTo16(f.tar()), make([]byte, 16)...)),
		"padding long":      f.cbc(append(gzippedTo16(f.tar()), bytes.Repeat([]byte{17}, 16)...)),
		"padding uneven":    f.cbc(append(gzippedTo16(f.tar()), append(bytes.Repeat([]byte{9}, 15), 16)...)),
		"plaintext":         gzippedTo16(f.tar()),
		"other key":         f.otherKey(gzipped(f.tar())),
		"other vector only": f.otherIV(gzipped(f.tar())),
	} {
		expect := "key"
		switch name {
		case "nothing", "not blocks":
			expect = "truncated"
		}
		if name == "last block gone" { // what is last now is no padding
			expect = "key"
		}
		spell("cipher "+name, "signed, ciphertext wrong: "+name, expect, f.make(t, digest, e, 96, nil))
	}
	return vs
}

// emptyLast splits e into equal parts and adds an empty one.
func (f *forge) emptyLast(t *testing.T, e []byte) bundle {
	b := f.make(t, sha1.Sum(f.tar()), e, len(e), func(m *Manifest) {
		m.Parts = append(m.Parts, ManifestPart{"img.part.01", sha1.Sum(nil)})
	})
	b.parts["img.part.01"] = nil
	return b
}

// gzippedTo16 is a gzip stream whose length is a multiple of 16, by means of
// a comment in its header.
func gzippedTo16(b []byte) []byte {
	for n := range 17 {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		z.Comment = string(bytes.Repeat([]byte{'c'}, n))
		z.Write(b)
		z.Close()
		if out.Len()%16 == 0 {
			return out.Bytes()
		}
	}
	panic("no length fits")
}

func (f *forge) otherKey(b []byte) []byte {
	g := *f
	g.key[0] ^= 1
	return g.encrypted(b)
}

func (f *forge) otherIV(b []byte) []byte {
	g := *f
	g.iv[0] ^= 1
	return g.encrypted(b)
}

// archiveCases have good signatures and digests over strange archives.
func (f *forge) archiveCases(t *testing.T) (vs []*vector) {
	add := func(name, comment, expect string, tar []byte) {
		vs = append(vs, &vector{name: "archive/" + name, comment: comment, expect: expect, bundle: f.archive(t, tar, nil)})
	}
	packed := func(name, comment, expect string, tar, z []byte) {
		vs = append(vs, &vector{name: "archive/" + name, comment: comment, expect: expect, bundle: f.make(t, sha1.Sum(tar), f.encrypted(z), 200, nil)})
	}
	img, size := f.image, int64(len(f.image))
	dense := sparse.Dense(size)
	head := func(change func(h []byte)) []byte {
		m := member{name: "img", size: size, data: dense, mtime: time.Unix(0, 0), mode: 0o644}
		h := m.header()
		if change != nil {
			change(h)
			fixSum(h)
		}
		return h
	}
	plain := f.tar()

	add("plain", "a plain member", "ok", plain)
	for _, c := range []struct{ name, member string }{{"absolute name", "/etc/passwd"}, {"parent name", "../../x"}, {"empty name", ""}, {"name with newline", "a\nb"}} {
		add(c.name, "the member's name is not used", "ok", tarOf(head(func(h []byte) { clear(h[:100]); copy(h, c.member) }), img))
	}
	long := member{name: string(bytes.Repeat([]byte{'n'}, 255)), size: size, data: dense, mtime: time.Unix(0, 0), mode: 0o644}
	add("long name", "a long-name record first", "ok", tarOf(long.header(), img))
	add("old type", "typeflag NUL", "ok", tarOf(head(func(h []byte) { h[offType] = 0 }), img))
	add("contiguous", "typeflag 7", "ok", tarOf(head(func(h []byte) { h[offType] = '7' }), img))
	add("base 256", "size in base 256", "ok", tarOf(head(func(h []byte) {
		clear(h[offSize : offSize+12])
		h[offSize] = 0x80
		binary.BigEndian.PutUint64(h[offSize+4:], uint64(size))
	}), img))
	add("ustar", "POSIX magic", "ok", tarOf(head(func(h []byte) { copy(h[offMagic:], "ustar\x0000") }), img))
	add("negative mtime", "before 1970", "ok", tarOf(head(func(h []byte) { putNumber(h[offMtime:offMtime+12], -5) }), img))
	add("no padding to a record", "two zero blocks and no more", "ok", plain[:1024+1024+512])
	add("one zero block", "a single zero block", "ok", plain[:1024+512+512])
	add("more padding", "a larger blocking factor", "ok", append(bytes.Clone(plain), make([]byte, 100*tarRecord)...))

	// Sparse members: f.image is zero from byte 300 on.
	sp := func(entries sparse.Map, stored []byte, change func(h []byte)) []byte {
		h := make([]byte, tarBlock)
		copy(h, "img")
		if left := putMap(h[offSparse:], entries, sparseInHeader); len(left) > 0 {
			panic("too many entries for a header")
		}
		putNumber(h[offRealSize:offRealSize+12], size)
		putHeader(h, 'S', int64(len(stored)), 0, 0o644)
		if change != nil {
			change(h)
			fixSum(h)
		}
		return tarOf(h, stored)
	}
	one := sparse.Map{{Off: 0, Len: 512}, {Off: size}}
	add("sparse", "an old-GNU sparse member", "ok", sp(one, img[:512], nil))
	add("sparse no end entry", "without the entry at the end", "ok", sp(one[:1], img[:512], nil))
	add("sparse odd end", "last extent ends within a block", "ok", sp(sparse.Map{{Off: 0, Len: 300}, {Off: size}}, img[:300], nil))
	add("sparse overlap", "extents overlap", "format", sp(sparse.Map{{Off: 0, Len: 512}, {Off: 100, Len: 512}}, append(bytes.Clone(img[:512]), img[:512]...), nil))
	add("sparse descending", "extents descend", "format", sp(sparse.Map{{Off: 512, Len: 100}, {Off: 0, Len: 100}}, img[:200], nil))
	add("sparse past the end", "an extent passes the end", "format", sp(sparse.Map{{Off: 512, Len: 512}}, img[:512], nil))
	add("sparse sum", "header says more than the map", "format", sp(one, img[:600], nil))
	add("sparse unaligned", "an extent but the last ends within a block", "format", sp(sparse.Map{{Off: 0, Len: 100}, {Off: 200, Len: 100}}, img[:200], nil))
	add("sparse larger", "larger than the manifest says", "size", sp(one, img[:512], func(h []byte) { putNumber(h[offRealSize:offRealSize+12], 1<<40) }))
	add("sparse negative", "a negative offset", "format", sp(one, img[:512], func(h []byte) { putNumber(h[offSparse:offSparse+12], -512) }))
	add("sparse text", "an offset that is no number", "format", sp(one, img[:512], func(h []byte) { copy(h[offSparse:], "zzz") }))
	add("sparse endless map", "says the map goes on, data follow", "format", sp(one, img[:512], func(h []byte) { h[offExtended] = 1 }))
	ext := func(more byte) []byte {
		full := sparse.Map{{Off: 0, Len: 512}, {Off: size}, {Off: size}, {Off: size}}
		b := sp(full, img[:512], func(h []byte) { h[offExtended] = 1 })
		block := make([]byte, tarBlock)
		putMap(block, sparse.Map{{Off: size}}, 1)
		block[offMoreMaps] = more
		return slices.Concat(b[:512], block, b[512:])
	}
	add("sparse extension", "a map in two blocks", "ok", ext(0))
	add("sparse extension lies", "the second block says there is a third", "format", ext(1))

	for _, c := range []struct {
		name string
		kind byte
	}{{"hard link", '1'}, {"symbolic link", '2'}, {"character device", '3'}, {"block device", '4'}, {"folder", '5'}, {"fifo", '6'}, {"global header", 'g'}, {"volume header", 'V'}, {"multi-volume", 'M'}, {"dump dir", 'D'}, {"unknown type", 'Z'}} {
		add(c.name, "not a regular file", "format", tarOf(head(func(h []byte) { h[offType] = c.kind; copy(h[157:], "/etc/passwd") }), img))
	}
	two := slices.Concat(plain[:512+1024], plain)
	add("two members", "a second file", "format", two)
	link := head(func(h []byte) { h[offType] = '2'; copy(h[157:], "/tmp"); putNumber(h[offSize:offSize+12], 0) })
	add("link first", "a link, then the file", "format", slices.Concat(link, plain))
	add("link after", "the file, then a link", "format", slices.Concat(plain[:512+1024], link, make([]byte, 1024)))
	add("checksum", "header's checksum wrong", "format", func() []byte { b := bytes.Clone(plain); b[0] ^= 1; return b }())
	add("zeros", "an empty archive", "format", make([]byte, tarRecord))
	add("empty", "nothing", "truncated", nil)
	add("half a header", "ends in the header", "truncated", plain[:300])
	add("no data", "ends after the header", "truncated", plain[:512])
	add("half the data", "ends in the data", "truncated", plain[:512+400])
	add("no trailer", "ends after the data", "truncated", plain[:512+1024])
	add("odd trailer", "ends within a block", "truncated", plain[:512+1024+700])
	add("data in the trailer", "bytes after the image", "format", func() []byte { b := bytes.Clone(plain); b[len(b)-1] = 1; return b }())
	add("endless padding", "zeros far beyond any blocking factor", "limit", append(bytes.Clone(plain), make([]byte, 3<<20)...))
	add("size huge", "a member of 8 EiB", "format", tarOf(head(func(h []byte) { h[offSize] = 0x80; copy(h[offSize+1:], "\xff\xff\xff\xff") }), img))
	add("size large", "a member of 1 TiB", "size", tarOf(head(func(h []byte) { putNumber(h[offSize:offSize+12], 1<<40) }), img))
	add("size negative", "a member of -1 bytes", "format", tarOf(head(func(h []byte) { putNumber(h[offSize:offSize+12], -1) }), img))
	add("size text", "a size that is no number", "format", tarOf(head(func(h []byte) { copy(h[offSize:], "12x4567") }), img))
	add("long name huge", "a name of 1 MiB", "format", slices.Concat(longRecord('L', 1<<20), plain))
	add("long name twice", "two long names", "format", slices.Concat(longRecord('L', 10), longRecord('L', 10), plain))
	add("long link", "a long link name", "format", slices.Concat(longRecord('K', 10), plain))

	pax := func(records ...string) []byte {
		var body []byte
		for _, r := range records {
			n := len(r) + 3
			for len(fmt.Sprint(n))+2+len(r) != n {
				n++
			}
			body = append(body, fmt.Sprintf("%d %s\n", n, r)...)
		}
		return slices.Concat(longHeader('x', int64(len(body))), padded(body, 0))
	}
	add("pax", "an extended header", "ok", slices.Concat(pax("path=../../etc/passwd", "mtime=1.5"), plain))
	add("pax size", "an extended header with the size", "ok", slices.Concat(pax("size=700"), tarOf(head(func(h []byte) { putNumber(h[offSize:offSize+12], 0) }), img)))
	sparseBody := tarOf(head(func(h []byte) { putNumber(h[offSize:offSize+12], 512) }), img[:512])
	add("pax sparse 0.0", "PAX sparse format 0.0", "ok", slices.Concat(pax("GNU.sparse.size=700", "GNU.sparse.numblocks=2", "GNU.sparse.offset=0", "GNU.sparse.numbytes=512", "GNU.sparse.offset=700", "GNU.sparse.numbytes=0"), sparseBody))
	add("pax sparse 0.1", "PAX sparse format 0.1", "ok", slices.Concat(pax("GNU.sparse.size=700", "GNU.sparse.map=0,512,700,0"), sparseBody))
	inData := append(padded([]byte("2\n0\n512\n700\n0\n"), 0), img[:512]...)
	sparse10 := tarOf(head(func(h []byte) { putNumber(h[offSize:offSize+12], 1024) }), inData)
	add("pax sparse 1.0", "PAX sparse format 1.0", "ok", slices.Concat(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=img", "GNU.sparse.realsize=700"), sparse10))
	add("pax sparse 1.0 count", "a map of 2^40 entries", "limit", slices.Concat(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=700"), tarOf(head(func(h []byte) { putNumber(h[offSize:offSize+12], 1024) }), padded([]byte("1099511627776\n0\n512\n"), 512))))
	add("pax sparse no size", "without the real size", "format", slices.Concat(pax("GNU.sparse.map=0,512"), sparseBody))
	add("pax sparse odd", "a map of odd length", "format", slices.Concat(pax("GNU.sparse.size=700", "GNU.sparse.map=0,512,700"), sparseBody))
	add("pax sparse text", "a map with text", "format", slices.Concat(pax("GNU.sparse.size=700", "GNU.sparse.map=0,x"), sparseBody))
	add("pax sparse future", "a sparse format of the future", "format", slices.Concat(pax("GNU.sparse.major=2", "GNU.sparse.minor=0", "GNU.sparse.realsize=700"), sparse10))
	add("pax length lies", "a record longer than its header", "format", slices.Concat(longHeader('x', 20), padded([]byte("999 path=x\n"), 0), plain))
	add("pax no newline", "a record without its newline", "format", slices.Concat(longHeader('x', 11), padded([]byte("11 path=abc"), 0), plain))
	add("pax twice", "two extended headers", "format", slices.Concat(pax("path=a"), pax("path=b"), plain))
	add("pax key twice", "one key twice", "format", slices.Concat(pax("size=700", "size=1"), plain))
	add("pax huge", "an extended header of 2 MiB", "format", slices.Concat(longHeader('x', 2<<20), plain))
	add("pax size text", "a size that is no number", "format", slices.Concat(pax("size=-1"), plain))

	// The compression.
	packed("gzip members", "several gzip members", "ok", plain, slices.Concat(gzipped(plain[:100]), gzipped(plain[100:5000]), gzipped(plain[5000:])))
	packed("gzip empty members", "with empty members between", "ok", plain, slices.Concat(gzipped(nil), gzipped(plain[:100]), gzipped(nil), gzipped(plain[100:]), gzipped(nil)))
	packed("gzip stored", "not compressed at all", "ok", plain, ourMember(plain, flate.NoCompression))
	packed("gzip ours", "members with their lengths", "ok", plain, slices.Concat(ourMember(plain[:1000], 9), ourMember(plain[1000:], 1)))
	packed("gzip ours then foreign", "a foreign member after ours", "ok", plain, slices.Concat(ourMember(plain[:1000], 9), gzipped(plain[1000:])))
	packed("gzip foreign then ours", "ours after a foreign member", "ok", plain, slices.Concat(gzipped(plain[:1000]), ourMember(plain[1000:], 9)))
	packed("gzip named", "a file name and comment in the header", "ok", plain, gzippedTo16(plain))
	packed("gzip garbage after", "bytes after the stream", "format|truncated", plain, append(gzipped(plain), "garbage"...))
	packed("gzip zeros after", "zeros after the stream", "format", plain, append(gzipped(plain), make([]byte, 32)...))
	packed("gzip garbage after ours", "bytes after our members", "format", plain, append(ourMember(plain, 9), "garbage"...))
	packed("gzip truncated", "stream breaks off", "truncated", plain, func() []byte { z := gzipped(plain); return z[:len(z)-20] }())
	packed("gzip no trailer", "checksum missing", "truncated", plain, func() []byte { z := gzipped(plain); return z[:len(z)-8] }())
	packed("gzip ours truncated", "our member breaks off", "truncated", plain, func() []byte { z := ourMember(plain, 9); return z[:len(z)-20] }())
	flip := func(z []byte, fromEnd int) []byte { z[len(z)-fromEnd] ^= 1; return z }
	packed("gzip checksum", "checksum wrong", "format", plain, flip(gzipped(plain), 8))
	packed("gzip length", "length wrong", "format", plain, flip(gzipped(plain), 4))
	packed("gzip ours checksum", "checksum wrong", "format", plain, flip(ourMember(plain, 9), 8))
	packed("gzip ours length", "length wrong", "format", plain, flip(ourMember(plain, 9), 4))
	for name, c := range map[string]struct {
		at     int
		by     int
		expect string
	}{
		"packed length less": {16, -1, "format|truncated"}, "packed length much less": {16, -9, "format|truncated"}, "packed length more": {16, 1, "format|truncated"},
		"raw length less": {20, -1, "format|truncated"}, "raw length more": {20, 1, "format|truncated"},
	} {
		z := ourMember(plain, 9)
		binary.LittleEndian.PutUint32(z[c.at:], uint32(int(binary.LittleEndian.Uint32(z[c.at:]))+c.by))
		packed("hint "+name, "the lengths in our member's header lie", c.expect, plain, z)
	}
	huge := ourMember(plain, 9)
	binary.LittleEndian.PutUint32(huge[20:], 0xffffffff)
	packed("hint huge", "a length beyond all bounds is not ours: read as any gzip", "ok", plain, huge)
	packed("gzip bomb", "10 MiB of zeros for 700 bytes", "limit", append(bytes.Clone(plain), make([]byte, 10<<20)...), gzipped(append(bytes.Clone(plain), make([]byte, 10<<20)...)))
	return vs
}

func fixSum(h []byte) {
	h = h[:tarBlock]
	copy(h[offSum:offSum+8], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[offSum:], fmt.Sprintf("%06o\x00 ", sum))
}

func longHeader(kind byte, size int64) []byte {
	h := make([]byte, tarBlock)
	copy(h, "././@LongLink")
	putHeader(h, kind, size, 0, 0o644)
	return h
}

func longRecord(kind byte, size int64) []byte {
	return slices.Concat(longHeader(kind, size), padded(bytes.Repeat([]byte{'n'}, int(size)), 0))
}

// ourMember is a member with lengths, made by compress/gzip.
func ourMember(b []byte, level int) []byte {
	var out bytes.Buffer
	z, err := flate.NewWriter(&out, level)
	if err != nil {
		panic(err)
	}
	z.Write(b)
	z.Close()
	h := append(bytes.Clone(memberMagic), make([]byte, 8)...)
	binary.LittleEndian.PutUint32(h[16:], uint32(len(h)+out.Len()+8))
	binary.LittleEndian.PutUint32(h[20:], uint32(len(b)))
	h = append(h, out.Bytes()...)
	h = binary.LittleEndian.AppendUint32(h, crc32.ChecksumIEEE(b))
	return binary.LittleEndian.AppendUint32(h, uint32(len(b)))
}
