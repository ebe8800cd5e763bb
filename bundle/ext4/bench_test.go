package ext4_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
)

// BenchmarkSmallFiles plans and writes 100,000 files of 0 to 8 KiB from a directory.
func BenchmarkSmallFiles(b *testing.B) {
	root := b.TempDir()
	for i := range 100 {
		d := filepath.Join(root, fmt.Sprint(i))
		check(b, os.Mkdir(d, 0o755))
		for j := range 1000 {
			check(b, os.WriteFile(filepath.Join(d, fmt.Sprintf("file-%d", j)), make([]byte, j*8), 0o644))
		}
	}
	tree, src := walk(b, root)
	benchmark(b, tree, src)
}

// BenchmarkLargeFile writes one file of 2 GiB, which the source has in memory.
func BenchmarkLargeFile(b *testing.B) {
	t, err := filetree.NewBuilder(filetree.Attr{Mode: unix.S_IFDIR | 0o755}, nil)
	check(b, err)
	check(b, t.Begin(filetree.Root))
	_, err = t.Add(&filetree.Entry{Name: "f", Link: filetree.None, Attr: filetree.Attr{Mode: unix.S_IFREG | 0o644, Size: 2 << 30}})
	check(b, err)
	path := filepath.Join(b.TempDir(), "f")
	f, err := os.Create(path)
	check(b, err)
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i * i >> 3)
	}
	for range 2 << 10 {
		_, err := f.Write(buf)
		check(b, err)
	}
	check(b, f.Close())
	benchmark(b, t.Tree(), dirSource{1: path})
}

func benchmark(b *testing.B, tree *filetree.Tree, src filetree.Source) {
	b.Run("plan", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			plan(b, tree, ext4.Options{})
		}
	})
	p := plan(b, tree, ext4.Options{})
	b.Run("write", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(p.Map().Bytes())
		for b.Loop() {
			check(b, p.Write(b.Context(), io.Discard, src, nil))
		}
	})
}
