package catalog

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/upload"
)

// region is a catalog in memory with a bucket of bundles beside it.
type region struct {
	name    string
	mem     *objectsInMemory // of the catalog
	buckets *objectsInMemory
}

func (r *region) open(t testing.TB, from *Catalog, fault func(op, key string, done bool) error) *Catalog {
	t.Helper()
	c, err := Open(r.mem.client(fault), Options{
		Trust: from.opt.Trust, Signer: from.opt.Signer,
		Bucket: func(context.Context, string) (upload.Store, error) { return r.buckets.client(fault), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	c.checked = true
	return c
}

// bundleIn puts a fixture's bundle into a bucket's memory.
func bundleIn(t testing.TB, o *objectsInMemory) (location string) {
	t.Helper()
	files, err := filepath.Glob("../../bundle/ec2/testdata/fixtures/ec2-full/*")
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		o.set("p/"+path.Base(f), b)
		if strings.HasSuffix(f, ".xml") {
			location = "bkt/p/" + path.Base(f)
		}
	}
	return location
}

// whole says whether what a record of the region has at its location is a
// bundle of which every part has the digest that the manifest says.
func (r *region) whole(m *Image) bool {
	_, key, err := SplitBundle(m.Location)
	if err != nil {
		return false
	}
	objects := r.buckets.snapshot()
	manifest, err := ec2.ParseManifest(objects[key].data)
	if err != nil {
		return false
	}
	for _, p := range manifest.Parts {
		if ec2.Sum(objects[path.Join(path.Dir(key), p.Filename)].data) != p.SHA1 {
			return false
		}
	}
	return true
}

// TestCopyCut: a copy that is killed, or meets a fault, or is lied to, at each of
// its requests: whenever somebody looks, an image that is available is whole; and
// the same copy, begun again, ends as the same image.
func TestCopyCut(t *testing.T) {
	for _, how := range []string{"killed before", "killed after", "fault", "lost reply", "corrupted"} {
		cuts := 0
		for at := 1; ; at++ {
			src := &region{"src-1", newMemory(), newMemory()}
			dst := &region{"dst-1", newMemory(), newMemory()}
			key := open(t, src.mem.client(nil), testSigner(t), nil)
			from, to := src.open(t, key, nil), dst.open(t, key, nil)
			for _, c := range []struct {
				c    *Catalog
				name string
			}{{from, src.name}, {to, dst.name}} {
				if err := c.c.Create(t.Context(), c.name); err != nil {
					t.Fatal(err)
				}
			}
			call := Call{Account: alice}
			m, err := from.Register(t.Context(), call, Registration{Image: Image{Name: "bundle", Location: bundleIn(t, src.buckets)}})
			if err != nil {
				t.Fatal(err)
			}
			request := CopyRequest{SourceID: m.ID, SourceRegion: src.name, Token: "token"}
			hit := false
			fault := cutter(how, at, &hit, func(op, k string) {
				if op == "put" {
					dst.buckets.spoil(k) // it says it has stored what it has not
				}
			})
			look := func(when string) {
				t.Helper()
				v, err := to.View(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				found, err := v.Describe(t.Context(), alice, Query{})
				if err != nil || len(found) > 1 {
					t.Fatalf("%s at %d, %s: %d images, %v", how, at, when, len(found), err)
				}
				for _, x := range found {
					if x.State == Available && !dst.whole(x) {
						t.Fatalf("%s at %d, %s: %s is available and not whole", how, at, when, x.ID)
					}
				}
			}
			cut := dst.open(t, key, fault)
			id := ""
			c, err := cut.Copy(t.Context(), call, request, from)
			if err == nil {
				id = c.ID
				look("begun")
				_, err = cut.CompleteCopy(t.Context(), call, id, from, nil)
			}
			look("cut")
			if !hit {
				if err != nil {
					t.Fatalf("without a cut: %v", err)
				}
				break
			}
			cuts++
			again, err := to.Copy(t.Context(), call, request, from)
			if err != nil {
				t.Fatalf("%s at %d, again: %v", how, at, err)
			}
			if id != "" && again.ID != id {
				t.Fatalf("%s at %d: %s, then %s", how, at, id, again.ID)
			}
			done, err := to.CompleteCopy(t.Context(), call, again.ID, from, nil)
			var refusal *Error
			switch {
			case how == "corrupted" && errors.As(err, &refusal):
				// It was found out, and the image failed.
			case err != nil:
				t.Fatalf("%s at %d, completed: %v", how, at, err)
			case done.State != Available:
				t.Fatalf("%s at %d: %s", how, at, done.State)
			}
			look("completed")
		}
		if cuts < 20 {
			t.Errorf("%s: only %d cuts", how, cuts)
		}
		t.Logf("%s: %d cuts", how, cuts)
	}
}

// TestCopyTellsNothing: a copy of another's image has not what its owner alone is
// shown.
func TestCopyTellsNothing(t *testing.T) {
	src := &region{"src-1", newMemory(), newMemory()}
	dst := &region{"dst-1", newMemory(), newMemory()}
	key := open(t, src.mem.client(nil), testSigner(t), nil)
	from, to := src.open(t, key, nil), dst.open(t, key, nil)
	if err := errors.Join(from.Create(t.Context(), "src-1"), to.Create(t.Context(), "dst-1")); err != nil {
		t.Fatal(err)
	}
	m, err := from.Register(t.Context(), Call{Account: alice}, Registration{
		Image: Image{Name: "bundle", Location: bundleIn(t, src.buckets), SourceInstance: "i-1", Tags: Tags{"k": "v"}},
	})
	if err == nil {
		_, err = from.ModifyLaunchPermissions(t.Context(), Call{Account: alice}, m.ID, Permissions{Public: true}, Permissions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	for account, want := range map[string]string{alice: "i-1", bob: ""} {
		c, err := to.Copy(t.Context(), Call{Account: account}, CopyRequest{SourceID: m.ID}, from)
		if err != nil || c.SourceInstance != want || len(c.Tags) != 0 {
			t.Errorf("%s's copy is of the instance %q with %v, %v", account, c.SourceInstance, c.Tags, err)
		}
	}
}

// TestCopyOfDamagedSource: it fails, and says which part it is.
func TestCopyOfDamagedSource(t *testing.T) {
	src := &region{"src-1", newMemory(), newMemory()}
	dst := &region{"dst-1", newMemory(), newMemory()}
	key := open(t, src.mem.client(nil), testSigner(t), nil)
	from, to := src.open(t, key, nil), dst.open(t, key, nil)
	if err := errors.Join(from.Create(t.Context(), "src-1"), to.Create(t.Context(), "dst-1")); err != nil {
		t.Fatal(err)
	}
	call := Call{Account: alice}
	m, err := from.Register(t.Context(), call, Registration{Image: Image{Name: "bundle", Location: bundleIn(t, src.buckets)}})
	if err != nil {
		t.Fatal(err)
	}
	bad := append([]byte{}, src.buckets.m["p/web-1.0.part.05"].data...)
	bad[7] ^= 1
	src.buckets.set("p/web-1.0.part.05", bad)
	c, err := to.Copy(t.Context(), call, CopyRequest{SourceID: m.ID}, from)
	if err != nil {
		t.Fatal(err)
	}
	_, err = to.CompleteCopy(t.Context(), call, c.ID, from, nil)
	code(t, err, CodeManifest)
	v, err := to.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.Image(t.Context(), c.ID)
	if err != nil || got.State != Failed || !strings.Contains(got.Reason.Message, "web-1.0.part.05") {
		t.Errorf("%+v, %v", got, err)
	}
	if _, ok := dst.buckets.m["bundles/"+c.ID+"/web-1.0.manifest.xml"]; ok {
		t.Error("the manifest is there")
	}
}
