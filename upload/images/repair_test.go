package images_test

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// pieces is a candidate with whole chunks.
type pieces [][]byte

func (pieces) At(context.Context, *chunked.Manifest, string, int64, []byte) error {
	return chunked.ErrMissing
}

func (p pieces) Pieces(context.Context) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, b := range p {
			if !yield(b, nil) {
				return
			}
		}
	}
}

// TestRepair damages a store at random and repairs it from another store, from
// disks, from pieces, and from nothing at all.
func TestRepair(t *testing.T) {
	t.Parallel()
	d := newDamaged(t)
	copied := newMem()
	copied.restore(d.good)
	other := d.open(t, &actor{mem: copied}, "")
	n := many(200, 5000)
	saved, lost := 0, 0
	for seed := range uint64(n) {
		rng := rand.New(rand.NewPCG(seed, 3))
		d.m.restore(d.good)
		domain, err := d.s.Domain(t.Context(), "main", images.DomainOptions{})
		if err != nil {
			t.Fatal(err)
		}
		o := images.RepairOptions{Domain: domain, Owner: d.owner}
		prefixes := []string{"packs/"}
		mode := seed % 4
		switch mode {
		case 0:
			o.Stores = []*images.Store{other}
			prefixes = append(prefixes, "index/", "images/web/manifests/", "images/mail/manifests/", "images/db/keys/", "images/web/head")
		case 1:
			for _, blocks := range d.world {
				o.Candidates = append(o.Candidates, images.Disk{ReaderAt: bytes.NewReader(text(blocks))})
			}
		case 2:
			var all pieces
			for _, blocks := range d.world {
				for _, b := range blocks {
					all = append(all, block(b))
				}
			}
			o.Candidates = []images.Candidate{pieces{[]byte("nothing of it")}, all}
		}
		what := fmt.Sprint("mode ", mode, ": ", d.hurt(rng, prefixes...))
		for rng.IntN(2) == 0 && len(d.m.keys("packs/")) > 1 {
			what += "; " + d.hurt(rng, prefixes...)
		}
		before := map[string][]images.Span{}
		for ref, blocks := range d.world {
			spans, opened := d.unreadable(t, ref, blocks)
			if opened {
				before[ref] = spans
			}
		}
		rep, err := d.s.Repair(t.Context(), o)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		d.afterRepair(t, what, rep, before, mode == 3)
		// What was damaged is kept, and nothing is damaged that nobody mentions.
		for _, k := range rep.Quarantined {
			if len(d.m.keys(images.Quarantine+k)) != 1 {
				t.Errorf("%s: %s is not in quarantine", what, k)
			}
		}
		again, err := d.s.Repair(t.Context(), o)
		if err != nil || len(again.Restored) != 0 {
			t.Errorf("%s: again: %+v, %v", what, again, err)
		}
		if _, err := d.s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
			t.Errorf("%s: collection afterwards: %v", what, err)
		}
		if _, err := d.s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
			t.Errorf("%s: collection afterwards: %v", what, err)
		}
		d.afterRepair(t, what+", collected", rep, before, mode == 3)
		if t.Failed() {
			t.Fatalf("damage %d, %s\n%+v", seed, what, rep)
		}
		if len(rep.Lost) > 0 {
			lost++
		} else {
			saved++
		}
	}
	t.Logf("%d random damages: %d made good, %d reported as lost", n, saved, lost)
	if !raced && (lost == 0 || saved < n/2) {
		t.Error("that proves nothing")
	}
}

// afterRepair makes sure that all is whole; or, if there was no other source,
// that exactly what could not be read before is reported as lost.
func (d *damaged) afterRepair(t testing.TB, what string, rep *images.RepairReport, before map[string][]images.Span, alone bool) {
	t.Helper()
	lost := map[string][]images.Span{}
	for _, v := range rep.Lost {
		var l []images.Span
		for _, x := range v.Damages {
			l = append(l, x.Ranges...)
		}
		lost[v.Image+"@"+v.Name.String()] = join(l)
	}
	if !alone && len(lost) > 0 {
		t.Errorf("%s: lost %v", what, lost)
	}
	for ref, blocks := range d.world {
		now, opened := d.unreadable(t, ref, blocks)
		if !opened {
			t.Errorf("%s: %s does not open", what, ref)
			continue
		}
		if fmt.Sprint(now) != fmt.Sprint(lost[ref]) {
			t.Errorf("%s: %s lacks %v, reported is %v", what, ref, now, lost[ref])
		}
		if alone && len(now) > len(before[ref]) {
			t.Errorf("%s: %s lacked %v, now lacks %v", what, ref, before[ref], now)
		}
	}
}

// TestRepairFromOtherPacks: chunks that are stored twice, by two creators who do
// not believe each other, save each other.
func TestRepairFromOtherPacks(t *testing.T) {
	p, m := newPeople(t), newMem()
	s := p.open(t, &actor{mem: m}, "")
	if _, err := p.capture(t.Context(), s, "web", words("a b c d e f")); err != nil {
		t.Fatal(err)
	}
	first := m.keys("packs/")
	other := *p
	other.owner[0]++
	if _, err := other.capture(t.Context(), s, "mail", words("f e d c b a")); err != nil {
		t.Fatal(err)
	}
	for _, k := range first {
		m.change(k, func([]byte) []byte { return nil })
	}
	if _, err := read(t.Context(), s, "web"); err == nil {
		t.Fatal("the image can be read without its packs")
	}
	d, err := s.Domain(t.Context(), "main", images.DomainOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rep, err := s.Repair(t.Context(), images.RepairOptions{Domain: d, Owner: p.owner})
	if err != nil || len(rep.Lost) != 0 || len(rep.Moved) != len(first) {
		t.Fatalf("%+v, %v", rep, err)
	}
	mustRead(t, s, "web", words("a b c d e f"))
	// The next capture shares what was saved, and does not look for what is gone.
	packs := len(m.keys("packs/"))
	if _, err := p.capture(t.Context(), s, "web", words("a b c d e X")); err != nil {
		t.Fatal(err)
	}
	if n := len(m.keys("packs/")) - packs; n != 1 {
		t.Errorf("one changed block made %d packs", n)
	}
	mustRead(t, s, "web", words("a b c d e X"))
	mustRead(t, s, "web@parent", words("a b c d e f"))
	sr, err := s.Scrub(t.Context(), nil)
	if err != nil || len(sr.Damages) != 0 {
		t.Errorf("scrub: %+v, %v", sr, err)
	}
}

// TestPackGone: a pack that is deleted behind the parent's index is noticed by
// the next capture, which stores its chunks again.
func TestPackGone(t *testing.T) {
	p, m := newPeople(t), newMem()
	s := p.open(t, &actor{mem: m}, t.TempDir())
	blocks := words("a b c d e f")
	if _, err := p.capture(t.Context(), s, "web", blocks); err != nil {
		t.Fatal(err)
	}
	gone := m.keys("packs/")[0]
	m.change(gone, func([]byte) []byte { return nil })
	if _, err := p.capture(t.Context(), s, "web", blocks); err != nil {
		t.Fatal(err)
	}
	mustRead(t, s, "web", blocks)
	for _, k := range m.keys("images/web/manifests/") {
		if doc, err := chunked.ReadManifestUnverified(m.snapshot()[k].data); err != nil || doc.Sequence == 2 && strings.Contains(fmt.Sprint(doc.Packs), gone[len("packs/00/"):]) {
			t.Errorf("the new manifest names the pack that is gone: %v", err)
		}
	}
}
