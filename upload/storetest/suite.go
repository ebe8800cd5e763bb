// Package storetest is the suite every upload.Store must pass. What goes in: a
// function that opens an empty store; what comes out: test failures. It writes
// only into the stores it is given.
package storetest

import (
	"bytes"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-image/instar/upload"
)

// Options says in what a store may differ.
type Options struct {
	// Unsorted: the server lists keys in another order than their bytes'.
	Unsorted bool
	// NoIfMatch: the server ignores If-Match on PUT, or knows no ETag by which to.
	NoIfMatch bool
}

// Run puts a store through the suite. open returns a store that is empty, one
// for each call, and closes it by t.Cleanup.
func Run(t *testing.T, open func(t *testing.T) upload.Store, o Options) {
	for _, c := range []struct {
		name string
		f    func(t *testing.T, s upload.Store)
	}{
		{"RoundTrip", testRoundTrip},
		{"Ranges", testRanges},
		{"Missing", testMissing},
		{"BadKeys", testBadKeys},
		{"OddKeys", testOddKeys},
		{"Replace", testReplace},
		{"IfNoneMatch", testIfNoneMatch},
		{"IfNoneMatchRace", testIfNoneMatchRace},
		{"IfMatch", func(t *testing.T, s upload.Store) {
			if !o.NoIfMatch {
				testIfMatch(t, s)
			}
		}},
		{"Digests", testDigests},
		{"List", func(t *testing.T, s upload.Store) { testList(t, s, o.Unsorted) }},
		{"ManyKeys", func(t *testing.T, s upload.Store) { testManyKeys(t, s, o.Unsorted) }},
		{"Delete", testDelete},
		{"Copy", testCopy},
		{"Stream", testStream},
		{"StreamFails", testStreamFails},
		{"Changed", testChanged},
		{"Cancelled", testCancelled},
		{"Parallel", testParallel},
		{"Progress", testProgress},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open(t)) })
	}
}

// Bytes makes n bytes that look random and depend on seed alone.
func Bytes(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	r.Read(b)
	return b
}

func put(t *testing.T, s upload.Store, key string, data []byte) upload.Object {
	t.Helper()
	o, err := upload.PutBytes(t.Context(), s, key, data, upload.PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func get(t *testing.T, s upload.Store, key string, o upload.GetOptions) []byte {
	t.Helper()
	r, _, err := s.Get(t.Context(), key, o)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func keys(t *testing.T, s upload.Store, prefix string) []string {
	t.Helper()
	l := []string{}
	for o, err := range s.List(t.Context(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		l = append(l, o.Key)
	}
	return l
}

func wantErr(t *testing.T, err, kind error, what string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: got error %v, want %q", what, err, kind)
		return
	}
	var e *upload.Error
	if !errors.As(err, &e) {
		t.Errorf("%s: %v is no *upload.Error", what, err)
	}
}

func testRoundTrip(t *testing.T, s upload.Store) {
	for _, n := range []int{0, 1, 1000, 1 << 20, 3<<20 + 17} {
		data := Bytes(uint64(n), n)
		key := fmt.Sprintf("dir/size-%d", n)
		o := put(t, s, key, data)
		if o.Key != key || o.Size != int64(n) || o.ETag == "" {
			t.Errorf("put %d bytes: got %+v", n, o)
		}
		if got := get(t, s, key, upload.GetOptions{}); !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back different", n)
		}
		st, err := s.Stat(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if st.Size != int64(n) || st.ETag != o.ETag || st.Modified.IsZero() {
			t.Errorf("stat gives %+v, put gave %+v", st, o)
		}
		if sum := md5.Sum(data); st.MD5 != nil && !bytes.Equal(st.MD5, sum[:]) {
			t.Errorf("MD5 %x, want %x", st.MD5, sum)
		}
	}
}

func testRanges(t *testing.T, s upload.Store) {
	data := Bytes(1, 100_000)
	put(t, s, "r", data)
	put(t, s, "empty", nil)
	for _, c := range []struct{ off, n int64 }{{0, 1}, {0, 99_999}, {1, 0}, {50_000, 10}, {99_999, 1}, {99_999, 100}, {100_000, 0}, {100_000, 5}, {200_000, 5}, {0, 1 << 40}} {
		lo, hi := min(c.off, 100_000), int64(100_000)
		if c.n > 0 {
			hi = min(hi, lo+c.n)
		}
		r, o, err := s.Get(t.Context(), "r", upload.GetOptions{Offset: c.off, Length: c.n})
		if err != nil {
			t.Errorf("range %+v: %v", c, err)
			continue
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(got, data[lo:hi]) {
			t.Errorf("range %+v: got %d bytes, %v; want %d", c, len(got), err, hi-lo)
		}
		if o.Size != 100_000 {
			t.Errorf("range %+v: object has size %d", c, o.Size)
		}
	}
	if got := get(t, s, "empty", upload.GetOptions{Offset: 0, Length: 10}); len(got) != 0 {
		t.Errorf("range of an empty object gives %q", got)
	}
}

func testMissing(t *testing.T, s upload.Store) {
	_, _, err := s.Get(t.Context(), "no/such", upload.GetOptions{})
	wantErr(t, err, upload.ErrNotExist, "get")
	_, err = s.Stat(t.Context(), "no/such")
	wantErr(t, err, upload.ErrNotExist, "stat")
	_, err = s.Copy(t.Context(), "to", "no/such", upload.PutOptions{})
	wantErr(t, err, upload.ErrNotExist, "copy")
	if err := s.Delete(t.Context(), "no/such", "neither"); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
	put(t, s, "file", []byte("x"))
	_, err = s.Stat(t.Context(), "file/below")
	wantErr(t, err, upload.ErrNotExist, "stat below an object")
	if got := keys(t, s, "nothing"); len(got) != 0 {
		t.Errorf("list of nothing: %q", got)
	}
}

func testBadKeys(t *testing.T, s upload.Store) {
	for _, k := range []string{"", "/", "/abs", "a/", "a//b", ".", "..", "../x", "a/../../x", "a/./b", "a\x00b", "bad\xffutf8", strings.Repeat("x", 256), strings.Repeat("x/", 600) + "x", ".instar-tmp-x"} {
		_, err := upload.PutBytes(t.Context(), s, k, []byte("x"), upload.PutOptions{})
		wantErr(t, err, upload.ErrKey, fmt.Sprintf("put %.20q", k))
		_, _, err = s.Get(t.Context(), k, upload.GetOptions{})
		wantErr(t, err, upload.ErrKey, fmt.Sprintf("get %.20q", k))
		_, err = s.Stat(t.Context(), k)
		wantErr(t, err, upload.ErrKey, fmt.Sprintf("stat %.20q", k))
		wantErr(t, s.Delete(t.Context(), k), upload.ErrKey, fmt.Sprintf("delete %.20q", k))
	}
}

func testOddKeys(t *testing.T, s upload.Store) {
	odd := []string{"a b", "a+b", "a%20b", "a&b=c;d", "quote\"'<>", "ünïcödé/日本", "tilde~", "dots..x", "-dash", "hash#frag?q", "star*[x]", "co:lon", strings.Repeat("n", 255)}
	for i, k := range odd {
		put(t, s, k, []byte(k))
		put(t, s, fmt.Sprintf("deep/%d/%s", i, k), []byte(k))
	}
	for _, k := range odd {
		if got := get(t, s, k, upload.GetOptions{}); string(got) != k {
			t.Errorf("key %q holds %q", k, got)
		}
	}
	got := keys(t, s, "")
	for _, k := range odd {
		if !slices.Contains(got, k) {
			t.Errorf("key %q is not listed", k)
		}
		if c, err := s.Copy(t.Context(), "copied/"+k, k, upload.PutOptions{}); err != nil || c.Key != "copied/"+k {
			t.Errorf("copy of %q: %+v, %v", k, c, err)
		}
	}
	if err := s.Delete(t.Context(), got...); err != nil {
		t.Fatal(err)
	}
	if left := keys(t, s, ""); len(left) != len(odd) {
		t.Errorf("%d keys are left, want the %d copies: %q", len(left), len(odd), left)
	}
}

func testList(t *testing.T, s upload.Store, unsorted bool) {
	all := []string{"a-b", "a.manifest.xml", "a/b", "a/c/d", "a0", "b/x", "img.part.00", "img.part.01", "img.part.10"}
	for i, k := range all {
		put(t, s, k, Bytes(uint64(i), i))
	}
	if unsorted {
		slices.Sort(all)
	}
	for _, prefix := range []string{"", "a", "a/", "a/c", "img.part.", "img.part.0", "b", "zzz", "a/c/d", "a/c/d/"} {
		want := []string{}
		for _, k := range all {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		slices.Sort(want)
		got := keys(t, s, prefix)
		if unsorted {
			slices.Sort(got)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("list %q (-want +got):\n%s", prefix, d)
		}
	}
	n := 0
	for o, err := range s.List(t.Context(), "") {
		if err != nil || o.Modified.IsZero() {
			t.Errorf("%+v, %v", o, err)
		}
		if n++; n == 3 {
			break // must not hang or go on
		}
	}
}

// testManyKeys crosses the 1000 keys a page or a delete may have.
func testManyKeys(t *testing.T, s upload.Store, unsorted bool) {
	const n = 1103
	want := make([]string, n)
	var wg sync.WaitGroup
	work := make(chan string)
	for range 8 {
		wg.Go(func() {
			for k := range work {
				if _, err := upload.PutBytes(t.Context(), s, k, []byte("x"), upload.PutOptions{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range want {
		want[i] = fmt.Sprintf("many/%04d", i)
		work <- want[i]
	}
	close(work)
	wg.Wait()
	got := keys(t, s, "many/")
	if unsorted {
		slices.Sort(got)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatalf("list (-want +got):\n%s", d)
	}
	if err := s.Delete(t.Context(), got...); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, s, ""); len(got) != 0 {
		t.Errorf("%d keys are left", len(got))
	}
}

func testDelete(t *testing.T, s upload.Store) {
	for _, k := range []string{"d/1", "d/2", "d/sub/3", "e"} {
		put(t, s, k, []byte("x"))
	}
	if err := s.Delete(t.Context(), "d/1", "d/none", "d/sub/3"); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"d/2", "e"}, keys(t, s, "")); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Errorf("deleting no keys: %v", err)
	}
	err := s.Delete(t.Context(), "e", "bad//key", "d/2")
	var de *upload.DeleteError
	if !errors.As(err, &de) || len(de.Failed) != 1 || de.Failed[0].Key != "bad//key" {
		t.Errorf("got %v, want one failure", err)
	}
	if got := keys(t, s, ""); len(got) != 0 {
		t.Errorf("left: %q", got)
	}
}

func testCopy(t *testing.T, s upload.Store) {
	data := Bytes(3, 300_000)
	put(t, s, "from/x", data)
	o, err := s.Copy(t.Context(), "to/y", "from/x", upload.PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if o.Key != "to/y" || o.Size != int64(len(data)) || o.ETag == "" {
		t.Errorf("got %+v", o)
	}
	if got := get(t, s, "to/y", upload.GetOptions{IfMatch: o.ETag}); !bytes.Equal(got, data) {
		t.Error("the copy differs")
	}
	if got := get(t, s, "from/x", upload.GetOptions{}); !bytes.Equal(got, data) {
		t.Error("the original differs")
	}
}
