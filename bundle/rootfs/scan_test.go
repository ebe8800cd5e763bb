package rootfs_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

// write makes files beneath dir: a name ending in "/" is a directory.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if name[len(name)-1] == '/' {
			must(t, os.MkdirAll(path, 0o755))
			continue
		}
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(content), 0o644))
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func scan(t *testing.T, o rootfs.Options) *rootfs.Root {
	t.Helper()
	r, err := rootfs.Scan(t.Context(), o)
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	return r
}

// read gives the content the source opens for a path.
func read(t *testing.T, r *rootfs.Root, path string) string {
	t.Helper()
	id := r.Tree.Find(path)
	if id == filetree.None {
		t.Fatalf("%s is not in the tree", path)
	}
	f, err := r.Source().Open(t.Context(), id)
	must(t, err)
	defer f.Close()
	buf := make([]byte, r.Tree.Size(id))
	if _, err := f.ReadAt(buf, 0); err != nil {
		t.Fatalf("reading %s: %v", path, err)
	}
	return string(buf)
}

func TestScanOrdinaryRoot(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"etc/hostname": "one\n", "usr/bin/x": "#!", "tmp/gone": "x", "proc/1/stat": "x", "home/": ""})
	must(t, os.Link(filepath.Join(dir, "usr/bin/x"), filepath.Join(dir, "usr/bin/y")))
	must(t, os.Symlink("../usr/bin/x", filepath.Join(dir, "etc/link")))
	must(t, unix.Mkfifo(filepath.Join(dir, "etc/fifo"), 0o600))
	must(t, unix.Setxattr(filepath.Join(dir, "etc/hostname"), "user.a", []byte("b"), 0))
	r := scan(t, rootfs.Options{Volume: dir})
	tr := r.Tree
	if got := read(t, r, "etc/hostname"); got != "one\n" {
		t.Errorf("etc/hostname reads %q", got)
	}
	if x, y := tr.Find("usr/bin/x"), tr.Find("usr/bin/y"); x != y || tr.Names(x) != 2 {
		t.Errorf("hard links are inodes %d and %d with %d names", x, y, tr.Names(x))
	}
	if got := string(tr.Target(tr.Find("etc/link"))); got != "../usr/bin/x" {
		t.Errorf("link leads to %q", got)
	}
	if xs := tr.Xattrs(tr.Find("etc/hostname")); len(xs) != 1 || xs[0].Name != "user.a" || string(xs[0].Value) != "b" {
		t.Errorf("extended attributes %v", xs)
	}
	if tr.Mode(tr.Find("etc/fifo")) != unix.S_IFIFO|0o600 {
		t.Errorf("the FIFO is missing")
	}
	for path, want := range map[string]bool{"tmp": true, "tmp/gone": false, "proc": true, "proc/1": false, "dev/null": true, "home": true} {
		if got := tr.Find(path) != filetree.None; got != want {
			t.Errorf("%s in the tree: %v, want %v", path, got, want)
		}
	}
	if len(r.Problems) != 0 {
		t.Errorf("problems: %v", r.Problems)
	}
}
