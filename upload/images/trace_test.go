package images_test

import (
	"bytes"
	"cmp"
	"errors"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// TestFirstReads holds what is left of ranges against a disk of bytes.
func TestFirstReads(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 60
		ranges := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) chunked.Range {
			return chunked.Range{Position: rapid.Int64Range(-3, size+3).Draw(t, "pos"), Length: rapid.OneOf(rapid.Int64Range(-1, 20), rapid.Just(int64(math.MaxInt64))).Draw(t, "length")}
		}), 0, 30).Draw(t, "ranges")
		var want []int64
		seen := map[int64]bool{}
		for _, r := range ranges {
			if r.Position < 0 {
				continue
			}
			for i := r.Position; i < size && i-r.Position < r.Length; i++ {
				if !seen[i] {
					seen[i] = true
					want = append(want, i)
				}
			}
		}
		var got []int64
		list := images.FirstReads(ranges, size)
		for n, r := range list {
			if n > 0 && list[n-1].Position+list[n-1].Length == r.Position {
				t.Fatalf("ranges %d and %d are one", n-1, n)
			}
			for i := range r.Length {
				got = append(got, r.Position+i)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%v gives %v", ranges, got)
		}
	})
}

// TestTraces: what was recorded is found again, stays as long as its version
// does, and nothing else is believed.
func TestTraces(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	objects := &actor{mem: m}
	s := p.open(t, objects, "")
	for range 2 {
		if _, err := p.capture(t.Context(), s, "web", words("a b c d e f")); err != nil {
			t.Fatal(err)
		}
	}
	old, err := s.Resolve(t.Context(), "web@parent", images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Resolve(t.Context(), "web", images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.Trace(t.Context()); !errors.Is(err, images.ErrNoTrace) {
		t.Fatalf("no trace yet: %v", err)
	}
	if _, err := img.PutTrace(t.Context(), []chunked.Range{{Position: 1 << 40, Length: 5}}, p.signer); err == nil {
		t.Error("a trace of nothing was stored")
	}
	for _, x := range []*images.Image{old, img} {
		put, err := x.PutTrace(t.Context(), []chunked.Range{{Position: 128, Length: 64}, {Position: 0, Length: 1 << 30}}, p.signer)
		if err != nil {
			t.Fatal(err)
		}
		got, err := x.Trace(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Ranges) != 3 || got.Ranges[0].Position != 128 || got.Bytes != 6*64 || put.Bytes != got.Bytes || put.Size != got.Size {
			t.Errorf("trace %+v, put %+v", got.Ranges, put)
		}
	}
	for range 2 {
		if _, err := s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := old.Trace(t.Context()); err != nil {
		t.Fatalf("after a collection: %v", err)
	}
	if r, err := s.Verify(t.Context(), images.VerifyOptions{}); err != nil || !r.Sound() {
		t.Fatalf("verify: %+v, %v", r, err)
	}

	key := chunked.TraceKey("web", img.Name)
	good, _, err := upload.GetBytes(t.Context(), objects, key, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := upload.GetBytes(t.Context(), objects, chunked.TraceKey("web", old.Name), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "stranger"), "stranger")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.PutTrace(t.Context(), []chunked.Range{{Position: 0, Length: 1}}, stranger); !errors.Is(err, keys.ErrUntrusted) {
		t.Errorf("a stranger's trace: %v", err)
	}
	foreign, err := (&chunked.Trace{Name: "web", Manifest: img.Name, Created: epoch, Ranges: []chunked.Range{{Position: 0, Length: 1}}}).Sign(t.Context(), stranger)
	if err != nil {
		t.Fatal(err)
	}
	unsigned, _, err := chunked.Split(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct {
		name   string
		object []byte
		want   error
	}{
		{"of another version", other, chunked.ErrOther},
		{"by a stranger", foreign, keys.ErrUntrusted},
		{"not signed", unsigned, keys.ErrSignature},
		{"changed", bytes.Replace(good, []byte("128"), []byte("129"), 1), keys.ErrSignature},
		{"endless", make([]byte, chunked.MaxTrace+keys.MaxSignature+1), upload.ErrTooLarge},
		{"empty", nil, keys.ErrSignature},
	} {
		if _, err := upload.PutBytes(t.Context(), objects, key, bad.object, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := img.Trace(t.Context()); !errors.Is(err, bad.want) {
			t.Errorf("a trace that is %s: %v", bad.name, err)
		}
	}
	// It costs nothing but itself.
	mustRead(t, s, "web", words("a b c d e f"))
	if err := img.DeleteTrace(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := img.Trace(t.Context()); !errors.Is(err, images.ErrNoTrace) {
		t.Errorf("deleted: %v", err)
	}
	if _, err := s.Delete(t.Context(), "web@"+old.Name.String(), p.signer); err != nil {
		t.Fatal(err)
	}
	if _, err := objects.Stat(t.Context(), chunked.TraceKey("web", old.Name)); !errors.Is(err, upload.ErrNotExist) {
		t.Errorf("the trace of a version that was deleted: %v", err)
	}
}

// FuzzReadRanges: whatever a guest says, what would be signed lies on the disk,
// each byte once, and no more of it than a trace has.
func FuzzReadRanges(f *testing.F) {
	f.Add(`{"ranges":[[0,4096],[8192,1],[4096,100000]]}`, int64(1<<20))
	f.Add(`{"ranges":[[-1,4096],[9223372036854775807,9223372036854775807]]}`, int64(1<<20))
	f.Add(`{"ranges":[[1]]}`, int64(5))
	f.Fuzz(func(t *testing.T, text string, size int64) {
		ranges, err := images.ReadRanges(strings.NewReader(text))
		if err != nil {
			if !errors.Is(err, chunked.ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		list := images.FirstReads(ranges, size)
		seen := slices.Clone(list)
		slices.SortFunc(seen, func(a, b chunked.Range) int { return cmp.Compare(a.Position, b.Position) })
		end := int64(0)
		for _, r := range seen {
			if r.Position < end || r.Length < 1 || r.Length > size-r.Position {
				t.Fatalf("%q: %d bytes at %d of %d", text, r.Length, r.Position, size)
			}
			end = r.Position + r.Length
		}
	})
}
