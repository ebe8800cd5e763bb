package images_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

// inTurn has f see what is asked for, one after the other.
func inTurn(f func(op)) func(op) error {
	var mu sync.Mutex
	return func(o op) error {
		mu.Lock()
		defer mu.Unlock()
		f(o)
		return nil
	}
}

// first reads the disk of a version as who knows nothing of it does, and tells for what
// the store was asked, and what of it was trouble.
func first(t *testing.T, p *people, m *mem, ref string) (disk []byte, asked []string, trouble []error) {
	t.Helper()
	objects := &actor{mem: m}
	objects.before = inTurn(func(o op) {
		kind, _, _ := strings.Cut(o.key, "/")
		if kind == "images" {
			kind = strings.Split(o.key, "/")[2]
		}
		asked = append(asked, kind)
	})
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

// TestOpeningAsked: making one asks for no object of the index twice.
func TestOpeningAsked(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	pub, _ := opened(t, p, p.open(t, &actor{mem: m}, ""), "a b c d e f g h i j k l")
	asked := map[string]int{}
	objects := &actor{mem: m}
	objects.before = inTurn(func(o op) {
		if o.name == "get" {
			asked[o.key]++
		}
	})
	s := p.open(t, objects, "")
	img, err := s.Resolve(t.Context(), "web@"+pub.Name.String(), images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := img.IndexKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	clear(asked)
	if _, err := s.PutOpening(t.Context(), pub, key, whole); err != nil {
		t.Fatal(err)
	}
	index := 0
	for k, n := range asked {
		if strings.HasPrefix(k, chunked.IndexFolder) {
			index++
			if n > 1 {
				t.Errorf("%s is asked for %d times", k, n)
			}
		}
	}
	if index < 4 {
		t.Errorf("%d objects of the index are asked for", index)
	}
}

// TestAdoptWithoutHints: that a boot trace or an opening cannot be read, or written, is told,
// and the image is copied all the same.
func TestAdoptWithoutHints(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	s := p.open(t, &actor{mem: m}, "")
	pub, _ := opened(t, p, s, "a b c")
	ref := "web@" + pub.Name.String()
	denied := errors.New("denied")
	deny := func(o op) error {
		if strings.Contains(o.key, "/traces/") || strings.Contains(o.key, "/openings/") {
			return denied
		}
		return nil
	}
	for _, side := range []string{"source", "destination"} {
		from, to := &actor{mem: m}, &actor{mem: newMem()}
		if side == "source" {
			from.before = deny
		} else {
			to.before = deny
		}
		img, err := p.open(t, from, "").Resolve(t.Context(), ref, images.ResolveOptions{})
		if err != nil {
			t.Fatal(err)
		}
		there := p.open(t, to, "")
		a, err := there.Adopt(t.Context(), img, images.AdoptOptions{Signer: p.signer})
		if err != nil {
			t.Fatalf("denied at the %s: %v", side, err)
		}
		if !errors.Is(a.Beside, denied) {
			t.Errorf("denied at the %s: told of %v", side, a.Beside)
		}
		mustRead(t, there, ref, words("a b c"))
	}
	if a, err := p.open(t, &actor{mem: newMem()}, "").Adopt(t.Context(), resolve(t, s, ref), images.AdoptOptions{Signer: p.signer}); err != nil || a.Beside != nil {
		t.Errorf("nothing is denied: %+v, %v", a, err)
	}
}

func resolve(t *testing.T, s *images.Store, ref string) *images.Image {
	t.Helper()
	img, err := s.Resolve(t.Context(), ref, images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// stuck answers for no opening until who asks has lost patience.
type stuck struct{ *actor }

func (s *stuck) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	if strings.Contains(key, "/openings/") {
		<-ctx.Done()
		return nil, upload.Object{}, context.Cause(ctx)
	}
	return s.actor.Get(ctx, key, o)
}

// TestOpenFirstWithoutKey: who cannot open an image is told so, and does not wait for its opening.
func TestOpenFirstWithoutKey(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	pub, _ := opened(t, p, p.open(t, &actor{mem: m}, ""), "a b c")
	p.id = newIdentity(t)
	s := p.open(t, &stuck{&actor{mem: m}}, "")
	_, _, err := resolve(t, s, "web@"+pub.Name.String()).OpenFirst(t.Context(), s.Source(), func(err error) { t.Error(err) })
	if err == nil {
		t.Error("it is opened without its key")
	}
}

// TestOpeningRemembered: that an image has no opening is asked once, and what is
// remembered wrong of an index is remembered anew.
func TestOpeningRemembered(t *testing.T) {
	p := newPeople(t)
	m := newMem()
	state := t.TempDir()
	pub, err := p.capture(t.Context(), p.open(t, &actor{mem: m}, ""), "web", words("a b c"))
	if err != nil {
		t.Fatal(err)
	}
	asked := map[string]int{}
	objects := &actor{mem: m}
	objects.before = inTurn(func(o op) {
		kind, _, _ := strings.Cut(strings.TrimPrefix(o.key, "images/web/"), "/")
		asked[kind]++
	})
	o := p.options(state)
	o.Remember = true
	opened := func() {
		t.Helper()
		s, err := images.Open(objects, o)
		if err != nil {
			t.Fatal(err)
		}
		clear(asked)
		if _, _, err := resolve(t, s, "web@"+pub.Name.String()).OpenFirst(t.Context(), s.Source(), func(err error) { t.Error(err) }); err != nil {
			t.Fatal(err)
		}
	}
	opened()
	if asked["openings"] != 1 || asked["index"] != 1 {
		t.Errorf("at first the store is asked for %v", asked)
	}
	opened()
	if asked["openings"]+asked["index"] != 0 {
		t.Errorf("the second time it is asked for %v", asked)
	}
	changed := 0
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(filepath.WalkDir(state, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Base(filepath.Dir(name)) != "objects" {
			return err
		}
		b, err := os.ReadFile(name)
		if err != nil || chunked.NameOf(b) != pub.Manifest.Index.Root.Name {
			return err
		}
		changed++
		b[len(b)/2] ^= 1
		return os.WriteFile(name, b, 0o600)
	}))
	if changed != 1 {
		t.Fatalf("%d files have the index's root", changed)
	}
	for n, want := range []int{1, 0} {
		if opened(); asked["index"] != want {
			t.Errorf("time %d after it was damaged the store is asked for %v", n+1, asked)
		}
	}
}
