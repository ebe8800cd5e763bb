package ext4_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// What ext4 cannot have is named before any file is read, and the image is
// still sound.
func TestWarnings(t *testing.T) {
	b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(t, err)
	check(t, b.Begin(filetree.Root))
	many := make([]filetree.Xattr, 300)
	for i := range many {
		many[i] = filetree.Xattr{Name: fmt.Sprintf("user.%d", i), Value: []byte("v")}
	}
	reg := filetree.Attr{Mode: unix.S_IFREG | 0o644}
	at := func(a filetree.Attr, sec int64) filetree.Attr {
		a.Mtime.Sec = sec
		return a
	}
	tests := []struct {
		e    filetree.Entry
		want error
	}{
		{filetree.Entry{Name: "ancient", Attr: at(reg, -1<<31-1)}, ext4.ErrTime},
		{filetree.Entry{Name: "casefold", Attr: filetree.Attr{Mode: unix.S_IFDIR | 0o755, Flags: 0x40000000}}, ext4.ErrCasefold},
		{filetree.Entry{Name: "device", Attr: filetree.Attr{Mode: unix.S_IFCHR | 0o644, Major: 4096, Minor: 1}}, ext4.ErrDevice},
		{filetree.Entry{Name: "far", Attr: at(reg, 1<<34)}, ext4.ErrTime},
		{filetree.Entry{Name: "huge", Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 1 << 44}, Data: sparse.Map{{Off: 1 << 43, Len: 1}}}, ext4.ErrFileSize},
		{filetree.Entry{Name: "largest", Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 1<<44 - 4096}, Data: sparse.Map{{Off: 1<<44 - 4097, Len: 1}}}, nil},
		{filetree.Entry{Name: "xattr-acl", Attr: reg, Xattrs: []filetree.Xattr{{Name: "system.posix_acl_access", Value: []byte("nonsense")}}}, ext4.ErrACL},
		{filetree.Entry{Name: "xattr-foreign", Attr: reg, Xattrs: []filetree.Xattr{{Name: "btrfs.compression", Value: []byte("zstd")}, {Name: "user.kept", Value: []byte("kept")}}}, ext4.ErrXattrName},
		{filetree.Entry{Name: "xattr-large", Attr: reg, Xattrs: []filetree.Xattr{{Name: "user.large", Value: bytes.Repeat([]byte("x"), 65537)}}}, ext4.ErrXattrSize},
		{filetree.Entry{Name: "xattr-many", Attr: reg, Xattrs: many}, ext4.ErrXattrSpace},
		{filetree.Entry{Name: "xattr-unnamed", Attr: reg, Xattrs: []filetree.Xattr{{Name: "user.", Value: nil}}}, ext4.ErrXattrName},
	}
	for _, tt := range tests {
		tt.e.Link = filetree.None
		_, err := b.Add(&tt.e)
		check(t, err)
	}
	tree := b.Tree()
	p := plan(t, tree, ext4.Options{NotAfter: 1})
	got := map[string]error{}
	for w := range p.Warnings() {
		got[tree.Path(w.ID)] = w.Err
	}
	for _, tt := range tests {
		if !errors.Is(got[tt.e.Name], tt.want) {
			t.Errorf("%s: %v", tt.e.Name, got[tt.e.Name])
		}
	}
	for range p.Warnings() { // may be left early
		break
	}
	img := image(t, p, &memSource{t: tree}, func(c ext4.Change) { t.Error(c.String()) })
	fsck(t, img)
	dir := mount(t, img)
	if v := xattrsOf(t, filepath.Join(dir, "xattr-foreign")); len(v) != 1 || string(v[0].Value) != "kept" {
		t.Errorf("attributes %v", v)
	}
	if v := xattrsOf(t, filepath.Join(dir, "xattr-many")); len(v) < 100 {
		t.Errorf("only %d attributes", len(v))
	}
	if n := statOf(t, filepath.Join(dir, "largest")).Size; n != 1<<44-4096 {
		t.Errorf("size %d", n)
	}
}

func TestLostFound(t *testing.T) {
	b, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(t, err)
	check(t, b.Begin(filetree.Root))
	_, err = b.Add(&filetree.Entry{Name: "lost+found", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644}})
	check(t, err)
	if _, err := ext4.NewPlan(b.Tree(), ext4.Options{}); !errors.Is(err, ext4.ErrLostFound) {
		t.Error(err)
	}

	// One with names in it, among them those that vanished files will get.
	b, err = filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(t, err)
	check(t, b.Begin(filetree.Root))
	vanishing, err := b.Add(&filetree.Entry{Name: "a", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 5000}})
	check(t, err)
	lost, err := b.Add(&filetree.Entry{Name: "lost+found", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFDIR | 0o711}})
	check(t, err)
	check(t, b.Begin(lost))
	for i := range 900 {
		_, err = b.Add(&filetree.Entry{Name: fmt.Sprintf("#%03d", i), Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644}})
		check(t, err)
	}
	_, err = b.Add(&filetree.Entry{Name: "#" + strings.Repeat("9", 200), Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644}})
	check(t, err)
	tree := b.Tree()
	src := &memSource{t: tree, faults: map[filetree.ID]fault{vanishing: {open: filetree.ErrVanished}}}
	for i := filetree.ID(100); i < 200; i++ { // some of lost+found itself
		src.faults[i] = fault{open: filetree.ErrVanished}
	}
	img := image(t, plan(t, tree, ext4.Options{}), src, nil)
	fsck(t, img)
	dir := mount(t, img)
	list, err := os.ReadDir(filepath.Join(dir, "lost+found"))
	check(t, err)
	if len(list) != 902 {
		t.Errorf("%d names", len(list))
	}
	if m := statOf(t, filepath.Join(dir, "lost+found")).Mode; m != unix.S_IFDIR|0o711 {
		t.Errorf("mode %o", m)
	}
}
