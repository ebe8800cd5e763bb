package images_test

import (
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// TestAdoptCut lets a copy from another store end, or fail, or be lied to, at each
// of its requests of the store it copies to, and of the one it copies from: at no
// time a reader finds a version there that is not whole, and the same copy, begun
// again, ends well.
func TestAdoptCut(t *testing.T) {
	p, ctx := newPeople(t), t.Context()
	theirs := newMem()
	from := p.open(t, &actor{mem: theirs}, "")
	blocks := words("a b c d e f g")
	for _, c := range []string{"a b c d", "a b c d e f g"} {
		if _, err := p.capture(ctx, from, "web", words(c)); err != nil {
			t.Fatal(err)
		}
	}
	img, err := from.Resolve(ctx, "web", images.ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ref := "web@" + img.Name.String()
	ours := newMem()
	if _, err := p.capture(ctx, p.open(t, &actor{mem: ours}, ""), "web", words("x y")); err != nil {
		t.Fatal(err)
	}
	begun := ours.snapshot()
	modes := []struct {
		name         string
		source       bool // it is the other store's requests
		stored, once bool
		lie          bool // the store says it has stored what it has not
	}{
		{name: "killed before"},
		{name: "killed after", stored: true},
		{name: "fault", once: true},
		{name: "lost reply", stored: true, once: true},
		{name: "corrupted", stored: true, once: true, lie: true},
		{name: "killed at the source", source: true},
		{name: "fault at the source", source: true, once: true},
	}
	for _, mode := range modes {
		cuts, step := 0, 1
		if raced {
			step = 7
		}
		for n := 0; ; n += step {
			ours.restore(begun)
			k := &killer{n: n, stored: mode.stored, once: mode.once}
			here, there := &actor{mem: ours}, &actor{mem: theirs}
			if mode.source {
				k.attach(there)
			} else {
				k.attach(here)
			}
			if mode.lie {
				tell := here.after
				here.after = func(o op) error {
					if tell(o) == nil || o.name != "put" {
						return nil
					}
					ours.change(o.key, func(b []byte) []byte {
						if len(b) > 20 {
							b[20] ^= 1
						}
						return b
					})
					return nil
				}
			}
			look := func(when string) {
				t.Helper()
				s := p.open(t, &actor{mem: ours}, "")
				l, err := s.List(ctx, "")
				if err != nil {
					t.Fatalf("%s at %d, %s: %v", mode.name, n, when, err)
				}
				for _, i := range l {
					for _, v := range i.Versions {
						if v.Unpublished || i.Err != nil {
							continue
						}
						r, err := s.Verify(ctx, images.VerifyOptions{Refs: []string{i.Image + "@" + v.Name.String()}, ReadData: true})
						if err != nil || !r.Sound() {
							t.Fatalf("%s at %d (%s %s), %s: version %s is shown: %+v, %v", mode.name, n, k.at.name, k.at.key, when, v.Name, r, err)
						}
					}
				}
			}
			source, err := p.open(t, there, "").Resolve(ctx, ref, images.ResolveOptions{})
			if err == nil {
				_, err = p.open(t, here, "").Adopt(ctx, source, images.AdoptOptions{Signer: p.signer, Behind: true})
			}
			if !k.fired {
				if err != nil {
					t.Fatalf("%s: without a cut: %v", mode.name, err)
				}
				break
			}
			cuts++
			// A head in a wrong place of the store's is no document: its reader says so.
			head := mode.lie && k.at.name == "put" && k.at.key == chunked.HeadKey("web")
			if !head {
				look("cut")
			}
			source, err = p.open(t, &actor{mem: theirs}, "").Resolve(ctx, ref, images.ResolveOptions{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = p.open(t, &actor{mem: ours}, "").Adopt(ctx, source, images.AdoptOptions{Signer: p.signer, Behind: true})
			if head {
				if err == nil {
					t.Fatalf("%s at %d: a head that is none was taken", mode.name, n)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%s at %d (%s %s), again: %v", mode.name, n, k.at.name, k.at.key, err)
			}
			look("again")
			mustRead(t, p.open(t, &actor{mem: ours}, ""), ref, blocks)
			mustRead(t, p.open(t, &actor{mem: ours}, ""), "web", words("x y"))
		}
		if cuts*step < 5 {
			t.Errorf("%s: only %d cuts", mode.name, cuts)
		}
		t.Logf("%s: %d cuts", mode.name, cuts)
	}
}
