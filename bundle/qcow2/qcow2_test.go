package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/instar-image/instar/bundle/sparse"
)

func qemuImg(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), "qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// disk is a random disk: a raw file, and the map of its data.
func disk(t *testing.T, r *rand.Rand, size int64) (string, sparse.Map) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	var m sparse.Map
	for pos := int64(0); pos < size; {
		gap := r.Int64N(1 + []int64{0, 5000, 200_000, 3 << 20, size / 3}[r.IntN(5)])
		if pos += gap &^ 511; pos >= size {
			break
		}
		n := min(1+r.Int64N([]int64{4096, 70_000, 2 << 20}[r.IntN(3)]), size-pos)
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(r.Uint32()) & 0x1f
		}
		if _, err := f.WriteAt(p, pos); err != nil {
			t.Fatal(err)
		}
		m = m.Append(sparse.Extent{Off: pos, Len: n})
		pos += n
	}
	return path, m
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestWriterAgainstQEMU writes random disks and lets QEMU check and compare them.
func TestWriterAgainstQEMU(t *testing.T) {
	for i, size := range []int64{0, 512, 65536, 65536*3 + 512, 10 << 20, 40<<20 + 4096, 1200 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(i), 7))
			raw, m := disk(t, r, size)
			src := open(t, raw)
			path := filepath.Join(t.TempDir(), "q.qcow2")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			w, err := NewWriter(f, size, m)
			if err != nil {
				t.Fatal(err)
			}
			for _, j := range r.Perm(len(m)) { // in any order, in pieces of any size
				for e := m[j]; e.Len > 0; {
					p := make([]byte, min(e.Len, 1+r.Int64N(300_000)))
					if _, err := src.ReadAt(p, e.Off); err != nil && !errors.Is(err, io.EOF) {
						t.Fatal(err)
					}
					if _, err := w.WriteAt(p, e.Off); err != nil {
						t.Fatal(err)
					}
					e.Off, e.Len = e.Off+int64(len(p)), e.Len-int64(len(p))
				}
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			qemuImg(t, "check", "-f", "qcow2", path)
			qemuImg(t, "compare", "-f", "raw", "-F", "qcow2", raw, path)
			same(t, raw, path, size)
		})
	}
}

// same reads the whole disk with a Reader and holds it against the raw file.
func same(t *testing.T, raw, path string, size int64) {
	t.Helper()
	f, want := open(t, path), open(t, raw)
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	q, err := NewReader(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	if q.Size() != size {
		t.Fatalf("size %d, want %d", q.Size(), size)
	}
	m, err := q.Map()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Check(size); err != nil {
		t.Fatal(err)
	}
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	held := sparse.Map(m)
	for pos := int64(0); pos < size; pos += int64(len(a)) {
		n := min(int64(len(a)), size-pos)
		if _, err := want.ReadAt(a[:n], pos); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		for len(held) > 0 && held[0].End() <= pos {
			held = held[1:]
		}
		clear(b)
		for _, e := range held {
			from, to := max(e.Off, pos), min(e.End(), pos+n)
			if from >= to {
				break
			}
			if _, err := q.ReadAt(b[from-pos:to-pos], from); err != nil {
				t.Fatalf("reading %d bytes at %d: %v", to-from, from, err)
			}
		}
		if !bytes.Equal(a[:n], b[:n]) {
			t.Fatalf("the disk differs in the MiB at %d", pos)
		}
	}
}

// TestReaderAgainstQEMU reads what QEMU writes, in all variants that are read.
func TestReaderAgainstQEMU(t *testing.T) {
	raw, _ := disk(t, rand.New(rand.NewPCG(3, 7)), 30<<20+512)
	for _, args := range [][]string{
		{},
		{"-o", "compat=0.10"},
		{"-o", "cluster_size=512"},
		{"-o", "cluster_size=2M"},
		{"-o", "lazy_refcounts=on"},
		{"-c"},
		{"-c", "-o", "compat=0.10,cluster_size=4k"},
		{"-c", "-o", "compression_type=zstd"},
		{"-S", "0"},
	} {
		path := filepath.Join(t.TempDir(), "q")
		qemuImg(t, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), raw, path)...)
		same(t, raw, path, 30<<20+512)
	}
}

// TestRefused holds the Reader to refuse what it would read wrongly.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	qemuImg(t, "create", "-f", "qcow2", base, "4M")
	for _, c := range []struct {
		name string
		args []string
		want error
	}{
		{"backing", []string{"-b", base, "-F", "qcow2"}, ErrUnsupported},
		{"external", []string{"-o", "data_file=" + filepath.Join(dir, "data")}, ErrUnsupported},
		{"extended", []string{"-o", "extended_l2=on"}, ErrUnsupported},
	} {
		path := filepath.Join(dir, c.name)
		qemuImg(t, append(append([]string{"create", "-f", "qcow2"}, c.args...), path, "4M")...)
		f := open(t, path)
		st, _ := f.Stat()
		if _, err := NewReader(f, st.Size()); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	data, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		at   int
		b    byte
		want error
	}{
		{"magic", 0, 0, ErrFormat},
		{"version", 7, 9, ErrUnsupported},
		{"encryption", 35, 1, ErrUnsupported},
		{"clusters", 23, 60, ErrFormat},
		{"size", 24, 0xff, ErrFormat},
		{"level 1 outside", 40, 0x7f, ErrFormat},
		{"corrupt", 79, incompatBad, ErrFormat},
		{"feature", 72, 1, ErrUnsupported},
	} {
		p := bytes.Clone(data)
		p[c.at] = c.b
		if _, err := NewReader(bytes.NewReader(p), int64(len(p))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(make([]byte, 200))
	var b writerAt
	w, err := NewWriter(&b, 1<<20, sparse.Map{{Off: 0, Len: 512}, {Off: 300_000, Len: 70_000}})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("hello"), 3); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(b))
	f.Fuzz(func(t *testing.T, p []byte) {
		q, err := NewReader(bytes.NewReader(p), int64(len(p)))
		if err != nil {
			return
		}
		m, err := q.Map()
		if err != nil {
			return
		}
		buf := make([]byte, 4096)
		for _, e := range m[:min(len(m), 50)] {
			_, _ = q.ReadAt(buf[:min(e.Len, 4096)], e.Off)
		}
	})
}

// writerAt is a file in memory.
type writerAt []byte

func (b *writerAt) WriteAt(p []byte, off int64) (int, error) {
	if n := int(off) + len(p); n > len(*b) {
		*b = append(*b, make([]byte, n-len(*b))...)
	}
	return copy((*b)[off:], p), nil
}

func TestWriterKeepsToItsMap(t *testing.T) {
	var b writerAt
	w, err := NewWriter(&b, 1<<20, sparse.Map{{Off: 0, Len: 512}})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := w.WriteAt(make([]byte, 70_000), 0); err == nil || n != cluster {
		t.Errorf("wrote %d bytes, %v", n, err)
	}
	if _, err := NewWriter(&b, 1<<61, nil); !errors.Is(err, ErrSize) {
		t.Error(err)
	}
	if _, err := NewWriter(&b, 512, sparse.Map{{Off: 0, Len: 513}}); !errors.Is(err, sparse.ErrInvalid) {
		t.Error(err)
	}
}
