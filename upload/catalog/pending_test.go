package catalog

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// captured is a catalog beside Instar images whose manifests are all there is of them.
type captured struct {
	t       *testing.T
	mem     *objectsInMemory
	signer  keys.Signer
	c       *Catalog
	trouble func(key string) error // of the images' store, when an object is read; nil for none
	now     time.Time
}

// troubled is the images' store.
type troubled struct {
	*memStore
	w *captured
}

func (s troubled) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	if s.w.trouble != nil {
		if err := s.w.trouble(key); err != nil {
			return nil, upload.Object{}, err
		}
	}
	return s.memStore.Get(ctx, key, o)
}

func newCaptured(t *testing.T) *captured {
	t.Helper()
	w := &captured{t: t, mem: newMemory(), signer: testSigner(t), now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}
	all, err := images.Open(troubled{w.mem.client(nil), w}, images.Options{Trust: keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: w.signer.Public()})})
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

// TestPassingTroubles: what the store, or the way to it, has for a while makes no
// image fail for good; what is wrong with the image does.
func TestPassingTroubles(t *testing.T) {
	w := newCaptured(t)
	n := w.version(1, w.now)
	w.head(1, n)
	m := w.pending("patched")
	head, manifest, location := chunked.HeadKey("i-1"), chunked.ManifestKey("i-1", n), "i-1@"+n.String()
	complete := func(key string, kind error) error {
		w.trouble = func(k string) error {
			if k != key {
				return nil
			}
			return &upload.Error{Op: "get", Store: "s3://mem", Key: k, Kind: kind, Message: "a trouble of the store"}
		}
		return w.c.Complete(t.Context(), asAlice, m.ID, location, m.Created)
	}
	for name, kind := range map[string]error{
		"slow down": nil, "no credentials": upload.ErrCredentials, "no right": upload.ErrAccess, "not reached": upload.ErrUnreachable,
		"replaced while read": upload.ErrChanged, "another clock": upload.ErrClockSkew,
	} {
		for _, key := range []string{head, manifest} {
			if err := complete(key, kind); !errors.As(err, new(*upload.Error)) || isRefusal(err) {
				t.Errorf("%s, %s: %v", name, key, err)
			}
		}
		// Who asks for it himself hears of what he may not have.
		_, err := w.c.Register(t.Context(), asAlice, Registration{Image: Image{Name: "of it", Location: location}})
		if err == nil || isRefusal(err) != (name == "no right") {
			t.Errorf("%s, registered: %v", name, err)
		}
	}
	for _, kind := range []error{upload.ErrNotExist, upload.ErrTooLarge, upload.ErrCorrupt} {
		code(t, complete(manifest, kind), CodeManifest)
	}
	if err := complete("", nil); err != nil {
		t.Error(err)
	}
}
