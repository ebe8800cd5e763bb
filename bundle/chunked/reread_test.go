package chunked

import (
	"bytes"
	"context"
	"testing"
)

// rereading is a store behind a cache that tells lies.
type rereading struct {
	*memoryStore
	lies, again int
}

func (r *rereading) ReadPack(ctx context.Context, n Name, off int64, p []byte) error {
	r.lies++
	if err := r.memoryStore.ReadPack(ctx, n, off, p); err != nil {
		return err
	}
	p[len(p)-1] ^= 1
	return nil
}

func (r *rereading) RereadPack(ctx context.Context, n Name, off int64, p []byte) error {
	r.again++
	return r.memoryStore.ReadPack(ctx, n, off, p)
}

// TestReread: what a cache has wrong is read from the store.
func TestReread(t *testing.T) {
	im := makeSmall(t, 4)
	src := &rereading{memoryStore: im.m}
	x, err := OpenIndex(t.Context(), src, im.res.Root.Name, im.res.Root.Size, im.res.IndexKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := x.Stream("disk")
	if err != nil {
		t.Fatal(err)
	}
	out := make(image, s.Size())
	if err := Restore(t.Context(), s, out, RestoreOptions{Workers: 1}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, im.disk) || src.again == 0 {
		t.Errorf("%d reads again of %d lies; the disk is right: %v", src.again, src.lies, bytes.Equal(out, im.disk))
	}
}
