package chunked

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
)

// TestSealOfOtherKind: what is sealed as one thing does not open as another,
// nor under another key.
func TestSealOfOtherKind(t *testing.T) {
	types := []Type{TypeChunk, TypeFooter, TypeSegment, TypeRoot}
	for _, a := range types {
		for _, c := range []Codec{Stored, Zstd, 2} {
			sealed := AppendSeal(nil, Key{1}, a, c, []byte("something"))
			for _, b := range types {
				_, p, err := openSeal("it", Key{1}, b, bytes.Clone(sealed))
				switch {
				case a != b && !errors.Is(err, ErrCorrupt):
					t.Errorf("%c opens as %c: %v", a, b, err)
				case a == b && c > Zstd && !errors.Is(err, ErrVersion):
					t.Errorf("codec %d: %v", c, err)
				case a == b && c <= Zstd && (err != nil || string(p) != "something"):
					t.Errorf("%c, codec %d: %q, %v", a, c, p, err)
				}
			}
			if _, _, err := openSeal("it", Key{2}, a, bytes.Clone(sealed)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("another key: %v", err)
			}
		}
	}
}

// TestFrames: of zstd, one frame with the right length and nothing else.
func TestFrames(t *testing.T) {
	d := testDomain(1)
	p := bytes.Repeat([]byte("plaintext "), 100)
	good := tool(t, p, "zstd", "-c")
	empty := tool(t, nil, "zstd", "-c")
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0}, "skip"...)
	half := tool(t, p[:500], "zstd", "-c")
	long := tool(t, append(bytes.Clone(p), 'x'), "zstd", "-c")
	streamed := tool(t, p, "sh", "-c", "cat | zstd -c --no-check --stream-size=1000 | cat")
	for _, c := range []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"good", good, true},
		{"streamed", streamed, true},
		{"nothing", nil, false},
		{"no data", empty, false},
		{"too long", long, false},
		{"too short", half, false},
		{"two frames", append(bytes.Clone(half), half...), false},
		{"and an empty one", append(bytes.Clone(good), empty...), false},
		{"and one to skip", append(bytes.Clone(good), skippable...), false},
		{"one to skip first", append(bytes.Clone(skippable), good...), false},
		{"and a byte", append(bytes.Clone(good), 0), false},
		{"cut", good[:len(good)-5], false},
		{"plaintext", p, false},
	} {
		ch := Chunk{Digest: DigestOf(p), Size: len(p), At: Location{Offset: packHeaderSize}}
		ch.Key = d.ChunkKey(ch.Digest)
		sealed := AppendSeal(nil, ch.Key, TypeChunk, Zstd, c.frame)
		ch.At.Sealed = len(sealed)
		got, err := OpenChunk(ch, sealed)
		if c.ok && (err != nil || !bytes.Equal(got, p)) {
			t.Errorf("%s: %v", c.name, err)
		}
		if !c.ok && !typed(err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestPlaintextMustMatch: the right key and tag are not enough.
func TestPlaintextMustMatch(t *testing.T) {
	d := testDomain(1)
	ch := Chunk{Digest: DigestOf([]byte("what was promised")), Size: 17}
	ch.Key = d.ChunkKey(ch.Digest)
	sealed := AppendSeal(nil, ch.Key, TypeChunk, Stored, []byte("what is delivered"))
	ch.At = Location{Offset: packHeaderSize, Sealed: len(sealed)}
	if _, err := OpenChunk(ch, sealed); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

// TestNoncesNeverRepeat: under one key, a nonce is used for one message.
func TestNoncesNeverRepeat(t *testing.T) {
	d := testDomain(1)
	r := rand.New(rand.NewPCG(1, 1))
	type use struct {
		k Key
		n [nonceSize]byte
	}
	seen := map[use][]byte{}
	forms := 0
	for i := range 300 {
		p := text(r, 1+r.IntN(20_000))
		if i%3 == 0 {
			copy(p, make([]byte, len(p)/2))
		}
		k := d.ChunkKey(DigestOf(p))
		encodings := [][2]any{{Stored, p}}
		for _, l := range []Level{Fastest, Default, Better} {
			z, err := newPacker(l)
			if err != nil {
				t.Fatal(err)
			}
			encodings = append(encodings, [2]any{Zstd, z.enc.EncodeAll(p, nil)})
		}
		for _, e := range encodings {
			for _, typ := range []Type{TypeChunk, TypeSegment} {
				codec, b := e[0].(Codec), e[1].([]byte)
				sealed := AppendSeal(nil, k, typ, codec, b)
				u := use{k: k, n: [nonceSize]byte(sealed[1:])}
				m := append([]byte{byte(typ), byte(codec)}, b...)
				if old, ok := seen[u]; ok && !bytes.Equal(old, m) {
					t.Fatal("one nonce for two messages under one key")
				} else if !ok {
					forms++
				}
				seen[u] = m
			}
		}
	}
	t.Logf("%d messages, each with a nonce of its own", forms)
	if forms < 1500 {
		t.Error("levels do not differ: this shows nothing")
	}
}
