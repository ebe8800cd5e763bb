package ec2

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// tamperBundle is a real bundle of about 64 KiB in 16 parts.
func tamperBundle(t testing.TB) (doc []byte, parts map[string][]byte) {
	t.Helper()
	o := options(t)
	o.PartSize = MinPartSize
	store := newMemStore()
	data := patchwork(200_000, 3)
	_, doc, err := Bundle(t.Context(), o, memoryImage("img", data, nil), store)
	if err != nil {
		t.Fatal(err)
	}
	total := len(doc)
	for _, p := range store.parts {
		total += len(p)
	}
	if total < 50_000 || total > 200_000 {
		t.Fatalf("the bundle has %d bytes", total)
	}
	return doc, store.parts
}

// Every bit of every byte of the manifest, flipped: refused, or all that is
// trusted stays as it is (in the version, bundler and declaration).
func TestEveryManifestFlip(t *testing.T) {
	doc, _ := tamperBundle(t)
	user := loadParty(t, "user")
	m := parsed(t, doc)
	trusted := cmp.Options{cmpopts.IgnoreUnexported(Manifest{}), cmpopts.IgnoreFields(Manifest{}, "Version", "Bundler")}
	accepted := 0
	flipped := bytes.Clone(doc)
	for i := range doc {
		for bit := range 8 {
			flipped[i] = doc[i] ^ 1<<bit
			got, err := ParseManifest(flipped)
			if err == nil {
				_, err = got.CheckTrust(Trust{Keys: []*rsa.PublicKey{user.pub()}})
			}
			if err != nil {
				if _, ok := errors.AsType[*Error](err); !ok {
					t.Fatalf("byte %d bit %d: %v has no class", i, bit, err)
				}
				continue
			}
			accepted++
			if d := cmp.Diff(m, got, trusted); d != "" || !bytes.Equal(m.signed, got.signed) {
				t.Fatalf("byte %d bit %d: accepted with another content: %s", i, bit, d)
			}
		}
		flipped[i] = doc[i]
	}
	// The unsigned texts are about 30 bytes: most of their flips are accepted.
	if accepted == 0 || accepted > 8*60 {
		t.Errorf("%d flips were accepted", accepted)
	}
	t.Logf("%d flips, %d of unsigned bytes accepted", 8*len(doc), accepted)
}

// Every bit of every byte of every part, flipped: refused where parts are
// fetched, which is before anything is decrypted, with the part's name.
func TestEveryPartFlip(t *testing.T) {
	doc, parts := tamperBundle(t)
	m := parsed(t, doc)
	src := mapSource(maps.Clone(parts))
	f := newFetcher(m, src, t.TempDir())
	buf := make([]byte, 0, 2<<20)
	flips := 0
	for i, p := range m.Parts {
		good := parts[p.Filename]
		flipped := bytes.Clone(good)
		src[p.Filename] = flipped
		for at := range good {
			for bit := range 8 {
				flipped[at] = good[at] ^ 1<<bit
				if _, err := f.part(t.Context(), i, buf); !errors.Is(err, ErrDigest) {
					t.Fatalf("%s byte %d bit %d: %v", p.Filename, at, bit, err)
				}
				flips++
			}
			flipped[at] = good[at]
		}
		if _, err := f.part(t.Context(), i, buf); err != nil {
			t.Fatalf("%s unchanged: %v", p.Filename, err)
		}
		src[p.Filename] = good
	}
	if flips < 450_000 {
		t.Errorf("only %d flips", flips)
	}
}

// A sample of flips through the whole way: the error names the part, and no
// output appears.
func TestFlipsEndToEnd(t *testing.T) {
	doc, parts := tamperBundle(t)
	m := parsed(t, doc)
	user := loadParty(t, "user")
	dir := t.TempDir()
	for i, p := range m.Parts {
		for _, at := range []int{0, 15, 16, len(parts[p.Filename]) / 2, len(parts[p.Filename]) - 1} {
			src := mapSource(maps.Clone(parts))
			src[p.Filename] = bytes.Clone(parts[p.Filename])
			src[p.Filename][at] ^= 1 << (at % 8)
			err := UnbundleFile(t.Context(), UnbundleOptions{Key: user.key}, m, src, filepath.Join(dir, "out"))
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Class != ErrDigest || e.Object != objPart(p.Filename) {
				t.Errorf("part %d byte %d: %v", i, at, err)
			}
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestEveryManifestTruncation(t *testing.T) {
	doc, _ := tamperBundle(t)
	for n := range doc {
		if _, err := ParseManifest(doc[:n]); !errors.Is(err, ErrTruncated) {
			t.Fatalf("%d of %d bytes: %v, want ErrTruncated", n, len(doc), err)
		}
	}
	enc := newForge(t).encryptedManifest(t, loadParty(t, "user").pub(), 2, doc)
	user := loadParty(t, "user")
	for n := 0; n < len(enc); n += 7 {
		if got, err := DecryptManifest(enc[:n], user.key); err == nil {
			// CBC has no integrity: a cut that happens to end in padding
			// decrypts, and parsing has to notice.
			if _, err = ParseManifest(got); err == nil {
				t.Fatalf("encrypted, %d of %d bytes: accepted", n, len(enc))
			}
		}
	}
}

// Parts cut at every block boundary and one byte beside it.
func TestEveryPartTruncation(t *testing.T) {
	doc, parts := tamperBundle(t)
	m := parsed(t, doc)
	src := mapSource(maps.Clone(parts))
	f := newFetcher(m, src, t.TempDir())
	buf := make([]byte, 0, 2<<20)
	for i, p := range m.Parts {
		good := parts[p.Filename]
		for at := 0; at <= len(good); at += 16 {
			for _, n := range []int{at - 1, at, at + 1} {
				if n < 0 || n >= len(good) {
					continue
				}
				src[p.Filename] = good[:n]
				if _, err := f.part(t.Context(), i, buf); !errors.Is(err, ErrDigest) {
					t.Fatalf("%s cut to %d: %v", p.Filename, n, err)
				}
			}
		}
		src[p.Filename] = good
	}
}

// All pairs of parts, swapped and doubled.
func TestEveryPairOfParts(t *testing.T) {
	doc, parts := tamperBundle(t)
	m := parsed(t, doc)
	names := slices.Sorted(maps.Keys(parts))
	if len(names) < 12 {
		t.Fatalf("only %d parts", len(names))
	}
	user := loadParty(t, "user")
	for i, a := range names {
		for _, b := range names[i+1:] {
			for what, src := range map[string]mapSource{"swapped": maps.Clone(parts), "first doubled": maps.Clone(parts), "second doubled": maps.Clone(parts)} {
				switch what {
				case "swapped":
					src[a], src[b] = src[b], src[a]
				case "first doubled":
					src[b] = src[a]
				case "second doubled":
					src[a] = src[b]
				}
				r, err := Verify(t.Context(), VerifyOptions{UnbundleOptions: UnbundleOptions{Trust: []*rsa.PublicKey{user.pub()}}}, m, src)
				if !errors.Is(err, ErrDigest) {
					t.Fatalf("%s and %s %s: %v", a, b, what, err)
				}
				wantBad := 1
				if what == "swapped" {
					wantBad = 2
				}
				if len(r.Problems) != wantBad || r.PartsGood != len(names)-wantBad || r.Archive != "not checked" {
					t.Fatalf("%s and %s %s: report %+v", a, b, what, r)
				}
			}
		}
	}
}

// A part larger than memory allows goes by way of a file, and is verified
// like any other.
func TestLargePartIsSpooled(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	dir := t.TempDir()
	ft := newFetcher(m, mapSource(good.parts), dir)
	ft.inMemory = 10 // bytes
	var out bytes.Buffer
	if err := decodeParts(t.Context(), m, f.key, f.iv, ft, NewStreamOutput(&out)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), f.image) {
		t.Error("image differs")
	}
	name := m.Parts[1].Filename
	bad := mapSource(maps.Clone(good.parts))
	bad[name] = bytes.Clone(bad[name])
	bad[name][3]++
	ft = newFetcher(m, bad, dir)
	ft.inMemory = 10
	if err := decodeParts(t.Context(), m, f.key, f.iv, ft, &nowhere{}); !errors.Is(err, ErrDigest) {
		t.Errorf("damaged: %v, want ErrDigest", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	ft = newFetcher(m, mapSource(good.parts), filepath.Join(dir, "absent"))
	ft.inMemory = 10
	if err := decodeParts(t.Context(), m, f.key, f.iv, ft, &nowhere{}); err == nil {
		t.Error("no room for the spool file: no error")
	}
}
