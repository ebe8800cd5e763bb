package ec2

import (
	"bytes"
	"compress/gzip"
	"crypto/sha1"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// allocated is how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Documents of up to the largest size that is read at all: refused, with
// memory in proportion to what was sent.
func TestHugeManifests(t *testing.T) {
	f := newForge(t)
	doc := string(f.good(t).doc)
	in := func(at, text string) string { return strings.Replace(doc, at, text+at, 1) }
	for _, c := range []struct {
		name string
		doc  string
		want error
	}{
		{"100,000 levels", in("<image>", strings.Repeat("<a>", 100_000)), ErrFormat},
		{"100,000 known levels", in("<architecture>", strings.Repeat("<block_device_mapping>", 100_000)), ErrFormat},
		{"million attributes", strings.Replace(doc, "<parts count=", "<parts"+strings.Repeat(" a='1'", 1_000_000)+" count=", 1), ErrFormat},
		{"million different attributes", strings.Replace(doc, "<parts count=", "<parts a='' b='' c='' d='' e=''"+strings.Repeat(" f='1'", 1_000_000)+" count=", 1), ErrFormat},
		{"15 MiB of text", in("x86_64", strings.Repeat("x", 15<<20)), ErrFormat},
		{"15 MiB of references", in("x86_64", strings.Repeat("&#65;", 3<<20)), ErrFormat},
		{"15 MiB in an attribute", strings.Replace(doc, "count='", "count='"+strings.Repeat("1", 15<<20), 1), ErrFormat},
		{"15 MiB name", in("<image>", "<"+strings.Repeat("a", 15<<20)+">"), ErrFormat},
		{"15 MiB declaration", strings.Replace(doc, "<?xml", "<?xml"+strings.Repeat(" ", 15<<20), 1), nil},
		{"15 MiB of space", in("<image>", strings.Repeat(" ", 15<<20)), nil},
		{"15 MiB of comments", in("<image>", strings.Repeat("<!---->", 2<<20)), ErrFormat},
		{"400,000 mappings", in("</architecture>", "</architecture><block_device_mapping>"+strings.Repeat("<mapping><virtual>a</virtual></mapping>", 400_000)+"</block_device_mapping>"), ErrLimit},
		{"more than 16 MiB", doc + strings.Repeat(" ", 16<<20), ErrLimit},
		{"digits", strings.Replace(doc, "<size>700", "<size>"+strings.Repeat("7", 60_000), 1), ErrFormat},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := []byte(c.doc)
			var err error
			used := allocated(func() { _, err = ParseManifest(data) })
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if limit := uint64(len(data)*8 + 8<<20); used > limit {
				t.Errorf("%d bytes allocated for %d", used, len(data))
			}
		})
	}
}

// A manifest of as many parts as fit is read in bounded memory.
func TestManyParts(t *testing.T) {
	f := newForge(t)
	const n = 100_000 // 1 TiB of 10 MiB parts
	b := f.archive(t, f.tar(), func(m *Manifest) {
		m.Parts = m.Parts[:0]
		for i := range n {
			m.Parts = append(m.Parts, ManifestPart{Filename: partName("img", i, 6)})
		}
	})
	var m *Manifest
	var err error
	used := allocated(func() { m, err = ParseManifest(b.doc) })
	if err != nil || len(m.Parts) != n {
		t.Fatalf("%v", err)
	}
	if used > 16*uint64(len(b.doc)) { // the race detector's own share included
		t.Errorf("%d MiB allocated for a manifest of %d MiB", used>>20, len(b.doc)>>20)
	}
}

// A gzip stream of 1:1000 and an archive that claims 1 TiB stop at what was
// declared, having used next to nothing.
func TestBombs(t *testing.T) {
	f := newForge(t)
	bomb := func(head []byte, zeros int64) ([]byte, SHA1) {
		var z bytes.Buffer
		w, err := gzip.NewWriterLevel(&z, gzip.BestSpeed)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha1.New()
		to := io.MultiWriter(w, sum)
		to.Write(head)
		block := make([]byte, 1<<20)
		for ; zeros > 0; zeros -= int64(len(block)) {
			to.Write(block)
		}
		w.Close()
		return z.Bytes(), SHA1(sum.Sum(nil))
	}
	big := member{name: "img", size: 1 << 40, mode: 0o644}
	big.data = big.data.Append(extent(0, 1<<40))
	tiny := member{name: "img", size: 700, mode: 0o644}
	tiny.data = tiny.data.Append(extent(0, 700))
	for _, c := range []struct {
		name     string
		head     []byte
		declared int64
		want     error
	}{
		{"1 TiB where 700 are declared", big.header(), 700, ErrSize},
		{"1 TiB that breaks off", big.header(), 1 << 40, ErrTruncated},
		{"700 bytes and endless zeros", tarOf(tiny.header(), f.image)[:2048], 700, ErrLimit},
	} {
		t.Run(c.name, func(t *testing.T) {
			z, digest := bomb(c.head, 100<<20)
			b := f.make(t, digest, f.encrypted(z), 64<<10, func(m *Manifest) { m.Size = c.declared })
			m, err := ParseManifest(b.doc)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			used := allocated(func() {
				err = UnbundleFile(t.Context(), UnbundleOptions{Key: f.user.key}, m, mapSource(b.parts), filepath.Join(dir, "out"))
			})
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if used > 64<<20 {
				t.Errorf("%d MiB allocated", used>>20)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// A gzip member that inflates to itself, over and over, is one file like any
// other here: nothing is unpacked twice. What is not tar is refused.
func TestGzipInGzip(t *testing.T) {
	f := newForge(t)
	z := f.tar()
	for range 5 {
		z = gzipped(z)
	}
	b := f.make(t, sha1.Sum(f.tar()), f.encrypted(z), 1<<20, nil)
	m, err := ParseManifest(b.doc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unbundleBytes(t, UnbundleOptions{Key: f.user.key}, m, mapSource(b.parts)); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrTruncated) {
		t.Errorf("got %v", err)
	}
}

// A sparse bomb, 1 EiB of hole in a small archive, takes no disk.
func TestSparseBomb(t *testing.T) {
	f := newForge(t)
	m := member{name: "img", size: 1 << 42, mode: 0o644} // 4 TiB, which ext4 can hold
	m.data = m.data.Append(extent(0, 512))
	tar := tarOf(m.header(), f.image[:512])
	b := f.archive(t, tar, func(m *Manifest) { m.Size = 1 << 42 })
	got, err := ParseManifest(b.doc)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "out")
	if err := UnbundleFile(t.Context(), UnbundleOptions{Key: f.user.key}, got, mapSource(b.parts), path); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 1<<42 || st.Blocks > 1000 {
		t.Errorf("%d bytes in %d blocks", st.Size, st.Blocks)
	}
}
