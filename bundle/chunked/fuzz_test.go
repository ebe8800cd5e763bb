package chunked

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// The fuzz targets check that what is accepted has one form: decoding and
// encoding gives the same bytes.

func fuzzTyped(t *testing.T, err error) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("an error without a class: %v", err)
	}
}

func FuzzSegment(f *testing.F) {
	s := sampleSegment()
	p, err := s.Encode(1 << 20)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p, int64(1<<20))
	f.Add(p, int64(100))
	f.Fuzz(func(t *testing.T, p []byte, length int64) {
		s, err := DecodeSegment(p, length)
		if err != nil {
			fuzzTyped(t, err)
			return
		}
		if got, err := s.Encode(length); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%x is encoded as %x (%v)", p, got, err)
		}
	})
}

func sampleSegment() *Segment {
	return &Segment{
		Salt:  SegmentSalt{1},
		Packs: []Name{{2}, {1}},
		Chunks: []SegmentChunk{
			{Digest: Digest{3}, Key: Key{4}, Offset: 16, Size: 100, Sealed: 129, Pack: 0},
			{Digest: Digest{5}, Key: Key{6}, Offset: 1 << 20, Size: MaxChunk, Sealed: 1 << 20, Pack: 1},
			{Digest: Digest{7}, Key: Key{6}, Offset: 500, Size: 1, Sealed: 30, Pack: 0},
		},
		Extents: []SegmentExtent{{Pos: 0, Length: 10}, {Pos: 10, Length: 80, Start: 20}, {Pos: 4096, Length: 4096, Start: 8192, Chunk: 1}, {Pos: 8192, Length: 1, Chunk: 2}},
	}
}

func FuzzRoot(f *testing.F) {
	p, err := sampleRoot().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := DecodeRoot(p)
		if err != nil {
			fuzzTyped(t, err)
			return
		}
		if got, err := r.Encode(); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%x is encoded as %x (%v)", p, got, err)
		}
	})
}

func sampleRoot() *Root {
	return &Root{Streams: []RootStream{
		{Name: "disk", Size: 1 << 40, Segments: []SegmentRef{
			{Pos: 0, Length: segmentRange, Name: Name{1}, Key: Key{2}, Plain: 1000, Stored: 500},
			{Pos: 1 << 30, Length: segmentRange, Name: Name{1}, Key: Key{2}, Plain: 1000, Stored: 500},
		}},
		{Name: "kernel"},
	}}
}

func FuzzMoved(f *testing.F) {
	p, err := sampleMoved().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := DecodeMoved(Name{99}, p)
		if err != nil {
			fuzzTyped(t, err)
			return
		}
		if got, err := m.Encode(); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%x is encoded as %x (%v)", p, got, err)
		}
	})
}

func sampleMoved() *Moved {
	return &Moved{
		Manifests: []Name{{1}, {2}},
		Packs:     []ObjectSize{{Name{3}, 1 << 20}, {Name{4}, 1 << 21}},
		Entries:   []MovedChunk{{From: 16, To: 16, Sealed: 100, Pack: 1}, {From: 116, To: 16, Sealed: 90, Pack: 0}},
	}
}

func FuzzFooter(f *testing.F) {
	d := testDomain(1)
	entries := []PackEntry{{ID: ID{1}, Plain: 100, Sealed: 129}, {ID: ID{2}, Plain: MaxChunk, Sealed: 1000}}
	whole := appendPackEnd(nil, d, Key{5}, Salt{7}, entries)
	tr, err := parseTrailer("it", d, whole[len(whole)-packTrailerSize:], 1<<20)
	if err != nil {
		f.Fatal(err)
	}
	_, plain, err := openSeal("it", d.FooterKey(Salt{7}), TypeFooter, bytes.Clone(whole[:tr.sealed]))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain, whole[len(whole)-packTrailerSize:])
	f.Fuzz(func(t *testing.T, plain, end []byte) {
		if len(end) == packTrailerSize {
			if _, err := parseTrailer("it", d, end, 1<<20); err != nil {
				fuzzTyped(t, err)
			}
		}
		var chunks int64
		// Of the lengths' sum, the one that fits: the rest is checked elsewhere.
		for try := range 2 {
			got, err := parseFooter("it", plain, Salt{7}, chunks)
			if err == nil {
				again := appendPackEnd(nil, d, Key{5}, Salt{7}, got.Entries)
				tr, err := parseTrailer("it", d, again[len(again)-packTrailerSize:], MaxPack)
				if err != nil {
					t.Fatal(err)
				}
				_, p, err := openSeal("it", d.FooterKey(Salt{7}), TypeFooter, again[:tr.sealed])
				if err != nil || !bytes.Equal(p[ownerSize:], plain[ownerSize:]) {
					t.Fatalf("%x is encoded as %x (%v)", plain, p, err)
				}
				return
			}
			fuzzTyped(t, err)
			if try == 0 {
				chunks = 0
				for _, e := range got.Entries {
					chunks += int64(e.Sealed)
				}
			}
		}
	})
}

// FuzzSealed: whatever is taken for a sealed chunk is refused or gives what
// has the digest.
func FuzzSealed(f *testing.F) {
	d := testDomain(1)
	for _, p := range [][]byte{[]byte("short"), bytes.Repeat([]byte("long "), 1000)} {
		_, sealed, err := d.SealChunk(p, Fastest)
		if err != nil {
			f.Fatal(err)
		}
		c, b, err := openSeal("it", d.ChunkKey(DigestOf(p)), TypeChunk, sealed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(c), b, len(p))
	}
	u, err := newUnpacker()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, c byte, b []byte, size int) {
		size = 1 + abs(size)%(1<<20)
		sealed := AppendSeal(nil, Key{1}, TypeChunk, Codec(c), b)
		p, err := u.openExact("it", Key{1}, TypeChunk, sealed, size, nil)
		if err != nil {
			fuzzTyped(t, err)
		} else if len(p) != size {
			t.Fatalf("%d bytes instead of %d", len(p), size)
		}
	})
}

func abs(i int) int {
	if i < 0 {
		return -(i + 1)
	}
	return i
}

// Round trips of anything that may be.

func draw32(t *rapid.T, label string) (a [32]byte) {
	copy(a[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, label))
	return a
}

func TestSegmentRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		length := rapid.Int64Range(1, 1<<40).Draw(t, "length")
		s := &Segment{}
		copy(s.Salt[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "salt"))
		end := int64(0)
		for range rapid.IntRange(1, 20).Draw(t, "extents") {
			if end >= length {
				break
			}
			if len(s.Chunks) == 0 || rapid.Bool().Draw(t, "new chunk") {
				if len(s.Packs) == 0 || rapid.Bool().Draw(t, "new pack") {
					s.Packs = append(s.Packs, draw32(t, "pack"))
				}
				c := SegmentChunk{Digest: draw32(t, "digest"), Key: draw32(t, "key")}
				c.Size = rapid.Int32Range(1, MaxChunk).Draw(t, "size")
				c.Sealed = rapid.Int32Range(minSealedChunk, maxSealedChunk).Draw(t, "sealed")
				c.Offset = rapid.Int64Range(packHeaderSize, MaxPack-int64(c.Sealed)).Draw(t, "offset")
				c.Pack = uint32(len(s.Packs) - 1)
				s.Chunks = append(s.Chunks, c)
				s.Extents = append(s.Extents, SegmentExtent{Chunk: uint32(len(s.Chunks) - 1)})
			} else {
				s.Extents = append(s.Extents, SegmentExtent{Chunk: uint32(rapid.IntRange(0, len(s.Chunks)-1).Draw(t, "chunk"))})
			}
			e := &s.Extents[len(s.Extents)-1]
			size := s.Chunks[e.Chunk].Size
			e.Start = rapid.Int32Range(0, size-1).Draw(t, "start")
			e.Pos = rapid.Int64Range(end, length-1).Draw(t, "pos")
			e.Length = int32(rapid.Int64Range(1, min(int64(size-e.Start), length-e.Pos)).Draw(t, "length"))
			end = e.Pos + int64(e.Length)
			if n := len(s.Extents); n > 1 && s.Extents[n-2].continues(*e) {
				s.Extents[n-2].Length += e.Length
				s.Extents = s.Extents[:n-1]
			}
		}
		p, err := s.Encode(length)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeSegment(p, length)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, s) {
			t.Fatalf("%+v became %+v", s, got)
		}
	})
}

func TestRootRoundTrip(t *testing.T) {
	names := []string{"a", "b-0", "disk", "initrd", "kernel", "layout", "zz"}
	rapid.Check(t, func(t *rapid.T) {
		r := &Root{}
		for _, n := range names {
			if rapid.Bool().Draw(t, n) {
				continue
			}
			s := RootStream{Name: n, Size: rapid.Int64Min(0).Draw(t, "size")}
			end := int64(0)
			for range rapid.IntRange(0, 5).Draw(t, "segments") {
				if end >= s.Size {
					break
				}
				g := SegmentRef{Pos: rapid.Int64Range(end, s.Size-1).Draw(t, "pos"), Name: draw32(t, "name"), Key: draw32(t, "key")}
				g.Length = rapid.Int64Range(1, s.Size-g.Pos).Draw(t, "length")
				g.Plain = rapid.Int32Range(int32(minSegment), MaxSegment).Draw(t, "plain")
				g.Stored = rapid.Int32Range(minSealedChunk, maxStoredSegment).Draw(t, "stored")
				end = g.Pos + g.Length
				s.Segments = append(s.Segments, g)
			}
			r.Streams = append(r.Streams, s)
		}
		p, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeRoot(p)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, r) {
			t.Fatalf("%+v became %+v", r, got)
		}
	})
}

// TestStrict: each rule of the encodings, broken.
func TestStrict(t *testing.T) {
	for _, c := range []struct {
		name  string
		wreck func(s *Segment)
	}{
		{"nothing", func(s *Segment) { *s = Segment{} }},
		{"a pack twice", func(s *Segment) { s.Packs[1] = s.Packs[0] }},
		{"a pack nobody uses", func(s *Segment) { s.Packs = append(s.Packs, Name{9}) }},
		{"packs in another order", func(s *Segment) { s.Chunks[0].Pack, s.Chunks[1].Pack = 1, 0 }},
		{"a chunk twice", func(s *Segment) { s.Chunks[1].Digest = s.Chunks[0].Digest }},
		{"a chunk nobody uses", func(s *Segment) { s.Chunks = append(s.Chunks, s.Chunks[0]); s.Chunks[3].Digest = Digest{9} }},
		{"a chunk of no length", func(s *Segment) { s.Chunks[2].Size = 0 }},
		{"a chunk too long", func(s *Segment) { s.Chunks[1].Size++ }},
		{"a chunk in the header", func(s *Segment) { s.Chunks[0].Offset-- }},
		{"a chunk beyond any pack", func(s *Segment) { s.Chunks[0].Offset = MaxPack - 100 }},
		{"chunks in another order", func(s *Segment) { s.Extents[0].Chunk = 1 }},
		{"overlapping", func(s *Segment) { s.Extents[1].Pos-- }},
		{"empty", func(s *Segment) { s.Extents[1].Length = 0 }},
		{"beyond its chunk", func(s *Segment) { s.Extents[1].Length++ }},
		{"beyond the segment", func(s *Segment) { s.Extents[3].Pos = 1 << 20 }},
		{"one extent as two", func(s *Segment) { s.Extents[1].Start = 10 }},
	} {
		s := sampleSegment()
		c.wreck(s)
		if _, err := s.Encode(1 << 20); !errors.Is(err, ErrUsage) {
			t.Errorf("segment with %s is encoded: %v", c.name, err)
		}
	}
	for _, c := range []struct {
		name  string
		wreck func(r *Root)
	}{
		{"streams in another order", func(r *Root) { r.Streams[0].Name = "l" }},
		{"a stream twice", func(r *Root) { r.Streams[0].Name = "kernel" }},
		{"a bad name", func(r *Root) { r.Streams[0].Name = "Disk" }},
		{"no name", func(r *Root) { r.Streams[0].Name = "" }},
		{"less than nothing", func(r *Root) { r.Streams[1].Size = -1 }},
		{"overlapping segments", func(r *Root) { r.Streams[0].Segments[1].Pos = 5 }},
		{"a segment beyond the stream", func(r *Root) { r.Streams[0].Segments[1].Pos = 1<<40 - 5 }},
		{"an empty segment", func(r *Root) { r.Streams[0].Segments[1].Length = 0 }},
		{"a segment too large", func(r *Root) { r.Streams[0].Segments[1].Plain = MaxSegment + 1 }},
	} {
		r := sampleRoot()
		c.wreck(r)
		if _, err := r.Encode(); !errors.Is(err, ErrUsage) {
			t.Errorf("root with %s is encoded: %v", c.name, err)
		}
	}
	for _, c := range []struct {
		name  string
		wreck func(m *Moved)
	}{
		{"nothing", func(m *Moved) { m.Entries, m.Packs = nil, nil }},
		{"manifests in another order", func(m *Moved) { m.Manifests[0] = Name{3} }},
		{"packs in another order", func(m *Moved) { m.Packs[0].Name = Name{5} }},
		{"a pack nobody uses", func(m *Moved) { m.Packs = append(m.Packs, ObjectSize{Name{6}, 1 << 20}) }},
		{"a pack too small", func(m *Moved) { m.Packs[0].Size = 10 }},
		{"entries in another order", func(m *Moved) { m.Entries[1].From = 16 }},
		{"a chunk beyond its pack", func(m *Moved) { m.Entries[1].To = 1 << 20 }},
		{"a chunk too short", func(m *Moved) { m.Entries[0].Sealed = 29 }},
		{"no such pack", func(m *Moved) { m.Entries[1].Pack = 2 }},
	} {
		m := sampleMoved()
		c.wreck(m)
		if _, err := m.Encode(); !errors.Is(err, ErrUsage) {
			t.Errorf("moved object with %s is encoded: %v", c.name, err)
		}
	}
}
