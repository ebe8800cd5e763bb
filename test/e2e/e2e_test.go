// Package e2e proves the product as an operator meets it: the built program,
// real servers, the kernel's own filesystems, and comparers and checkers that
// share nothing with it.
package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/test/zoo"
)

// fsck checks an image of a filesystem without changing it: nothing to repair.
func fsck(t testing.TB, image string) {
	t.Helper()
	loopfs.Run(t, "e2fsck", "-f", "-n", image)
}

// equal fails the test for each difference between a tree and what came back.
func equal(t testing.TB, want, got string, skipTools ...string) {
	t.Helper()
	// A capture has these directories whatever the tree has, and lost+found is
	// each filesystem's own.
	given := []string{"dev", "mnt", "proc", "run", "sys", "tmp", "lost+found"}
	skip := func(path string) bool { return slices.Contains(given, path) }
	own, err := compare.Trees(want, got, compare.Options{Skip: skip})
	if err != nil {
		t.Fatal(err)
	}
	tools, err := compare.Tools(want, got, append(given, skipTools...)...)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range append(own, tools...) {
		if i == 40 {
			t.Fatalf("and more: %d differences", len(own)+len(tools))
		}
		t.Error(d)
	}
}

// populate makes a small root-like tree: enough to be a filesystem, quick to capture.
func populate(t testing.TB, dir string) {
	t.Helper()
	loopfs.Run(t, "bash", "-ec", `
cd "$1"
mkdir -p etc usr/bin var/log home/user tmp
echo tree > etc/hostname
for i in $(seq 200); do echo "file $i" > usr/bin/f$i; done
ln usr/bin/f1 usr/bin/hard; ln -s f2 usr/bin/soft
head -c 300000 /dev/urandom > home/user/random
truncate -s 20M var/log/sparse; echo end >> var/log/sparse
setfattr -n user.note -v kept home/user/random
`, "bash", dir)
}

// smallVolume is a mounted ext4 with a small tree.
func smallVolume(t testing.TB) string {
	t.Helper()
	dir := loopfs.Make(t, "ext4", 256<<20)
	populate(t, dir)
	return dir
}

// vol is the command line of a capture that leaves nothing out.
func vol(i *instar.Instar, dir string, args ...string) []string {
	all := append([]string{"bundle-vol", "-v", dir, "--no-filter", "--no-inherit", "--size", "auto", "--batch"}, i.Bundling()...)
	return append(all, args...)
}

// names lists a directory.
func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// nothingIn fails the test if a directory holds anything: what a failed command
// must leave.
func nothingIn(t testing.TB, dir string) {
	t.Helper()
	if left := names(t, dir); len(left) > 0 {
		t.Errorf("left behind in %s: %q", dir, left)
	}
}

// TestZoo takes every kind of file through a capture, a server and back, from
// each filesystem, each by another way.
func TestZoo(t *testing.T) {
	i := instar.New(t)
	for _, way := range []struct {
		fstype string
		// there captures root into storage, back brings the image to a file.
		round func(t *testing.T, root, image string)
	}{
		{"ext4", func(t *testing.T, root, image string) {
			s := servers.MinIO(t)
			i := i.With(s.Env()...)
			at := s.Bucket(t) + "/some/prefix"
			i.Want(t, instar.OK, vol(i, root, "-p", "zoo", "-b", at)...)
			i.Want(t, instar.OK, "download-and-unbundle", "-b", at, "-p", "zoo", "-k", i.Keys.UserKey, "-d", image)
		}},
		{"xfs", func(t *testing.T, root, image string) {
			s := servers.MinIOTLS(t)
			i := i.With(s.Env()...)
			at, up, down := s.Bucket(t)+"/zoo", t.TempDir(), t.TempDir()
			i.Want(t, instar.OK, vol(i, root, "-p", "zoo", "-d", up)...)
			i.Want(t, instar.OK, "upload-bundle", "-m", up+"/zoo.manifest.xml", "-b", at)
			i.Want(t, instar.OK, "download-bundle", "-b", at, "-p", "zoo", "-d", down)
			i.Want(t, instar.OK, "unbundle", "-m", down+"/zoo.manifest.xml", "-s", down, "-k", i.Keys.UserKey, "-d", filepath.Dir(image))
			rename(t, filepath.Join(filepath.Dir(image), "zoo"), image)
		}},
		{"btrfs", func(t *testing.T, root, image string) {
			s := servers.Versity(t)
			i := i.With(s.Env()...)
			at := s.Bucket(t)
			i.Want(t, instar.OK, vol(i, root, "-p", "zoo", "-b", at)...)
			i.Want(t, instar.OK, "download-and-unbundle", "-b", at, "-p", "zoo", "-k", i.Keys.CloudKey, "-c", i.Keys.UserCert, "-d", image)
		}},
		{"tmpfs", func(t *testing.T, root, image string) {
			store := "file://" + t.TempDir()
			i.Want(t, instar.OK, vol(i, root, "-p", "zoo", "-b", store)...)
			i.Want(t, instar.OK, "download-and-unbundle", "-b", store, "-p", "zoo", "-k", i.Keys.UserKey, "-d", image)
		}},
	} {
		t.Run(way.fstype, func(t *testing.T) {
			root := loopfs.Make(t, way.fstype, 3<<30)
			t.Cleanup(func() {
				if err := zoo.Release(root); err != nil {
					t.Error(err)
				}
			})
			made, skipped, err := zoo.Create(root, way.fstype)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d kinds; this filesystem cannot hold %q", len(made), skipped)
			image := filepath.Join(t.TempDir(), "image")
			way.round(t, root, image)
			fsck(t, image)
			// rsync reads holes: 4 GiB of them once is enough.
			skip := []string{zoo.Far}
			if way.fstype != "tmpfs" {
				skip = append(skip, "over-4GiB")
			}
			equal(t, root, loopfs.Mount(t, image, "ro"), skip...)
		})
	}
}

func rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// TestSameTreeSameBytes captures a tree twice with one key: the parts must be
// equal. (The manifest holds randomly padded RSA ciphertexts.)
func TestSameTreeSameBytes(t *testing.T) {
	i := instar.New(t)
	root := smallVolume(t)
	dirs := [2]string{t.TempDir(), t.TempDir()}
	for n, dir := range dirs {
		if n > 0 {
			// In another second, so that no clock's reading may be in the bytes.
			time.Sleep(1100 * time.Millisecond)
		}
		i.Want(t, instar.OK, vol(i, root, "-p", "same", "-d", dir, "--part-size", "65536",
			"--enc-key", strings.Repeat("0123456789abcdef", 2), "--enc-iv", strings.Repeat("fedcba9876543210", 2))...)
	}
	parts := 0
	for _, name := range names(t, dirs[0]) {
		if !strings.Contains(name, ".part.") {
			continue
		}
		parts++
		a, err := os.ReadFile(filepath.Join(dirs[0], name))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dirs[1], name))
		if err != nil {
			t.Fatal(err)
		}
		if string(a) != string(b) {
			t.Errorf("%s differs", name)
		}
	}
	if parts < 3 || len(names(t, dirs[0])) != len(names(t, dirs[1])) {
		t.Errorf("%d parts; %q and %q", parts, names(t, dirs[0]), names(t, dirs[1]))
	}
}

// TestUse writes to what came back and grows it, as its new owner would.
func TestUse(t *testing.T) {
	i := instar.New(t)
	root, store := smallVolume(t), "file://"+t.TempDir()
	i.Want(t, instar.OK, vol(i, root, "-p", "use", "-b", store)...)
	image := filepath.Join(t.TempDir(), "image")
	i.Want(t, instar.OK, "download-and-unbundle", "-b", store, "-p", "use", "-k", i.Keys.UserKey, "-d", image)

	dir := loopfs.Mount(t, image)
	equal(t, root, dir)
	loopfs.Run(t, "bash", "-ec", `
cd "$1"
for i in $(seq 500); do echo new > usr/bin/new-$i; done
mkdir -p a/b/c; mv usr/bin/f1 a/b/c/moved; rm usr/bin/hard; rm -r home; echo more >> var/log/sparse
setfattr -n user.new -v x etc/hostname; setfacl -m u:1000:r etc/hostname; fallocate -l 1M a/space
sync -f .`, "bash", dir)
	loopfs.Unmount(t, dir)
	fsck(t, image)

	if err := os.Truncate(image, 1<<30); err != nil {
		t.Fatal(err)
	}
	loopfs.Run(t, "e2fsck", "-f", "-y", image)
	loopfs.Run(t, "resize2fs", image)
	fsck(t, image)
	grown := loopfs.Mount(t, image)
	// It must have the room, not only say so.
	loopfs.Run(t, "bash", "-ec", `head -c 700M /dev/zero > "$1/big"; sync -f "$1"; rm "$1/big"; grep -q tree "$1/etc/hostname"`, "bash", grown)
	loopfs.Unmount(t, grown)
	fsck(t, image)
}
