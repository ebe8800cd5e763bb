package rootfs_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

func snapshots(t *testing.T, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, ".instar-snapshot-*"))
	must(t, err)
	return found
}

func TestSnapshot(t *testing.T) {
	dir := mounted(t, "btrfs")
	write(t, dir, map[string]string{"counter/a": "1", "counter/b": "1", "key": canary, "etc/x": "x"})
	run(t, "btrfs", "subvolume", "create", filepath.Join(dir, "nested"))
	write(t, dir, map[string]string{"nested/deep/file": "live"})
	img := filepath.Join(t.TempDir(), "img")
	run(t, "truncate", "-s", "64M", img)
	run(t, "mkfs.ext4", "-q", img)
	write(t, mountAt(t, dir, "home", "-o", "loop", img), map[string]string{"u": "mounted"})
	write(t, mountAt(t, dir, "memory", "-t", "tmpfs", "tmpfs"), map[string]string{"m": "m"})
	must(t, os.Link(filepath.Join(dir, "key"), filepath.Join(dir, "etc/key2")))

	o := rootfs.Options{Volume: dir, Never: []string{filepath.Join(dir, "key")}}
	r := scan(t, o)
	if n := snapshots(t, dir); len(n) != 1 {
		t.Fatalf("snapshots: %v", n)
	}
	// What changes now is not captured.
	write(t, dir, map[string]string{"counter/a": "2", "counter/b": "2"})
	must(t, os.RemoveAll(filepath.Join(dir, "etc")))
	for path, want := range map[string]string{"counter/a": "1", "counter/b": "1", "etc/x": "x", "nested/deep/file": "live", "home/u": "mounted"} {
		if got := read(t, r, path); got != want {
			t.Errorf("%s reads %q", path, got)
		}
	}
	unchanged(t, r)
	if in := holds(t, r, canary); len(in) != 0 {
		t.Errorf("the key is captured as %q", in)
	}
	if id := r.Tree.Find("memory"); id == filetree.None || r.Tree.NumChildren(id) != 0 || leftOut(r, "memory") == nil {
		t.Errorf("the tmpfs is not left out")
	}
	notes := strings.Join(r.Notes, "\n")
	for _, want := range []string{"snapshot", "/nested is not part of the snapshot", "/home is not part of the snapshot"} {
		if !strings.Contains(notes, want) {
			t.Errorf("nothing says %q: %q", want, notes)
		}
	}
	must(t, r.Close())
	if n := snapshots(t, dir); len(n) != 0 {
		t.Errorf("left behind: %v", n)
	}

	if live := scan(t, rootfs.Options{Volume: dir, Snapshot: rootfs.SnapshotNone}); len(snapshots(t, dir)) != 0 || read(t, live, "counter/a") != "2" || read(t, live, "nested/deep/file") != "live" {
		t.Errorf("a live walk is not live")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := rootfs.Scan(ctx, o); err == nil || len(snapshots(t, dir)) != 0 {
		t.Errorf("after a failed scan (%v): %v", err, snapshots(t, dir))
	}
}

// TestSnapshotsOfTheDead: the next capture deletes what a killed one left,
// but not what another one uses.
func TestSnapshotsOfTheDead(t *testing.T) {
	dir := mounted(t, "btrfs")
	write(t, dir, map[string]string{"a": "a"})
	run(t, "btrfs", "subvolume", "snapshot", "-r", dir, filepath.Join(dir, ".instar-snapshot-1000000000-77"))
	write(t, dir, map[string]string{".instar-snapshot-x": "not one"})
	one := scan(t, rootfs.Options{Volume: dir})
	if !strings.Contains(strings.Join(one.Notes, "\n"), "deleted the snapshot .instar-snapshot-1000000000-77") {
		t.Errorf("notes: %q", one.Notes)
	}
	if n := snapshots(t, dir); len(n) != 2 {
		t.Errorf("snapshots: %v", n)
	}
	if got := one.Tree.Entries(); one.Tree.Find("a") == filetree.None || one.Tree.Find(".instar-snapshot-x") != filetree.None {
		t.Errorf("%d entries", got)
	}
}

// TestSameTreeTwice: capturing changes nothing that the next capture would see.
func TestSameTreeTwice(t *testing.T) {
	for _, typ := range []string{"ext4", "btrfs"} {
		dir := mounted(t, typ)
		write(t, dir, map[string]string{"a/b/c": "x", "etc/fstab": "/dev/x / xfs inode64 0 0\n", "etc/machine-id": "1", "tmp/x": "y"})
		list := func() map[string]filetree.Attr {
			r, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir})
			must(t, err)
			attrs := map[string]filetree.Attr{}
			for id := range filetree.ID(r.Tree.Len()) {
				a := r.Tree.Attr(id)
				if a.Size > 0 && r.Tree.Target(id) == nil {
					read(t, r, r.Tree.Path(id))
				}
				a.Dev, a.Ctime = 0, filetree.Time{} // of the snapshot
				attrs[r.Tree.Path(id)] = a
			}
			must(t, r.Close())
			return attrs
		}
		if d := cmp.Diff(list(), list()); d != "" {
			t.Errorf("%s: %s", typ, d)
		}
	}
}
