package images_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// whole is the disk of an image of so many blocks, in an order of wanting.
func whole(yield func(chunked.Range) bool) {
	_ = yield(chunked.Range{Position: 64, Length: 64}) && yield(chunked.Range{Position: 0, Length: 1 << 30})
}

// opened captures an image that has an opening.
func opened(t *testing.T, p *people, s *images.Store, blocks string) (*images.Published, int64) {
	t.Helper()
	pub, err := p.capture(t.Context(), s, "web", words(blocks))
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Resolve(t.Context(), "web@"+pub.Name.String(), images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := img.IndexKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := s.PutOpening(t.Context(), pub, key, whole)
	if err != nil {
		t.Fatal(err)
	}
	return pub, n
}

// first reads the disk of a version as who knows nothing of it does, and tells for what
// the store was asked, and what of it was trouble.
func first(t *testing.T, p *people, m *mem, ref string) (disk []byte, asked []string, trouble []error) {
	t.Helper()
	objects := &actor{mem: m}
	objects.before = func(o op) error {
		kind, _, _ := strings.Cut(o.key, "/")
		if kind == "images" {
			kind = strings.Split(o.key, "/")[2]
		}
		asked = append(asked, kind)
		return nil
	}
	s := p.open(t, objects, "")
	img, err := s.Resolve(t.Context(), ref, images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	x, key, err := img.OpenFirst(t.Context(), s.Source(), func(err error) { trouble = append(trouble, err) })
	if err != nil {
		t.Fatal(err)
	}
	if want, err := img.IndexKey(context.Background()); err != nil || key != want {
		t.Errorf("another key (%v)", err)
	}
	asked = slices.Delete(asked, slices.Index(asked, "keys"), slices.Index(asked, "keys")+1) // asked for once more, by this test
	st, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		t.Fatal(err)
	}
	disk = make([]byte, st.Size())
	if _, err := st.ReaderAt(t.Context(), 1<<20).ReadAt(disk, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return disk, asked, trouble
}

// TestOpenings: with an opening one request brings what took one for each of its parts;
// a wrong one costs requests, and no wrong byte; it goes with its version.
func TestOpenings(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	s := p.open(t, &actor{mem: m}, "")
	old, _ := opened(t, p, s, "a b c d")
	pub, size := opened(t, p, s, "a b c d e f")
	ref := "web@" + pub.Name.String()
	key := chunked.OpeningKey("web", pub.Name)
	good := m.snapshot()[key].data
	if int64(len(good)) != size {
		t.Errorf("%d bytes are stored, %d told", len(good), size)
	}
	want, asked, trouble := first(t, p, m, ref)
	slices.Sort(asked)
	if got := strings.Join(asked, " "); got != "keys manifests openings" || len(trouble) > 0 {
		t.Errorf("the store is asked for %s; %v", got, trouble)
	}
	if !bytes.Contains(want, block("e")) {
		t.Error("the disk is another")
	}
	put := func(b []byte) {
		t.Helper()
		if _, err := upload.PutBytes(t.Context(), &actor{mem: m}, key, b, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for at := 0; at < len(good); at += 7 {
		bad := bytes.Clone(good)
		bad[at] ^= 0x41
		put(bad)
		got, asked, _ := first(t, p, m, ref)
		if !bytes.Equal(got, want) {
			t.Fatalf("byte %d of the opening is wrong, and so is the disk", at)
		}
		if len(asked) < 4 {
			t.Fatalf("byte %d of the opening is wrong, and nothing else was asked for: %v", at, asked)
		}
	}
	other := m.snapshot()[chunked.OpeningKey("web", old.Name)].data
	for what, b := range map[string][]byte{"empty": nil, "cut": good[:len(good)-1], "text": []byte("hello"), "another version's": other} {
		put(b)
		got, _, trouble := first(t, p, m, ref)
		if !bytes.Equal(got, want) {
			t.Errorf("an opening that is %s: the disk is another", what)
		}
		if (len(trouble) > 0) != (what != "another version's") {
			t.Errorf("an opening that is %s: told of %v", what, trouble)
		}
		if r, err := s.Scrub(t.Context(), nil); err != nil || (len(r.Damages) == 0) != (what == "another version's") {
			t.Errorf("an opening that is %s: a scrub says %+v, %v", what, r, err)
		}
	}
	put(good)

	// A copy elsewhere has what lies beside it, too.
	img, err := s.Resolve(t.Context(), ref, images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.PutTrace(t.Context(), []chunked.Range{{Position: 0, Length: 64}}, p.signer); err != nil {
		t.Fatal(err)
	}
	there := newMem()
	for range 2 {
		if _, err := p.open(t, &actor{mem: there}, "").Adopt(t.Context(), img, images.AdoptOptions{Signer: p.signer}); err != nil {
			t.Fatal(err)
		}
		for _, k := range []string{key, chunked.TraceKey("web", pub.Name)} {
			if !bytes.Equal(there.snapshot()[k].data, m.snapshot()[k].data) {
				t.Errorf("the copy's %s is another", k)
			}
		}
	}

	for range 2 {
		if _, err := s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := m.snapshot()[key]; !ok {
		t.Error("it is collected while its version is there")
	}
	if _, err := s.Delete(t.Context(), ref, p.signer); err != nil {
		t.Fatal(err)
	}
	if _, ok := m.snapshot()[key]; ok {
		t.Error("it outlives its version")
	}
	// One that is left of a version that is gone is garbage.
	put(good)
	for range 2 {
		m.pass(48 * time.Hour)
		if _, err := s.GC(t.Context(), images.GCOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := m.snapshot()[key]; ok {
		t.Error("what is left of a version is not collected")
	}
}

// TestOpeningOfMuch: an opening has the beginning of what is wanted, and little beside what its version added.
func TestOpeningOfMuch(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	s := p.open(t, &actor{mem: m}, "")
	var blocks []string
	for i := range 9000 { // a chunk of 64 bytes is some 100 in a pack
		blocks = append(blocks, fmt.Sprint("block", i))
	}
	pub, n := opened(t, p, s, strings.Join(blocks, " "))
	if most := pub.Manifest.Added / 8; n > most || n < most/2 || most < 64<<10 {
		t.Errorf("the opening of what added %d bytes has %d", pub.Manifest.Added, n)
	}
	img, err := s.Resolve(t.Context(), "web@"+pub.Name.String(), images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o, err := img.Opening(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(o.Objects) < 2 || len(o.Ranges) == 0 {
		t.Errorf("it has %d objects and %d ranges", len(o.Objects), len(o.Ranges))
	}
}
