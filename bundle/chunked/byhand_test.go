package chunked

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The format once more, by other programs: b3sum, zstd, and what SPEC.md says
// put together byte by byte.

func tool(t *testing.T, stdin []byte, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, stderr.String())
	}
	return out
}

func unhex(t *testing.T, s []byte) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.TrimSpace(string(s)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func handH(t *testing.T, m []byte) []byte {
	t.Helper()
	return unhex(t, tool(t, m, "b3sum", "--no-names"))
}

func handKDF(t *testing.T, context string, k []byte) []byte {
	t.Helper()
	return unhex(t, tool(t, k, "b3sum", "--no-names", "--derive-key", "instar 2026-11-22 "+context))
}

func handMAC(t *testing.T, k []byte, m ...[]byte) []byte {
	t.Helper()
	f := filepath.Join(t.TempDir(), "m")
	if err := os.WriteFile(f, bytes.Join(m, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	return unhex(t, tool(t, k, "b3sum", "--no-names", "--keyed", f))
}

func handSeal(t *testing.T, k []byte, typ, codec byte, b []byte) []byte {
	t.Helper()
	ad := append([]byte("instar-seal-1"), typ, codec)
	ek, nk := handKDF(t, "seal encryption", k), handKDF(t, "seal nonce", k)
	n := handMAC(t, nk, ad, b)[:12]
	block, err := aes.NewCipher(ek)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Join([][]byte{{codec}, n, gcm.Seal(nil, n, b, ad)}, nil)
}

func uv(n uint64) []byte { return binary.AppendUvarint(nil, n) }

func le32(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }

// byHand is an image made by hand: two chunks in a pack, one of them
// compressed by the zstd program, a segment and a root.
type byHand struct {
	secret          Secret
	plain           [2][]byte
	chunks          [2]Chunk
	pack, seg, root []byte
	indexKey        Key
	owner           Key
	salt            Salt
	segPlain        []byte
	rootPlain       []byte
}

func makeByHand(t *testing.T) *byHand {
	h := &byHand{indexKey: Key{0xaa, 1}, owner: Key{0xbb, 2}, salt: Salt{0xcc, 3}}
	for i := range h.secret {
		h.secret[i] = byte(i * 7)
	}
	s := h.secret[:]
	h.plain[0] = []byte("a chunk that is stored as it is")
	h.plain[1] = bytes.Repeat([]byte("a chunk that compresses well. "), 200)
	kid, kchunk, kfoot := handKDF(t, "chunk id", s), handKDF(t, "chunk key", s), handKDF(t, "pack footer", s)
	body := [][]byte{[]byte("INSTARPK"), le32(1), le32(0)}
	entries := uv(2)
	off := int64(16)
	for i, p := range h.plain {
		d := handH(t, p)
		k := handMAC(t, kchunk, d)
		codec, b := byte(0), p
		if i == 1 {
			codec, b = 1, tool(t, p, "zstd", "-19", "-c", "--check")
		}
		sealed := handSeal(t, k, 'C', codec, b)
		body = append(body, sealed)
		entries = bytes.Join([][]byte{entries, handMAC(t, kid, d), uv(uint64(len(p))), uv(uint64(len(sealed)))}, nil)
		h.chunks[i] = Chunk{Digest: Digest(d), Key: Key(k), Size: len(p), At: Location{Offset: off, Sealed: len(sealed)}}
		off += int64(len(sealed))
	}
	f := append(handMAC(t, h.owner[:], h.salt[:], entries)[:16], entries...)
	footer := handSeal(t, handMAC(t, kfoot, h.salt[:]), 'F', 0, f)
	label := handKDF(t, "domain label", s)[:12]
	body = append(body, footer, le32(uint32(len(footer))), le32(1), le32(uint32(len(f))), label, h.salt[:], []byte("INSTARPF"))
	h.pack = bytes.Join(body, nil)
	name := sha256.Sum256(h.pack)
	seg := [][]byte{[]byte("INSTARIS"), le32(1), bytes.Repeat([]byte{0x5a}, 16), uv(1), name[:], uv(2)}
	for i := range h.chunks {
		c := &h.chunks[i]
		c.At.Pack = name
		seg = append(seg, c.Digest[:], c.Key[:], uv(uint64(c.Size)), uv(0), uv(uint64(c.At.Offset)), uv(uint64(c.At.Sealed)))
	}
	seg = append(seg, uv(3),
		uv(100), uv(31), uv(0), uv(0), // 100: all of chunk 0
		uv(0), uv(1000), uv(1), uv(5), // 131: chunk 1 from 5
		uv(4096), uv(7), uv(0), uv(24)) // 5227: chunk 0 from 24
	h.segPlain = bytes.Join(seg, nil)
	segKey := handMAC(t, handKDF(t, "segment key", s), handH(t, h.segPlain))
	h.seg = handSeal(t, segKey, 'S', 1, tool(t, h.segPlain, "zstd", "-c"))
	segName := sha256.Sum256(h.seg)
	h.rootPlain = bytes.Join([][]byte{
		[]byte("INSTARIR"), le32(1), uv(2),
		uv(4), []byte("disk"), uv(1 << 20), uv(1), uv(4096), uv(8192), segName[:], segKey, uv(uint64(len(h.segPlain))), uv(uint64(len(h.seg))),
		uv(6), []byte("kernel"), uv(0), uv(0),
	}, nil)
	h.root = handSeal(t, h.indexKey[:], 'R', 0, h.rootPlain)
	return h
}

func (h *byHand) store() *memoryStore {
	m := newMemoryStore()
	m.packs[NameOf(h.pack)] = h.pack
	m.index[NameOf(h.seg)] = h.seg
	m.index[NameOf(h.root)] = h.root
	return m
}

func (h *byHand) disk() []byte {
	p := make([]byte, 1<<20)
	copy(p[4196:], h.plain[0])
	copy(p[4096+131:], h.plain[1][5:1005])
	copy(p[4096+5227:], h.plain[0][24:])
	return p
}

func TestByHandIsRead(t *testing.T) {
	h := makeByHand(t)
	m := h.store()
	x, err := OpenIndex(t.Context(), m, NameOf(h.root), int64(len(h.root)), h.indexKey)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(x.Streams()); got != "[disk kernel]" {
		t.Errorf("streams %s", got)
	}
	s, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	out := make(image, s.Size())
	if err := Restore(t.Context(), s, out, RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, h.disk()) {
		t.Error("the restored disk differs")
	}
	got := make([]byte, s.Size())
	if _, err := s.ReaderAt(t.Context(), 1<<20).ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, h.disk()) {
		t.Error("the disk as read differs")
	}
	d := h.secret.Domain()
	f, err := d.ReadFooter(t.Context(), m, NameOf(h.pack), int64(len(h.pack)))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Entries) != 2 || !f.OwnedBy(h.owner) || f.Salt != h.salt {
		t.Errorf("footer %+v", f)
	}
	i := 0
	for e, at := range f.All(NameOf(h.pack)) {
		if e.ID != d.ID(h.chunks[i].Digest) || at != h.chunks[i].At || e.Plain != h.chunks[i].Size {
			t.Errorf("entry %d is %+v at %+v", i, e, at)
		}
		i++
	}
}

func TestByHandIsWritten(t *testing.T) {
	h := makeByHand(t)
	d := h.secret.Domain()
	// What is not compressed has one form, which the encoders give.
	var chunks []SealedChunk
	for _, c := range h.chunks {
		if d.ChunkKey(c.Digest) != c.Key {
			t.Errorf("chunk %s has another key", c.Digest)
		}
		sealed := h.pack[c.At.Offset:][:c.At.Sealed]
		chunks = append(chunks, SealedChunk{ID: d.ID(c.Digest), Plain: c.Size, Sealed: sealed})
	}
	c, sealed, err := d.SealChunk(h.plain[0], Better)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(sealed, chunks[0].Sealed) || c.Digest != h.chunks[0].Digest {
		t.Error("the sealed chunk differs")
	}
	pack, err := EncodePack(d, h.owner, h.salt, chunks)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(pack, h.pack) {
		t.Errorf("the pack differs:\n%x\n%x", pack, h.pack)
	}
	s, err := DecodeSegment(h.segPlain, 8192)
	if err != nil {
		t.Fatal(err)
	}
	want := Segment{
		Salt:  SegmentSalt(bytes.Repeat([]byte{0x5a}, 16)),
		Packs: []Name{NameOf(h.pack)},
		Extents: []SegmentExtent{
			{Pos: 100, Length: 31, Chunk: 0},
			{Pos: 131, Length: 1000, Chunk: 1, Start: 5},
			{Pos: 5227, Length: 7, Chunk: 0, Start: 24},
		},
	}
	for _, c := range h.chunks {
		want.Chunks = append(want.Chunks, SegmentChunk{Digest: c.Digest, Key: c.Key, Offset: c.At.Offset, Size: int32(c.Size), Sealed: int32(c.At.Sealed)})
	}
	if fmt.Sprintf("%x", *s) != fmt.Sprintf("%x", want) {
		t.Errorf("the segment is\n%x, not\n%x", *s, want)
	}
	if p, err := want.Encode(8192); err != nil || !bytes.Equal(p, h.segPlain) {
		t.Errorf("the segment is encoded as %x (%v)", p, err)
	}
	root := Root{Streams: []RootStream{
		{Name: "disk", Size: 1 << 20, Segments: []SegmentRef{{
			Pos: 4096, Length: 8192, Name: NameOf(h.seg),
			Key: d.SegmentKey(DigestOf(h.segPlain)), Plain: int32(len(h.segPlain)), Stored: int32(len(h.seg)),
		}}},
		{Name: "kernel"},
	}}
	p, err := root.Encode()
	if err != nil || !bytes.Equal(p, h.rootPlain) {
		t.Errorf("the root is encoded as %x (%v)", p, err)
	}
	if got := AppendSeal(nil, h.indexKey, TypeRoot, Stored, p); !bytes.Equal(got, h.root) {
		t.Errorf("the root is sealed as %x", got)
	}
	// What this program compresses, the zstd program decodes.
	for _, l := range []Level{Fastest, Default, Better} {
		c, sealed, err := d.SealChunk(h.plain[1], l)
		if err != nil {
			t.Fatal(err)
		}
		codec, frame, err := openSeal("chunk", c.Key, TypeChunk, bytes.Clone(sealed))
		if err != nil || codec != Zstd {
			t.Fatalf("codec %d, %v", codec, err)
		}
		if !bytes.Equal(handSeal(t, c.Key[:], 'C', 1, frame), sealed) {
			t.Errorf("level %d: sealed in another way", l)
		}
		if got := tool(t, frame, "zstd", "-dc"); !bytes.Equal(got, h.plain[1]) {
			t.Errorf("level %d: zstd decodes something else", l)
		}
	}
}

func TestByHandMoved(t *testing.T) {
	b := bytes.Join([][]byte{
		[]byte("INSTARMV"), le32(1),
		uv(2), bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32),
		uv(2), bytes.Repeat([]byte{3}, 32), uv(5000), bytes.Repeat([]byte{4}, 32), uv(300),
		uv(3),
		uv(16), uv(40), uv(1), uv(16),
		uv(70), uv(4000), uv(0), uv(16),
		uv(5000), uv(50), uv(0), uv(4016),
	}, nil)
	m, err := DecodeMoved(Name{9}, b)
	if err != nil {
		t.Fatal(err)
	}
	three, four := Name(bytes.Repeat([]byte{3}, 32)), Name(bytes.Repeat([]byte{4}, 32))
	for _, c := range []struct {
		from int64
		want Location
	}{{16, Location{four, 16, 40}}, {70, Location{three, 16, 4000}}, {5000, Location{three, 4016, 50}}} {
		if at, ok := m.Lookup(c.from); !ok || at != c.want {
			t.Errorf("what was at %d is at %+v, %t", c.from, at, ok)
		}
	}
	if _, ok := m.Lookup(71); ok {
		t.Error("what was never there has moved")
	}
	if !m.Serves(Name(bytes.Repeat([]byte{2}, 32))) || m.Serves(three) {
		t.Error("it serves other manifests")
	}
	if got, err := m.Encode(); err != nil || !bytes.Equal(got, b) {
		t.Errorf("encoded as %x (%v)", got, err)
	}
	if _, err := DecodeMoved(three, b); err == nil {
		t.Error("a pack is moved to itself")
	}
}
