package images_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// TestAdoptBehind: a version that is copied in behind those that are here can be
// read, and what the name stands for stays; where the name was not, it begins.
func TestAdoptBehind(t *testing.T) {
	p, ctx := newPeople(t), t.Context()
	from := p.open(t, &actor{mem: newMem()}, "")
	for _, c := range []string{"a b c", "a b d", "a b e"} {
		if _, err := p.capture(ctx, from, "web", words(c)); err != nil {
			t.Fatal(err)
		}
	}
	theirs, err := from.Resolve(ctx, "web", images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, behind := range []bool{true, false} {
		to := p.open(t, &actor{mem: newMem()}, "")
		if _, err := p.capture(ctx, to, "web", words("x y")); err != nil {
			t.Fatal(err)
		}
		a, err := to.Adopt(ctx, theirs, images.AdoptOptions{Signer: p.signer, Behind: behind})
		if err != nil {
			t.Fatal(err)
		}
		want := words("a b e")
		if behind {
			want = words("x y")
		}
		mustRead(t, to, "web", want)
		mustRead(t, to, "web@"+a.Name.String(), words("a b e"))
		// The next version follows, whatever the sequence of what was copied.
		if _, err := p.capture(ctx, to, "web", words("x z")); err != nil {
			t.Fatal(err)
		}
		mustRead(t, to, "web", words("x z"))
		mustRead(t, to, "web@"+a.Name.String(), words("a b e"))
	}
	fresh := p.open(t, &actor{mem: newMem()}, "")
	if _, err := fresh.Adopt(ctx, theirs, images.AdoptOptions{Signer: p.signer, Behind: true}); err != nil {
		t.Fatal(err)
	}
	mustRead(t, fresh, "web", words("a b e"))
}

// TestAdoptBehindDeleted: what was deleted here does not come to stand for its name
// again behind nothing; nor is anything copied for it.
func TestAdoptBehindDeleted(t *testing.T) {
	p, ctx := newPeople(t), t.Context()
	from := p.open(t, &actor{mem: newMem()}, "")
	if _, err := p.capture(ctx, from, "web", words("a b c")); err != nil {
		t.Fatal(err)
	}
	theirs, err := from.Resolve(ctx, "web", images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	mem := newMem()
	to := p.open(t, &actor{mem: mem}, "")
	if _, err := to.Adopt(ctx, theirs, images.AdoptOptions{Signer: p.signer, Behind: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := to.Delete(ctx, "web", p.signer); err != nil {
		t.Fatal(err)
	}
	before := mem.snapshot()
	if _, err := to.Adopt(ctx, theirs, images.AdoptOptions{Signer: p.signer, Behind: true}); !errors.Is(err, chunked.ErrDeleted) {
		t.Errorf("behind nothing: %v", err)
	}
	for key := range mem.snapshot() {
		if _, ok := before[key]; !ok && !strings.HasPrefix(key, chunked.RunsFolder) {
			t.Errorf("%s was put", key)
		}
	}
	if _, err := to.Resolve(ctx, "web", images.ResolveOptions{}); !errors.Is(err, chunked.ErrDeleted) {
		t.Errorf("it is there: %v", err)
	}
	// Who captures it again says what its name stands for.
	if _, err := p.capture(ctx, to, "web", words("x y")); err != nil {
		t.Fatal(err)
	}
	if _, err := to.Adopt(ctx, theirs, images.AdoptOptions{Signer: p.signer, Behind: true}); err != nil {
		t.Fatal(err)
	}
	mustRead(t, to, "web", words("x y"))
}
