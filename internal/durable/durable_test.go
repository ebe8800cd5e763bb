package durable_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/internal/durable"
)

// expect holds the files of a directory, name and content, against those that
// are to be there.
func expect(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.Name(), string(b))
	}
	if !slices.Equal(got, want) {
		t.Errorf("there is %q, want %q", got, want)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, c := range []struct {
		mode fs.FileMode
		text string
	}{{0o600, "one"}, {0o644, "two"}, {0o600, ""}} {
		if err := durable.Replace(path, c.mode, []byte(c.text)); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode() != c.mode {
			t.Errorf("mode %v, %v; want %v", st.Mode(), err, c.mode)
		}
		expect(t, dir, "f", c.text)
	}
	if err := durable.Replace(filepath.Join(dir, "none", "f"), 0o600, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a directory that is not there: %v", err)
	}
	// What cannot be placed leaves nothing.
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.Replace(filepath.Join(dir, "d"), 0o600, []byte("x")); err == nil {
		t.Error("a file took the place of a directory")
	}
	if left, err := filepath.Glob(filepath.Join(dir, durable.Temp+"*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := durable.Create(path, 0o644, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o644 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if err := durable.Create(path, 0o644, []byte("second")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file that is there: %v", err)
	}
	expect(t, dir, "f", "first")
}

// TestFill: until all is written, and for good if it cannot be, what was there
// is there.
func TestFill(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := durable.Replace(path, 0o600, []byte("before")); err != nil {
		t.Fatal(err)
	}
	full := errors.New("the disk is full")
	err := durable.Fill(path, 0o600, func(f *os.File) error {
		if _, err := f.WriteString("half of it"); err != nil {
			return err
		}
		if st, err := f.Stat(); err != nil || st.Mode() != 0o600 {
			t.Errorf("what is being written has mode %v, %v", st.Mode(), err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != "before" {
			t.Errorf("meanwhile: %q, %v", b, err)
		}
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
	expect(t, dir, "f", "before")
	err = durable.Fill(path, 0o600, func(f *os.File) error { _, err := f.WriteString("after"); return err })
	if err != nil {
		t.Fatal(err)
	}
	expect(t, dir, "f", "after")
}

func TestSyncDir(t *testing.T) {
	if err := durable.SyncDir(t.TempDir()); err != nil {
		t.Error(err)
	}
	if err := durable.SyncDir("/proc/self"); err != nil { // knows no such thing: EINVAL
		t.Error(err)
	}
	if err := durable.SyncDir(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := durable.Replace(path, 0o600, []byte("12345")); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int64{5, 6, 1 << 40} {
		if data, err := durable.Read(path, limit); err != nil || string(data) != "12345" {
			t.Errorf("%d bytes at most: %q, %v", limit, data, err)
		}
	}
	if data, err := durable.Read(path, 4); err == nil {
		t.Errorf("4 bytes at most: %q", data)
	}
	if _, err := durable.Read(filepath.Join(dir, "none"), 4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("where nothing is: %v", err)
	}
	link, pipe := filepath.Join(dir, "link"), filepath.Join(dir, "pipe")
	if err := errors.Join(os.Symlink("f", link), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := durable.Read(link, 5); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link: %v", err)
	}
	if data, err := durable.Read(pipe, 5); len(data) > 0 { // it does not wait
		t.Errorf("a pipe: %q, %v", data, err)
	}
}
