package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload/s3fault"
)

// TestChanges changes files between the moment the capture has seen them and
// the moment it reads them: the store stands still meanwhile. The image must be
// a sound filesystem, each change named, everything else exact.
func TestChanges(t *testing.T) {
	server := servers.MinIO(t)
	proxy := s3fault.New(server.Endpoint)
	t.Cleanup(proxy.Close)
	i := instar.New(t, server.Env()...).With("AWS_ENDPOINT_URL=" + proxy.URL)

	root := loopfs.Make(t, "ext4", 1<<30)
	populate(t, root)
	// So much stands before the victims that no buffer reaches them.
	loopfs.Run(t, "bash", "-ec", `
cd "$1"
mkdir aaa zzz
head -c 200M /dev/urandom > aaa/big
for f in shrinks empties grows vanishes renewed replaced becomes-fifo becomes-link rewritten stays; do head -c 100000 /dev/urandom > zzz/$f; done
ln zzz/shrinks zzz/shrinks-too
mkdir zzz/dir; echo x > zzz/dir/inside; echo outside > aaa/outside`, "bash", root)
	before := map[string]string{}
	for _, f := range names(t, filepath.Join(root, "zzz")) {
		if f != "dir" {
			before[f] = read(t, filepath.Join(root, "zzz", f))
		}
	}

	var once sync.Once
	proxy.Plan(func(r s3fault.Request) s3fault.Fault {
		if r.Method == "PUT" && strings.Contains(r.Path, ".part.") {
			once.Do(func() {
				loopfs.Run(t, "bash", "-ec", `
cd "$1/zzz"
truncate -s 5000 shrinks; : > empties; echo more >> grows; rm vanishes
mv renewed old; echo other > renewed; mv replaced away; echo other > replaced; chmod 600 replaced; rm becomes-fifo; mkfifo becomes-fifo; ln -sf ../aaa/outside becomes-link
head -c 100000 /dev/zero | tr '\0' z | dd of=rewritten conv=notrunc status=none
mv dir dir2; ln -s ../aaa dir`, "bash", root)
			})
		}
		return s3fault.None
	})
	at := server.Bucket(t) + "/change"
	r := i.Want(t, instar.Changed, vol(i, root, "-p", "changed", "-b", at)...)
	for _, f := range []string{"shrinks", "empties", "grows", "vanishes", "renewed", "replaced", "becomes-fifo", "becomes-link", "rewritten"} {
		if !strings.Contains(r.Stderr, "zzz/"+f) {
			t.Errorf("zzz/%s is not named", f)
		}
	}
	if strings.Contains(r.Stderr, "zzz/stays") {
		t.Error("zzz/stays is named, but did not change")
	}
	if t.Failed() {
		t.Log(r)
	}

	image := filepath.Join(t.TempDir(), "image")
	i.Want(t, instar.OK, "download-and-unbundle", "-b", at, "-p", "changed", "-k", i.Keys.UserKey, "-d", image)
	fsck(t, image)
	got := loopfs.Mount(t, image, "ro")
	content := func(f string) string { return read(t, filepath.Join(got, "zzz", f)) }

	// A file that shrank ends where it ended when it was read; one that grew, where
	// it ended when it was planned. One that was renewed, with the same owner and
	// mode, has its new content.
	for f, want := range map[string]string{
		"shrinks": before["shrinks"][:5000], "shrinks-too": before["shrinks"][:5000],
		"empties": "", "grows": before["grows"], "stays": before["stays"],
		"rewritten": strings.Repeat("z", 100_000), "renewed": "other\n",
	} {
		if content(f) != want {
			t.Errorf("zzz/%s holds other bytes than it should", f)
		}
	}
	for _, f := range []string{"vanishes", "replaced", "becomes-fifo", "becomes-link"} {
		if _, err := os.Lstat(filepath.Join(got, "zzz", f)); !os.IsNotExist(err) {
			t.Errorf("zzz/%s is in the image (%v)", f, err)
		}
	}
	// Nothing that was replaced led the capture elsewhere.
	for f, data := range files(t, filepath.Join(got, "zzz")) {
		if strings.Contains(data, "outside") {
			t.Errorf("zzz/%s holds what is outside", f)
		}
	}
	diffs, err := compare.Trees(root, got, compare.Options{Skip: func(p string) bool {
		first, _, _ := strings.Cut(p, "/")
		return first == "zzz" || first == "lost+found" || first == "dev" || first == "mnt" ||
			first == "proc" || first == "run" || first == "sys" || first == "tmp"
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range diffs {
		t.Error(d)
	}
}

// files reads the regular files of a hierarchy.
func files(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		out[strings.TrimPrefix(path, dir)] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
