package faults

import (
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// imaging is what the runs of create-image work on: a tree, its next version,
// which shares the inodes of what did not change, and a store with the first.
type imaging struct {
	trees   [2]string
	store   string               // a directory: has an image of the first tree
	digests [3][sha256.Size]byte // of the disks: of each version, and of the second laid out afresh
}

func newImaging(t testing.TB, i *instar.Instar) *imaging {
	t.Helper()
	top := t.TempDir()
	m := &imaging{trees: [2]string{top + "/v1", top + "/v2"}, store: t.TempDir() + "/store"}
	loopfs.Run(t, "bash", "-ec", `
mkdir -p "$1/etc" "$1/usr"; cd "$1"; echo x >etc/hostname; head -c 700000 /dev/urandom >usr/large
for i in $(seq 20); do head -c $((i * 999)) /dev/urandom >usr/small-$i; done
cp -al "$1" "$2"; cd "$2"; rm usr/small-3; echo y >etc/new; mv etc/new etc/hostname; head -c 5000 /dev/urandom >usr/more
touch -r "$1" "$2" # the root's own time`, "bash", m.trees[0], m.trees[1])
	time.Sleep(3100 * time.Millisecond) // what was just written would be in doubt
	for n, tree := range []string{m.trees[0], m.trees[1], m.trees[1]} {
		store := t.TempDir() + "/store"
		switch n {
		case 0:
			store = m.store
		case 1:
			loopfs.Run(t, "cp", "-a", m.store, store)
		}
		i.Want(t, instar.OK, createImage(tree, store)...)
		got, ok := disk(t, i, store, upload.Options{})
		if !ok {
			t.Fatal("no image was made")
		}
		m.digests[n] = got
	}
	if m.digests[0] == m.digests[1] {
		t.Fatal("the two versions are the same")
	}
	return m
}

func createImage(tree, store string) []string {
	return []string{"create-image", "--store", store, "--name", "web", "-v", tree, "--no-filter", "-s", "16", "--uuid", "0f0e0d0c-0b0a-4908-8706-050403020100"}
}

// disk reads and verifies the newest image; false if there is none.
func disk(t testing.TB, i *instar.Instar, store string, o upload.Options) (sum [sha256.Size]byte, ok bool) {
	t.Helper()
	if filepath.IsAbs(store) {
		store = "file://" + store
	}
	objects, err := upload.Open(t.Context(), store, o)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, upload.ErrNoBucket) {
		return sum, false
	}
	if err != nil {
		t.Fatal(err)
	}
	defer objects.Close()
	m := machine.Open(machine.Options{Dir: filepath.Join(i.Home, "etc")})
	ids, err := m.Identities()
	if err != nil {
		t.Fatal(err)
	}
	trust, err := m.Signers(nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := images.Open(objects, images.Options{Trust: trust, Identities: ids})
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Resolve(t.Context(), "web", images.ResolveOptions{})
	if errors.Is(err, images.ErrNoImage) {
		return sum, false
	}
	if err != nil {
		t.Fatal(err)
	}
	x, err := img.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range x.Streams() {
		d, err := x.Stream(name)
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(d.ReaderAt(t.Context(), 32<<20), 0, d.Size())); err != nil {
			t.Fatalf("stream %s: %v", name, err)
		}
		if name == chunked.StreamDisk {
			sum = [sha256.Size]byte(h.Sum(nil))
		}
	}
	return sum, true
}

// imageIs fails the test unless the newest image is one of the given versions.
func imageIs(t testing.TB, w *world, store string, o upload.Options, mayLack bool, versions ...int) {
	t.Helper()
	got, ok := disk(t, w.Instar, store, o)
	if !ok {
		if !mayLack {
			t.Error("there is no image")
		}
		return
	}
	for _, v := range versions {
		if got == w.digests[v] {
			return
		}
	}
	t.Errorf("the newest image is none of versions %v", versions)
}

func imageJobs() []job {
	return []job{
		{
			name: "create-image",
			args: func(w *world, dir string) []string { return createImage(w.trees[0], dir+"/store") },
			whole: func(t testing.TB, w *world, dir string) {
				t.Helper()
				imageIs(t, w, dir+"/store", upload.Options{}, false, 0)
			},
			sound: func(t testing.TB, w *world, dir string) {
				t.Helper()
				imageIs(t, w, dir+"/store", upload.Options{}, true, 0)
			},
		},
		{
			name: "create-image of the next version",
			prepare: func(t testing.TB, w *world, dir string) {
				loopfs.Run(t, "cp", "-a", w.store, dir+"/store")
			},
			args: func(w *world, dir string) []string { return createImage(w.trees[1], dir+"/store") },
			whole: func(t testing.TB, w *world, dir string) {
				t.Helper()
				imageIs(t, w, dir+"/store", upload.Options{}, false, 1, 2)
			},
			sound: func(t testing.TB, w *world, dir string) {
				t.Helper()
				imageIs(t, w, dir+"/store", upload.Options{}, false, 0, 1, 2)
			},
		},
	}
}

func imageTransfers() []transfer {
	store := func(r *remote, prefix string) (string, upload.Options) {
		return "s3://" + r.bucket + "/" + prefix, upload.Options{
			Endpoint: r.server.Endpoint, Credentials: &upload.Credentials{AccessKeyID: r.server.AccessKey, SecretAccessKey: r.server.SecretKey},
		}
	}
	is := func(mayLack bool, versions ...int) func(t testing.TB, r *remote, prefix, _ string) {
		return func(t testing.TB, r *remote, prefix, _ string) {
			t.Helper()
			url, o := store(r, prefix)
			imageIs(t, r.world, url, o, mayLack, versions...)
		}
	}
	return []transfer{
		{
			name: "create-image",
			args: func(r *remote, prefix, _ string) []string {
				return createImage(r.trees[0], r.bucket+"/"+prefix)
			},
			whole: is(false, 0), sound: is(true, 0),
		},
		{
			name: "create-image of the next version",
			prepare: func(t testing.TB, r *remote, prefix string) {
				r.Want(t, instar.OK, createImage(r.trees[0], r.bucket+"/"+prefix)...)
			},
			args: func(r *remote, prefix, _ string) []string {
				return createImage(r.trees[1], r.bucket+"/"+prefix)
			},
			whole: is(false, 1, 2), sound: is(false, 0, 1, 2),
		},
	}
}
