package filetree_test

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

func dir() filetree.Attr { return filetree.Attr{Mode: unix.S_IFDIR | 0o755} }

func builder(t testing.TB) *filetree.Builder {
	t.Helper()
	b, err := filetree.NewBuilder(dir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func add(t testing.TB, b *filetree.Builder, e filetree.Entry) filetree.ID {
	t.Helper()
	id, err := b.Add(&e)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestTree(t *testing.T) {
	b := builder(t)
	if err := b.Begin(filetree.Root); err != nil {
		t.Fatal(err)
	}
	label := []filetree.Xattr{{Name: "security.selinux", Value: []byte("u:r:t")}, {Name: "security.a", Value: []byte{0}}}
	etc := add(t, b, filetree.Entry{Name: "etc", Link: filetree.None, Attr: dir(), Xattrs: label})
	link := add(t, b, filetree.Entry{Name: "lnk", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFLNK | 0o777}, Target: "etc/passwd"})
	holes := sparse.Map{{Off: 4096, Len: 4096}}
	big := add(t, b, filetree.Entry{
		Name: "sparse", Link: filetree.None, Data: holes, Xattrs: label,
		Attr: filetree.Attr{Mode: unix.S_IFREG | 0o600, Size: 1 << 40, Mtime: filetree.Time{Sec: -5, Nsec: 999999999}, Dev: 7, Ino: 42},
	})
	b.Remember(7, 42, big)
	void := add(t, b, filetree.Entry{Name: "void", Link: filetree.None, Data: sparse.Map{}, Attr: filetree.Attr{Mode: unix.S_IFREG, Size: 9}})
	if err := b.Begin(etc); err != nil {
		t.Fatal(err)
	}
	again := add(t, b, filetree.Entry{Name: "hard", Link: b.Linked(7, 42)})
	file := add(t, b, filetree.Entry{Name: "passwd", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG, Size: 3}})
	tr := b.Tree()

	if again != big || tr.Names(big) != 2 || tr.Names(file) != 1 || tr.Names(filetree.Root) != 0 {
		t.Errorf("hard link: id %d for %d, %d names", again, big, tr.Names(big))
	}
	if tr.Len() != 6 || tr.Entries() != 6 {
		t.Errorf("%d inodes, %d entries", tr.Len(), tr.Entries())
	}
	for id, want := range map[filetree.ID]string{filetree.Root: ".", etc: "etc", file: "etc/passwd", big: "sparse"} {
		if got := tr.Path(id); got != want {
			t.Errorf("Path(%d) = %q, want %q", id, got, want)
		}
		if got := tr.Find(want); got != id {
			t.Errorf("Find(%q) = %d, want %d", want, got, id)
		}
	}
	for _, p := range []string{"nope", "etc/nope", "lnk/passwd", "etc/passwd/x"} {
		if got := tr.Find(p); got != filetree.None {
			t.Errorf("Find(%q) = %d", p, got)
		}
	}
	var names []string
	for name, id := range tr.Children(etc) {
		names = append(names, fmt.Sprintf("%s=%d", name, id))
	}
	if want := []string{fmt.Sprintf("hard=%d", big), fmt.Sprintf("passwd=%d", file)}; !slices.Equal(names, want) {
		t.Errorf("children: %v, want %v", names, want)
	}
	if got := string(tr.Target(link)); got != "etc/passwd" || tr.Size(link) != 10 {
		t.Errorf("target %q of size %d", got, tr.Size(link))
	}
	if got := tr.Data(big); !slices.Equal(got, holes) {
		t.Errorf("data map %v", got)
	}
	if got := tr.Data(void); got == nil || len(got) != 0 {
		t.Errorf("data map of a file that is all hole: %v", got)
	}
	if got := tr.Data(file); !slices.Equal(got, sparse.Dense(3)) {
		t.Errorf("data map of a dense file: %v", got)
	}
	if got := tr.Attr(big); got.Mtime != (filetree.Time{Sec: -5, Nsec: 999999999}) || got.Dev != 7 || got.Ino != 42 || got.Size != 1<<40 {
		t.Errorf("attributes: %+v", got)
	}
	if x, y := tr.Xattrs(etc), tr.Xattrs(big); &x[0] != &y[0] || x[0].Name != "security.a" {
		t.Errorf("equal attribute sets are not shared, or not sorted: %v", x)
	}
}

func TestBuilderRefuses(t *testing.T) {
	reg := filetree.Attr{Mode: unix.S_IFREG}
	for name, c := range map[string]struct {
		e    filetree.Entry
		want error
	}{
		"empty name":        {filetree.Entry{Link: filetree.None, Attr: reg}, filetree.ErrName},
		"dot":               {filetree.Entry{Name: ".", Link: filetree.None, Attr: reg}, filetree.ErrName},
		"dot dot":           {filetree.Entry{Name: "..", Link: filetree.None, Attr: reg}, filetree.ErrName},
		"slash":             {filetree.Entry{Name: "a/b", Link: filetree.None, Attr: reg}, filetree.ErrName},
		"NUL":               {filetree.Entry{Name: "a\x00", Link: filetree.None, Attr: reg}, filetree.ErrName},
		"long":              {filetree.Entry{Name: strings.Repeat("x", 256), Link: filetree.None, Attr: reg}, filetree.ErrName},
		"before the last":   {filetree.Entry{Name: "a", Link: filetree.None, Attr: reg}, filetree.ErrOrder},
		"the same":          {filetree.Entry{Name: "m", Link: filetree.None, Attr: reg}, filetree.ErrOrder},
		"directory link":    {filetree.Entry{Name: "z", Link: filetree.Root}, filetree.ErrName},
		"no type":           {filetree.Entry{Name: "z", Link: filetree.None}, filetree.ErrName},
		"empty target":      {filetree.Entry{Name: "z", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFLNK}}, filetree.ErrName},
		"data past the end": {filetree.Entry{Name: "z", Link: filetree.None, Attr: reg, Data: sparse.Dense(1)}, sparse.ErrInvalid},
	} {
		b := builder(t)
		if _, err := b.Add(&filetree.Entry{Name: "a", Link: filetree.None, Attr: reg}); !errors.Is(err, filetree.ErrOrder) {
			t.Fatalf("Add without Begin: %v", err)
		}
		if err := b.Begin(filetree.Root); err != nil {
			t.Fatal(err)
		}
		add(t, b, filetree.Entry{Name: "m", Link: filetree.None, Attr: reg})
		if _, err := b.Add(&c.e); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err := b.Begin(filetree.Root); !errors.Is(err, filetree.ErrOrder) {
			t.Errorf("beginning the root again: %v", err)
		}
	}
}

// TestMemory holds the package to its word of about 110 bytes a file: a tree
// is what grows with the size of the machine that is captured.
func TestMemory(t *testing.T) {
	const files = 400_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b := builder(t)
	if err := b.Begin(filetree.Root); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		add(t, b, filetree.Entry{Name: fmt.Sprintf("%016d", i), Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG, Size: 5}})
	}
	tr := b.Tree()
	runtime.GC()
	runtime.ReadMemStats(&after)
	if per := float64(after.HeapAlloc-before.HeapAlloc) / files; per > 135 {
		t.Errorf("%.0f bytes for a file with a name of 16, want at most 135", per)
	}
	if tr.Path(files) != fmt.Sprintf("%016d", files-1) {
		t.Errorf("path of the last file is %q", tr.Path(files))
	}
}
