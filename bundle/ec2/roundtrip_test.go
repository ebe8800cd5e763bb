package ec2

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/instar-image/instar/bundle/sparse"
)

// patchwork is n bytes: text-like, zero and random stretches.
func patchwork(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n)
	for len(b) < n {
		k := min(1+r.IntN(200_000), n-len(b))
		s := make([]byte, k)
		switch r.IntN(3) {
		case 0:
			for i := range s {
				s[i] = "abcdefgh \n"[r.IntN(10)]
			}
		case 1:
			for i := range s {
				s[i] = byte(r.Uint32())
			}
		}
		b = append(b, s...)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	user := loadParty(t, "user")
	big := patchwork(9_000_001, 7)
	for _, c := range []struct {
		name     string
		data     []byte
		m        sparse.Map
		partSize int
	}{
		{"one byte", []byte("x"), nil, 0},
		{"exactly a block", patchwork(512, 1), nil, 4096},
		{"all hole", make([]byte, 1<<20), sparse.Map{}, 4096},
		{"dense", big, nil, 1 << 20},
		{"dense in tiny parts", big[:300_000], nil, 4096},
		{"sparse, aligned", nil, sparse.Map{{Off: 4096, Len: 4096}, {Off: 1 << 20, Len: 3 << 20}}, 64 << 10},
		{"sparse, odd", nil, sparse.Map{{Off: 1, Len: 1}, {Off: 600, Len: 1}, {Off: 1023, Len: 2}, {Off: 5000, Len: 77}, {Off: 6143, Len: 1}, {Off: 90000, Len: 12345}}, 4096},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := c.data
			if len(c.m) > 0 { // zero what the map says is a hole
				data = make([]byte, 4<<20+123)
				for _, e := range c.m {
					copy(data[e.Off:e.End()], big[e.Off:e.End()])
				}
			}
			o := options(t)
			o.PartSize = c.partSize
			store := newMemStore()
			m, doc, err := Bundle(t.Context(), o, memoryImage("img", data, c.m), store)
			if err != nil {
				t.Fatal(err)
			}
			m2, err := ParseManifest(doc)
			if err != nil {
				t.Fatal(err)
			}
			if m2.Digest != m.Digest || len(m2.Parts) != len(store.parts) {
				t.Errorf("manifest has digest %s and %d parts, want %s and %d", m2.Digest, len(m2.Parts), m.Digest, len(store.parts))
			}
			got, err := unbundleBytes(t, UnbundleOptions{Key: user.key}, m2, store)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, data) {
				t.Error("the image came back changed")
			}
		})
	}
}
