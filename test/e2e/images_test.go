package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/test/zoo"
)

// imageStore is a store of Instar images on a real server.
type imageStore struct {
	*instar.Instar
	server         *servers.Server
	bucket, prefix string
}

func newImageStore(t testing.TB, s *servers.Server) *imageStore {
	t.Helper()
	return &imageStore{instar.New(t, s.Env()...), s, s.Bucket(t), "some/prefix"}
}

func (s *imageStore) store() []string {
	return []string{"--store", "s3://" + s.bucket + "/" + s.prefix}
}

// run runs a command about the store, which must succeed, and returns the last
// object it prints.
func (s *imageStore) run(t testing.TB, args ...string) map[string]any {
	t.Helper()
	r := s.Want(t, instar.OK, slices.Concat(args, s.store(), []string{"--json"})...)
	lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	var o map[string]any
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &o); err != nil {
		t.Fatalf("%s: %v", r.Stdout, err)
	}
	return o
}

// capture makes a version of an image that leaves nothing out.
func (s *imageStore) capture(t testing.TB, root, name string, args ...string) map[string]any {
	t.Helper()
	o := s.run(t, append([]string{"create-image", "-v", root, "--name", name, "--no-filter", "--size", "4g", "-r", "x86_64"}, args...)...)
	t.Logf("%s %v: %v bytes read, %v added in %v packs and %v index objects, %v of %v files unchanged, %.1f s", name, args, o["bytes_read"], o["bytes_added"],
		o["packs_added"], o["index_added"], o["files_unchanged"], o["files"], o["seconds"])
	return o
}

// restore restores an image to a new file, checks it and mounts it.
func (s *imageStore) restore(t testing.TB, ref string) (image, dir string) {
	t.Helper()
	image = filepath.Join(t.TempDir(), "restored")
	s.run(t, "restore", ref, "--to", image)
	fsck(t, image)
	return image, loopfs.Mount(t, image, "ro")
}

// folders counts the objects below each folder of the store.
func (s *imageStore) folders(t testing.TB) map[string]int {
	t.Helper()
	n := map[string]int{}
	for _, k := range s.server.Keys(t, s.bucket) {
		parts := strings.Split(strings.TrimPrefix(k, s.prefix+"/"), "/")
		folder := parts[0]
		if folder == "images" && len(parts) > 2 {
			folder = parts[2]
		}
		n[folder]++
	}
	return n
}

// TestImageZoo takes every kind of file of every filesystem into an image on a
// server and back; twice, which adds no pack; and once more after changes, when
// the parent's places are kept.
func TestImageZoo(t *testing.T) {
	server := servers.MinIO(t)
	for _, fstype := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(fstype, func(t *testing.T) {
			s := newImageStore(t, server)
			root := loopfs.Make(t, fstype, 3<<30)
			t.Cleanup(func() {
				if err := zoo.Release(root); err != nil {
					t.Error(err)
				}
			})
			made, skipped, err := zoo.Create(root, fstype)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d kinds; this filesystem cannot hold %q", len(made), skipped)
			// rsync reads holes: 4 GiB of them once is enough.
			skip := []string{zoo.Far}
			if fstype != "tmpfs" {
				skip = append(skip, "over-4GiB")
			}
			// Of files that were written just before nobody knows from their times
			// whether they changed since.
			time.Sleep(3100 * time.Millisecond)
			first := s.capture(t, root, "zoo")
			image, dir := s.restore(t, "zoo")
			equal(t, root, dir, skip...)
			loopfs.Unmount(t, dir)

			// The zoo's files of times to come are read each time; nobody can know
			// that they did not change. Their data is known all the same.
			before := s.folders(t)
			again := s.capture(t, root, "zoo")
			after := s.folders(t)
			// On xfs, what is allocated but not written is data or a hole depending on
			// what is cached of it: such files are read again, too.
			read := 4096.0
			if fstype == "xfs" {
				read = 4 << 20
			}
			if after["packs"] > before["packs"]+1 || after["manifests"] != before["manifests"]+1 || after["runs"] != 0 ||
				again["bytes_added"].(float64) > 128<<10 || again["bytes_read"].(float64) > read {
				t.Errorf("the same tree again: %v became %v: %v", before, after, again)
			}

			loopfs.Run(t, "bash", "-ec", `
cd "$1"
mkdir -p new/a/b; echo small > new/a/b/small; head -c 3000000 /dev/urandom > new/large
ln new/large new/a/link; ln -s ../large new/a/soft; mkfifo new/pipe; mknod new/node c 1 3
truncate -s 50M new/holes; echo end >> new/holes
setfattr -n user.note -v new new/large
for i in $(seq 300); do echo "file $i" > new/a/f$i; done
`, "bash", root)
			changed := s.capture(t, root, "zoo")
			if changed["parent"] != again["manifest"] || changed["files_unchanged"].(float64) < again["files_unchanged"].(float64)*9/10 {
				t.Errorf("after a change: %v", changed)
			}
			_, dir = s.restore(t, "zoo")
			equal(t, root, dir, skip...)
			loopfs.Unmount(t, dir)

			loopfs.Run(t, "bash", "-ec", `
cd "$1"
rm -r new/a/b new/pipe; mv new/large new/renamed; echo more >> new/renamed; chown 12:34 new/a; chmod 4711 new/a/f1
for i in $(seq 2 3 300); do rm new/a/f$i; done; echo other > new/a/f4; setfattr -x user.note new/renamed
`, "bash", root)
			s.capture(t, root, "zoo", "--verify-content")
			_, dir = s.restore(t, "zoo")
			equal(t, root, dir, skip...)
			loopfs.Unmount(t, dir)

			differences := map[string]string{}
			r := s.Want(t, instar.OK, append([]string{"images", "diff", "zoo@parent", "zoo", "--json"}, s.store()...)...)
			for line := range strings.Lines(r.Stdout) {
				var d struct{ Path, Kind string }
				if err := json.Unmarshal([]byte(line), &d); err != nil {
					t.Fatal(err)
				}
				differences[d.Path] = d.Kind
			}
			for path, kind := range map[string]string{
				"new/large": "removed", "new/renamed": "added", "new/a/b/small": "removed", "new/pipe": "removed", "new/a/f2": "removed", "new/a/f4": "changed",
			} {
				if differences[path] != kind {
					t.Errorf("diff: %s is %q, not %s", path, differences[path], kind)
				}
			}
			for path := range differences {
				if path != "" && !strings.HasPrefix(path, "new/") {
					t.Errorf("diff: %s is %s", path, differences[path])
				}
			}

			// What was there first is still there.
			old := filepath.Join(t.TempDir(), "old")
			s.run(t, "restore", "zoo@"+first["manifest"].(string), "--to", old)
			sameFile(t, image, old)
		})
	}
}

// TestImageTwice captures a tree that did not change: a manifest, its key's object
// and index objects are all that is added.
func TestImageTwice(t *testing.T) {
	s := newImageStore(t, servers.MinIO(t))
	root := smallVolume(t)
	time.Sleep(3100 * time.Millisecond)
	s.capture(t, root, "web")
	before := s.folders(t)
	again := s.capture(t, root, "web")
	after := s.folders(t)
	if again["bytes_read"] != 0.0 || again["packs_added"] != 0.0 || after["packs"] != before["packs"] || after["domains"] != before["domains"] ||
		after["manifests"] != before["manifests"]+1 || after["keys"] != before["keys"]+1 || after["head"] != before["head"] || after["runs"] != 0 ||
		after["index"] > before["index"]+1 {
		t.Errorf("the same tree again: %v became %v: %v", before, after, again)
	}
}

// TestImageFormats takes an image out of the store and into it in each format,
// and lets the formats' own tools say that it is the same disk.
func TestImageFormats(t *testing.T) {
	s := newImageStore(t, servers.MinIO(t))
	root, work := smallVolume(t), t.TempDir()
	at := func(name string) string { return filepath.Join(work, name) }
	s.capture(t, root, "web", "-B", "ami=sda1,root=/dev/sda1")
	s.run(t, "restore", "web", "--to", at("disk"))

	s.run(t, "export", "web", "--to", at("raw"), "--format", "raw")
	sameFile(t, at("raw"), at("disk"))
	s.run(t, "export", "web", "--to", at("qcow2"))
	loopfs.Run(t, "qemu-img", "check", at("qcow2"))
	loopfs.Run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", at("qcow2"), at("disk"))
	loopfs.Run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", at("qcow2"), at("converted"))
	sameFile(t, at("converted"), at("disk"))

	// The peers' way: openssl, gzip and tar.
	bundle, back := t.TempDir(), t.TempDir()
	s.run(t, slices.Concat([]string{"export", "web", "--format", "ec2", "-d", bundle, "-p", "our bundle"}, s.Bundling())...)
	loopfs.Run(t, "../peer-unbundle", bundle+"/our bundle.manifest.xml", s.Keys.UserKey, back, s.Keys.UserCert)
	sameFile(t, filepath.Join(back, "our bundle"), at("disk"))
	s.Want(t, instar.OK, "unbundle", "-m", bundle+"/our bundle.manifest.xml", "-s", bundle, "-k", s.Keys.CloudKey, "-c", s.Keys.UserCert, "-d", work)
	sameFile(t, at("our bundle"), at("disk"))

	loopfs.Run(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", at("disk"), at("compressed"))
	loopfs.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k,compat=0.10", at("disk"), at("old"))
	for n, in := range [][]string{
		{at("disk")},
		{at("qcow2")},
		{at("compressed")},
		{at("old")},
		{bundle + "/our bundle.manifest.xml", "-k", s.Keys.UserKey},
	} {
		res := s.run(t, append([]string{"import", "--name", "again"}, in...)...)
		if n > 0 && res["packs_added"] != 0.0 {
			t.Errorf("the same disk as %s: %v", in[0], res)
		}
		s.run(t, "restore", "again", "--to", at("again"), "--force")
		sameFile(t, at("again"), at("disk"))
	}
	fsck(t, at("again"))
	equal(t, root, loopfs.Mount(t, at("again"), "ro"))

	// A partitioned disk goes through unchanged, too.
	loopfs.Run(t, "bash", "-ec", `truncate -s 96M "$1"; sfdisk -q "$1" <<<$'label: gpt\nstart=2048'; head -c 5000000 /dev/urandom | dd of="$1" bs=1M seek=20 conv=notrunc status=none`, "bash", at("gpt"))
	s.run(t, "import", "--name", "gpt", at("gpt"))
	if m := s.run(t, "images", "show", "gpt"); m["partition"] != "gpt" {
		t.Errorf("a disk with a GPT: %v", m["partition"])
	}
	s.run(t, "restore", "gpt", "--to", at("gpt2"))
	sameFile(t, at("gpt2"), at("gpt"))
}

// TestImageToDevice restores to block devices that are in use, dirty and empty.
func TestImageToDevice(t *testing.T) {
	s := newImageStore(t, servers.MinIO(t))
	root := smallVolume(t)
	s.run(t, "create-image", "-v", root, "--name", "web", "--no-filter", "--size", "96m", "-r", "x86_64")
	backing := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(backing, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(backing, 128<<20); err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(loopfs.Run(t, "losetup", "-f", "--show", backing))
	t.Cleanup(func() { loopfs.Run(t, "losetup", "-d", dev) })
	s.run(t, "restore", "web", "--to", dev)
	fsck(t, dev)
	dir := loopfs.MountDevice(t, dev)
	equal(t, root, dir)
	s.Want(t, instar.File, append([]string{"restore", "web", "--to", dev, "--force"}, s.store()...)...)
	loopfs.Run(t, "bash", "-ec", `rm -r "$1"/home; head -c 20M /dev/urandom >"$1"/else; sync -f "$1"`, "bash", dir)
	loopfs.Unmount(t, dir)
	s.Want(t, instar.File, append([]string{"restore", "web", "--to", dev}, s.store()...)...)
	s.run(t, "restore", "web", "--to", dev, "--force")
	fsck(t, dev)
	equal(t, root, loopfs.MountDevice(t, dev, "ro"))
}
