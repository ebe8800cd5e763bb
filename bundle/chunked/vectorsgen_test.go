package chunked

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
)

// generator makes the vector set, always the same one: all that is random
// comes from a seed.
type generator struct {
	t   *testing.T
	all map[string]*vector
}

// writeVectors replaces the set.
func writeVectors(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 20261122)
	g := &generator{t: t, all: map[string]*vector{}}
	g.seals()
	g.packs()
	g.segments()
	g.roots()
	g.moved()
	g.documents()
	old, err := filepath.Glob(vectorFolder + "/*.vector")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range old {
		g.must(os.Remove(f))
	}
	for name, v := range g.all {
		g.must(os.WriteFile(filepath.Join(vectorFolder, name+".vector"), v.encode(), 0o644))
	}
}

func (g *generator) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// add puts a vector into the set: what it is about, in words that make its
// file's name, and further fields, key and value by turns.
func (g *generator) add(kind, what, expect string, body []byte, fields ...string) {
	g.t.Helper()
	name := kind + "-" + strings.Trim(strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		}
		return '-'
	}, what), "-")
	for strings.Contains(name, "--") {
		name = strings.ReplaceAll(name, "--", "-")
	}
	if g.all[name] != nil {
		g.t.Fatalf("two vectors %s", name)
	}
	v := &vector{fields: [][2]string{{"kind", kind}, {"expect", expect}, {"comment", what}}, body: bytes.Clone(body)}
	for i := 0; i < len(fields); i += 2 {
		v.fields = append(v.fields, [2]string{fields[i], fields[i+1]})
	}
	g.all[name] = v
}

func hexOf[T ~[32]byte](a T) string { return hex.EncodeToString(a[:]) }

// flip gives b with a bit of byte i changed; i < 0 counts from the end.
func flip(b []byte, i int) []byte {
	b = bytes.Clone(b)
	if i < 0 {
		i += len(b)
	}
	b[i] ^= 1
	return b
}

// story is text that each level of compression makes something else of.
func (g *generator) story() []byte {
	words := strings.Fields("it was a dark and stormy night the rain fell in torrents except at occasional intervals when checked by violent gusts")
	var b []byte
	for i := 0; len(b) < 3000; i++ {
		b = append(append(b, words[name32(fmt.Sprint(i))[0]%byte(len(words))]...), ' ')
	}
	return b
}

func (g *generator) zstd(p []byte, l Level) []byte {
	z, err := newPacker(l)
	g.must(err)
	c, b := z.pack(p)
	if c != Zstd {
		g.t.Fatal("does not compress")
	}
	return bytes.Clone(b)
}

func (g *generator) seals() {
	k := Key(sha256.Sum256([]byte("seal key")))
	short := []byte("a plaintext that is stored as it is")
	story := g.story()
	b := g.zstd(story, Fastest)
	fields := func(typ Type, p []byte) []string {
		return []string{"key", hexOf(k), "type", string(typ), "size", fmt.Sprint(len(p)), "plain", fmt.Sprintf("%x", sha256.Sum256(p))}
	}
	for _, typ := range []Type{TypeChunk, TypeFooter, TypeSegment, TypeRoot} {
		g.add("seal", "stored, type "+string(typ), "ok", AppendSeal(nil, k, typ, Stored, short), fields(typ, short)...)
	}
	g.add("seal", "compressed", "ok", AppendSeal(nil, k, TypeChunk, Zstd, b), fields(TypeChunk, story)...)
	g.add("seal", "compressed at another level", "ok", AppendSeal(nil, k, TypeChunk, Zstd, g.zstd(story, Better)), fields(TypeChunk, story)...)
	g.add("seal", "one byte", "ok", AppendSeal(nil, k, TypeChunk, Stored, short[:1]), fields(TypeChunk, short[:1])...)

	good := AppendSeal(nil, k, TypeChunk, Stored, short)
	bad := func(what, class string, body []byte, p []byte) {
		g.add("seal", what, class, body, fields(TypeChunk, p)...)
	}
	bad("codec changed", "corrupt", flip(good, 0), short)
	bad("nonce changed", "corrupt", flip(good, 1), short)
	bad("first byte changed", "corrupt", flip(good, 13), short)
	bad("last byte changed", "corrupt", flip(good, -17), short)
	bad("tag changed", "corrupt", flip(good, -1), short)
	bad("cut", "corrupt", good[:len(good)-1], short)
	bad("a byte behind", "corrupt", append(bytes.Clone(good), 0), short)
	bad("nothing", "corrupt", nil, short)
	bad("28 bytes", "corrupt", good[:28], short)
	bad("of another type", "corrupt", AppendSeal(nil, k, TypeSegment, Stored, short), short)
	bad("with another key", "corrupt", AppendSeal(nil, Key{1}, TypeChunk, Stored, short), short)
	bad("shorter than known", "corrupt", good, append(bytes.Clone(short), 'x'))
	bad("longer than known", "corrupt", good, short[:len(short)-1])
	bad("unknown codec", "version", AppendSeal(nil, k, TypeChunk, 2, short), short)

	zip := func(what string, b, p []byte) {
		bad(what, "malformed", AppendSeal(nil, k, TypeChunk, Zstd, b), p)
	}
	zip("compressed, shorter than known", b, append(bytes.Clone(story), 'x'))
	zip("compressed, longer than known", b, story[:len(story)-1])
	zip("frame without end", b[:len(b)-1], story)
	zip("byte behind the frame", append(bytes.Clone(b), 0), story)
	zip("two frames", append(bytes.Clone(b), b...), append(bytes.Clone(story), story...))
	skip := []byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 'x'}
	zip("frame to be skipped, then one", append(bytes.Clone(skip), b...), story)
	zip("one, then a frame to be skipped", append(bytes.Clone(b), skip...), story)
	zip("no frame", []byte("this is not zstd at all"), story)
	zip("empty instead of a frame", nil, story)
	dict := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x21, 7, 1, 0x09, 0, 0, 'x'} // single segment, dictionary 7, size 1, last raw block
	zip("frame with dictionary", dict, []byte("x"))

	g.chunks(short)
}

func (g *generator) chunks(short []byte) {
	d, story := g.secret().Domain(), g.story()
	put := func(what, class string, c Chunk, sealed, p []byte) {
		g.add("chunk", what, class, sealed, "digest", hexOf(c.Digest), "key", hexOf(c.Key), "size", fmt.Sprint(c.Size), "plain", fmt.Sprintf("%x", sha256.Sum256(p)))
	}
	c, sealed, err := d.SealChunk(short, Fastest)
	g.must(err)
	put("stored", "ok", c, sealed, short)
	z, zsealed, err := d.SealChunk(story, Fastest)
	g.must(err)
	put("compressed", "ok", z, zsealed, story)
	_, better, err := d.SealChunk(story, Better)
	g.must(err)
	put("recompressed", "ok", z, better, story)
	wrong := c
	wrong.Digest[0] ^= 1
	put("sealed with the right key, another digest", "corrupt", wrong, sealed, short)
	other := []byte("a plaintext that a thief had signed")
	evil := c
	evil.Size = len(other)
	put("another plaintext under the same key", "corrupt", evil, AppendSeal(nil, c.Key, TypeChunk, Stored, other), other)
	wrong = c
	wrong.Key = d.ChunkKey(z.Digest)
	put("another chunk's key", "corrupt", wrong, sealed, short)
	put("another chunk's bytes", "corrupt", c, zsealed, short)
	put("a segment in a chunk's place", "corrupt", c, AppendSeal(nil, c.Key, TypeSegment, Stored, short), short)
	wrong = c
	wrong.Size = 0
	put("no bytes", "malformed", wrong, sealed, nil)
	wrong.Size = MaxChunk + 1
	put("more than 4 MiB", "malformed", wrong, sealed, nil)
	put("29 bytes sealed", "malformed", c, sealed[:29], short)
}

func (g *generator) secret() Secret { return sha256.Sum256([]byte("domain secret")) }

func (g *generator) packs() {
	secret, owner := g.secret(), Key(sha256.Sum256([]byte("owner")))
	d := secret.Domain()
	var chunks []SealedChunk
	for i := range 3 {
		p := append(g.story()[:200+i:200+i], byte('0'+i))
		c, sealed, err := d.SealChunk(p, Fastest)
		g.must(err)
		chunks = append(chunks, SealedChunk{ID: d.ID(c.Digest), Plain: c.Size, Sealed: sealed})
	}
	salt := Salt(bytes.Repeat([]byte{0x5a}, 16))
	good, err := EncodePack(d, owner, salt, chunks)
	g.must(err)
	one, err := EncodePack(d, owner, salt, chunks[:1])
	g.must(err)
	fields := func(n Name, own bool, count int) []string {
		return []string{
			"secret", hexOf(secret), "name", n.String(), "owner", hexOf(owner), "own", fmt.Sprint(own), "chunks", fmt.Sprint(count),
		}
	}
	put := func(what, class string, data []byte) {
		g.add("pack", what, class, data, fields(NameOf(data), true, 3)...)
	}
	put("of three chunks", "ok", good)
	g.add("pack", "of one chunk", "ok", one, fields(NameOf(one), true, 1)...)
	theirs, err := EncodePack(d, Key{9}, salt, chunks)
	g.must(err)
	g.add("pack", "of another creator", "ok", theirs, fields(NameOf(theirs), false, 3)...)
	foreign, err := EncodePack(Secret{7}.Domain(), owner, salt, chunks)
	g.must(err)

	g.add("pack", "under another name", "corrupt", good, fields(NameOf(one), true, 3)...)
	g.add("pack", "a bit of a chunk changed", "corrupt", flip(good, 100), fields(NameOf(good), true, 3)...)
	put("of another domain", "foreign", foreign)
	put("another magic", "malformed", flip(good, 0))
	put("version 0 in front", "version", flip(good, 8))
	put("reserved field in use", "malformed", flip(good, 12))
	put("another magic behind", "corrupt", flip(good, -1))
	put("another salt", "corrupt", flip(good, -9))
	put("another label", "foreign", flip(good, -25))
	put("footer's plain length one less", "corrupt", flip(good, -40))
	put("version 0 behind", "version", flip(good, -44))
	put("footer's length changed", "corrupt", flip(good, -48))
	put("footer changed", "corrupt", flip(good, -60))
	put("nothing", "malformed", nil)
	put("cut at the end", "corrupt", good[:len(good)-1])
	put("cut in front", "malformed", good[1:])
	put("a byte behind", "corrupt", append(bytes.Clone(good), 0))
	put("a byte before the footer", "malformed", slices.Insert(bytes.Clone(good), packHeaderSize, 0))
	put("a chunk taken out", "malformed", slices.Concat(good[:packHeaderSize], good[packHeaderSize+len(chunks[0].Sealed):]))

	// By a creator of the domain who breaks the rules.
	body := good[:packHeaderSize+len(chunks[0].Sealed)+len(chunks[1].Sealed)+len(chunks[2].Sealed)]
	entry := func(b []byte, plain, sealed int64) []byte {
		b = append(b, chunks[0].ID[:]...)
		return appendUvarint(appendUvarint(b, plain), sealed)
	}
	craft := func(what, class string, f []byte) {
		put(what, class, g.packWithFooter(d, owner, salt, body, f))
	}
	n := int64(len(body) - packHeaderSize)
	third := n / 3
	ok := entry(entry(entry([]byte{3}, 5, third), 5, third), 5, n-2*third)
	craft("other lengths that add up", "ok", ok)
	craft("no chunk listed", "malformed", append([]byte{0}, make([]byte, 40)...))
	craft("chunks end early", "malformed", entry(entry(entry([]byte{3}, 5, third), 5, third), 5, n-2*third-1))
	craft("chunks end late", "malformed", entry(entry(entry([]byte{3}, 5, third), 5, third), 5, n-2*third+1))
	craft("fewer entries than counted", "malformed", entry(entry([]byte{3}, 5, third), 5, n-third))
	craft("more entries than counted", "malformed", append([]byte{2}, ok[1:]...))
	craft("huge count", "malformed", append([]byte{0xff, 0xff, 0xff, 0xff, 0x7f}, ok[1:]...))
	craft("count of more than 64 bits", "malformed", append(bytes.Repeat([]byte{0xff}, 10), ok[1:]...))
	craft("count not in its shortest form", "malformed", append([]byte{0x83, 0}, ok[1:]...))
	craft("chunk of no bytes", "malformed", entry(entry(entry([]byte{3}, 0, third), 5, third), 5, n-2*third))
	craft("chunk beyond 4 MiB", "malformed", entry(entry(entry([]byte{3}, MaxChunk+1, third), 5, third), 5, n-2*third))
	craft("sealed chunk of 29 bytes", "malformed", entry(entry(entry([]byte{3}, 5, 29), 5, third), 5, n-third-29))
	craft("sealed chunk beyond 4,260,000 bytes", "malformed", entry(entry(entry([]byte{3}, 5, maxSealedChunk+1), 5, third), 5, n-2*third))

	foot := func(what, class string, data []byte, size int) {
		g.add("footer", what, class, data, append(fields(NameOf(good), true, 3), "size", fmt.Sprint(size))...)
	}
	foot("read from the end", "ok", good, len(good))
	foot("pack shorter than its size", "corrupt", good[:minPack-1], minPack-1)
	foot("size beyond 256 MiB", "corrupt", good, MaxPack+1)
	foot("trailer of another pack", "corrupt", slices.Concat(good[:len(good)-packTrailerSize], one[len(one)-packTrailerSize:]), len(good))
	foot("of another domain", "foreign", foreign, len(foreign))
	foot("shifted by a byte", "malformed", append([]byte{0}, good...), len(good)+1)
	// A reader of footers does not read the chunks: their bytes are not its business.
	foot("a bit of a chunk changed", "ok", flip(good, 40), len(good))
}

// packWithFooter puts a footer that says f behind body.
func (g *generator) packWithFooter(d *Domain, owner Key, salt Salt, body, f []byte) []byte {
	o := ownerOf(owner, salt, f)
	f = slices.Concat(o[:], f)
	sealed := AppendSeal(nil, d.FooterKey(salt), TypeFooter, Stored, f)
	pack := slices.Concat(body, sealed)
	pack = binary.LittleEndian.AppendUint32(pack, uint32(len(sealed)))
	pack = binary.LittleEndian.AppendUint32(pack, version)
	pack = binary.LittleEndian.AppendUint32(pack, uint32(len(f)))
	return slices.Concat(pack, d.label[:], salt[:], []byte(trailerMagic))
}
