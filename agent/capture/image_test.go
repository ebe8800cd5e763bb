package capture_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// host is a machine with a tree and keys, and a store it captures to.
type host struct {
	t     *testing.T
	tree  string
	dir   string // the store's
	ids   []*keys.Identity
	old   []*keys.Identity // of the machine before the last login
	trust *keys.AllowedSigners
	o     capture.ImageOptions
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, tree: t.TempDir(), dir: t.TempDir()}
	h.login()
	script := `cd "$1"; mkdir -p etc usr/bin var/log; echo host >etc/hostname
for i in $(seq 200); do head -c $((i * 37)) /dev/urandom >usr/bin/small-$i; done
head -c 3000000 /dev/urandom >usr/bin/large; truncate -s 5M var/log/sparse; echo end >>var/log/sparse
ln usr/bin/small-7 usr/bin/linked; ln -s ../etc/hostname usr/name; : >usr/empty`
	loopfs.Run(t, "bash", "-ec", script, "bash", h.tree)
	h.settle()
	return h
}

// login gives the machine keys of its own.
func (h *host) login() {
	h.t.Helper()
	m := machine.Open(machine.Options{Dir: h.t.TempDir(), Create: true})
	ids, err := m.Identities()
	if err != nil {
		h.t.Fatal(err)
	}
	signer, err := m.Signer(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	owner, err := m.Owner()
	if err != nil {
		h.t.Fatal(err)
	}
	var lines []keys.AllowedSigner
	if h.trust != nil {
		lines = h.trust.Entries()
	}
	h.trust = keys.NewAllowedSigners(append(lines, keys.AllowedSigner{Principals: "*", Key: signer.Public()})...)
	h.old, h.ids = h.ids, ids
	h.o = capture.ImageOptions{
		Volume: capture.VolumeOptions{Root: rootfs.Options{Volume: h.tree, NoFilter: true}, Size: 64 << 20},
		Name:   "web-1", Domain: "default", Owner: owner, Signer: signer, Recipients: []*keys.Recipient{ids[0].Recipient()},
		Tool: "instar test",
	}
}

// settle makes what was written old enough not to be in doubt.
func (h *host) settle() {
	h.t.Helper()
	time.Sleep(3100 * time.Millisecond)
}

func (h *host) open() *images.Store {
	h.t.Helper()
	objects, err := upload.Open(h.t.Context(), "file://"+h.dir, upload.Options{CreateDir: true})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { objects.Close() })
	s, err := images.Open(objects, images.Options{Trust: h.trust, Identities: h.ids})
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// capture makes an image and checks that what comes back is the tree.
func (h *host) capture() *capture.ImageResult {
	h.t.Helper()
	h.o.Store = h.open()
	q := &quiet{}
	res, err := capture.CreateImage(h.t.Context(), h.o, q)
	if err != nil {
		h.t.Fatal(err)
	}
	if len(q.warned) > 0 || res.Flawed > 0 {
		h.t.Errorf("warned of %q", q.warned)
	}
	h.check()
	return res
}

// disk restores the newest version.
func (h *host) restore() string {
	h.t.Helper()
	s := h.open()
	img, err := s.Resolve(h.t.Context(), h.o.Name, images.ResolveOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	x, err := img.Open(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	d, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		h.t.Fatal(err)
	}
	path := filepath.Join(h.t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(d.Size()), chunked.Restore(h.t.Context(), d, f, chunked.RestoreOptions{})); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func (h *host) check() {
	h.t.Helper()
	img := h.restore()
	fsimg := img
	if k := h.o.Volume.Partition; k == disk.MBR || k == disk.GPT {
		fsimg = loopfs.Partitions(h.t, img) + "p1"
	}
	if out, err := exec.Command("e2fsck", "-fn", fsimg).CombinedOutput(); err != nil {
		h.t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	var mnt string
	if fsimg == img {
		mnt = loopfs.Mount(h.t, img, "ro")
	} else {
		mnt = loopfs.MountDevice(h.t, fsimg, "ro")
	}
	diffs, err := compare.Trees(h.tree, mnt, compare.Options{Skip: func(p string) bool {
		switch p {
		case "lost+found", "dev", "proc", "sys", "run", "mnt", "tmp":
			return true
		}
		return false
	}})
	if err != nil {
		h.t.Fatal(err)
	}
	for _, d := range diffs {
		h.t.Error(d)
	}
	loopfs.Unmount(h.t, mnt)
}

// objects are the keys below a folder of the store.
func (h *host) objects(folder string) map[string]bool {
	h.t.Helper()
	found := map[string]bool{}
	err := filepath.WalkDir(filepath.Join(h.dir, folder), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			found[path] = true
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Fatal(err)
	}
	return found
}

// TestCreateImageAgain: an unchanged tree adds a manifest, its key, an index
// root, a head; nothing is read.
func TestCreateImageAgain(t *testing.T) {
	t.Parallel()
	for _, kind := range []disk.Kind{disk.None, disk.GPT} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			h.o.Volume.Partition = kind
			first := h.capture()
			if first.Parent != nil || first.FilesUnchanged != 0 || first.BytesAdded < 3_000_000 || first.PacksAdded != 1 {
				t.Errorf("the first capture: %+v", first)
			}
			packs, index := len(h.objects("packs")), len(h.objects("index"))
			second := h.capture()
			if second.Parent == nil || *second.Parent != first.Published.Name || second.FilesRead > 1 || second.BytesRead > 4096 {
				t.Errorf("the second capture reads: %+v", second)
			}
			if second.PacksAdded != 0 || len(h.objects("packs")) != packs {
				t.Errorf("the second capture adds packs: %+v", second)
			}
			if n := len(h.objects("index")); n != index+1 || second.IndexAdded != 1 {
				t.Errorf("%d index objects, %d before: want one root more", n, index)
			}
			if second.Published.Sequence != first.Published.Sequence+1 || second.Manifest.Parent != first.Published.Name {
				t.Errorf("published as %+v", second.Published)
			}
		})
	}
}

// TestCreateImageChanges: what is added is what changed.
func TestCreateImageChanges(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.capture()
	loopfs.Run(t, "bash", "-ec", `cd "$1"; head -c 50000 /dev/urandom >usr/bin/new; echo more >>etc/hostname; rm usr/bin/small-9; mv usr/bin/small-12 usr/bin/moved
chmod 600 usr/bin/small-13; printf x | dd of=usr/bin/large bs=1 seek=1500000 conv=notrunc status=none; mkdir usr/dir; ln usr/bin/small-14 usr/dir/again`, "bash", h.tree)
	h.settle()
	res := h.capture()
	// The large file is read, two cells of it are stored; metadata too.
	if res.BytesAdded > 800_000 {
		t.Errorf("%d bytes added", res.BytesAdded)
	}
	if res.FilesUnchanged < 190 || res.BytesRead > 3_200_000 {
		t.Errorf("%d files unchanged, %d bytes read", res.FilesUnchanged, res.BytesRead)
	}
}

// TestCreateImageInDoubt: a file that is written again within the resolution of
// its times is read, and one that pretends to be unchanged is found out by
// VerifyContent alone.
func TestCreateImageInDoubt(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	file := filepath.Join(h.tree, "etc/hostname")
	if err := os.WriteFile(file, []byte("fast\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	h.capture() // within two seconds of that write
	if res := h.capture(); res.FilesRead == 0 || res.FilesRead > 3 {
		t.Errorf("%d files read, want the one in doubt", res.FilesRead)
	}
	h.settle()
	h.capture()
	if res := h.capture(); res.FilesRead > 1 {
		t.Errorf("%d files read, want none but made ones", res.FilesRead)
	}
	h.o.VerifyContent = true
	if res := h.capture(); res.FilesUnchanged != 0 || res.PacksAdded != 0 {
		t.Errorf("everything is to be read and found: %+v", res)
	}
}

// TestCreateImageFoundOut: content that changed while size, times and inode
// stayed as they were is found out by VerifyContent, and by nothing else.
func TestCreateImageFoundOut(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	dev := filepath.Join(t.TempDir(), "volume.img")
	loopfs.Run(t, "bash", "-ec", `truncate -s 64M "$1"; mke2fs -q -t ext4 "$1"`, "bash", dev)
	mount := func() string {
		h.tree = loopfs.Mount(t, dev, "noatime")
		h.o.Volume.Root.Volume = h.tree
		return h.tree
	}
	mnt := mount()
	marker := bytes.Repeat([]byte("what the disk says "), 1000)
	for _, name := range []string{"one", "two", "three"} {
		if err := os.WriteFile(filepath.Join(mnt, name), append(marker, name...), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	h.settle()
	h.capture()
	loopfs.Unmount(t, mnt)
	disk, err := os.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(disk, append(slices.Clone(marker), "two"...))
	if at < 0 {
		t.Fatal("the file is not on the disk in one piece")
	}
	copy(disk[at:], "WHAT")
	if err := os.WriteFile(dev, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	mnt = mount()
	h.o.VerifyContent = true
	res := h.capture()
	if res.PacksAdded != 1 || res.FilesUnchanged != 0 {
		t.Errorf("%+v", res)
	}
	if res = h.capture(); res.PacksAdded != 0 {
		t.Errorf("once more: %+v", res)
	}
	loopfs.Unmount(t, mnt)
}

// TestCreateImageWithoutParent: an image that this machine cannot read is
// followed by a full one, which shares what this machine has stored.
func TestCreateImageWithoutParent(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	first := h.capture()
	mine := h.o
	// Another machine that may write to the domain, but not read the image.
	h.login()
	if err := h.admit(mine, h.ids[0].Recipient()); err != nil {
		t.Fatal(err)
	}
	other := h.capture()
	if other.Parent != nil || other.PacksAdded == 0 || other.BytesReused > first.BytesAdded/2 {
		t.Errorf("another machine shares what it does not trust, or found a parent: %+v", other)
	}
	h.o.AllCreators, h.o.Full = true, true
	if res := h.capture(); res.BytesAdded > 200_000 || res.Parent != nil {
		t.Errorf("sharing with all creators: %+v", res)
	}
	// Its own packs are found without a parent.
	h.o.AllCreators = false
	if res := h.capture(); res.BytesAdded > 200_000 {
		t.Errorf("sharing with itself: %+v", res)
	}
}

// admit lets a machine write to the domain.
func (h *host) admit(by capture.ImageOptions, r *keys.Recipient) error {
	h.t.Helper()
	objects, err := upload.Open(h.t.Context(), "file://"+h.dir, upload.Options{})
	if err != nil {
		return err
	}
	defer objects.Close()
	s, err := images.Open(objects, images.Options{Trust: h.trust, Identities: h.old})
	if err != nil {
		return err
	}
	return s.AddCreator(h.t.Context(), by.Domain, r, by.Signer)
}

// TestCreateImagePackGone: a pack that disappeared is noticed, and what it held
// is stored again.
func TestCreateImagePackGone(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.capture()
	for pack := range h.objects("packs") {
		if err := os.Remove(pack); err != nil {
			t.Fatal(err)
		}
	}
	res := h.capture()
	if res.FilesUnchanged != 0 || res.PacksAdded == 0 {
		t.Errorf("%+v", res)
	}
}

// TestCreateImageBoot: the kernel travels with the image.
func TestCreateImageBoot(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	loopfs.Run(t, "bash", "-ec", `cd "$1"; mkdir -p boot usr/lib/modules/6.1.0-9-amd64/kernel; ln -s usr/lib lib
head -c 700000 /dev/urandom >boot/vmlinuz-6.1.0-9-amd64; mkdir -p etc/default; echo 'GRUB_CMDLINE_LINUX="console=ttyS0 root=/dev/sda1"' >etc/default/grub`, "bash", h.tree)
	res := h.capture()
	if res.Kernel != "6.1.0-9-amd64" || res.Manifest.Cmdline != "console=ttyS0" {
		t.Errorf("kernel %q, command line %q", res.Kernel, res.Manifest.Cmdline)
	}
	var names []string
	for _, s := range res.Manifest.Streams {
		names = append(names, s.Name)
	}
	if got := strings.Join(names, " "); got != "disk kernel layout" {
		t.Errorf("streams %s", got)
	}
}

// during calls do when the plan is made and the reading begins.
type during struct {
	quiet
	do func()
}

func (d *during) Phase(name string, total int64) {
	d.quiet.Phase(name, total)
	if strings.HasPrefix(name, "capturing ") {
		d.do()
	}
}

// TestCreateImageLive captures a tree that changes meanwhile: each file is
// named, the image is sound, and the next one has what became of them.
func TestCreateImageLive(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.o.Store = h.open()
	d := &during{do: func() {
		loopfs.Run(t, "bash", "-ec", `cd "$1"; rm usr/bin/small-30; truncate -s 1000000 usr/bin/large; echo more >>etc/hostname; echo other >usr/x; mv usr/x usr/bin/small-31`, "bash", h.tree)
	}}
	res, err := capture.CreateImage(t.Context(), h.o, d)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"usr/bin/small-30", "usr/bin/large", "etc/hostname", "usr/bin/small-31"} {
		if !slices.Contains(d.warned, name) {
			t.Errorf("%s is not among those warned of: %q", name, d.warned)
		}
	}
	if res.Flawed != 4 {
		t.Errorf("%d files are said not to be as they are, want 4", res.Flawed)
	}
	loopfs.Run(t, "e2fsck", "-fn", h.restore())
	h.settle()
	h.capture() // which compares
}

// TestCreateImageCanary looks for this machine's keys in an image of a tree
// that holds them in three places, with the filter off.
func TestCreateImageCanary(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for _, dir := range []string{"etc/instar", "root/.config/instar", "srv/keys"} {
		m := machine.Open(machine.Options{Dir: filepath.Join(h.tree, dir), Create: true})
		if _, err := m.Identities(); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Signer(t.Context()); err != nil {
			t.Fatal(err)
		}
		if dir == "srv/keys" {
			h.o.Volume.Root.Never = m.SecretFiles()
		}
	}
	h.o.Store = h.open()
	if _, err := capture.CreateImage(t.Context(), h.o, &quiet{}); err != nil {
		t.Fatal(err)
	}
	img, err := os.ReadFile(h.restore())
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"AGE-SECRET-KEY-", "PRIVATE KEY"} {
		if bytes.Contains(img, []byte(secret)) {
			t.Errorf("%q is in the image", secret)
		}
	}
	if !bytes.Contains(img, []byte("ssh-ed25519 ")) {
		t.Error("the public halves are not in the image either: this test looks for nothing")
	}
}

// TestCreateImageCancelled leaves nothing that a reader sees.
func TestCreateImageCancelled(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h.o.Store = h.open()
	if _, err := capture.CreateImage(ctx, h.o, &quiet{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if n := len(h.objects("images")) + len(h.objects("runs")); n != 0 {
		t.Errorf("%d objects are left", n)
	}
	h.capture()
}
