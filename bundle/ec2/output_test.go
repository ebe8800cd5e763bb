package ec2

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

// An existing file stays as it is until, and unless, all is verified.
func TestUnbundleFileReplacesLast(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	dir := t.TempDir()
	path := filepath.Join(dir, "out")
	if err := os.WriteFile(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.Digest[0]++ // noticed at the very end
	o := UnbundleOptions{Key: f.user.key}
	if err := UnbundleFile(t.Context(), o, m, mapSource(good.parts), path); !errors.Is(err, ErrDigest) {
		t.Errorf("%v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Errorf("the old file is now %q", b)
	}
	m.Digest[0]--
	if err := UnbundleFile(t.Context(), o, m, mapSource(good.parts), path); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); !bytes.Equal(b, f.image) {
		t.Error("the new file is not the image")
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// Nothing goes to a pipe or a device before all is verified.
func TestNothingBeforeAllIsVerified(t *testing.T) {
	f := newForge(t)
	good := f.good(t)
	m := parsed(t, good.doc)
	o := UnbundleOptions{Key: f.user.key}
	dev := filepath.Join(t.TempDir(), "device")
	old := bytes.Repeat([]byte{0xee}, 1000)
	if err := os.WriteFile(dev, old, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *os.File {
		d, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	for _, breakIt := range []func(){
		func() { m.Digest[0]++ },
		func() { m.Digest[0]--; delete(good.parts, m.Parts[len(m.Parts)-1].Filename) },
	} {
		breakIt()
		var out bytes.Buffer
		if err := UnbundleTo(t.Context(), o, m, mapSource(good.parts), &out); err == nil || out.Len() > 0 {
			t.Errorf("to a pipe: %v, %d bytes", err, out.Len())
		}
		if err := UnbundleDevice(t.Context(), o, m, mapSource(good.parts), open()); err == nil {
			t.Error("to a device: no error")
		}
		if b, _ := os.ReadFile(dev); !bytes.Equal(b, old) {
			t.Error("the device was written to")
		}
	}
	good = f.good(t)
	var out bytes.Buffer
	if err := UnbundleTo(t.Context(), o, m, mapSource(good.parts), &out); err != nil || !bytes.Equal(out.Bytes(), f.image) {
		t.Errorf("to a pipe: %v", err)
	}
	if err := UnbundleDevice(t.Context(), o, m, mapSource(good.parts), open()); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(dev); !bytes.Equal(b, f.image) {
		t.Error("the device does not hold the image")
	}
}

// A real block device: old bytes under holes are gone, a small one is refused.
func TestUnbundleToBlockDevice(t *testing.T) {
	user := loadParty(t, "user")
	m := readManifest(t, fixture("ec2-basic", "fx.img.manifest.xml"))
	src := dirSource(fixture("ec2-basic"))
	for _, c := range []struct {
		size int64
		ok   bool
	}{{m.Size + 1<<20, true}, {m.Size - 4096, false}} {
		back := filepath.Join(t.TempDir(), "back")
		if err := os.WriteFile(back, bytes.Repeat([]byte{0xee}, int(c.size)), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("losetup", "--find", "--show", back).CombinedOutput()
		if err != nil {
			t.Fatalf("losetup: %v %s", err, out)
		}
		loop := strings.TrimSpace(string(out))
		t.Cleanup(func() {
			if out, err := exec.Command("losetup", "-d", loop).CombinedOutput(); err != nil {
				t.Errorf("losetup -d: %v %s", err, out)
			}
		})
		d, err := os.OpenFile(loop, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = UnbundleDevice(t.Context(), UnbundleOptions{Key: user.key}, m, src, d)
		if (err == nil) != c.ok {
			t.Errorf("device of %d bytes: %v", c.size, err)
		}
		got := make([]byte, m.Size)
		if _, err := d.ReadAt(got, 0); c.ok && (err != nil || sha256Hex(got) != fixtureSHA256) {
			t.Errorf("device holds another image: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnbundleStream(t *testing.T) {
	f := newForge(t)
	e := f.encrypted(gzipped(f.tar()))
	digest := SHA1(sha1Sum(f.tar()))
	wrong := digest
	wrong[0]++
	for _, c := range []struct {
		name string
		o    StreamOptions
		want error
	}{
		{"key alone", StreamOptions{Key: f.key, IV: f.iv}, nil},
		{"size and digest", StreamOptions{Key: f.key, IV: f.iv, Size: 700, SHA1: &digest}, nil},
		{"wrong size", StreamOptions{Key: f.key, IV: f.iv, Size: 701}, ErrSize},
		{"wrong digest", StreamOptions{Key: f.key, IV: f.iv, SHA1: &wrong}, ErrDigest},
		{"wrong key", StreamOptions{Key: f.iv, IV: f.iv}, ErrKey},
	} {
		var out bytes.Buffer
		err := UnbundleStream(t.Context(), c.o, iotest.OneByteReader(bytes.NewReader(bytes.Clone(e))), NewStreamOutput(&out))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err == nil && !bytes.Equal(out.Bytes(), f.image) {
			t.Errorf("%s: image differs", c.name)
		}
	}
	if err := UnbundleStream(t.Context(), StreamOptions{Key: f.key, IV: f.iv}, bytes.NewReader(e[:len(e)-16]), &nowhere{}); err == nil {
		t.Error("truncated: no error")
	}
}
