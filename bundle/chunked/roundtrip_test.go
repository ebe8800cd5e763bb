package chunked

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
)

// memory is a Source and a Sink.
type packMap map[Name][]byte

func (m packMap) ReadPack(_ context.Context, n Name, off int64, p []byte) error {
	data, ok := m[n]
	if !ok {
		return fmt.Errorf("pack %s: %w", n, ErrMissing)
	}
	if off < 0 || off+int64(len(p)) > int64(len(data)) {
		return fmt.Errorf("pack %s: range %d+%d of %d", n, off, len(p), len(data))
	}
	copy(p, data[off:])
	return nil
}

func testDomain(seed byte) *Domain {
	var s Secret
	for i := range s {
		s[i] = seed + byte(i)
	}
	return s.Domain()
}

func TestPackRoundTrip(t *testing.T) {
	for _, count := range []int{1, 3, 1000} {
		t.Run(fmt.Sprint(count), func(t *testing.T) {
			d := testDomain(1)
			var chunks []SealedChunk
			var want []Chunk
			plain := map[int][]byte{}
			for i := range count {
				p := bytes.Repeat([]byte(fmt.Sprintf("chunk %d ", i)), 1+i%50)
				c, sealed, err := d.SealChunk(p, Fastest)
				if err != nil {
					t.Fatal(err)
				}
				plain[i] = p
				want = append(want, c)
				chunks = append(chunks, SealedChunk{ID: d.ID(c.Digest), Plain: c.Size, Sealed: sealed})
			}
			owner := Key{7}
			data, err := EncodePack(d, owner, Salt{9}, chunks)
			if err != nil {
				t.Fatal(err)
			}
			n := NameOf(data)
			whole, err := d.OpenPack(n, data)
			if err != nil {
				t.Fatal(err)
			}
			src := newMemoryStore()
			src.packs[n] = data
			f, err := d.ReadFooter(t.Context(), src, n, int64(len(data)))
			if err != nil {
				t.Fatal(err)
			}
			if most := map[bool]int{false: 1, true: 2}[count > 400]; src.reads > most {
				t.Errorf("%d reads for the footer of %d chunks", src.reads, count)
			}
			if len(f.Entries) != count || len(whole.Entries) != count {
				t.Fatalf("%d and %d entries, want %d", len(f.Entries), len(whole.Entries), count)
			}
			if !f.OwnedBy(owner) || f.OwnedBy(Key{8}) {
				t.Error("the owner is not told from others")
			}
			i := 0
			for e, at := range f.All(n) {
				c := want[i]
				c.At = at
				if e.ID != d.ID(c.Digest) || e.Plain != c.Size {
					t.Fatalf("entry %d is another chunk's", i)
				}
				sealed := bytes.Clone(data[at.Offset : at.Offset+int64(at.Sealed)])
				got, err := OpenChunk(c, sealed)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, plain[i]) {
					t.Fatalf("chunk %d differs", i)
				}
				i++
			}
			if _, err := testDomain(2).OpenPack(n, data); !errors.Is(err, ErrForeign) {
				t.Errorf("another domain's pack: %v", err)
			}
		})
	}
}
