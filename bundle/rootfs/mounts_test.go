package rootfs_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

// mountAt mounts something at dir/rel, which it makes.
func mountAt(t *testing.T, dir, rel string, args ...string) string {
	t.Helper()
	path := filepath.Join(dir, rel)
	must(t, os.MkdirAll(path, 0o700))
	run(t, "mount", append(args, path)...)
	t.Cleanup(func() { run(t, "umount", "-l", path) })
	return path
}

func TestMounts(t *testing.T) {
	dir := mounted(t, "ext4")
	write(t, dir, map[string]string{"etc/x": "x", "srv/www/index": "i", "home/hidden": "beneath the mount", "tmp/stage/s": "only here"})

	img := filepath.Join(t.TempDir(), "img")
	run(t, "truncate", "-s", "64M", img)
	run(t, "mkfs.ext4", "-q", img)
	home := mountAt(t, dir, "home", "-o", "loop", img)
	write(t, home, map[string]string{"user/file": "at home"})
	mountAt(t, dir, "again", "--bind", filepath.Join(dir, "srv/www"))   // captured as srv/www
	mountAt(t, dir, "loop", "--bind", dir)                              // holds the volume itself
	mountAt(t, dir, "stage", "--bind", filepath.Join(dir, "tmp/stage")) // captured nowhere else
	mountAt(t, dir, "user", "--bind", filepath.Join(home, "user"))      // captured as home/user
	mountAt(t, dir, "etc", "--bind", filepath.Join(dir, "etc"))         // over itself
	write(t, mountAt(t, dir, "memory", "-t", "tmpfs", "tmpfs"), map[string]string{"m": "m"})
	mountAt(t, dir, "proc", "-t", "proc", "proc")
	mountAt(t, dir, "chroot/sys", "-t", "sysfs", "sysfs")
	write(t, dir, map[string]string{"etc/resolv.conf": "under", "etc/hosts": "h"})
	run(t, "mount", "--bind", filepath.Join(dir, "memory/m"), filepath.Join(dir, "etc/resolv.conf"))
	t.Cleanup(func() { run(t, "umount", "-l", filepath.Join(dir, "etc/resolv.conf")) })
	write(t, dir, map[string]string{"etc/fstab": "UUID=1 / ext4 defaults 0 1\nUUID=2 /home ext4 defaults 0 2\n/dev/sdq /other ext4 defaults 0 2\n"})

	r := scan(t, rootfs.Options{Volume: dir})
	for path, want := range map[string]string{"home/user/file": "at home", "stage/s": "only here", "srv/www/index": "i", "etc/x": "x"} {
		if got := read(t, r, path); got != want {
			t.Errorf("%s reads %q", path, got)
		}
	}
	for path, class := range map[string]rootfs.Class{
		"again": rootfs.Duplicate, "loop": rootfs.Duplicate, "user": rootfs.Duplicate, "memory": rootfs.NotLocal, "proc": rootfs.Pseudo, "chroot/sys": rootfs.Pseudo,
		"etc/resolv.conf": rootfs.NotLocal,
	} {
		o := leftOut(r, path)
		if o == nil || o.Class != class || o.Why == "" {
			t.Errorf("%s: %+v, want %s", path, o, class)
		}
		id := r.Tree.Find(path)
		if id == filetree.None || r.Tree.NumChildren(id) != 0 || r.Tree.Size(id) != 0 {
			t.Errorf("%s is not kept empty", path)
		}
	}
	// What the mounts hide was made with this mode; /proc itself has 0555.
	for _, path := range []string{"proc", "memory", "chroot/sys"} {
		if m := r.Tree.Mode(r.Tree.Find(path)); m != unix.S_IFDIR|0o700 {
			t.Errorf("%s has mode %o", path, m)
		}
	}
	if got := read(t, r, "etc/fstab"); !strings.Contains(got, "\n# instar: not in this image: UUID=2 /home") || !strings.Contains(got, "\n# instar: not in this image: /dev/sdq") ||
		!strings.HasPrefix(got, r.Facts.SpecUUID()+"\t/\text4") || len(r.Fstab) != 3 {
		t.Errorf("fstab: %q, changes %+v", got, r.Fstab)
	}

	unchanged(t, r)
	all := scan(t, rootfs.Options{Volume: dir, All: true})
	if got := read(t, all, "memory/m"); got != "m" {
		t.Errorf("with All, memory/m reads %q", got)
	}
	if all.Tree.NumChildren(all.Tree.Find("proc")) != 0 {
		t.Errorf("with All, proc is captured")
	}
	// A mount whose only other place is left out is no duplicate.
	out := scan(t, rootfs.Options{Volume: dir, Exclude: []string{"/srv"}})
	if got := read(t, out, "again/index"); got != "i" {
		t.Errorf("again/index reads %q", got)
	}
}

func TestFstabOptions(t *testing.T) {
	dir := t.TempDir()
	const old = "/dev/sdq /other ext4 defaults 0 2\n"
	write(t, dir, map[string]string{"etc/fstab": old, "etc/crypttab": "c UUID=1 none luks\n"})
	must(t, os.Chmod(filepath.Join(dir, "etc/fstab"), 0o600))

	r := scan(t, rootfs.Options{Volume: dir, Fstab: []byte("mine\n"), GrubConfig: []byte("default 0\n")})
	for path, want := range map[string]string{"etc/fstab": "mine\n", "etc/fstab.old": old, "boot/grub/menu.lst": "default 0\n", "etc/crypttab": "# instar: not in this image: c UUID=1 none luks\n"} {
		if got := read(t, r, path); got != want {
			t.Errorf("%s reads %q", path, got)
		}
	}
	if got := string(r.Tree.Target(r.Tree.Find("boot/grub/grub.conf"))); got != "menu.lst" {
		t.Errorf("grub.conf leads to %q", got)
	}
	if m := r.Tree.Mode(r.Tree.Find("etc/fstab")); m != unix.S_IFREG|0o600 {
		t.Errorf("fstab has mode %o", m)
	}
	r = scan(t, rootfs.Options{Volume: dir, FstabKind: rootfs.FstabModern, RootSpec: "LABEL=new root"})
	if got := read(t, r, "etc/fstab"); !strings.HasPrefix(got, `LABEL=new\040root`+"\t/\text4") {
		t.Errorf("generated: %q", got)
	}
	if got := mustRead(os.ReadFile(filepath.Join(dir, "etc/fstab"))); string(got) != old {
		t.Errorf("the volume's own fstab reads %q", got)
	}
}
