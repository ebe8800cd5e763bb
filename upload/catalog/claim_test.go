package catalog

import (
	"context"
	"errors"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/upload"
)

// hooked is a bucket that calls when the parts of a bundle have been listed.
type hooked struct {
	upload.Store
	listed func()
}

func (h hooked) Close() error { h.listed(); return h.Store.Close() }

// deletable is a catalog, and a bundle beside it that is about to be deleted.
func deletable(t *testing.T, listed func()) (c *Catalog, buckets *objectsInMemory, location string, now *time.Time) {
	t.Helper()
	mem := newMemory()
	buckets = newMemory()
	at := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	c = open(t, mem.client(nil), testSigner(t), func(o *Options) {
		o.Now = func() time.Time { return at }
		o.Bucket = func(context.Context, string) (upload.Store, error) { return hooked{buckets.client(nil), listed}, nil }
	})
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	return c, buckets, bundleIn(t, buckets), &at
}

// TestDeletedWhileRegistered: a whole deletion between the look at a bundle and
// its registration leaves no image of nothing.
func TestDeletedWhileRegistered(t *testing.T) {
	var c *Catalog
	var buckets *objectsInMemory
	location, looks := "", 0
	c, buckets, location, _ = deletable(t, func() {
		if looks++; looks > 1 {
			return
		}
		// By another process, with a Catalog of its own.
		release, err := c.Claim(t.Context(), "test", location)
		if err != nil {
			t.Fatal(err)
		}
		for k := range buckets.snapshot() {
			if err := buckets.client(nil).Delete(t.Context(), k); err != nil {
				t.Fatal(err)
			}
		}
		if err := release(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	_, err := c.Register(t.Context(), Call{Account: alice}, Registration{Image: Image{Name: "gone", Location: location}})
	code(t, err, CodeManifest)
	if looks != 2 {
		t.Errorf("it was looked at %d times", looks)
	}
	// What is there again, is registered.
	bundleIn(t, buckets)
	if _, err := c.Register(t.Context(), Call{Account: alice}, Registration{Image: Image{Name: "back", Location: location}}); err != nil {
		t.Error(err)
	}
	// So it is with an image that was pending.
	looks = 0
	c, buckets, location, _ = deletable(t, func() {
		if looks++; looks == 1 {
			release, err := c.Claim(t.Context(), "test", location)
			if err != nil {
				t.Fatal(err)
			}
			buckets.restore(nil)
			if err := release(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	})
	m, err := c.CreatePending(t.Context(), Call{Account: alice}, "CreateImage", Image{Name: "pending"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	code(t, c.Complete(t.Context(), Call{Account: alice}, m.ID, location, time.Time{}), CodeManifest)
}

// TestTwoClaims: two delete the same; when the first has ended, nothing is
// registered there before the second has.
func TestTwoClaims(t *testing.T) {
	c, _, location, _ := deletable(t, func() {})
	register := func(name string) error {
		_, err := c.Register(t.Context(), Call{Account: alice}, Registration{Image: Image{Name: name, Location: location}})
		return err
	}
	claim := func() func(context.Context) error {
		t.Helper()
		release, err := c.Claim(t.Context(), "test", location)
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	first, second := claim(), claim()
	code(t, register("one"), CodeManifest)
	for range 2 { // also twice: an answer was lost
		if err := first(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	code(t, register("two"), CodeManifest)
	if err := second(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := register("three"); err != nil {
		t.Error(err)
	}
	if _, err := c.Claim(t.Context(), "test", location); !errors.Is(err, ErrRegistered) {
		t.Errorf("deleting what is registered: %v", err)
	}
	// One that was killed keeps others away for its time, not for ever.
	var now *time.Time
	c, _, location, now = deletable(t, func() {})
	claim()
	*now = now.Add(ClaimLife - time.Second)
	code(t, register("early"), CodeManifest)
	*now = now.Add(time.Second)
	if err := register("late"); err != nil {
		t.Error(err)
	}
	// What remains is forgotten in the end.
	*now = now.Add(2 * tokenLife)
	if _, err := c.Collect(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	v, err := c.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for claim, err := range v.Claims(t.Context()) {
		t.Errorf("kept is %v, %v", claim, err)
	}
}

// TestBucketNames: a bucket's name leads nowhere, for buckets that are directories.
func TestBucketNames(t *testing.T) {
	c := open(t, newMemory().client(nil), testSigner(t), func(o *Options) {
		o.Bucket = func(_ context.Context, bucket string) (upload.Store, error) {
			t.Errorf("the bucket %q is opened", bucket)
			return nil, upload.ErrNoBucket
		}
	})
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	for _, bucket := range []string{"..", ".", "", "a\\b", "a\x00b", strings.Repeat("b", 256), "a b", "-\n", ".instar-tmp-x"} {
		_, err := c.Register(t.Context(), Call{Account: alice}, Registration{Image: Image{Name: "one", Location: path.Join("/") + bucket + "/a.manifest.xml"}})
		code(t, err, CodeManifest)
		_, err = c.Restore(t.Context(), Call{Account: alice}, RestoreRequest{Bucket: bucket, Key: "a.bin"})
		code(t, err, CodeParameterValue)
	}
}
