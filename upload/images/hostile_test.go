package images_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

func (a *actor) mustPut(t testing.TB, key string, data []byte) {
	t.Helper()
	if _, err := upload.PutBytes(t.Context(), a, key, data, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

// TestCopiedFooter: somebody who may write packs puts a creator's footer behind
// other bytes. The creator's next capture does not take them for its chunks.
func TestCopiedFooter(t *testing.T) {
	p, m := newPeople(t), newMem()
	a := &actor{mem: m}
	s := p.open(t, a, "")
	if _, err := p.capture(t.Context(), s, "web", words("a b c")); err != nil {
		t.Fatal(err)
	}
	real := m.keys("packs/")[0]
	fake := bytes.Clone(m.snapshot()[real].data)
	for i := byte(0); chunked.PackKey(chunked.NameOf(fake)) >= real; i++ { // the first with a chunk has it
		fake[40] = i
	}
	a.mustPut(t, chunked.PackKey(chunked.NameOf(fake)), fake)
	if _, err := p.capture(t.Context(), s, "mail", words("a b c")); err != nil {
		t.Fatal(err)
	}
	mustRead(t, s, "mail", words("a b c"))
	mustRead(t, s, "web", words("a b c"))
}

// TestHeadOfAStranger: a head that nobody trusts, of a high sequence and with
// few versions, has no version of the image deleted.
func TestHeadOfAStranger(t *testing.T) {
	p, m := newPeople(t), newMem()
	a := &actor{mem: m}
	s := p.open(t, a, "")
	first, err := p.capture(t.Context(), s, "web", words("a b c"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.capture(t.Context(), s, "web", words("d e f")); err != nil {
		t.Fatal(err)
	}
	key := chunked.HeadKey("web")
	good := m.snapshot()[key].data
	h := chunked.Head{Name: "web", Sequence: 1000, Manifest: first.Name, Created: chunked.Stamp(epoch)}
	evil, err := h.Sign(t.Context(), newPeople(t).signer)
	if err != nil {
		t.Fatal(err)
	}
	a.mustPut(t, key, evil)
	for range 3 {
		m.pass(48 * time.Hour)
		if _, err := s.GC(t.Context(), images.GCOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	a.mustPut(t, key, good)
	mustRead(t, s, "web", words("d e f"))
	mustRead(t, s, "web@parent", words("a b c"))

	// One by somebody who is trusted, as after a deletion, does.
	h.Created = chunked.Stamp(m.now())
	trusted, err := h.Sign(t.Context(), p.signer)
	if err != nil {
		t.Fatal(err)
	}
	a.mustPut(t, key, trusted)
	for range 3 {
		m.pass(48 * time.Hour)
		if _, err := s.GC(t.Context(), images.GCOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(m.keys(chunked.ManifestsFolder("web"))); n != 1 {
		t.Errorf("%d manifests are left", n)
	}
}

// TestIndexOfAnotherManifest: a signer whose manifest says less than the index
// holds, so that garbage collection would take what is read.
func TestIndexOfAnotherManifest(t *testing.T) {
	p, m := newPeople(t), newMem()
	a := &actor{mem: m}
	s := p.open(t, a, "")
	v, err := p.capture(t.Context(), s, "web", words("a b c d e f"))
	if err != nil {
		t.Fatal(err)
	}
	lies := *v.Manifest
	lies.Index.Segments = lies.Index.Segments[:1]
	object, err := lies.Sign(t.Context(), p.signer)
	if err != nil {
		t.Fatal(err)
	}
	n := chunked.NameOf(object)
	a.mustPut(t, chunked.ManifestKey("web", n), object)
	a.mustPut(t, chunked.KeysKey("web", n), m.snapshot()[chunked.KeysKey("web", v.Name)].data)
	img, err := s.Resolve(t.Context(), "web@"+n.String(), images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.Open(t.Context()); err == nil {
		t.Error("opened")
	}
}
