package launch

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
)

// TestInstarObjects: where URLs are signed, all of an Instar image has one.
func TestInstarObjects(t *testing.T) {
	w := newWorld(t)
	signer, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "k"), "test")
	if err != nil {
		t.Fatal(err)
	}
	name := func(s string) chunked.Name { return chunked.NameOf([]byte(s)) }
	objects := func(names ...string) []chunked.ObjectSize {
		var list []chunked.ObjectSize
		for _, s := range names {
			list = append(list, chunked.ObjectSize{Name: name(s), Size: 1 << 20})
		}
		slices.SortFunc(list, func(a, b chunked.ObjectSize) int { return a.Name.Compare(b.Name) })
		return list
	}
	m := &chunked.Manifest{
		Name: "web", Sequence: 1, Created: time.Now().UTC().Truncate(time.Second), Domain: "main", Architecture: "x86_64", Partition: "none", Filesystem: "ext4",
		Streams: []chunked.Content{{Name: chunked.StreamDisk, Size: 1 << 30}}, Index: chunked.IndexRef{Root: objects("root")[0], Segments: objects("s1", "s2")},
		Packs: objects("p1", "p2", "p3"), Data: 1 << 20, Tool: "test",
	}
	data, err := m.Sign(t.Context(), signer)
	if err != nil {
		t.Fatal(err)
	}
	n := chunked.NameOf(data)
	key := chunked.ManifestKey("web", n)
	file := filepath.Join(w.store, filepath.FromSlash(key))
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	w.instance.Launch = &metadata.Launch{
		Format: "instar", Store: "file://" + w.store, Manifest: key, ManifestSHA256: n.String(),
		Signers: keys.AllowedSigner{Principals: "*", Key: signer.Public()}.String(), IndexKey: "AGE-SECRET-KEY-1X",
	}
	w.serve(t, metadata.Options{})
	got, err := w.client(t, ticket.Options{}).Claim(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		key, chunked.KeysKey("web", n), chunked.TraceKey("web", n), chunked.IndexObjectKey(name("root")), chunked.IndexObjectKey(name("s1")), chunked.IndexObjectKey(name("s2")),
		chunked.PackKey(name("p1")), chunked.PackKey(name("p2")), chunked.PackKey(name("p3")),
	}
	for _, k := range want {
		if !strings.HasPrefix(got.Objects[k], "https://store.example/"+k) {
			t.Errorf("no URL for %s", k)
		}
	}
	if len(got.Objects) != len(want) {
		t.Errorf("%d URLs for %d objects", len(got.Objects), len(want))
	}

	w.moved(t, name)

	if err := os.WriteFile(file, append(data, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "another manifest in the store", err, 403, "is not the record's")
}

// moved: what became of packs has URLs too, over as many hops as there are, and
// what is no moved object, or leads nowhere, none more. Without the right to list
// the ticket is as before, and the log says so.
func (w *world) moved(t *testing.T, name func(string) chunked.Name) {
	t.Helper()
	put := func(key string, data []byte) {
		file := filepath.Join(w.store, filepath.FromSlash(key))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	move := func(from string, to ...string) {
		m := &chunked.Moved{}
		for i, s := range to {
			m.Packs = append(m.Packs, chunked.ObjectSize{Name: name(s), Size: 1 << 20})
			m.Entries = append(m.Entries, chunked.MovedChunk{From: int64(1000 * (i + 1)), To: 100, Sealed: 50, Pack: uint32(i)})
		}
		slices.SortFunc(m.Packs, func(a, b chunked.ObjectSize) int { return a.Name.Compare(b.Name) })
		data, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		put(chunked.MovedKey(name(from)), data)
	}
	claim := func() map[string]string {
		got, err := w.client(t, ticket.Options{}).Claim(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return got.Objects
	}
	w.instance.Launch.Reclaims = 100
	w.serve(t, metadata.Options{})
	before := len(claim())
	move("p1", "q1", "q2")
	move("q1", "r1")
	move("r1", "p2") // back to a pack of the image
	move("elsewhere", "other")
	put(chunked.MovedKey(name("p3")), []byte("nonsense"))
	for range 2 { // read, and remembered
		got := claim()
		for _, key := range []string{
			chunked.MovedKey(name("p1")), chunked.PackKey(name("q1")), chunked.PackKey(name("q2")), chunked.MovedKey(name("q1")), chunked.PackKey(name("r1")),
			chunked.MovedKey(name("r1")), chunked.MovedKey(name("p3")),
		} {
			if got[key] == "" {
				t.Errorf("no URL for %s", key)
			}
		}
		if len(got) != before+7 {
			t.Errorf("%d URLs, %d without what was moved", len(got), before)
		}
	}
	// A circle ends.
	move("p2", "p1")
	if got := claim(); len(got) != before+8 {
		t.Errorf("%d URLs in a circle, %d without what was moved", len(got), before)
	}
	// Another target at the same place.
	move("q1", "r1", "r2")
	if got := claim(); got[chunked.PackKey(name("r2"))] == "" {
		t.Error("what was moved again has no URL")
	}
	w.unlisted = true
	if got := claim(); len(got) != before {
		t.Errorf("%d URLs by who may not list, %d without what was moved", len(got), before)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if last := w.notes[len(w.notes)-1]; !strings.Contains(last, "may not be listed") {
		t.Errorf("the log has %q", last)
	}
}
