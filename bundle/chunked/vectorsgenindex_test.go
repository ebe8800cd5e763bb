package chunked

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
)

// varint is a uvarint's bytes.
func varint(n int64) []byte { return appendUvarint(nil, n) }

// segmentParts is a segment's plaintext, taken apart.
type segmentParts struct {
	magic, salt []byte
	packCount   []byte
	packs       [][]byte
	chunkCount  []byte
	chunks      [][][]byte // d, k, plain, pack, offset, sealed
	extentCount []byte
	extents     [][][]byte // gap, length, chunk, start
	behind      []byte
}

func (s *segmentParts) join() []byte {
	b := slices.Concat(s.magic, s.salt, s.packCount)
	b = append(b, slices.Concat(s.packs...)...)
	b = append(b, s.chunkCount...)
	for _, c := range s.chunks {
		b = append(b, slices.Concat(c...)...)
	}
	b = append(b, s.extentCount...)
	for _, e := range s.extents {
		b = append(b, slices.Concat(e...)...)
	}
	return append(b, s.behind...)
}

func name32(what string) []byte { h := sha256.Sum256([]byte(what)); return h[:] }

const segmentLength = 1 << 20

func goodSegment() *segmentParts {
	chunk := func(what string, plain, pack, offset, sealed int64) [][]byte {
		return [][]byte{name32(what), name32("key of " + what), varint(plain), varint(pack), varint(offset), varint(sealed)}
	}
	extent := func(gap, length, chunk, start int64) [][]byte {
		return [][]byte{varint(gap), varint(length), varint(chunk), varint(start)}
	}
	return &segmentParts{
		magic: appendMagic(nil, segmentMagic), salt: name32("salt")[:16],
		packCount: varint(2), packs: [][]byte{name32("pack 0"), name32("pack 1")},
		chunkCount: varint(3), chunks: [][][]byte{
			chunk("chunk 0", 500_000, 0, 16, 200_000), chunk("chunk 1", 4096, 0, 200_016, 2000), chunk("chunk 2", 100, 1, 16, 129),
		},
		extentCount: varint(4), extents: [][][]byte{
			extent(0, 500_000, 0, 0), extent(4096, 1024, 1, 3072), extent(0, 1024, 1, 0), extent(segmentLength-500_000-4096-2048-100, 100, 2, 0),
		},
	}
}

func (g *generator) segments() {
	d := g.secret().Domain()
	seal := func(p []byte) (SegmentRef, []byte) {
		ref, data, err := d.SealSegment(p, Fastest)
		g.must(err)
		ref.Length = segmentLength
		return ref, data
	}
	put := func(what, class string, ref SegmentRef, data []byte) {
		g.add("segment", what, class, data, "name", ref.Name.String(), "key", hexOf(ref.Key), "plain", fmt.Sprint(ref.Plain),
			"stored", fmt.Sprint(ref.Stored), "length", fmt.Sprint(ref.Length), "packs", "2", "chunks", "3", "extents", "4")
	}
	ref, data := seal(goodSegment().join())
	put("of three chunks", "ok", ref, data)
	with := func(change func(*SegmentRef)) SegmentRef { r := ref; change(&r); return r }
	put("another key", "corrupt", with(func(r *SegmentRef) { r.Key[0] ^= 1 }), data)
	put("another name", "corrupt", with(func(r *SegmentRef) { r.Name[0] ^= 1 }), data)
	put("another stored length", "corrupt", with(func(r *SegmentRef) { r.Stored++ }), data)
	put("a bit changed", "corrupt", ref, flip(data, 40))
	put("a bit changed, and the name to fit", "corrupt", with(func(r *SegmentRef) { r.Name = NameOf(flip(data, 40)) }), flip(data, 40))
	put("plain length one more", "corrupt", with(func(r *SegmentRef) { r.Plain++ }), data)
	put("reaches beyond the segment", "malformed", with(func(r *SegmentRef) { r.Length-- }), data)
	root := AppendSeal(nil, ref.Key, TypeRoot, Stored, goodSegment().join())
	put("sealed as a root", "corrupt", with(func(r *SegmentRef) { r.Name = NameOf(root); r.Stored = int32(len(root)) }), root)

	craft := func(what, class string, change func(s *segmentParts)) {
		s := goodSegment()
		change(s)
		r, data := seal(s.join())
		put(what, class, r, data)
	}
	bad := func(what string, change func(s *segmentParts)) { craft(what, "malformed", change) }
	bad("another magic", func(s *segmentParts) { s.magic[0] ^= 1 })
	craft("version 2", "version", func(s *segmentParts) { s.magic[8] = 2 })
	bad("a byte behind", func(s *segmentParts) { s.behind = []byte{0} })
	bad("cut", func(s *segmentParts) { s.extents[3][3] = nil })
	bad("huge count of packs", func(s *segmentParts) { s.packCount = varint(1 << 40) })
	bad("huge count of chunks", func(s *segmentParts) { s.chunkCount = varint(1 << 40) })
	bad("huge count of extents", func(s *segmentParts) { s.extentCount = varint(1 << 40) })
	bad("a number not in its shortest form", func(s *segmentParts) { s.extents[0][0] = []byte{0x80, 0} })
	bad("a number of more than 64 bits", func(s *segmentParts) { s.extents[0][0] = append(bytes.Repeat([]byte{0xff}, 9), 2) })
	bad("a pack that no chunk uses", func(s *segmentParts) { s.packCount, s.packs = varint(3), append(s.packs, name32("pack 2")) })
	bad("a pack twice", func(s *segmentParts) { s.packs[1] = s.packs[0] })
	bad("a chunk twice", func(s *segmentParts) { s.chunks[1][0] = s.chunks[0][0] })
	bad("a chunk that no extent uses", func(s *segmentParts) { s.extentCount, s.extents = varint(3), s.extents[:3] })
	bad("a pack beyond the list", func(s *segmentParts) { s.chunks[2][3] = varint(2) })
	bad("packs not in the order of use", func(s *segmentParts) {
		s.chunks[0][3], s.chunks[1][3], s.chunks[2][3] = varint(1), varint(1), varint(0)
	})
	bad("chunk of no bytes", func(s *segmentParts) { s.chunks[1][2] = varint(0) })
	bad("chunk beyond 4 MiB", func(s *segmentParts) { s.chunks[1][2] = varint(MaxChunk + 1) })
	bad("chunk within a pack's header", func(s *segmentParts) { s.chunks[0][4] = varint(15) })
	bad("chunk beyond any pack", func(s *segmentParts) { s.chunks[0][4] = varint(MaxPack) })
	bad("chunk sealed in 29 bytes", func(s *segmentParts) { s.chunks[2][5] = varint(29) })
	bad("extent of no bytes", func(s *segmentParts) { s.extents[2][1] = varint(0) })
	bad("extent leaves its chunk", func(s *segmentParts) { s.extents[1][3] = varint(3073) })
	bad("extent begins behind its chunk", func(s *segmentParts) { s.extents[2][3] = varint(4096) })
	bad("extent of a chunk beyond the list", func(s *segmentParts) { s.extents[3][2] = varint(3) })
	bad("chunks not in the order of use", func(s *segmentParts) { s.extents[0][2], s.extents[3][2] = varint(2), varint(0) })
	bad("extent beyond the segment", func(s *segmentParts) { s.extents[3][0] = varint(segmentLength) })
	bad("two extents that are one", func(s *segmentParts) { s.extents[1][3], s.extents[2][3] = varint(0), varint(1024) })
	bad("nothing in it", func(s *segmentParts) {
		s.packCount, s.packs, s.chunkCount, s.chunks, s.extentCount, s.extents = varint(0), nil, varint(0), nil, varint(0), nil
		s.behind = make([]byte, 120)
	})
}

// rootParts is a root's plaintext, taken apart.
type rootParts struct {
	magic, count []byte
	streams      []*streamParts
	behind       []byte
}

type streamParts struct {
	length, name, size, count []byte
	segments                  [][][]byte // gap, length, name, key, plain, stored
}

func (r *rootParts) join() []byte {
	b := slices.Concat(r.magic, r.count)
	for _, s := range r.streams {
		b = append(b, slices.Concat(s.length, s.name, s.size, s.count)...)
		for _, x := range s.segments {
			b = append(b, slices.Concat(x...)...)
		}
	}
	return append(b, r.behind...)
}

func goodRoot() *rootParts {
	stream := func(name string, size int64, segments ...[][]byte) *streamParts {
		return &streamParts{varint(int64(len(name))), []byte(name), varint(size), varint(int64(len(segments))), segments}
	}
	segment := func(what string, gap, length int64) [][]byte {
		return [][]byte{varint(gap), varint(length), name32(what), name32("key of " + what), varint(500), varint(400)}
	}
	return &rootParts{magic: appendMagic(nil, rootMagic), count: varint(3), streams: []*streamParts{
		stream("disk", 1<<30, segment("segment 0", 0, 256<<20), segment("segment 1", 256<<20, 512<<20)),
		stream("kernel", 8<<20, segment("segment 2", 0, 8<<20)),
		stream("layout", 0),
	}}
}

func (g *generator) roots() {
	key := Key(name32("index key"))
	seal := func(p []byte) (Name, []byte) {
		n, data, err := SealRoot(key, p, Fastest)
		g.must(err)
		return n, data
	}
	put := func(what, class string, n Name, k Key, data []byte) {
		g.add("root", what, class, data, "name", n.String(), "key", hexOf(k), "streams", "3")
	}
	n, data := seal(goodRoot().join())
	put("of three streams", "ok", n, key, data)
	wrong := key
	wrong[5] ^= 1
	put("another key", "corrupt", n, wrong, data)
	put("another name", "corrupt", Name{}, key, data)
	put("a bit changed", "corrupt", n, key, flip(data, 30))
	put("a bit changed, and the name to fit", "corrupt", NameOf(flip(data, 30)), key, flip(data, 30))
	put("nothing", "corrupt", NameOf(nil), key, nil)
	segment := AppendSeal(nil, key, TypeSegment, Stored, goodRoot().join())
	put("sealed as a segment", "corrupt", NameOf(segment), key, segment)
	raw := func(what string, c Codec, b []byte) {
		data := AppendSeal(nil, key, TypeRoot, c, b)
		put(what, "malformed", NameOf(data), key, data)
	}
	raw("zstd without its length", Zstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0x09, 0, 0, 'x'})
	raw("zstd of a terabyte, it says", Zstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 1, 0, 0, 0x09, 0, 0, 'x'})
	raw("no zstd", Zstd, []byte("no zstd"))
	raw("empty", Stored, nil)

	bad := func(what string, change func(r *rootParts)) {
		r := goodRoot()
		change(r)
		class := "malformed"
		if what == "version 2" {
			class = "version"
		}
		n, data := seal(r.join())
		put(what, class, n, key, data)
	}
	bad("another magic", func(r *rootParts) { r.magic[7] ^= 1 })
	bad("version 2", func(r *rootParts) { r.magic[8] = 2 })
	bad("a byte behind", func(r *rootParts) { r.behind = []byte{0} })
	bad("fewer streams than counted", func(r *rootParts) { r.count = varint(4) })
	bad("huge count of streams", func(r *rootParts) { r.count = varint(1 << 50) })
	bad("huge count of segments", func(r *rootParts) { r.streams[0].count = varint(1 << 50) })
	bad("streams do not ascend", func(r *rootParts) { r.streams[0], r.streams[1] = r.streams[1], r.streams[0] })
	bad("a stream twice", func(r *rootParts) { r.streams[2] = r.streams[1] })
	bad("stream without name", func(r *rootParts) { r.streams[0].length, r.streams[0].name = varint(0), nil })
	bad("stream with a long name", func(r *rootParts) {
		r.streams[2].length, r.streams[2].name = varint(65), bytes.Repeat([]byte("x"), 65)
	})
	bad("stream with a capital", func(r *rootParts) { r.streams[0].name = []byte("Disk") })
	bad("stream with a slash", func(r *rootParts) { r.streams[0].name = []byte("di/k") })
	bad("size beyond 63 bits", func(r *rootParts) { r.streams[0].size = append(bytes.Repeat([]byte{0xff}, 9), 1) })
	bad("segment beyond its stream", func(r *rootParts) { r.streams[0].segments[1][0] = varint(256<<20 + 1) })
	bad("segment of no bytes", func(r *rootParts) { r.streams[1].segments[0][1] = varint(0) })
	bad("segment beyond 16 MiB", func(r *rootParts) { r.streams[1].segments[0][4] = varint(MaxSegment + 1) })
	bad("segment too small to hold one", func(r *rootParts) { r.streams[1].segments[0][4] = varint(10) })
	bad("sealed segment of 29 bytes", func(r *rootParts) { r.streams[1].segments[0][5] = varint(29) })
	bad("a number not in its shortest form", func(r *rootParts) { r.streams[0].segments[0][0] = []byte{0x80, 0x80, 0} })
}

func (g *generator) moved() {
	old := Name(name32("old pack"))
	type parts struct {
		magic, manifestCount []byte
		manifests            [][]byte
		packCount            []byte
		packs                [][][]byte
		count                []byte
		entries              [][][]byte
		behind               []byte
	}
	sorted := func(what string) (a, b []byte) {
		a, b = name32(what+" 0"), name32(what+" 1")
		if bytes.Compare(a, b) > 0 {
			a, b = b, a
		}
		return a, b
	}
	put := func(what, class string, change func(p *parts)) {
		m0, m1 := sorted("manifest")
		p0, p1 := sorted("target")
		p := &parts{
			magic: appendMagic(nil, movedMagic), manifestCount: varint(2), manifests: [][]byte{m0, m1},
			packCount: varint(2), packs: [][][]byte{{p0, varint(1 << 20)}, {p1, varint(2000)}},
			count: varint(3), entries: [][][]byte{
				{varint(16), varint(1000), varint(0), varint(16)},
				{varint(5000), varint(1000), varint(1), varint(16)},
				{varint(9000), varint(500), varint(0), varint(1016)},
			},
		}
		change(p)
		b := slices.Concat(p.magic, p.manifestCount, slices.Concat(p.manifests...), p.packCount)
		for _, x := range p.packs {
			b = append(b, slices.Concat(x...)...)
		}
		b = append(b, p.count...)
		for _, x := range p.entries {
			b = append(b, slices.Concat(x...)...)
		}
		g.add("moved", what, class, append(b, p.behind...), "name", old.String())
	}
	bad := func(what string, change func(p *parts)) { put(what, "malformed", change) }
	put("to two packs", "ok", func(*parts) {})
	put("for no manifest", "ok", func(p *parts) { p.manifestCount, p.manifests = varint(0), nil })
	put("version 2", "version", func(p *parts) { p.magic[8] = 2 })
	bad("another magic", func(p *parts) { p.magic[3] ^= 1 })
	bad("a byte behind", func(p *parts) { p.behind = []byte{0} })
	bad("cut", func(p *parts) { p.entries[2][3] = nil })
	bad("manifests do not ascend", func(p *parts) { p.manifests[0], p.manifests[1] = p.manifests[1], p.manifests[0] })
	bad("a manifest twice", func(p *parts) { p.manifests[0] = p.manifests[1] })
	bad("packs do not ascend", func(p *parts) { p.packs[0], p.packs[1] = p.packs[1], p.packs[0] })
	bad("to itself", func(p *parts) {
		p.packCount, p.packs = varint(1), [][][]byte{{old[:], varint(1 << 20)}}
		p.entries[1][2] = varint(0)
	})
	bad("a pack nothing went to", func(p *parts) { p.entries[1][2] = varint(0) })
	bad("a pack beyond the list", func(p *parts) { p.entries[1][2] = varint(2) })
	bad("a pack beyond 256 MiB", func(p *parts) { p.packs[0][1] = varint(MaxPack + 1) })
	bad("a pack too small to be one", func(p *parts) { p.packs[1][1] = varint(20) })
	bad("entries do not ascend", func(p *parts) { p.entries[0], p.entries[2] = p.entries[2], p.entries[0] })
	bad("an offset twice", func(p *parts) { p.entries[1][0] = p.entries[0][0] })
	bad("leaves its pack", func(p *parts) { p.entries[1][3] = varint(1500) })
	bad("within a pack's header", func(p *parts) { p.entries[1][3] = varint(8) })
	bad("from within a pack's header", func(p *parts) { p.entries[0][0] = varint(15) })
	bad("29 bytes", func(p *parts) { p.entries[1][1] = varint(29) })
	bad("nothing moved", func(p *parts) { p.packCount, p.packs, p.count, p.entries = varint(0), nil, varint(0), nil })
	bad("huge count", func(p *parts) { p.count = varint(1 << 60) })
	bad("a number not in its shortest form", func(p *parts) { p.entries[0][0] = []byte{0x90, 0} })
}
