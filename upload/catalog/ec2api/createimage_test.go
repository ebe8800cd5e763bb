package ec2api_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/tasks"
	"github.com/instar-image/instar/upload/images"
)

// TestForgedStatus: a status is anybody's who may write the bucket. One that names
// what the instance signed before it was asked makes no image of that.
func TestForgedStatus(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	trust := keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: w.signer.Public()})
	all, err := images.Open(w.store, images.Options{Trust: trust})
	if err != nil {
		t.Fatal(err)
	}
	clock := func() time.Time { return w.now }
	if w.catalog, err = catalog.Open(w.store, catalog.Options{Trust: w.trust, Signer: w.signer, Now: clock, Images: all}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "accounts.yaml")
	if err := os.WriteFile(file, []byte(accountsYAML), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := ec2api.ReadAccounts(file)
	if err != nil {
		t.Fatal(err)
	}
	w.api, err = ec2api.New(ec2api.Options{Catalog: w.catalog, Accounts: func() *ec2api.Accounts { return a }, Region: region, Tasks: w.tasks, Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string, object []byte, err error) {
		t.Helper()
		if err == nil {
			_, err = upload.PutBytes(ctx, w.store, key, object, upload.PutOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var versions []chunked.Name
	for i, at := range []time.Time{w.now.AddDate(-1, 0, 0), w.now} {
		m := &chunked.Manifest{
			Name: "i-a1", Sequence: int64(i + 1), Created: at, Domain: "default", Architecture: "x86_64", Partition: "none", Filesystem: "ext4",
			Streams: []chunked.Content{{Name: chunked.StreamDisk, Size: 1 << 20}, {Name: chunked.StreamLayout, Size: 1 << 10}},
			Index:   chunked.IndexRef{Root: chunked.ObjectSize{Name: chunked.NameOf([]byte("root")), Size: 900}},
			Packs:   []chunked.ObjectSize{}, Tool: "test",
		}
		object, err := m.Sign(ctx, w.signer)
		versions = append(versions, chunked.NameOf(object))
		put(chunked.ManifestKey("i-a1", versions[i]), object, err)
	}
	head, err := (&chunked.Head{Name: "i-a1", Sequence: 2, Manifest: versions[1], Versions: versions[:1], Created: w.now}).Sign(ctx, w.signer)
	put(chunked.HeadKey("i-a1"), head, err)
	for i, want := range []string{"failed Client.InvalidManifest", "available "} {
		id := w.want("", alice, "CreateImage", "InstanceId", "i-a1", "Name", []string{"forged", "made"}[i]).first("imageId")
		waiting, _, err := w.tasks.Waiting(ctx, "i-a1")
		if err != nil || len(waiting) != 1 {
			t.Fatalf("waiting: %v, %v", waiting, err)
		}
		put(tasks.Prefix+"i-a1/"+waiting[0].ID+"/status", []byte(`{"state":"complete","manifest":"i-a1@`+versions[i].String()+`"}`), nil)
		r := w.want("", alice, "DescribeImages", "ImageId.1", id)
		if got := r.first("imageState") + " " + r.first("code"); got != want {
			t.Errorf("it is %s, want %s", got, want)
		}
	}
}
