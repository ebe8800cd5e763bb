package restore

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
	"strings"
	"sync"
	"testing"

	"github.com/instar-image/instar/bundle/sparse"
)

// fakeDisk gives its pieces in random order and may fail after some of them.
type fakeDisk struct {
	data  []byte
	m     sparse.Map
	fail  int // copies after which it fails; 0 never
	wrote int64
	seed  uint64
}

var errFetch = errors.New("store is gone")

func newDisk(seed uint64) *fakeDisk {
	r := rand.New(rand.NewPCG(seed, 1))
	d := &fakeDisk{data: make([]byte, 9<<20+4096), seed: seed}
	for pos := int64(0); pos < int64(len(d.data)); {
		n := min(4096*(1+r.Int64N(200)), int64(len(d.data))-pos)
		for i := range n {
			d.data[pos+i] = byte(r.Uint32() | 1)
		}
		d.m = d.m.Append(sparse.Extent{Off: pos, Len: n})
		pos += n + 4096*r.Int64N(300)
	}
	return d
}

func (d *fakeDisk) Size() int64                             { return int64(len(d.data)) }
func (d *fakeDisk) ID() string                              { return fmt.Sprint(d.seed) }
func (d *fakeDisk) Map(context.Context) (sparse.Map, error) { return d.m, nil }

func (d *fakeDisk) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(d.data).ReadAt(p, off)
}

func (d *fakeDisk) Copy(_ context.Context, out io.WriterAt, present io.ReaderAt, report func(int64)) error {
	type piece struct{ off, n int64 }
	var all []piece
	for _, e := range d.m {
		for off := e.Off; off < e.End(); off += 100_000 {
			all = append(all, piece{off, min(100_000, e.End()-off)})
		}
	}
	var mu sync.Mutex
	for i, j := range rand.New(rand.NewPCG(d.seed, 2)).Perm(len(all)) {
		if d.fail > 0 && i == d.fail {
			return errFetch
		}
		want := d.data[all[j].off : all[j].off+all[j].n]
		if present != nil {
			got := make([]byte, len(want))
			if _, err := present.ReadAt(got, all[j].off); err == nil && bytes.Equal(got, want) {
				continue
			}
		}
		if _, err := out.WriteAt(want, all[j].off); err != nil {
			return err
		}
		mu.Lock()
		d.wrote += all[j].n
		mu.Unlock()
		report(all[j].n)
	}
	return nil
}

func nothing(int64) {}

func files(t *testing.T, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names
}

func TestFileContinues(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "root.img")
	if err := os.WriteFile(path, []byte("the one before"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := newDisk(1)
	d.fail = 20
	if err := ToFile(t.Context(), d, path, nothing); !errors.Is(err, errFetch) {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); string(got) != "the one before" {
		t.Fatal("a failed restore touched the file")
	}
	// garbage in a hole, as a restore of another version of this program might leave
	part := filepath.Join(dir, files(t, dir)[0])
	f, err := os.OpenFile(part, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("garbage"), d.m[0].End()); err != nil {
		t.Fatal(err)
	}
	f.Close()
	first := d.wrote
	d.fail, d.wrote = 0, 0
	if err := ToFile(t.Context(), d, path, nothing); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, d.data) {
		t.Fatal("the file is not the disk")
	}
	if first+d.wrote != d.m.Bytes() {
		t.Errorf("wrote %d and then %d of %d bytes", first, d.wrote, d.m.Bytes())
	}
	if got := files(t, dir); len(got) != 1 {
		t.Errorf("left behind: %q", got)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := scan(path); err != nil || m.Bytes() > d.m.Bytes()+64<<10 {
		t.Errorf("%d bytes of %d are data, the disk has %d: %v", m.Bytes(), st.Size(), d.m.Bytes(), err)
	}
}

func scan(path string) (sparse.Map, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return sparse.Scan(int(f.Fd()), st.Size())
}

// loop is a loop device over a dirty file.
func loop(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, bytes.Repeat([]byte("dirty disk "), int(size/11+1))[:size], 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "losetup", "-f", "--show", path).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.CommandContext(context.Background(), "losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return dev
}

func TestDirtyDevice(t *testing.T) {
	d := newDisk(2)
	dev := loop(t, d.Size()+1<<20)
	head := make([]byte, 1<<20)
	read := func(p []byte, off int64) {
		t.Helper()
		f, err := os.Open(dev)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := ToDevice(t.Context(), d, dev, false, nothing); !errors.Is(err, ErrNotEmpty) || d.wrote != 0 {
		t.Fatal(err)
	}
	if read(head, 0); !bytes.HasPrefix(head, []byte("dirty disk dirty")) {
		t.Fatal("a device that was refused was touched")
	}
	d.fail = 30
	if err := ToDevice(t.Context(), d, dev, true, nothing); !errors.Is(err, errFetch) {
		t.Fatal(err)
	}
	if read(head, 0); !bytes.Equal(head, make([]byte, 1<<20)) {
		t.Fatal("a half-written device has a beginning")
	}
	d.fail, d.wrote = 0, 0
	if err := ToDevice(t.Context(), d, dev, false, nothing); err != nil {
		t.Fatal(err)
	}
	if d.wrote >= d.m.Bytes() {
		t.Error("the second restore wrote all again")
	}
	all := make([]byte, d.Size())
	if read(all, 0); !bytes.Equal(all, d.data) {
		t.Fatal("the device is not the disk")
	}
	if read(head, d.Size()); !bytes.HasPrefix(head, bytes.Repeat([]byte("dirty disk "), 20)[d.Size()%11:]) {
		t.Error("what lies beyond the disk was touched")
	}
}

func TestDeviceRefused(t *testing.T) {
	d := newDisk(3)
	dev := loop(t, 1<<20)
	if err := ToDevice(t.Context(), d, dev, false, nothing); !errors.Is(err, ErrTooSmall) {
		t.Errorf("too small: %v", err)
	}
	dev = loop(t, 16<<20)
	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-qF", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	mnt := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "mount", dev, mnt).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer func() {
		if out, err := exec.CommandContext(context.Background(), "umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}()
	if err := ToDevice(t.Context(), d, dev, false, nothing); !errors.Is(err, ErrInUse) {
		t.Errorf("mounted: %v", err)
	}
}

func TestQCOW2(t *testing.T) {
	dir := t.TempDir()
	d := newDisk(4)
	path, raw := filepath.Join(dir, "q"), filepath.Join(dir, "raw")
	d.fail = 5
	if err := ToQCOW2(t.Context(), d, path, nothing); !errors.Is(err, errFetch) {
		t.Fatal(err)
	}
	if got := files(t, dir); len(got) != 0 {
		t.Fatalf("left behind: %q", got)
	}
	d.fail = 0
	if err := ToQCOW2(t.Context(), d, path, nothing); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := ToStream(t.Context(), d, d.Size(), d.m, &b, nothing); err != nil || !bytes.Equal(b.Bytes(), d.data) {
		t.Fatalf("the stream is not the disk: %v", err)
	}
	if err := os.WriteFile(raw, d.data, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
