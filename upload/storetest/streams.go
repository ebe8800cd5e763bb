package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-image/instar/upload"
)

func testStream(t *testing.T, s upload.Store) {
	o := upload.PutOptions{PartSize: 5 << 20, Parallel: 3}
	for _, n := range []int{0, 1, 5<<20 - 1, 5 << 20, 5<<20 + 1, 17<<20 + 5} {
		data := Bytes(uint64(n), n)
		obj, err := s.PutStream(t.Context(), "stream", iotest.HalfReader(bytes.NewReader(data)), o)
		if err != nil {
			t.Errorf("%d bytes: %v", n, err)
			continue
		}
		if obj.Size != int64(n) || obj.ETag == "" {
			t.Errorf("%d bytes: got %+v", n, obj)
		}
		if got := get(t, s, "stream", upload.GetOptions{}); !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back as %d different ones", n, len(got))
		}
	}
}

func testStreamFails(t *testing.T, s upload.Store) {
	bang := errors.New("bang")
	for _, n := range []int64{0, 10, 6 << 20} {
		r := io.MultiReader(io.LimitReader(bytes.NewReader(make([]byte, n)), n), iotest.ErrReader(bang))
		_, err := s.PutStream(t.Context(), "fails", r, upload.PutOptions{PartSize: 5 << 20})
		wantErr(t, err, bang, "put of a failing stream")
		_, err = s.Stat(t.Context(), "fails")
		wantErr(t, err, upload.ErrNotExist, "stat after it")
	}
	if got := keys(t, s, ""); len(got) != 0 {
		t.Errorf("left: %q", got)
	}
}

func testCancelled(t *testing.T, s upload.Store) {
	put(t, s, "there", []byte("x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := upload.PutBytes(ctx, s, "k", []byte("x"), upload.PutOptions{})
	wantErr(t, err, context.Canceled, "put")
	_, err = s.PutStream(ctx, "k", strings.NewReader("x"), upload.PutOptions{})
	wantErr(t, err, context.Canceled, "put of a stream")
	_, _, err = s.Get(ctx, "there", upload.GetOptions{})
	wantErr(t, err, context.Canceled, "get")
	_, err = s.Stat(ctx, "there")
	wantErr(t, err, context.Canceled, "stat")
	wantErr(t, s.Delete(ctx, "there"), context.Canceled, "delete")
	_, err = s.Copy(ctx, "k", "there", upload.PutOptions{})
	wantErr(t, err, context.Canceled, "copy")
	for _, err := range s.List(ctx, "") {
		wantErr(t, err, context.Canceled, "list")
	}
	if d := cmp.Diff([]string{"there"}, keys(t, s, "")); d != "" {
		t.Errorf("store (-want +got):\n%s", d)
	}
}

func testParallel(t *testing.T, s upload.Store) {
	// MinIO answers a put with "access denied" when a delete removes the
	// last other object of its "directory" at that moment.
	for j := range 5 {
		put(t, s, fmt.Sprintf("p%d/keep", j), nil)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 5 {
				key := fmt.Sprintf("p%d/%d", j, i)
				data := Bytes(uint64(i*10+j), 50_000)
				if _, err := upload.PutBytes(t.Context(), s, key, data, upload.PutOptions{}); err != nil {
					t.Error(err)
				}
				got, _, err := upload.GetBytes(t.Context(), s, key, 1<<20)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d bytes, %v", key, len(got), err)
				}
				if err := s.Delete(t.Context(), key); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func testProgress(t *testing.T, s upload.Store) {
	var n atomic.Int64
	o := upload.PutOptions{PartSize: 5 << 20, Progress: func(d int64) { n.Add(d) }}
	if _, err := upload.PutBytes(t.Context(), s, "a", make([]byte, 123_456), o); err != nil {
		t.Fatal(err)
	}
	if n.Load() != 123_456 {
		t.Errorf("put reported %d bytes", n.Load())
	}
	n.Store(0)
	if _, err := s.PutStream(t.Context(), "b", bytes.NewReader(make([]byte, 11<<20)), o); err != nil {
		t.Fatal(err)
	}
	if n.Load() != 11<<20 {
		t.Errorf("put of a stream reported %d bytes", n.Load())
	}
	if _, _, err := upload.GetBytes(t.Context(), s, "a", 100); !errors.Is(err, upload.ErrTooLarge) {
		t.Errorf("reading an object over the limit: %v", err)
	}
}
