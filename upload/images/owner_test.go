package images_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// What a store's owner may try, by the names TUF has for it. The state a reader
// keeps is a directory that is opened anew each time, as by another process.

type attack struct {
	*people
	m     *mem
	state string
	v     []*images.Published
	at    []map[string]memObject // the store after each version
}

func newAttack(t testing.TB) *attack {
	t.Helper()
	a := &attack{people: newPeople(t), m: newMem(), state: t.TempDir()}
	for _, b := range []string{"a b c d e", "a b c d f", "a b g d f"} {
		v, err := a.capture(t.Context(), a.reader(t), "web", words(b))
		if err != nil {
			t.Fatal(err)
		}
		a.v = append(a.v, v)
		a.at = append(a.at, a.m.snapshot())
	}
	return a
}

func (a *attack) reader(t testing.TB) *images.Store { return a.open(t, &actor{mem: a.m}, a.state) }

func (a *attack) stranger(t testing.TB) *images.Store { return a.open(t, &actor{mem: a.m}, "") }

func (a *attack) refused(t testing.TB, s *images.Store, want error, what string) {
	t.Helper()
	if _, err := read(t.Context(), s, "web"); !errors.Is(err, want) {
		t.Errorf("%s: %v, want %q", what, err, want)
	}
}

func TestStoreRollback(t *testing.T) {
	a := newAttack(t)
	for _, old := range a.at[:2] {
		a.m.restore(old)
		a.refused(t, a.reader(t), chunked.ErrRollback, "an older store")
		if _, err := a.capture(t.Context(), a.reader(t), "web", words("z")); !errors.Is(err, chunked.ErrRollback) {
			t.Errorf("capturing on top of an older head: %v", err)
		}
		if _, err := a.reader(t).Delete(t.Context(), "web", a.signer); !errors.Is(err, chunked.ErrRollback) {
			t.Errorf("deleting by an older head: %v", err)
		}
		img, err := a.stranger(t).Resolve(t.Context(), "web", images.ResolveOptions{})
		if err != nil || img.Freshness != images.NotProven {
			t.Errorf("a reader without memory: %v, %v", img, err)
		}
		if _, err := a.stranger(t).Resolve(t.Context(), "web", images.ResolveOptions{AtLeast: 3}); !errors.Is(err, chunked.ErrRollback) {
			t.Errorf("with a least sequence: %v", err)
		}
	}
	a.m.restore(a.at[2])
	a.m.change("images/web/head", func([]byte) []byte { return nil })
	a.refused(t, a.reader(t), chunked.ErrRollback, "no head at all")
	if err := a.reader(t).Forget("web"); err != nil {
		t.Fatal(err)
	}
	a.refused(t, a.reader(t), images.ErrNoImage, "no head, forgotten")
	// The domain's secret likewise.
	a.m.restore(a.at[2])
	a.m.change("domains/main", func([]byte) []byte { return nil })
	if _, err := a.capture(t.Context(), a.reader(t), "web", words("z")); !errors.Is(err, images.ErrLabel) {
		t.Errorf("the domain is gone: %v", err)
	}
	if _, err := a.stranger(t).Domain(t.Context(), "main", images.DomainOptions{Create: true, Creators: []*keys.Recipient{a.id.Recipient()}, Signer: a.signer}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.capture(t.Context(), a.reader(t), "web", words("z")); !errors.Is(err, images.ErrLabel) {
		t.Errorf("the domain is another: %v", err)
	}
}

func TestStoreFreeze(t *testing.T) {
	a := newAttack(t)
	s := a.reader(t)
	d, err := s.Domain(t.Context(), "main", images.DomainOptions{})
	must(t, err)
	run, err := s.Begin(t.Context(), images.RunOptions{Image: "short", Domain: d, Owner: a.owner, Refresh: -1})
	must(t, err)
	parent := *a.people
	_, err = parent.captureExpiring(t.Context(), run, d, words("a b"), time.Hour)
	must(t, err)
	must(t, run.Close(t.Context()))
	img, err := s.Resolve(t.Context(), "short", images.ResolveOptions{})
	if err != nil || img.Freshness != images.Limited {
		t.Errorf("before it expires: %v", err)
	}
	if _, err := s.Resolve(t.Context(), "web", images.ResolveOptions{MaxAge: time.Hour}); err != nil {
		t.Error(err)
	}
	a.m.pass(2 * time.Hour)
	if _, err := s.Resolve(t.Context(), "short", images.ResolveOptions{}); !errors.Is(err, chunked.ErrStale) {
		t.Errorf("expired: %v", err)
	}
	if _, err := s.Resolve(t.Context(), "web", images.ResolveOptions{MaxAge: time.Hour}); !errors.Is(err, chunked.ErrStale) {
		t.Errorf("too old: %v", err)
	}
	// The store's clock is stopped; the reader's own is not.
	a.m.pass(-2 * time.Hour)
	o := a.options(a.state)
	o.Local = func() time.Time { return epoch.Add(2 * time.Hour) }
	s2, err := images.Open(&actor{mem: a.m}, o)
	must(t, err)
	if _, err := s2.Resolve(t.Context(), "short", images.ResolveOptions{}); !errors.Is(err, chunked.ErrStale) {
		t.Errorf("expired, by the reader's clock: %v", err)
	}
}

// TestStoreFastForward: a key that was stolen signs a huge sequence; when it is
// not allowed any more, the image goes on where it was.
func TestStoreFastForward(t *testing.T) {
	a := newAttack(t)
	thief, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "stolen"), "stolen")
	must(t, err)
	both := *a.people
	both.trust = keys.NewAllowedSigners(
		keys.AllowedSigner{Principals: "*", Key: a.signer.Public()}, keys.AllowedSigner{Principals: "*", Key: thief.Public()})
	h, err := (&chunked.Head{Name: "web", Sequence: 1 << 40, Manifest: a.v[0].Name, Created: epoch}).Sign(t.Context(), thief)
	must(t, err)
	a.m.change("images/web/head", func([]byte) []byte { return h })
	s := both.open(t, &actor{mem: a.m}, a.state)
	mustRead(t, s, "web", words("a b c d e"))
	a.m.restore(a.at[2])
	if _, err := read(t.Context(), both.open(t, &actor{mem: a.m}, a.state), "web"); !errors.Is(err, chunked.ErrRollback) {
		t.Errorf("while the key counts: %v", err)
	}
	mustRead(t, a.reader(t), "web", words("a b g d f"))
}

func TestStoreMixAndMatch(t *testing.T) {
	a := newAttack(t)
	n := 0
	for i, x := range a.v {
		for j, y := range a.v {
			if i == j {
				continue
			}
			a.m.restore(a.at[2])
			for _, folder := range []string{"keys", "manifests"} {
				from, to := fmt.Sprintf("images/web/%s/%s", folder, x.Name), fmt.Sprintf("images/web/%s/%s", folder, y.Name)
				a.m.restore(a.at[2])
				a.m.change(to, func([]byte) []byte { return a.at[2][from].data })
				if _, err := read(t.Context(), a.reader(t), "web@"+y.Name.String()); err == nil {
					t.Errorf("%s of version %d in place of %d's is taken", folder, i, j)
				}
				n++
			}
			a.m.restore(a.at[2])
			rx, ry := chunked.IndexObjectKey(x.Manifest.Index.Root.Name), chunked.IndexObjectKey(y.Manifest.Index.Root.Name)
			a.m.change(ry, func([]byte) []byte { return a.at[2][rx].data })
			if _, err := read(t.Context(), a.reader(t), "web@"+y.Name.String()); err == nil {
				t.Errorf("the root of version %d in place of %d's is taken", i, j)
			}
			n++
		}
	}
	t.Logf("%d mixtures", n)
}

func TestStoreArbitraryInstall(t *testing.T) {
	a := newAttack(t)
	evil := newPeople(t)
	evil.id = a.id
	m := newMem()
	if _, err := evil.capture(t.Context(), evil.open(t, &actor{mem: m}, ""), "web", words("e v i l")); err != nil {
		t.Fatal(err)
	}
	good := a.m.snapshot()
	all := maps.Clone(good)
	maps.Copy(all, m.snapshot())
	a.m.restore(all)
	a.refused(t, a.reader(t), keys.ErrUntrusted, "another's image")
	a.refused(t, a.stranger(t), keys.ErrUntrusted, "another's image, without memory")
	if _, err := a.capture(t.Context(), a.stranger(t), "new", words("a")); !errors.Is(err, keys.ErrUntrusted) {
		t.Errorf("another's domain secret is written under: %v", err)
	}
}

func TestStoreWrongSoftware(t *testing.T) {
	a := newAttack(t)
	if _, err := a.capture(t.Context(), a.reader(t), "mail", words("m")); err != nil {
		t.Fatal(err)
	}
	head := a.m.snapshot()["images/mail/head"].data
	for k, o := range a.m.snapshot() {
		if strings.HasPrefix(k, "images/mail/") {
			a.m.change(strings.Replace(k, "mail", "web", 1), func([]byte) []byte { return o.data })
		}
	}
	a.refused(t, a.reader(t), chunked.ErrOther, "another image's head")
	_ = head
	if _, err := a.reader(t).Resolve(t.Context(), "mail", images.ResolveOptions{Architecture: "arm64"}); !errors.Is(err, images.ErrUnfit) {
		t.Errorf("another architecture: %v", err)
	}
	only := *a.people
	only.trust = keys.NewAllowedSigners(keys.AllowedSigner{Principals: "web*", Key: a.signer.Public()})
	if _, err := only.open(t, &actor{mem: a.m}, "").Resolve(t.Context(), "mail", images.ResolveOptions{}); !errors.Is(err, keys.ErrUntrusted) {
		t.Errorf("a signer of other names: %v", err)
	}
}

func TestStoreEndlessData(t *testing.T) {
	a := newAttack(t)
	huge := make([]byte, 3<<20)
	for _, key := range []string{"images/web/head", "domains/main"} {
		a.m.restore(a.at[2])
		big := huge
		if key == "domains/main" {
			big = make([]byte, 9<<20)
		}
		a.m.change(key, func(b []byte) []byte { return append(b, big...) })
		_, err := a.capture(t.Context(), a.reader(t), "web", words("a"))
		if !errors.Is(err, upload.ErrTooLarge) {
			t.Errorf("%s: %v", key, err)
		}
	}
	a.m.restore(a.at[2])
	root := chunked.IndexObjectKey(a.v[2].Manifest.Index.Root.Name)
	a.m.change(root, func(b []byte) []byte { return append(b, huge...) })
	a.refused(t, a.reader(t), upload.ErrTooLarge, "an endless index root")
}

// TestStoreExtraneous: what nobody knows is neither used nor removed.
func TestStoreExtraneous(t *testing.T) {
	a := newAttack(t)
	var odd []string
	for _, k := range []string{"readme.txt", "packs/README", "packs/00/nothing", "images/web/other", "images/.hidden/head", "gc/list", "runs/me", "index/zz/" + strings.Repeat("z", 64), "images/web/manifests/short", "moved/x"} {
		a.m.change(k, func([]byte) []byte { return []byte("x") })
		odd = append(odd, k)
	}
	mustRead(t, a.reader(t), "web", words("a b g d f"))
	a.m.pass(48 * time.Hour)
	for range 2 {
		if _, err := a.reader(t).GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range odd {
		if !slices.Contains(a.m.keys(""), k) {
			t.Errorf("%s was removed", k)
		}
	}
	if l, err := a.reader(t).List(t.Context(), ""); err != nil || len(l) != 1 {
		t.Errorf("%+v, %v", l, err)
	}
	if r, err := a.reader(t).Verify(t.Context(), images.VerifyOptions{ReadData: true}); err != nil || !r.Sound() {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestStoreMirrorLies: a byte of any object is changed, or any object put in
// another's place: nothing wrong is ever read.
func TestStoreMirrorLies(t *testing.T) {
	t.Parallel()
	a := newAttack(t)
	good := a.m.snapshot()
	want := [][]string{words("a b c d e"), words("a b c d f"), words("a b g d f")}
	readable := func(what string) {
		t.Helper()
		for i, v := range a.v {
			got, err := read(t.Context(), a.reader(t), "web@"+v.Name.String())
			if err == nil && !bytes.Equal(got, text(want[i])) {
				t.Errorf("%s: version %d reads back wrong", what, i+1)
			}
		}
		got, err := read(t.Context(), a.reader(t), "web")
		if err == nil && !bytes.Equal(got, text(want[2])) {
			t.Errorf("%s: the newest version reads back wrong", what)
		}
	}
	all := sortedOf(good)
	swaps, flips := 0, 0
	for _, x := range all {
		for _, y := range all {
			if x == y || raced && x > all[1] {
				continue
			}
			a.m.restore(good)
			a.m.change(x, func([]byte) []byte { return good[y].data })
			readable(y + " in place of " + x)
			swaps++
		}
	}
	step := 23
	switch {
	case raced:
		step = 997
	case evidence():
		step = 1
	}
	for _, k := range all {
		for i := 0; i < len(good[k].data); i += step {
			a.m.restore(good)
			a.m.change(k, func(b []byte) []byte { b[i] ^= 0x10; return b })
			readable(fmt.Sprintf("byte %d of %s", i, k))
			flips++
		}
	}
	t.Logf("%d swaps, %d changed bytes", swaps, flips)
}

func sortedOf(m map[string]memObject) []string {
	var l []string
	for k := range m {
		l = append(l, k)
	}
	slices.Sort(l)
	return l
}

// TestStoreKeyCompromise: signatures of a key that is revoked count no more, or
// not after a day; the one that follows it goes on with the same image.
func TestStoreKeyCompromise(t *testing.T) {
	a := newAttack(t)
	next, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "next"), "next")
	must(t, err)
	p := *a.people
	p.signer = next
	p.trust = keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: next.Public()})
	s := p.open(t, &actor{mem: a.m}, "")
	if _, err := read(t.Context(), s, "web"); !errors.Is(err, keys.ErrUntrusted) {
		t.Errorf("revoked: %v", err)
	}
	p.trust = keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: next.Public()},
		keys.AllowedSigner{Principals: "*", Key: a.signer.Public(), ValidBefore: epoch.Add(time.Hour)})
	s = p.open(t, &actor{mem: a.m}, a.state)
	mustRead(t, s, "web", words("a b g d f"))
	v, err := p.capture(t.Context(), s, "web", words("n e w"))
	if err != nil || v.Sequence != 4 {
		t.Fatalf("%+v, %v", v, err)
	}
	p.trust = keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: next.Public()},
		keys.AllowedSigner{Principals: "*", Key: a.signer.Public(), ValidBefore: epoch.Add(-time.Hour)})
	s = p.open(t, &actor{mem: a.m}, "")
	mustRead(t, s, "web", words("n e w"))
	if _, err := read(t.Context(), s, "web@parent"); !errors.Is(err, keys.ErrExpired) {
		t.Errorf("signed after the key's end: %v", err)
	}
}

// TestMemorySurvives: a reader that is killed while it remembers still knows the
// newest head it knew before.
func TestMemorySurvives(t *testing.T) {
	a := newAttack(t)
	rng := rand.New(rand.NewPCG(7, 7))
	for n := range 30 {
		a.m.restore(a.at[2])
		kill := &killer{n: rng.IntN(6)}
		s, err := images.Open(kill.attach(&actor{mem: a.m}), a.options(a.state))
		must(t, err)
		_, _ = read(t.Context(), s, "web")
		a.m.restore(a.at[n%2])
		a.refused(t, a.reader(t), chunked.ErrRollback, "after a kill")
	}
}
