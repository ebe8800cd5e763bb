package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// The attacks on a repository that The Update Framework names, by whoever owns
// the store, on a catalog.

// world is a catalog with a past: states[i] are the store's objects after
// change i+1.
type world struct {
	t      *testing.T
	mem    *objectsInMemory
	signer keys.Signer
	now    time.Time
	states []map[string]memObject
}

func newWorld(t *testing.T, changes int, o func(*Options)) *world {
	t.Helper()
	w := &world{t: t, mem: newMemory(), signer: testSigner(t), now: time.Date(2026, 11, 22, 5, 0, 0, 0, time.UTC)}
	c := w.catalog(func(x *Options) {
		if o != nil {
			o(x)
		}
	})
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	w.states = append(w.states, w.mem.snapshot())
	for i := range changes - 1 {
		record(t, c, alice, fmt.Sprintf("image-%d", i))
		w.states = append(w.states, w.mem.snapshot())
	}
	return w
}

func (w *world) catalog(o func(*Options)) *Catalog {
	return open(w.t, w.mem.client(nil), w.signer, func(x *Options) {
		x.Now = func() time.Time { return w.now }
		if o != nil {
			o(x)
		}
	})
}

// read looks at everything.
func read(ctx context.Context, c *Catalog) error {
	v, err := c.View(ctx)
	if err != nil {
		return err
	}
	return v.Load(ctx)
}

func (w *world) refused(c *Catalog, name string, want ...error) {
	w.t.Helper()
	err := read(w.t.Context(), c)
	for _, e := range want {
		if errors.Is(err, e) {
			return
		}
	}
	w.t.Errorf("%s: %v, want %v", name, err, want)
}

func (w *world) fine(c *Catalog, name string) {
	w.t.Helper()
	if err := read(w.t.Context(), c); err != nil {
		w.t.Errorf("%s: %v", name, err)
	}
}

func (w *world) head(i int) []byte { return w.states[i][HeadKey].data }

// TestRollback: 14 cases.
func TestRollback(t *testing.T) {
	w := newWorld(t, 6, nil)
	state := t.TempDir()
	remembering := func() *Catalog { return w.catalog(func(o *Options) { o.State = state }) }
	w.fine(remembering(), "the newest")
	last := len(w.states) - 1
	for i := range last {
		w.mem.restore(w.states[i])
		w.refused(remembering(), fmt.Sprintf("the whole store as after change %d", i+1), ErrRollback)
		w.mem.restore(w.states[last])
		w.mem.set(HeadKey, w.head(i))
		w.refused(remembering(), fmt.Sprintf("the head of change %d alone", i+1), ErrRollback)
	}
	w.mem.restore(map[string]memObject{})
	w.refused(remembering(), "an empty store", ErrRollback)
	w.mem.restore(w.states[2])
	w.refused(w.catalog(func(o *Options) { o.AtLeast = 6 }), "less than is asked for", ErrRollback)
	w.mem.restore(w.states[last])
	open := w.catalog(nil) // remembers as long as it is open
	w.fine(open, "the newest")
	w.mem.restore(w.states[3])
	w.refused(open, "while it is open", ErrRollback)
	if err := open.Update(t.Context(), func(tx *Tx) error { tx.touch(); return nil }); !errors.Is(err, ErrRollback) {
		t.Errorf("a change on top of an old state: %v", err)
	}
}

// TestForked: another state under a sequence that was seen. 2 cases.
func TestForked(t *testing.T) {
	w := newWorld(t, 3, nil)
	c := w.catalog(nil)
	w.fine(c, "one")
	w.mem.restore(w.states[1])
	record(t, w.catalog(nil), bob, "another third change")
	w.refused(c, "another third change", ErrForked)
	record(t, w.catalog(nil), bob, "and a fourth")
	w.fine(c, "what follows it cannot be told apart") // nobody can: the signer signed both
}

// TestFreeze: 5 cases.
func TestFreeze(t *testing.T) {
	w := newWorld(t, 3, func(o *Options) { o.Expires = time.Hour })
	c := w.catalog(nil)
	w.now = w.now.Add(59 * time.Minute)
	w.fine(c, "in time")
	aged := w.catalog(func(o *Options) { o.MaxAge = 30 * time.Minute })
	w.refused(aged, "older than the reader wants", ErrStale)
	w.now = w.now.Add(2 * time.Minute)
	w.refused(c, "expired, seen before", ErrStale)
	w.refused(w.catalog(nil), "expired, never seen", ErrStale)
	if err := w.catalog(nil).Renew(t.Context()); !errors.Is(err, ErrStale) {
		t.Errorf("renewed by who cannot know that it is the newest: %v", err)
	}
}

// TestFastForward: 3 cases. A stolen key signs the highest sequence there is;
// without the key the catalog goes on.
func TestFastForward(t *testing.T) {
	w := newWorld(t, 3, nil)
	thief := testSigner(t)
	both := trustIn(w.signer.Public(), thief.Public())
	state := t.TempDir()
	victim := func(trust *keys.AllowedSigners) *Catalog {
		return w.catalog(func(o *Options) { o.Trust, o.State = trust, state })
	}
	w.fine(victim(both), "before")
	good := w.mem.snapshot()
	v, err := w.catalog(nil).View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := *v.root
	r.Sequence = maxNumber
	b, err := r.encode()
	if err != nil {
		t.Fatal(err)
	}
	h := &head{Region: "test-1", Sequence: maxNumber, Root: chunked.NameOf(b), Size: int64(len(b)), Created: w.now}
	object, err := h.sign(t.Context(), thief)
	if err != nil {
		t.Fatal(err)
	}
	w.mem.set(DataFold+h.Root.String(), b)
	w.mem.set(HeadKey, object)
	w.fine(victim(both), "by a key that is trusted")
	w.mem.restore(good)
	w.refused(victim(both), "back to before it", ErrRollback)
	w.fine(victim(trustIn(w.signer.Public())), "once the key is taken out")
}

// TestMixAndMatch: 8 cases. Parts of different states or catalogs.
func TestMixAndMatch(t *testing.T) {
	w := newWorld(t, 5, nil)
	v, err := w.catalog(nil).View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	old := newMemory()
	old.restore(w.states[2])
	ov, err := open(t, old.client(nil), w.signer, nil).View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, of chunked.Name) {
		w.mem.restore(w.states[4])
		w.mem.set(DataFold+name.String(), w.mem.m[DataFold+of.String()].data)
	}
	put(v.head.Root, ov.head.Root)
	w.refused(w.catalog(nil), "the root of an older state", ErrDamaged)
	put(v.root.Pages[0].Name, ov.root.Pages[0].Name)
	w.refused(w.catalog(nil), "a page of an older state", ErrDamaged)
	put(v.head.Root, v.root.Pages[0].Name)
	w.refused(w.catalog(nil), "a page for the root", ErrDamaged)
	put(v.root.Pages[0].Name, v.head.Root)
	w.refused(w.catalog(nil), "the root for a page", ErrDamaged)
	// Another catalog of the same signer.
	other := newMemory()
	oc := open(t, other.client(nil), w.signer, nil)
	if err := oc.Create(t.Context(), "test-2"); err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	mine := func() *Catalog { return w.catalog(func(o *Options) { o.State = state }) }
	w.mem.restore(w.states[4])
	w.fine(mine(), "mine")
	w.mem.restore(other.snapshot())
	w.refused(mine(), "another region's catalog", ErrOther)
	w.refused(w.catalog(func(o *Options) { o.Region = "test-1" }), "another region's than asked for", ErrOther)
	// A head whose root is of another sequence, or region.
	for _, x := range []struct {
		region   string
		sequence int64
	}{{"test-1", 9}, {"test-9", 5}} {
		w.mem.restore(w.states[4])
		h := &head{Region: x.region, Sequence: x.sequence, Root: v.head.Root, Size: v.head.Size, Created: w.now}
		object, err := h.sign(t.Context(), w.signer)
		if err != nil {
			t.Fatal(err)
		}
		w.mem.set(HeadKey, object)
		w.refused(w.catalog(nil), fmt.Sprintf("a head of %s, %d with the root of another", x.region, x.sequence), ErrOther)
	}
}

// TestArbitraryInstall: 24 cases. Heads nobody signed for the catalog.
func TestArbitraryInstall(t *testing.T) {
	w := newWorld(t, 2, nil)
	doc, sig, err := chunked.Split(w.head(1))
	if err != nil {
		t.Fatal(err)
	}
	try := func(name string, object []byte) {
		w.mem.set(HeadKey, object)
		w.refused(w.catalog(nil), name, keys.ErrSignature, keys.ErrUntrusted, keys.ErrNamespace, ErrFormat, ErrVersion, ErrOther)
	}
	try("unsigned", doc)
	try("a signature of nothing", sig)
	stranger := testSigner(t)
	h, _, err := openHead(w.head(1), trustIn(w.signer.Public()), "")
	if err != nil {
		t.Fatal(err)
	}
	object, err := h.sign(t.Context(), stranger)
	if err != nil {
		t.Fatal(err)
	}
	try("by a stranger", object)
	for _, ns := range []string{chunked.NamespaceImage, chunked.NamespaceHead, chunked.NamespaceDomain, chunked.NamespaceTrace, "file"} {
		object, err := chunked.Sign(t.Context(), doc, ns, w.signer)
		if err != nil {
			t.Fatal(err)
		}
		try("signed as "+ns, object)
	}
	for i := range 16 {
		b := bytes.Clone(w.head(1))
		b[i*len(b)/16] ^= 1
		try(fmt.Sprintf("byte %d changed", i*len(b)/16), b)
	}
}

// TestWrongPrincipal: 2 cases. A key that speaks for other regions, or for no
// catalog.
func TestWrongPrincipal(t *testing.T) {
	w := newWorld(t, 2, nil)
	for name, line := range map[string]keys.AllowedSigner{
		"another region's": {Principals: "eu-*", Namespaces: Namespace, Key: w.signer.Public()},
		"images' alone":    {Principals: "*", Namespaces: "instar-image,instar-head", Key: w.signer.Public()},
	} {
		w.refused(w.catalog(func(o *Options) { o.Trust = keys.NewAllowedSigners(line) }), name, keys.ErrUntrusted)
	}
}

// TestKeyRotation: 5 cases.
func TestKeyRotation(t *testing.T) {
	w := newWorld(t, 3, nil)
	next := testSigner(t)
	state := t.TempDir()
	with := func(s keys.Signer, trusted ...ssh.PublicKey) *Catalog {
		return w.catalog(func(o *Options) { o.Signer, o.Trust, o.State = s, trustIn(trusted...), state })
	}
	w.fine(with(w.signer, w.signer.Public()), "the old key")
	record(t, with(next, w.signer.Public(), next.Public()), alice, "by the new key")
	w.fine(with(next, next.Public()), "the old key taken out, the new one signed last")
	w.refused(with(w.signer, w.signer.Public()), "who does not know the new key", keys.ErrUntrusted)
	w.mem.restore(w.states[2])
	w.refused(with(next, next.Public()), "back to a head by the old key", keys.ErrUntrusted)
	retired := keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: w.signer.Public(), ValidBefore: w.now.Add(-time.Hour)})
	w.refused(w.catalog(func(o *Options) { o.Trust = retired }), "a head from after the key retired", keys.ErrExpired)
}

// TestEndlessData: 4 cases. What is longer than it may be is not read.
func TestEndlessData(t *testing.T) {
	w := newWorld(t, 2, nil)
	v, err := w.catalog(nil).View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	long := bytes.Repeat([]byte("x"), maxHead+keys.MaxSignature+1)
	w.mem.set(HeadKey, long)
	w.refused(w.catalog(nil), "a head without end", upload.ErrTooLarge)
	w.mem.restore(w.states[1])
	w.mem.set(DataFold+v.head.Root.String(), append(bytes.Clone(w.mem.m[DataFold+v.head.Root.String()].data), long...))
	w.refused(w.catalog(nil), "a root with more behind it", ErrDamaged)
	w.mem.restore(w.states[1])
	w.mem.set(DataFold+v.root.Pages[0].Name.String(), bytes.Repeat([]byte("x"), maxPage+1))
	w.refused(w.catalog(nil), "a page without end", upload.ErrTooLarge)
	w.mem.restore(w.states[1])
	w.mem.set(DataFold+v.head.Root.String(), bytes.Repeat([]byte("x"), maxRoot+1))
	w.refused(w.catalog(nil), "a root without end", upload.ErrTooLarge)
}

// TestExtraneous: 5 cases. What is more than the form allows, and what lies
// about.
func TestExtraneous(t *testing.T) {
	w := newWorld(t, 3, nil)
	w.mem.set(DataFold+strings.Repeat("0", 64), []byte("nobody refers to this"))
	w.mem.set("catalog/other", []byte("nor to this"))
	w.fine(w.catalog(nil), "objects nobody refers to")
	doc, _, err := chunked.Split(w.head(2))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(string) string{
		"a field more":        func(s string) string { return strings.Replace(s, `{"format"`, `{"x":1,"format"`, 1) },
		"a field twice":       func(s string) string { return strings.Replace(s, `"sequence":3`, `"sequence":3,"sequence":3`, 1) },
		"blanks":              func(s string) string { return strings.Replace(s, `,`, `, `, 1) },
		"another format":      func(s string) string { return strings.Replace(s, formatHead, formatRoot, 1) },
		"a later version":     func(s string) string { return strings.Replace(s, `"version":1`, `"version":2`, 1) },
		"a key in upper case": func(s string) string { return strings.Replace(s, `"region"`, `"Region"`, 1) },
	} {
		object, err := chunked.Sign(t.Context(), []byte(change(string(doc))), Namespace, w.signer)
		if err != nil {
			t.Fatal(err)
		}
		w.mem.set(HeadKey, object)
		w.refused(w.catalog(nil), name, ErrFormat, ErrVersion)
	}
}

// TestMirrorLies: 3 cases. Objects that are not there.
func TestMirrorLies(t *testing.T) {
	w := newWorld(t, 3, nil)
	v, err := w.catalog(nil).View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]string{"root": DataFold + v.head.Root.String(), "page": DataFold + v.root.Pages[0].Name.String()} {
		w.mem.restore(w.states[2])
		delete(w.mem.m, key)
		w.refused(w.catalog(nil), "the "+name+" is gone", upload.ErrNotExist)
	}
	w.mem.restore(w.states[2])
	delete(w.mem.m, HeadKey)
	w.refused(w.catalog(nil), "no head, and never seen one", ErrNoCatalog)
}

// TestKeepFresh: the time for which a state is good is kept by changes, and begun
// again when half of it is over.
func TestKeepFresh(t *testing.T) {
	w := newWorld(t, 2, func(o *Options) { o.Expires = 2 * time.Hour })
	c := w.catalog(nil) // which says nothing of it
	expect := func(name string, sequence int64, left time.Duration) {
		t.Helper()
		v, err := w.catalog(nil).View(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := v.Expires().Sub(w.now); v.Sequence() != sequence || !v.Expires().IsZero() && got != left || v.Expires().IsZero() != (left == 0) {
			t.Errorf("%s: change %d, good for %s; want %d, %s", name, v.Sequence(), got, sequence, left)
		}
	}
	keep := func(name string, did bool) {
		t.Helper()
		if got, err := c.KeepFresh(t.Context()); err != nil || got != did {
			t.Errorf("%s: renewed is %v, %v", name, got, err)
		}
	}
	w.now = w.now.Add(59 * time.Minute)
	keep("before half", false)
	record(t, c, alice, "another")
	expect("a change by who says nothing", 3, 2*time.Hour)
	w.now = w.now.Add(time.Hour)
	keep("at half", true)
	keep("at once again", false)
	expect("renewed", 4, 2*time.Hour)
	w.now = w.now.Add(2*time.Hour + time.Second)
	if _, err := c.KeepFresh(t.Context()); !errors.Is(err, ErrStale) {
		t.Errorf("too late: %v", err)
	}
	lapsed := w.catalog(func(o *Options) { o.Lapsed = true })
	if err := lapsed.Renew(t.Context()); err != nil {
		t.Error(err)
	}
	expect("renewed by who knows", 5, 2*time.Hour)
	if err := w.catalog(func(o *Options) { o.Expires = -1 }).Renew(t.Context()); err != nil {
		t.Error(err)
	}
	expect("for ever", 6, 0)
	keep("for ever", false)
	// Who takes what has expired takes nothing older than it has seen.
	state := t.TempDir()
	w.fine(w.catalog(func(o *Options) { o.State = state }), "the newest")
	w.mem.restore(w.states[1])
	w.refused(w.catalog(func(o *Options) { o.State, o.Lapsed = state, true }), "lapsed, and old", ErrRollback)
}

// TestClockBehind: nobody whose clock is behind makes the newest state one that is
// expired for everybody else; who knows better may say so.
func TestClockBehind(t *testing.T) {
	w := newWorld(t, 2, func(o *Options) { o.Expires = time.Hour })
	before, was := w.mem.snapshot(), w.now
	try := func(lapsed bool) error {
		return w.catalog(func(o *Options) { o.Lapsed = lapsed }).Renew(t.Context())
	}
	w.now = was.Add(-ClockSlack - time.Second)
	err := try(false)
	if !errors.Is(err, ErrClock) || !strings.Contains(err.Error(), "set this machine's clock") {
		t.Errorf("a clock that is behind: %v", err)
	}
	if after := w.mem.snapshot(); len(after) != len(before) || after[HeadKey].etag != before[HeadKey].etag {
		t.Error("something was stored")
	}
	w.now = was.Add(-ClockSlack)
	if err := try(false); err != nil {
		t.Errorf("a clock that may be so: %v", err)
	}
	w.now = w.now.Add(-2 * ClockSlack)
	if err := try(true); err != nil {
		t.Errorf("renewed by who knows: %v", err)
	}
}
