package capture_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/upload"
)

const part0, part1 = "b.part.0", "b.part.1"

func put(t *testing.T, d capture.Destination, name, data string) {
	t.Helper()
	if err := d.PutPart(t.Context(), ec2.Part{Name: name, Data: []byte(data)}); err != nil {
		t.Fatal(err)
	}
}

func prepare(t *testing.T, d capture.Destination) {
	t.Helper()
	if err := d.Prepare(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
}

func manifest(parts ...string) *ec2.Manifest {
	m := &ec2.Manifest{Name: "b"}
	for _, p := range parts {
		m.Parts = append(m.Parts, ec2.ManifestPart{Filename: p})
	}
	return m
}

func openDir(t *testing.T) upload.Store {
	t.Helper()
	s, err := upload.Open(t.Context(), "file://"+t.TempDir(), upload.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func stored(t *testing.T, s upload.Store) (all []string) {
	t.Helper()
	for o, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, o.Key)
	}
	return all
}

// TestSecondRunIntoBucket lets a second run take a first one's parts for
// leftovers and checks that the first publishes nothing and takes nothing of
// the second's with it.
func TestSecondRunIntoBucket(t *testing.T) {
	s := openDir(t)
	first, second := &capture.Bucket{Store: s}, &capture.Bucket{Store: s}
	prepare(t, first)
	put(t, first, part0, "first")
	prepare(t, second)
	put(t, second, part0, "other")
	put(t, first, part1, "first")
	if _, err := first.Commit(t.Context(), manifest(part0, part1), []byte("<first>")); !errors.Is(err, capture.ErrOtherRun) {
		t.Fatalf("Commit says %v, want ErrOtherRun", err)
	}
	if err := first.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := stored(t, s); len(got) != 1 || got[0] != part0 {
		t.Errorf("after the first run's end there are %q, want the second's part", got)
	}
	put(t, second, part1, "other")
	if _, err := second.Commit(t.Context(), manifest(part0, part1), []byte("<second>")); err != nil {
		t.Errorf("the second run cannot publish: %v", err)
	}
}

// TestSecondRunPublishedFirst checks that a manifest is never replaced.
func TestSecondRunPublishedFirst(t *testing.T) {
	s := openDir(t)
	first := &capture.Bucket{Store: s}
	prepare(t, first)
	put(t, first, part0, "first")
	const theirs = "<theirs>"
	if _, err := upload.PutBytes(t.Context(), s, capture.ManifestName("b"), []byte(theirs), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Commit(t.Context(), manifest(part0), []byte("<ours>")); !errors.Is(err, capture.ErrOtherRun) {
		t.Fatalf("Commit says %v, want ErrOtherRun", err)
	}
	if err := first.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, _, err := upload.GetBytes(t.Context(), s, capture.ManifestName("b"), 1<<10); err != nil || string(got) != theirs {
		t.Errorf("the other run's manifest is %q, %v", got, err)
	}
}

// TestSecondRunIntoDirectory checks that a directory is one run's at a time,
// and the next one's once the first is over or was killed.
func TestSecondRunIntoDirectory(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, dir := range []string{".", t.TempDir()} {
		if err := os.Mkdir(filepath.Join(dir, ".b.partial-killed"), 0o700); err != nil {
			t.Fatal(err)
		}
		first, second := &capture.Dir{Path: dir}, &capture.Dir{Path: dir}
		prepare(t, first)
		put(t, first, part0, "first")
		if err := second.Prepare(t.Context(), "b"); !errors.Is(err, capture.ErrOtherRun) {
			t.Fatalf("Prepare says %v, want ErrOtherRun", err)
		}
		if _, err := first.Commit(t.Context(), manifest(part0), []byte("<first>")); err != nil {
			t.Fatal(err)
		}
		prepare(t, second)
		if err := second.Abort(t.Context()); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 2 {
			t.Errorf("%s holds %v, %v; want a part and a manifest", dir, entries, err)
		}
	}
}

// TestReadErrorKeepsTheBundleBefore checks that an image that cannot be read
// leaves what was there.
func TestReadErrorKeepsTheBundleBefore(t *testing.T) {
	dir := t.TempDir()
	old := filepath.Join(dir, capture.ManifestName("b"))
	if err := os.WriteFile(old, []byte("<old>"), 0o600); err != nil {
		t.Fatal(err)
	}
	bang := errors.New("bang")
	img := ec2.Image{Name: "b", Size: 1 << 20, Write: func(context.Context, io.Writer) error { return bang }}
	if _, err := capture.Bundle(t.Context(), ec2.BundleOptions{}, img, &capture.Dir{Path: dir}, silent{}); err == nil {
		t.Fatal("no error")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%s holds %v, %v; want the old manifest alone", dir, entries, err)
	}
}

type silent struct{}

func (silent) Phase(string, int64) {}
func (silent) Add(int64)           {}
func (silent) Note(string)         {}
func (silent) Warn(string, string) {}

// TestOpenImageRefuses checks what is no image, a FIFO nobody writes to among it.
func TestOpenImageRefuses(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, "/dev/null", t.TempDir()} {
		if _, _, err := capture.OpenImage(path, 0); !errors.Is(err, capture.ErrOption) {
			t.Errorf("%s: %v, want ErrOption", path, err)
		}
	}
}
