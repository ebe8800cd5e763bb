package disk_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/sparse"
)

var id = [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// filesystem makes an ext4 image of some MiB and its map.
func filesystem(t *testing.T, mib string) (string, int64, sparse.Map) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fs")
	run(t, "truncate", "-s", mib+"M", path)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", path)
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	st, err := f.Stat()
	must(t, err)
	m, err := sparse.Scan(int(f.Fd()), st.Size())
	must(t, err)
	return path, st.Size(), m
}

// image writes d's stream out as the file it stands for.
func image(t *testing.T, d *disk.Disk, fs string, m sparse.Map) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	src, err := os.Open(fs)
	must(t, err)
	defer src.Close()
	var stream bytes.Buffer
	must(t, d.Write(t.Context(), &stream, func(w io.Writer) error {
		_, err := io.Copy(w, sparse.NewReader(src, m))
		return err
	}))
	if int64(stream.Len()) != d.Map().Bytes() {
		t.Fatalf("the stream has %d bytes, the map %d", stream.Len(), d.Map().Bytes())
	}
	must(t, d.Map().Check(d.Size()))
	for _, e := range d.Map() {
		_, err := f.WriteAt(stream.Next(int(e.Len)), e.Off)
		must(t, err)
	}
	must(t, f.Truncate(d.Size()))
	return path
}

func TestTables(t *testing.T) {
	fs, size, m := filesystem(t, "24")
	want, err := os.ReadFile(fs)
	must(t, err)
	for _, kind := range []disk.Kind{disk.MBR, disk.GPT} {
		t.Run(string(kind), func(t *testing.T) {
			d, err := disk.Wrap(kind, size, m, id)
			must(t, err)
			if d.Size() != size+kind.Overhead() {
				t.Errorf("size %d, want %d and an overhead of %d", d.Size(), size, kind.Overhead())
			}
			path := image(t, d, fs, m)
			got, err := os.ReadFile(path)
			must(t, err)
			off, n := d.Partition()
			if n != size || !bytes.Equal(got[off:off+n], want) {
				t.Errorf("the partition does not hold the filesystem")
			}
			if sha256.Sum256(got) != sha256.Sum256(mustRead(os.ReadFile(image(t, d, fs, m)))) {
				t.Errorf("two runs differ")
			}
			if len(d.Notes()) == 0 {
				t.Errorf("nothing is said about the missing boot loader")
			}
			dump := run(t, "sfdisk", "-d", path)
			parted := run(t, "parted", "-s", path, "unit", "s", "print")
			verify := ""
			if kind == disk.GPT {
				verify = run(t, "sgdisk", "-v", path)
				if !strings.Contains(verify, "No problems found") {
					t.Errorf("sgdisk: %s", verify)
				}
				for _, s := range []string{"start=        4096, size=       49152, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4", "type=21686148-6449-6E6F-744E-656564454649"} {
					if !strings.Contains(dump, s) {
						t.Errorf("sfdisk does not say %q:\n%s", s, dump)
					}
				}
			} else if !strings.Contains(dump, "start=        2048, size=       49152, type=83, bootable") {
				t.Errorf("sfdisk:\n%s", dump)
			}
			if !strings.Contains(parted, "ext4") || strings.Contains(parted, "rror") {
				t.Errorf("parted: %s", parted)
			}
			mount(t, path)
		})
	}
}

// mount shows the disk to the kernel as a loop device, whose first partition
// must be a clean filesystem that mounts. partx reads the table and tells the
// kernel, since not every kernel is built to read it itself.
func mount(t *testing.T, path string) {
	t.Helper()
	loop := strings.TrimSpace(run(t, "losetup", "--show", "-f", path))
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	run(t, "partx", "-a", loop)
	t.Cleanup(func() { run(t, "partx", "-d", loop) })
	run(t, "e2fsck", "-fn", loop+"p1")
	dir := t.TempDir()
	run(t, "mount", loop+"p1", dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	if _, err := os.Stat(filepath.Join(dir, "lost+found")); err != nil {
		t.Error(err)
	}
}

func mustRead(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestNone(t *testing.T) {
	m := sparse.Map{{Off: 4096, Len: 4096}}
	d, err := disk.Wrap(disk.None, 1<<20, m, id)
	must(t, err)
	var out bytes.Buffer
	must(t, d.Write(t.Context(), &out, func(w io.Writer) error {
		_, err := w.Write(bytes.Repeat([]byte{7}, 4096))
		return err
	}))
	if d.Size() != 1<<20 || len(d.Map()) != 1 || d.Map()[0] != m[0] || out.Len() != 4096 || len(d.Notes()) != 0 {
		t.Errorf("size %d, map %v, %d bytes", d.Size(), d.Map(), out.Len())
	}
}

func TestIdentifiersFollowTheFilesystem(t *testing.T) {
	head := func(id [16]byte) string {
		d, err := disk.Wrap(disk.GPT, 1<<20, nil, id)
		must(t, err)
		var out bytes.Buffer
		must(t, d.Write(t.Context(), &out, func(io.Writer) error { return nil }))
		return out.String()
	}
	one, again := head(id), head(id)
	if one != again || one == head([16]byte{}) {
		t.Errorf("the table does not depend on the filesystem's UUID alone")
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		kind disk.Kind
		size int64
		m    sparse.Map
		want error
	}{
		"kind":     {"apm", 1 << 20, nil, disk.ErrKind},
		"odd size": {disk.GPT, 1000, nil, disk.ErrSize},
		"nothing":  {disk.GPT, 0, nil, disk.ErrSize},
		"mbr 2TiB": {disk.MBR, 2 << 40, nil, disk.ErrSize},
		"map":      {disk.GPT, 1 << 20, sparse.Map{{Off: 1 << 20, Len: 1}}, sparse.ErrInvalid},
	} {
		if _, err := disk.Wrap(c.kind, c.size, c.m, id); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := disk.ParseKind("MBR"); !errors.Is(err, disk.ErrKind) {
		t.Errorf("ParseKind: %v", err)
	}
	broken := errors.New("broken")
	d, err := disk.Wrap(disk.GPT, 1<<20, sparse.Map{{Off: 0, Len: 10}}, id)
	must(t, err)
	for name, c := range map[string]struct {
		fs   func(io.Writer) error
		want error
	}{
		"short":  {func(w io.Writer) error { _, err := w.Write(make([]byte, 9)); return err }, disk.ErrMismatch},
		"long":   {func(w io.Writer) error { _, err := w.Write(make([]byte, 11)); return err }, disk.ErrMismatch},
		"broken": {func(io.Writer) error { return broken }, broken},
	} {
		if err := d.Write(t.Context(), io.Discard, c.fs); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
