package chunked

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

// The attacks on a repository that The Update Framework names, by whoever owns
// the store, on documents. Package upload/images has the same names for whole
// stores.

// published is what one publication leaves, and who trusts it.
type published struct {
	signer   keys.Signer
	trust    *keys.AllowedSigners
	manifest []byte
	head     []byte
}

func publish(t testing.TB, s keys.Signer, image string, sequence int64, at time.Time, change func(*Manifest)) *published {
	t.Helper()
	m := testManifest()
	m.Name, m.Sequence, m.Created = image, sequence, at
	m.Description = fmt.Sprintf("version %d", sequence)
	if change != nil {
		change(m)
	}
	manifest := signed(t, m, s)
	h := &Head{Name: image, Sequence: sequence, Manifest: NameOf(manifest), Created: at, Expires: at.Add(24 * time.Hour)}
	return &published{s, trustIn(s, image), manifest, signed(t, h, s)}
}

// read does what a reader does with a head and the manifest the store gives
// for it, and gives what to remember.
func read(head, manifest []byte, trust *keys.AllowedSigners, image string, f Freshness) (*Manifest, Seen, error) {
	h, v, err := OpenHead(head, trust, image)
	if err != nil {
		return nil, Seen{}, err
	}
	f.Seen = Current(f.Seen, trust, image)
	if err := h.CheckFresh(f); err != nil {
		return nil, Seen{}, err
	}
	m, _, err := OpenManifest(manifest, trust, image)
	if err != nil {
		return nil, Seen{}, err
	}
	if err := h.Check(m, NameOf(manifest)); err != nil {
		return nil, Seen{}, err
	}
	return m, Seen{h.Sequence, h.Manifest, keys.Fingerprint(v.Key)}, nil
}

func (p *published) fine(t testing.TB, image string, f Freshness) Seen {
	t.Helper()
	_, seen, err := read(p.head, p.manifest, p.trust, image, f)
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

func now() Freshness { return Freshness{Now: created.Add(time.Hour)} }

func refused(t testing.TB, err error, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%v, want %v", err, want)
	}
}

func TestRollback(t *testing.T) {
	s := testSigner(t)
	old := publish(t, s, "machine-1", 1, created, nil)
	neu := publish(t, s, "machine-1", 2, created, nil)
	old.fine(t, "machine-1", now())
	f := now()
	f.Seen = []Seen{neu.fine(t, "machine-1", now())}
	_, _, err := read(old.head, old.manifest, old.trust, "machine-1", f)
	refused(t, err, ErrRollback)
	f = now()
	f.AtLeast = 2
	_, _, err = read(old.head, old.manifest, old.trust, "machine-1", f)
	refused(t, err, ErrRollback)
	// An old manifest behind the new head.
	_, _, err = read(neu.head, old.manifest, neu.trust, "machine-1", now())
	refused(t, err, ErrOther)
	// What comes back after it was deleted.
	gone := &Head{Name: "machine-1", Sequence: 3, Created: created}
	h, v, err := OpenHead(signed(t, gone, s), neu.trust, "machine-1")
	if err != nil || !h.Deleted() {
		t.Fatal(err)
	}
	refused(t, h.Check(testManifest(), Name{}), ErrDeleted)
	f = now()
	f.Seen = []Seen{{h.Sequence, h.Manifest, keys.Fingerprint(v.Key)}}
	_, _, err = read(neu.head, neu.manifest, neu.trust, "machine-1", f)
	refused(t, err, ErrRollback)
}

func TestFreeze(t *testing.T) {
	p := publish(t, testSigner(t), "machine-1", 1, created, nil)
	seen := p.fine(t, "machine-1", now())
	// The same head for ever: it expires.
	f := Freshness{Seen: []Seen{seen}, Now: created.Add(24*time.Hour + time.Second)}
	_, _, err := read(p.head, p.manifest, p.trust, "machine-1", f)
	refused(t, err, ErrStale)
	// Or is older than the reader wants.
	f = Freshness{Now: created.Add(2 * time.Hour), MaxAge: time.Hour}
	_, _, err = read(p.head, p.manifest, p.trust, "machine-1", f)
	refused(t, err, ErrStale)
}

// TestFastForward: who has stolen a key sets the sequence as high as it goes.
// Taking the key out of the file makes the image usable again.
func TestFastForward(t *testing.T) {
	stolen, fresh := testSigner(t), testSigner(t)
	both := keys.NewAllowedSigners(append(trustIn(stolen, "*").Entries(), trustIn(fresh, "*").Entries()...)...)
	first := publish(t, fresh, "machine-1", 5, created, nil)
	evil := publish(t, stolen, "machine-1", maxNumber, created, nil)
	_, a, err := read(first.head, first.manifest, both, "machine-1", now())
	if err != nil {
		t.Fatal(err)
	}
	f := now()
	f.Seen = []Seen{a}
	_, b, err := read(evil.head, evil.manifest, both, "machine-1", f)
	if err != nil {
		t.Fatal(err)
	}
	next := publish(t, fresh, "machine-1", 6, created, nil)
	f.Seen = []Seen{a, b}
	_, _, err = read(next.head, next.manifest, both, "machine-1", f)
	refused(t, err, ErrRollback)
	// Recovery: the stolen key is taken out. Its head is refused, the next one
	// counts, and what was seen of the other key still does.
	_, _, err = read(evil.head, evil.manifest, next.trust, "machine-1", f)
	refused(t, err, keys.ErrUntrusted)
	if _, _, err = read(next.head, next.manifest, next.trust, "machine-1", f); err != nil {
		t.Error(err)
	}
	older := publish(t, fresh, "machine-1", 4, created, nil)
	_, _, err = read(older.head, older.manifest, next.trust, "machine-1", f)
	refused(t, err, ErrRollback)
	// No sequence is beyond the last.
	if _, err := (&Head{Name: "machine-1", Sequence: maxNumber + 1, Created: created}).Document(); !errors.Is(err, ErrUsage) {
		t.Error(err)
	}
}

func TestMixAndMatch(t *testing.T) {
	s := testSigner(t)
	v4, v5 := publish(t, s, "machine-1", 4, created, nil), publish(t, s, "machine-1", 5, created, nil)
	// The head of one and the manifest of the other, both ways.
	_, _, err := read(v5.head, v4.manifest, v5.trust, "machine-1", now())
	refused(t, err, ErrOther)
	_, _, err = read(v4.head, v5.manifest, v5.trust, "machine-1", now())
	refused(t, err, ErrOther)
	// The document of one with the signature of the other.
	doc4, _, err := Split(v4.manifest)
	if err != nil {
		t.Fatal(err)
	}
	_, sig5, err := Split(v5.manifest)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = OpenManifest(append(bytes.Clone(doc4), sig5...), v5.trust, "machine-1")
	refused(t, err, keys.ErrSignature)
	// The index key of one for the other.
	id := testIdentity(t)
	o := testKeys(t, nameN(4), Key{4}, id)
	_, err = o.IndexKey(nameN(5), id)
	refused(t, err, ErrOther)
	// The index root of one in the place of the other.
	root := &Root{Streams: []RootStream{{Name: "disk", Size: 4096}}}
	p, err := root.Encode()
	if err != nil {
		t.Fatal(err)
	}
	_, data4, err := SealRoot(Key{4}, p, Fastest)
	if err != nil {
		t.Fatal(err)
	}
	n5, _, err := SealRoot(Key{5}, p, Fastest)
	if err != nil {
		t.Fatal(err)
	}
	_, err = OpenRoot(n5, Key{5}, data4)
	refused(t, err, ErrCorrupt)
	// A manifest that is for a later publication than the head's.
	h, _, err := OpenHead(v4.head, v4.trust, "machine-1")
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := OpenManifest(v5.manifest, v5.trust, "machine-1")
	if err != nil {
		t.Fatal(err)
	}
	refused(t, h.Check(m, h.Manifest), ErrOther)
}

func TestArbitraryInstallation(t *testing.T) {
	mine, theirs := testSigner(t), testSigner(t)
	p := publish(t, mine, "machine-1", 1, created, nil)
	evil := publish(t, theirs, "machine-1", 2, created, nil)
	_, _, err := read(evil.head, evil.manifest, p.trust, "machine-1", now())
	refused(t, err, keys.ErrUntrusted)
	_, _, err = read(p.head, evil.manifest, p.trust, "machine-1", now())
	refused(t, err, keys.ErrUntrusted)
	for _, object := range [][]byte{nil, []byte("{}\n"), p.manifest[:len(p.manifest)/2]} {
		_, _, err = OpenManifest(object, p.trust, "machine-1")
		refused(t, err, keys.ErrSignature)
	}
	_, _, err = OpenManifest(p.manifest, keys.NewAllowedSigners(), "machine-1")
	refused(t, err, keys.ErrUntrusted)
}

// TestWrongSoftware: a right image where another one is asked for.
func TestWrongSoftware(t *testing.T) {
	s := testSigner(t)
	all := trustIn(s, "*")
	web, db := publish(t, s, "web", 1, created, nil), publish(t, s, "db", 1, created, nil)
	_, _, err := read(db.head, db.manifest, all, "web", now())
	refused(t, err, ErrOther)
	_, _, err = read(web.head, db.manifest, all, "web", now())
	refused(t, err, ErrOther)
	// What was signed for one purpose is not taken for another.
	_, _, err = OpenManifest(web.head, all, "web")
	refused(t, err, keys.ErrNamespace)
	_, _, err = OpenHead(web.manifest, all, "web")
	refused(t, err, keys.ErrNamespace)
	_, _, err = OpenDomain(web.head, all, "web")
	refused(t, err, keys.ErrNamespace)
	_, _, err = OpenTrace(web.head, all, "web", Name{})
	refused(t, err, keys.ErrNamespace)
	// A signer of one image's is none of another's.
	_, _, err = OpenManifest(db.manifest, web.trust, "db")
	refused(t, err, keys.ErrUntrusted)
}

// TestEndlessData: nothing is read or made beyond what its kind can be.
func TestEndlessData(t *testing.T) {
	p := publish(t, testSigner(t), "machine-1", 1, created, nil)
	_, _, err := OpenManifest(append(bytes.Repeat([]byte{'x'}, MaxSigned), p.manifest...), p.trust, "machine-1")
	refused(t, err, ErrLimit)
	for _, d := range []document{&Head{}, &Trace{}, &KeysObject{}, &DomainDoc{}, &RunDoc{}, &Condemned{}, &Manifest{}} {
		refused(t, decode(d, make([]byte, d.limit()+1)), ErrLimit)
	}
	h := testHead()
	h.Name, h.Versions = "machine-1", nil
	for i := range MaxVersions {
		h.Versions = append(h.Versions, nameN(100+i))
	}
	if doc, err := h.Document(); err != nil || len(doc) > MaxHead {
		t.Errorf("a full head has %d bytes: %v", len(doc), err)
	}
	// Lists that say little take little: nothing is set aside for what is not there.
	empty := "{\n  \"format\": \"instar-keys\",\n  \"version\": 1,\n  \"recipients\": [\n" + strings.Repeat("    {},\n", 1<<19)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	refused(t, decode(&KeysObject{}, []byte(empty)), ErrFormat)
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 2*uint64(len(empty)) {
		t.Errorf("%d bytes made %d", len(empty), allocated)
	}
	wrapped := Wrapped{Recipient: testIdentity(t).Recipient().String(), Wrapped: make([]byte, keys.MaxWrapped+1)}
	_, err = (&KeysObject{[]Wrapped{wrapped}}).Document()
	refused(t, err, ErrUsage)
}

// TestExtraneousDependencies: what a document names is all there is; nobody
// adds to it but its signer.
func TestExtraneousDependencies(t *testing.T) {
	s := testSigner(t)
	p := publish(t, s, "machine-1", 1, created, nil)
	doc, sig, err := Split(p.manifest)
	if err != nil {
		t.Fatal(err)
	}
	pack := fmt.Sprintf("  \"packs\": [\n    {\n      \"name\": \"%s\",\n      \"size\": 1000000\n    },\n", Name{})
	more := bytes.Replace(doc, []byte("  \"packs\": [\n"), []byte(pack), 1)
	if bytes.Equal(more, doc) {
		t.Fatal("nothing added")
	}
	_, _, err = OpenManifest(append(bytes.Clone(more), sig...), p.trust, "machine-1")
	refused(t, err, keys.ErrSignature)
	// A signer's own document with fields that nobody knows.
	odd, err := Sign(t.Context(), bytes.Replace(doc, []byte("  \"tool\""), []byte("  \"depends\": \"evil\",\n  \"tool\""), 1), NamespaceImage, s)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = OpenManifest(odd, p.trust, "machine-1")
	refused(t, err, ErrFormat)
	// A recipient the store added gets nothing by standing in the list.
	id, spy := testIdentity(t), testIdentity(t)
	o := testKeys(t, nameN(1), Key{1}, id)
	o.Recipients = append(o.Recipients, Wrapped{spy.Recipient().String(), "", o.Recipients[0].Wrapped})
	if _, err = o.IndexKey(nameN(1), spy); err == nil {
		t.Error("a spy reads")
	}
}

// TestMirrorLies: one mirror of several is old or wrong; what is right on
// another still counts, and what was seen there is asked of all.
func TestMirrorLies(t *testing.T) {
	s := testSigner(t)
	old, neu := publish(t, s, "machine-1", 1, created, nil), publish(t, s, "machine-1", 2, created, nil)
	f := now()
	var got *Manifest
	for _, mirror := range []struct {
		p    *published
		want error
	}{{old, nil}, {neu, nil}, {old, ErrRollback}, {&published{trust: neu.trust, head: neu.head, manifest: old.manifest}, ErrOther}, {neu, nil}} {
		m, seen, err := read(mirror.p.head, mirror.p.manifest, neu.trust, "machine-1", f)
		refused(t, err, mirror.want)
		if err == nil {
			got, f.Seen = m, append(f.Seen, seen)
		}
	}
	if got == nil || got.Sequence != 2 {
		t.Error("not the newest")
	}
	// Two heads with one sequence: the signer, or a thief, told two stories.
	fork := publish(t, s, "machine-1", 2, created.Add(time.Second), nil)
	_, _, err := read(fork.head, fork.manifest, fork.trust, "machine-1", f)
	refused(t, err, ErrForked)
}

// TestKeyCompromise: keys come and go by the allowed_signers file alone.
func TestKeyCompromise(t *testing.T) {
	a, b := testSigner(t), testSigner(t)
	line := func(s keys.Signer, change func(*keys.AllowedSigner)) keys.AllowedSigner {
		e := trustIn(s, "*").Entries()[0]
		if change != nil {
			change(&e)
		}
		return e
	}
	first, second := publish(t, a, "machine-1", 1, created, nil), publish(t, b, "machine-1", 2, created.Add(time.Minute), nil)
	rotated := keys.NewAllowedSigners(line(a, func(e *keys.AllowedSigner) { e.ValidBefore = created }), line(b, nil))
	// What a retired key signed in its time still counts; what it signs now does not.
	_, seen, err := read(first.head, first.manifest, rotated, "machine-1", now())
	if err != nil {
		t.Fatal(err)
	}
	f := now()
	f.Seen = []Seen{seen}
	if _, _, err := read(second.head, second.manifest, rotated, "machine-1", f); err != nil {
		t.Error(err)
	}
	late := publish(t, a, "machine-1", 3, created.Add(time.Minute), nil)
	_, _, err = read(late.head, late.manifest, rotated, "machine-1", f)
	refused(t, err, keys.ErrExpired)
	// Part of an image by a key that counts, part by one that does not.
	_, _, err = read(second.head, late.manifest, rotated, "machine-1", f)
	refused(t, err, keys.ErrExpired)
	// A thief dates back. That a key is out of the file is what stops it.
	back := publish(t, a, "machine-1", 3, created.Add(-time.Minute), nil)
	_, _, err = read(back.head, back.manifest, keys.NewAllowedSigners(line(b, nil)), "machine-1", f)
	refused(t, err, keys.ErrUntrusted)
	// A key for one image, or one purpose, does not reach further.
	narrow := keys.NewAllowedSigners(line(a, func(e *keys.AllowedSigner) { e.Principals = "machine-2" }), line(b, nil))
	_, _, err = OpenManifest(first.manifest, narrow, "machine-1")
	refused(t, err, keys.ErrUntrusted)
	heads := keys.NewAllowedSigners(line(a, func(e *keys.AllowedSigner) { e.Namespaces = NamespaceHead }), line(b, nil))
	if _, _, err = OpenHead(first.head, heads, "machine-1"); err != nil {
		t.Error(err)
	}
	_, _, err = OpenManifest(first.manifest, heads, "machine-1")
	refused(t, err, keys.ErrUntrusted)
}
