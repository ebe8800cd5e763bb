package ext4_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
)

func TestOrdinaryTree(t *testing.T) {
	root := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(root, "a/b/c"), 0o755))
	for i := range 300 {
		check(t, os.WriteFile(filepath.Join(root, "a/b", fmt.Sprintf("file-%d-%s", i, strings.Repeat("x", i%200))), []byte(strings.Repeat("y", i*77)), 0o644))
	}
	check(t, os.Symlink("short", filepath.Join(root, "short")))
	check(t, os.Symlink(strings.Repeat("long/", 500), filepath.Join(root, "long")))
	check(t, os.Link(filepath.Join(root, "a/b/file-0-"), filepath.Join(root, "hard")))
	check(t, unix.Mknod(filepath.Join(root, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	tree, src := walk(t, root)
	p := plan(t, tree, ext4.Options{Label: "root"})
	img := image(t, p, src, func(c ext4.Change) { t.Error(c.String()) })
	fsck(t, img)
	dir := mount(t, img)
	if out := run(t, "rsync", "-aHAXnci", "--delete", "--exclude=/lost+found", root+"/", dir+"/"); out != "" {
		t.Errorf("differences:\n%s", out)
	}
}
