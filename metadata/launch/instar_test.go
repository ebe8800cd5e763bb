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

	if err := os.WriteFile(file, append(data, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "another manifest in the store", err, 403, "is not the record's")
}
