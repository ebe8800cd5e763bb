package images_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// TestPublishAndRead: versions are found by name, digits and as parents, share
// what did not change, and read back.
func TestPublishAndRead(t *testing.T) {
	p, m := newPeople(t), newMem()
	s := p.open(t, &actor{mem: m}, t.TempDir())
	ctx := t.Context()
	if _, err := s.Resolve(ctx, "web", images.ResolveOptions{}); !errors.Is(err, images.ErrNoImage) {
		t.Errorf("before: %v", err)
	}
	one := words("a b c d e f g h i")
	v1, err := p.capture(ctx, s, "web", one)
	if err != nil {
		t.Fatal(err)
	}
	mustRead(t, s, "web", one)
	packs := len(m.keys("packs/"))
	two := words("a b c d X f g h i")
	v2, err := p.capture(ctx, s, "web", two)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(m.keys("packs/")); n != packs+1 {
		t.Errorf("one changed block made %d packs", n-packs)
	}
	mustRead(t, s, "web", two)
	mustRead(t, s, "web@parent", one)
	mustRead(t, s, "web@"+v1.Name.String()[:10], one)
	mustRead(t, s, "web@"+v2.Name.String(), two)
	mustRead(t, s, "web@"+v2.Name.String()[:12]+".parent", one)
	if v2.Manifest.Parent != v1.Name || v2.Sequence != 2 {
		t.Errorf("parent %s, sequence %d", v2.Manifest.Parent, v2.Sequence)
	}
	// The same again adds a manifest, its key and a root.
	before := m.snapshot()
	if _, err := p.capture(ctx, s, "web", two); err != nil {
		t.Fatal(err)
	}
	for _, k := range m.keys("") {
		if _, ok := before[k]; !ok && (strings.HasPrefix(k, "packs/") || strings.HasPrefix(k, "runs/")) {
			t.Errorf("the same tree again left %s", k)
		}
	}
	if n := len(m.keys("index/")); n != len(prefixed(before, "index/"))+1 {
		t.Errorf("%d index objects, had %d", n, len(prefixed(before, "index/")))
	}
	// Another image of the domain shares by the footers of its own packs.
	packs = len(m.keys("packs/"))
	if _, err := p.capture(ctx, s, "mail", two); err != nil {
		t.Fatal(err)
	}
	if n := len(m.keys("packs/")); n != packs {
		t.Errorf("the same blocks under another name made %d packs", n-packs)
	}
	l, err := s.List(ctx, "")
	if err != nil || len(l) != 2 || l[0].Image != "mail" || l[1].Image != "web" || len(l[1].Versions) != 3 {
		t.Fatalf("list: %+v, %v", l, err)
	}
	for _, i := range l {
		for j, v := range i.Versions {
			if i.Err != nil || v.Err != nil || v.Unpublished || v.Newest != (j == 0) {
				t.Errorf("%s: %+v", i.Image, v)
			}
		}
	}
}

func prefixed(m map[string]memObject, prefix string) []string {
	var l []string
	for k := range m {
		if strings.HasPrefix(k, prefix) {
			l = append(l, k)
		}
	}
	return l
}

// TestOtherCreators: another machine's footers are used only if that is asked
// for.
func TestOtherCreators(t *testing.T) {
	p, m := newPeople(t), newMem()
	s := p.open(t, &actor{mem: m}, "")
	if _, err := p.capture(t.Context(), s, "web", words("a b c")); err != nil {
		t.Fatal(err)
	}
	other := *p
	other.owner[0]++
	if _, err := other.capture(t.Context(), s, "mail", words("a b c")); err != nil {
		t.Fatal(err)
	}
	if n := len(m.keys("packs/")); n != 2 {
		t.Errorf("%d packs: another creator's footer was believed", n)
	}
	d, err := s.Domain(t.Context(), "main", images.DomainOptions{})
	if err != nil {
		t.Fatal(err)
	}
	other.owner[0]++
	run, err := s.Begin(t.Context(), images.RunOptions{Image: "db", Domain: d, Owner: other.owner, AllCreators: true, Refresh: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close(t.Context())
	if _, err := other.captureInto(t.Context(), s, run, d, words("a b c")); err != nil {
		t.Fatal(err)
	}
	if n := len(m.keys("packs/")); n != 2 {
		t.Errorf("%d packs: all creators' footers were to be believed", n)
	}
}

// TestDelete removes versions and images; what others share stays.
func TestDelete(t *testing.T) {
	p, m := newPeople(t), newMem()
	s := p.open(t, &actor{mem: m}, "")
	ctx := t.Context()
	contents := [][]string{words("a b c"), words("a b d"), words("a b e")}
	var names []chunked.Name
	for _, c := range contents {
		v, err := p.capture(ctx, s, "web", c)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, v.Name)
	}
	d, err := s.Delete(ctx, "web@"+names[1].String()[:8], p.signer)
	if err != nil || d.Newest != names[2] || len(d.Versions) != 1 {
		t.Fatalf("%+v, %v", d, err)
	}
	mustRead(t, s, "web", contents[2])
	mustRead(t, s, "web@"+names[0].String()[:8], contents[0])
	if _, err := s.Resolve(ctx, "web@"+names[1].String(), images.ResolveOptions{}); !errors.Is(err, images.ErrNoImage) {
		t.Errorf("deleted version: %v", err)
	}
	if _, err := s.Resolve(ctx, "web@parent", images.ResolveOptions{}); !errors.Is(err, images.ErrNoImage) {
		t.Errorf("deleted parent: %v", err)
	}
	if d, err = s.Delete(ctx, "web@"+names[2].String(), p.signer); err != nil || d.Newest != names[0] || d.Sequence != 5 {
		t.Fatalf("%+v, %v", d, err)
	}
	mustRead(t, s, "web", contents[0])
	if _, err = s.Delete(ctx, "web", p.signer); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve(ctx, "web", images.ResolveOptions{}); !errors.Is(err, chunked.ErrDeleted) {
		t.Errorf("deleted image: %v", err)
	}
	if l := m.keys("images/"); len(l) != 1 || l[0] != "images/web/head" {
		t.Errorf("left: %q", l)
	}
	if _, err = s.Delete(ctx, "web", p.signer); err != nil {
		t.Errorf("again: %v", err)
	}
	if _, err = s.Delete(ctx, "none", p.signer); !errors.Is(err, images.ErrNoImage) {
		t.Errorf("none: %v", err)
	}
	v, err := p.capture(ctx, s, "web", contents[1])
	if err != nil || v.Sequence != 7 {
		t.Fatalf("%+v, %v", v, err)
	}
	mustRead(t, s, "web", contents[1])
}

// TestRunKeepsItsPacks: what a capture that takes days has stored is not
// condemned while it says that it is under way; when it is dead, it is.
func TestRunKeepsItsPacks(t *testing.T) {
	p, m := newPeople(t), newMem()
	s := p.open(t, &actor{mem: m}, "")
	ctx := t.Context()
	_, err := p.capture(ctx, s, "other", words("o"))
	must(t, err)
	d, err := s.Domain(ctx, "main", images.DomainOptions{})
	must(t, err)
	renewed := make(chan struct{}, 1000)
	a := &actor{mem: m}
	a.after = func(o op) error {
		if o.name == "put" && strings.HasPrefix(o.key, "runs/") {
			renewed <- struct{}{}
		}
		return nil
	}
	run, err := p.open(t, a, "").Begin(ctx, images.RunOptions{Image: "web", Domain: d, Owner: p.owner, Refresh: time.Millisecond})
	must(t, err)
	data := []byte("not really a pack")
	must(t, run.PutPack(ctx, chunked.NameOf(data), data))
	m.pass(72 * time.Hour)
	for len(renewed) > 0 {
		<-renewed
	}
	<-renewed
	<-renewed // one that began after the time had passed
	r, err := s.GC(ctx, images.GCOptions{})
	if err != nil || len(r.Condemned) != 0 || len(r.Running) != 1 || r.Running[0] != "web" {
		t.Fatalf("under way: %+v, %v", r, err)
	}
	must(t, run.Close(ctx))
	if l := m.keys("runs/"); len(l) != 0 {
		t.Errorf("left: %q", l)
	}
	r, err = s.GC(ctx, images.GCOptions{})
	if err != nil || len(r.Condemned) != 1 {
		t.Fatalf("ended: %+v, %v", r, err)
	}
}

// TestParseRef reads references, and refuses what is none.
func TestParseRef(t *testing.T) {
	full := strings.Repeat("0a", 32)
	for _, good := range []string{"web", "web@0123", "web@" + full, "web@parent", "web@parent.parent", "web@0123.parent", "a.b_c-d@abcd"} {
		r, err := images.ParseRef(good)
		if err != nil || r.String() != good {
			t.Errorf("%q: %q, %v", good, r, err)
		}
	}
	for _, bad := range []string{"", "@", "web@", "web@012", "web@XYZ1", "web@0123.", "web@parent.0123", "web@" + full + "0", "-web", "a/b", "web@0123@4567", "web@ABCD"} {
		if r, err := images.ParseRef(bad); err == nil {
			t.Errorf("%q: %+v", bad, r)
		}
	}
}
