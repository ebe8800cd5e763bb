package catalog

import (
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/images"
)

// captured is a catalog beside Instar images whose manifests are all there is of them.
type captured struct {
	t      *testing.T
	mem    *objectsInMemory
	signer keys.Signer
	c      *Catalog
	fault  func(op, key string, done bool) error // of the images' store
	now    time.Time
}

func newCaptured(t *testing.T) *captured {
	t.Helper()
	w := &captured{t: t, mem: newMemory(), signer: testSigner(t), now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}
	store := w.mem.client(func(op, key string, done bool) error {
		if w.fault == nil {
			return nil
		}
		return w.fault(op, key, done)
	})
	all, err := images.Open(store, images.Options{Trust: keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: w.signer.Public()})})
	if err != nil {
		t.Fatal(err)
	}
	w.c = open(t, newMemory().client(nil), w.signer, func(o *Options) {
		o.Images, o.Now = all, func() time.Time { return w.now }
	})
	if err := w.c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	return w
}

// version signs a version of i-1 and stores it.
func (w *captured) version(sequence int64, at time.Time) chunked.Name {
	w.t.Helper()
	m := &chunked.Manifest{
		Name: "i-1", Sequence: sequence, Created: at, Domain: "default", Architecture: "x86_64", Partition: "none", Filesystem: "ext4",
		Streams: []chunked.Content{{Name: chunked.StreamDisk, Size: 1 << 20}, {Name: chunked.StreamLayout, Size: 1 << 10}},
		Index:   chunked.IndexRef{Root: chunked.ObjectSize{Name: chunked.NameOf([]byte("root")), Size: 900}},
		Packs:   []chunked.ObjectSize{}, Tool: "test",
	}
	object, err := m.Sign(w.t.Context(), w.signer)
	if err != nil {
		w.t.Fatal(err)
	}
	n := chunked.NameOf(object)
	w.mem.set(chunked.ManifestKey("i-1", n), object)
	return n
}

// head has i-1 list versions, newest first.
func (w *captured) head(sequence int64, versions ...chunked.Name) {
	w.t.Helper()
	object, err := (&chunked.Head{Name: "i-1", Sequence: sequence, Manifest: versions[0], Versions: versions[1:], Created: w.now}).Sign(w.t.Context(), w.signer)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mem.set(chunked.HeadKey("i-1"), object)
}

// pending is an image that was asked for just now.
func (w *captured) pending(name string) *Image {
	w.t.Helper()
	m, err := w.c.CreatePending(w.t.Context(), asAlice, "CreateImage", Image{Name: name, SourceInstance: "i-1"}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

// TestCompleteIsNew: what was signed before it was asked for, or is kept no more,
// does not become the image, whoever says that it is.
func TestCompleteIsNew(t *testing.T) {
	w := newCaptured(t)
	old := w.version(1, w.now.Add(-ClockSlack-time.Second))
	gone := w.version(2, w.now.Add(time.Minute)) // deleted, and put back
	slow := w.version(3, w.now.Add(-ClockSlack))
	late := w.version(4, w.now.Add(time.Hour))
	w.head(5, late, slow, old)
	m := w.pending("patched")
	for name, location := range map[string]string{
		"older":            "i-1@" + old.String(),
		"deleted":          "i-1@" + gone.String(),
		"the newest":       "i-1",
		"not in full":      "i-1@" + late.String()[:63],
		"parent":           "i-1@" + late.String() + ".parent",
		"of another place": "bkt/p/web-1.0.manifest.xml",
		"capitals":         "i-1@" + strings.ToUpper(late.String()),
		"nothing":          "",
	} {
		if err := w.c.Complete(t.Context(), asAlice, m.ID, location, m.Created); CodeOf(err) != CodeManifest {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, n := range map[string]chunked.Name{"slow": slow, "late": late} {
		m := w.pending(name)
		if err := w.c.Complete(t.Context(), asAlice, m.ID, "i-1@"+n.String(), m.Created); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		v, err := w.c.View(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := v.Image(t.Context(), m.ID); err != nil || got.State != Available || got.Digest != n.String() {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}
