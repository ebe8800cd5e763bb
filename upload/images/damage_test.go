package images_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// damaged is a store with versions that share much, to be hurt.
type damaged struct {
	*people
	m     *mem
	s     *images.Store
	world map[string][]string // by reference with the whole name: blocks
	good  map[string]memObject
}

func newDamaged(t testing.TB) *damaged {
	t.Helper()
	d := &damaged{people: newPeople(t), m: newMem(), world: map[string][]string{}}
	d.s = d.open(t, &actor{mem: d.m}, "")
	for _, v := range []struct{ image, blocks string }{
		{"web", "a b c d e f g h i j k l m"},
		{"web", "a b c X e f g h i j k Y m"},
		{"mail", "a b c d 1 2 3 4 5 6"},
		{"db", "p q r s t u"},
		{"web", "a b c X e f Z h i j k Y m n o"},
	} {
		p, err := d.capture(t.Context(), d.s, v.image, words(v.blocks))
		if err != nil {
			t.Fatal(err)
		}
		d.world[v.image+"@"+p.Name.String()] = words(v.blocks)
	}
	d.good = d.m.snapshot()
	return d
}

// hurt damages one object under prefixes at random and tells what it did.
func (d *damaged) hurt(rng *rand.Rand, prefixes ...string) string {
	var keys []string
	for _, p := range prefixes {
		keys = append(keys, d.m.keys(p)...)
	}
	key := keys[rng.IntN(len(keys))]
	what := ""
	d.m.change(key, func(b []byte) []byte {
		switch rng.IntN(5) {
		case 0:
			what = "deleted"
			return nil
		case 1:
			n := rng.IntN(len(b))
			what = fmt.Sprintf("cut to %d of %d", n, len(b))
			return append([]byte{}, b[:n]...)
		case 2:
			what = "made longer"
			return append(b, 'x')
		default:
			i := rng.IntN(len(b))
			b[i] ^= 1 << rng.IntN(8)
			what = fmt.Sprintf("byte %d of %d changed", i, len(b))
			return b
		}
	})
	return key + " " + what
}

// unreadable gives the blocks of a version that cannot be read, as ranges; all
// of them if the version does not open.
func (d *damaged) unreadable(t testing.TB, ref string, blocks []string) (lost []images.Span, opened bool) {
	t.Helper()
	img, err := d.s.Resolve(t.Context(), ref, images.ResolveOptions{})
	if err != nil {
		return nil, false
	}
	x, err := img.Open(t.Context())
	if err != nil {
		return nil, false
	}
	st, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		return nil, false
	}
	for i, want := range blocks {
		from := int64(i) * blockSize
		got := make([]byte, blockSize)
		// A cache of nothing: each block by itself.
		if _, err := st.ReaderAt(t.Context(), 0).ReadAt(got, from); err == nil {
			if !bytes.Equal(got, block(want)) {
				t.Fatalf("%s: block %d read back wrong", ref, i)
			}
			continue
		}
		if n := len(lost); n > 0 && lost[n-1].To == from {
			lost[n-1].To += blockSize
		} else {
			lost = append(lost, images.Span{Stream: chunked.StreamDisk, From: from, To: from + blockSize})
		}
	}
	return lost, true
}

// TestDamages hurts a store at random: verification names exactly the versions
// that are hurt, and exactly the ranges that cannot be read; a scrub, without
// keys, exactly the objects, and whom they hurt.
func TestDamages(t *testing.T) {
	d := newDamaged(t)
	keyless, err := images.Open(&actor{mem: d.m}, images.Options{Parallel: 1})
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.s.Verify(t.Context(), images.VerifyOptions{ReadData: true})
	if err != nil || !r.Sound() || len(r.Images) != 5 || r.Read == 0 {
		t.Fatalf("undamaged: %+v, %v", r, err)
	}
	sr, err := keyless.Scrub(t.Context(), nil)
	if err != nil || len(sr.Damages) != 0 || len(sr.Hurt) != 0 || sr.Objects.Objects < 20 {
		t.Fatalf("undamaged: %+v, %v", sr, err)
	}
	n := many(200, 5000)
	for seed := range uint64(n) {
		rng := rand.New(rand.NewPCG(seed, 2))
		d.m.restore(d.good)
		what := d.hurt(rng, "packs/", "index/", "images/web/manifests/", "images/mail/manifests/", "images/db/keys/")
		if rng.IntN(3) == 0 {
			what += "; " + d.hurt(rng, "packs/")
		}
		d.compare(t, what)
		var damaged []string
		for k, o := range d.good {
			// What is wrapped for a recipient only he can check.
			if now, ok := d.m.snapshot()[k]; (!ok || !bytes.Equal(now.data, o.data)) && !strings.Contains(k, "/keys/") {
				damaged = append(damaged, k)
			}
		}
		slices.Sort(damaged)
		sr, err := keyless.Scrub(t.Context(), nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var found []string
		for _, x := range sr.Damages {
			if !strings.Contains(x.Key, "/keys/") {
				found = append(found, x.Key)
			}
		}
		if !slices.Equal(found, damaged) {
			t.Fatalf("%s: the scrub found %q, %v", what, found, sr.Damages)
		}
		d.compareHurt(t, what, sr, damaged)
		if t.Failed() {
			t.Fatalf("damage %d: %s", seed, what)
		}
	}
	t.Logf("%d random damages", n)
}

// compare holds a verification against reading everything.
func (d *damaged) compare(t testing.TB, what string) {
	t.Helper()
	r, err := d.s.Verify(t.Context(), images.VerifyOptions{ReadData: true})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	reported := map[string]images.Verified{}
	for _, v := range r.Images {
		reported[v.Image+"@"+v.Name.String()] = v
	}
	for ref, blocks := range d.world {
		lost, opened := d.unreadable(t, ref, blocks)
		v, ok := reported[ref]
		if !ok {
			t.Errorf("%s: %s is not reported", what, ref)
			continue
		}
		var spans []images.Span
		for _, x := range v.Damages {
			spans = append(spans, x.Ranges...)
		}
		switch {
		case !opened && len(v.Damages) == 0:
			t.Errorf("%s: %s does not open, and is reported sound", what, ref)
		case opened && fmt.Sprint(join(spans)) != fmt.Sprint(lost):
			t.Errorf("%s: %s lacks %v, reported is %v", what, ref, lost, v.Damages)
		case opened && len(lost) == 0 && len(v.Damages) > 0 && !d.touches(v, what):
			t.Errorf("%s: %s is whole, reported is %v", what, ref, v.Damages)
		}
	}
	if len(reported) != len(d.world) {
		t.Errorf("%s: %d versions are reported", what, len(reported))
	}
}

// touches tells whether each damage reported is of an object that was damaged:
// one whose unused bytes are hurt is damaged, if nothing is lost by it.
func (d *damaged) touches(v images.Verified, what string) bool {
	for _, x := range v.Damages {
		if !strings.Contains(what, x.Key) {
			return false
		}
	}
	return true
}

func join(l []images.Span) []images.Span {
	slices.SortFunc(l, func(a, b images.Span) int { return int(a.From - b.From) })
	var out []images.Span
	for _, s := range l {
		if n := len(out); n > 0 && out[n-1].To >= s.From {
			out[n-1].To = max(out[n-1].To, s.To)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// compareHurt holds a scrub's list of hurt versions against the manifests.
func (d *damaged) compareHurt(t testing.TB, what string, sr *images.ScrubReport, damaged []string) {
	t.Helper()
	for ref := range d.world {
		image, name, _ := strings.Cut(ref, "@")
		m, err := chunked.ReadManifestUnverified(d.good["images/"+image+"/manifests/"+name].data)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]bool{"images/" + image + "/manifests/" + name: true, chunked.IndexObjectKey(m.Index.Root.Name): true}
		for _, o := range m.Packs {
			want[chunked.PackKey(o.Name)] = true
		}
		for _, o := range m.Index.Segments {
			want[chunked.IndexObjectKey(o.Name)] = true
		}
		hit := slices.ContainsFunc(damaged, func(k string) bool { return want[k] })
		keys := slices.DeleteFunc(slices.Clone(sr.Hurt[ref]), func(k string) bool { return strings.Contains(k, "/keys/") })
		if (len(keys) > 0) != hit {
			t.Errorf("%s: %s hurt: %v, reported: %v", what, ref, hit, sr.Hurt[ref])
		}
	}
}
