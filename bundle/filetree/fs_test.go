package filetree_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// content is a Source of the names' own paths.
type content struct{ t *filetree.Tree }

type contentFile struct{ *bytes.Reader }

func (contentFile) Changed() (bool, error) { return false, nil }
func (contentFile) Close() error           { return nil }

func (c content) Open(_ context.Context, id filetree.ID) (filetree.File, error) {
	return contentFile{bytes.NewReader([]byte(c.t.Path(id)))}, nil
}

// merged builds: usr/lib/a, lib -> usr/lib, abs -> /usr, up -> ../../usr/lib/a, loop -> loop, usr/dot -> ./lib/../lib.
func merged(t *testing.T) *filetree.Tree {
	t.Helper()
	dir := filetree.Attr{Mode: unix.S_IFDIR | 0o755}
	b, err := filetree.NewBuilder(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(id filetree.ID) {
		if err := b.Begin(id); err != nil {
			t.Fatal(err)
		}
	}
	add := func(name string, a filetree.Attr, target string) filetree.ID {
		id, err := b.Add(&filetree.Entry{Name: name, Link: filetree.None, Attr: a, Target: target})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	link := filetree.Attr{Mode: unix.S_IFLNK | 0o777}
	begin(filetree.Root)
	add("abs", link, "/usr")
	add("lib", link, "usr/lib")
	add("loop", link, "loop")
	add("out", link, "../../../etc/passwd")
	add("up", link, "../../usr/lib/a")
	usr := add("usr", dir, "")
	begin(usr)
	add("dot", link, "./lib/../lib")
	lib := add("lib", dir, "")
	begin(lib)
	add("a", filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: int64(len("usr/lib/a"))}, "")
	return b.Tree()
}

func TestFS(t *testing.T) {
	tree := merged(t)
	fsys := filetree.FS(t.Context(), tree, content{tree})
	for _, name := range []string{"usr/lib/a", "lib/a", "abs/lib/a", "up", "usr/dot/a", "abs/dot/a"} {
		got, err := fs.ReadFile(fsys, name)
		if err != nil || string(got) != "usr/lib/a" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"out", "lib/a/b", "nothing"} {
		if _, err := fs.Stat(fsys, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want that it does not exist", name, err)
		}
	}
	if _, err := fs.Stat(fsys, "loop"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a link to itself: %v", err)
	}
	sub, err := fs.Sub(fsys, "usr")
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(sub, "lib/a"); err != nil {
		t.Error(err)
	}
}
