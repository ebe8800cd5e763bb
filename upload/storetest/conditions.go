package storetest

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/instar-image/instar/upload"
)

func testReplace(t *testing.T, s upload.Store) {
	a := put(t, s, "k", []byte("first"))
	b := put(t, s, "k", []byte("second!"))
	if a.ETag == b.ETag {
		t.Errorf("both have ETag %q", a.ETag)
	}
	if got := get(t, s, "k", upload.GetOptions{}); string(got) != "second!" {
		t.Errorf("got %q", got)
	}
	_, _, err := s.Get(t.Context(), "k", upload.GetOptions{IfMatch: a.ETag})
	wantErr(t, err, upload.ErrChanged, "get of the old ETag")
}

func testIfNoneMatch(t *testing.T, s upload.Store) {
	o := upload.PutOptions{IfNoneMatch: true}
	if _, err := upload.PutBytes(t.Context(), s, "once", []byte("1"), o); err != nil {
		t.Fatal(err)
	}
	_, err := upload.PutBytes(t.Context(), s, "once", []byte("2"), o)
	wantErr(t, err, upload.ErrExist, "second put")
	_, err = upload.PutBytes(t.Context(), s, "once", []byte("1"), o)
	wantErr(t, err, upload.ErrExist, "second put of the same")
	if got := get(t, s, "once", upload.GetOptions{}); string(got) != "1" {
		t.Errorf("got %q", got)
	}
}

// testIfNoneMatchRace: of many, exactly one wins.
func testIfNoneMatchRace(t *testing.T, s upload.Store) {
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			_, err := upload.PutBytes(t.Context(), s, "race/here", fmt.Appendf(nil, "writer %d", i), upload.PutOptions{IfNoneMatch: true})
			if err == nil {
				won.Add(1)
			} else if !errors.Is(err, upload.ErrExist) {
				t.Errorf("writer %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d writers won", won.Load())
	}
}

func testIfMatch(t *testing.T, s upload.Store) {
	ctx := t.Context()
	a := put(t, s, "head", []byte("1"))
	b, err := upload.PutBytes(ctx, s, "head", []byte("2"), upload.PutOptions{IfMatch: a.ETag})
	if err != nil {
		t.Fatal(err)
	}
	_, err = upload.PutBytes(ctx, s, "head", []byte("3"), upload.PutOptions{IfMatch: a.ETag})
	wantErr(t, err, upload.ErrExist, "put with a stale ETag")
	if _, err = upload.PutBytes(ctx, s, "head", []byte("4"), upload.PutOptions{IfMatch: b.ETag}); err != nil {
		t.Error(err)
	}
	if got := get(t, s, "head", upload.GetOptions{}); string(got) != "4" {
		t.Errorf("got %q", got)
	}
	if _, err = upload.PutBytes(ctx, s, "none", []byte("5"), upload.PutOptions{IfMatch: b.ETag}); err == nil {
		t.Error("put with If-Match where nothing is succeeded")
	}
}

func testDigests(t *testing.T, s upload.Store) {
	data := Bytes(7, 200_000)
	m, h := md5.Sum(data), sha256.Sum256(data)
	o, err := upload.PutBytes(t.Context(), s, "good", data, upload.PutOptions{MD5: m[:], SHA256: h[:]})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(o.MD5, m[:]) || !bytes.Equal(o.SHA256, h[:]) {
		t.Errorf("digests are %x and %x", o.MD5, o.SHA256)
	}
	st, err := s.Stat(t.Context(), "good")
	if err != nil || st.SHA256 != nil && !bytes.Equal(st.SHA256, h[:]) {
		t.Errorf("stat gives SHA-256 %x, %v", st.SHA256, err)
	}
	bad := slices.Clone(m[:])
	bad[3] ^= 1
	_, err = upload.PutBytes(t.Context(), s, "bad", data, upload.PutOptions{MD5: bad})
	wantErr(t, err, upload.ErrCorrupt, "put with a wrong MD5")
	if _, err := s.Stat(t.Context(), "bad"); !errors.Is(err, upload.ErrNotExist) {
		t.Errorf("what failed its digest is stored: %v", err)
	}
}

// testChanged replaces an object between opening and reading a range of it.
func testChanged(t *testing.T, s upload.Store) {
	data := Bytes(4, 64)
	a := put(t, s, "k", data)
	put(t, s, "k", Bytes(5, 64))
	_, _, err := s.Get(t.Context(), "k", upload.GetOptions{Offset: 10, Length: 5, IfMatch: a.ETag})
	wantErr(t, err, upload.ErrChanged, "range of what was replaced")
}
