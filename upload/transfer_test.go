package upload_test

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/s3fault"
	"github.com/instar-image/instar/upload/storetest"
)

// stores runs a test on a directory and on a server.
func stores(t *testing.T, f func(t *testing.T, s upload.Store)) {
	t.Run("dir", func(t *testing.T) { f(t, open(t, t.TempDir(), upload.Options{})) })
	t.Run("s3", func(t *testing.T) { f(t, bucket(t, fakeOptions(fakeS3(t)))) })
}

// tally is a Progress that adds up.
type tally struct {
	mu                     sync.Mutex
	objects, done, skipped int
	total, moved           int64
}

func (c *tally) Start(n int, b int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects += n
	c.total += b
}

func (c *tally) Add(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.moved += n
}

func (c *tally) Done(_ string, size int64, skipped bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done++
	if skipped {
		c.skipped++
	}
}

// makeFiles makes n files of a bundle in a directory.
func makeFiles(t *testing.T, n int) (files []upload.File, fetches []upload.Fetch, total int64) {
	t.Helper()
	dir := t.TempDir()
	for i := range n {
		name := fmt.Sprintf("img.part.%02d", i)
		data := storetest.Bytes(uint64(i), 30_000+i)
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha1.Sum(data)
		files = append(files, upload.File{Key: "b/" + name, Path: filepath.Join(dir, name)})
		fetches = append(fetches, upload.Fetch{Key: "b/" + name, Name: name, Size: int64(len(data)), Sum: sum[:], Hash: sha1.New})
		total += int64(len(data))
	}
	return files, fetches, total
}

func TestUploadSkipsWhatIsIntact(t *testing.T) {
	stores(t, func(t *testing.T, s upload.Store) {
		files, _, total := makeFiles(t, 6)
		var c tally
		res, err := upload.Upload(t.Context(), s, files, upload.TransferOptions{Progress: &c})
		if err != nil || res.Moved != 6 || res.MovedBytes != total || c.moved != total || c.total != total || c.done != 6 {
			t.Fatalf("first: %+v, %+v, %v", res, &c, err)
		}
		// One object is missing, one has other bytes of the same size, one
		// another size.
		if err := s.Delete(t.Context(), files[0].Key); err != nil {
			t.Fatal(err)
		}
		for i, n := range map[int]int{1: 30_001, 2: 5} {
			if _, err := upload.PutBytes(t.Context(), s, files[i].Key, make([]byte, n), upload.PutOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		res, err = upload.Upload(t.Context(), s, files, upload.TransferOptions{})
		if err != nil || res.Moved != 3 || res.Skipped != 3 {
			t.Errorf("second: %+v, %v", res, err)
		}
		for _, f := range files {
			want, _ := os.ReadFile(f.Path)
			if got, _, err := upload.GetBytes(t.Context(), s, f.Key, 1<<20); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, %v", f.Key, len(got), err)
			}
		}
		if res, err = upload.Upload(t.Context(), s, files, upload.TransferOptions{Force: true}); err != nil || res.Moved != 6 {
			t.Errorf("forced: %+v, %v", res, err)
		}
	})
}

// TestUploadDistrustsMultipart: an ETag that is no MD5 proves nothing.
func TestUploadDistrustsMultipart(t *testing.T) {
	s := bucket(t, fakeOptions(fakeS3(t)))
	data := storetest.Bytes(1, 6<<20)
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	o, err := s.PutStream(t.Context(), "f", bytes.NewReader(data), upload.PutOptions{PartSize: 5 << 20})
	if err != nil || !strings.HasSuffix(o.ETag, "-2") || o.MD5 != nil {
		t.Fatalf("%+v, %v", o, err)
	}
	res, err := upload.Upload(t.Context(), s, []upload.File{{Key: "f", Path: path}}, upload.TransferOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// gofakes3 lists the whole content's MD5 even then; either way the bytes are right.
	if got, _, err := upload.GetBytes(t.Context(), s, "f", 1<<30); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%+v: %d bytes, %v", res, len(got), err)
	}
}

func TestUploadFailure(t *testing.T) {
	stores(t, func(t *testing.T, s upload.Store) {
		files, _, _ := makeFiles(t, 3)
		_, err := upload.Upload(t.Context(), s, append(files, upload.File{Key: "x", Path: filepath.Join(t.TempDir(), "missing")}), upload.TransferOptions{})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("missing file: %v", err)
		}
		_, err = upload.Upload(t.Context(), s, []upload.File{{Key: "x", Path: t.TempDir()}}, upload.TransferOptions{})
		if err == nil {
			t.Error("a directory was uploaded")
		}
		if n := len(keysOf(t, s)); n != 0 {
			t.Errorf("%d objects stored before the check", n)
		}
	})
}

func keysOf(t *testing.T, s upload.Store) (keys []string) {
	t.Helper()
	for o, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

func TestDownloadSkipsAndVerifies(t *testing.T) {
	stores(t, func(t *testing.T, s upload.Store) {
		files, fetches, total := makeFiles(t, 6)
		if _, err := upload.Upload(t.Context(), s, files, upload.TransferOptions{}); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		var c tally
		res, err := upload.Download(t.Context(), s, dir, fetches, upload.TransferOptions{Progress: &c})
		if err != nil || res.Moved != 6 || res.MovedBytes != total || c.moved != total || c.total != total {
			t.Fatalf("first: %+v, %+v, %v", res, &c, err)
		}
		// One file is missing, one damaged, one cut short.
		os.Remove(filepath.Join(dir, fetches[0].Name))
		os.WriteFile(filepath.Join(dir, fetches[1].Name), make([]byte, 30_001), 0o644)
		os.Truncate(filepath.Join(dir, fetches[2].Name), 100)
		res, err = upload.Download(t.Context(), s, dir, fetches, upload.TransferOptions{})
		if err != nil || res.Moved != 3 || res.Skipped != 3 {
			t.Errorf("second: %+v, %v", res, err)
		}
		checkFiles(t, dir, files)
	})
}

// checkFiles compares a directory with the originals: nothing more, nothing less.
func checkFiles(t *testing.T, dir string, files []upload.File) {
	t.Helper()
	for _, f := range files {
		want, _ := os.ReadFile(f.Path)
		got, err := os.ReadFile(filepath.Join(dir, filepath.Base(f.Path)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", f.Path, len(got), err)
		}
	}
	if l, _ := os.ReadDir(dir); len(l) != len(files) {
		t.Errorf("%d files in the directory, want %d: %v", len(l), len(files), l)
	}
}

func TestDownloadRefusesRot(t *testing.T) {
	stores(t, func(t *testing.T, s upload.Store) {
		files, fetches, _ := makeFiles(t, 2)
		if _, err := upload.Upload(t.Context(), s, files, upload.TransferOptions{}); err != nil {
			t.Fatal(err)
		}
		bad, _ := os.ReadFile(files[1].Path)
		bad[77] ^= 1
		if _, err := upload.PutBytes(t.Context(), s, files[1].Key, bad, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		_, err := upload.Download(t.Context(), s, dir, fetches, upload.TransferOptions{Parallel: 1})
		var e *upload.Error
		if !errors.Is(err, upload.ErrCorrupt) || !errors.As(err, &e) || e.Key != files[1].Key {
			t.Errorf("got %v", err)
		}
		checkFiles(t, dir, files[:1])
	})
}

// TestDownloadResumes breaks a download in the middle of its second object and
// counts what the next call asks for.
func TestDownloadResumes(t *testing.T) {
	p := s3fault.New(fakeS3(t))
	t.Cleanup(p.Close)
	o := fakeOptions(p.URL)
	o.Retry.Attempts = 1
	s := bucket(t, o)
	files, fetches, _ := makeFiles(t, 3)
	if _, err := upload.Upload(t.Context(), s, files, upload.TransferOptions{}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	p.Plan(s3fault.At(3, s3fault.ResetBody)) // HEAD, GET, HEAD, GET
	if _, err := upload.Download(t.Context(), s, dir, fetches, upload.TransferOptions{Parallel: 1, KeepPartial: true}); err == nil {
		t.Fatal("no error")
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 2 || !strings.HasSuffix(left[0].Name(), ".instar-part") {
		t.Fatalf("left: %v", left)
	}
	p.Plan(nil)
	var c tally
	res, err := upload.Download(t.Context(), s, dir, fetches, upload.TransferOptions{Parallel: 1, Progress: &c})
	if err != nil || res.Skipped != 1 || res.Moved != 2 {
		t.Fatalf("%+v, %v", res, err)
	}
	if log := p.Log(); !strings.HasPrefix(log[1].Range, "bytes=1") {
		t.Errorf("it began anew: %v", log)
	}
	checkFiles(t, dir, files)

	// Damage to what was kept is found and made good.
	os.Remove(filepath.Join(dir, fetches[1].Name))
	p.Plan(s3fault.At(1, s3fault.ResetBody))
	upload.Download(t.Context(), s, dir, fetches[1:2], upload.TransferOptions{KeepPartial: true})
	p.Plan(nil)
	l, _ := filepath.Glob(filepath.Join(dir, ".*.instar-part"))
	if len(l) != 1 {
		t.Fatalf("left: %q", l)
	}
	f, err := os.OpenFile(l[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("rot"), 10)
	f.Close()
	if _, err := upload.Download(t.Context(), s, dir, fetches[1:2], upload.TransferOptions{}); err != nil {
		t.Fatal(err)
	}
	checkFiles(t, dir, files)

	// Without KeepPartial nothing stays.
	os.Remove(filepath.Join(dir, fetches[1].Name))
	p.Plan(s3fault.At(1, s3fault.ResetBody))
	if _, err := upload.Download(t.Context(), s, dir, fetches[1:2], upload.TransferOptions{}); err == nil {
		t.Error("no error")
	}
	if l, _ := filepath.Glob(filepath.Join(dir, ".*.instar-part")); len(l) != 0 {
		t.Errorf("left: %q", l)
	}
}

func TestDownloadStaysInside(t *testing.T) {
	stores(t, func(t *testing.T, s upload.Store) {
		if _, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		outer := t.TempDir()
		dir := filepath.Join(outer, "in")
		os.Mkdir(dir, 0o755)
		os.Symlink(outer, filepath.Join(dir, "link"))
		for _, name := range []string{"../out", "/tmp/../out", "link/out", filepath.Join(outer, "out")} {
			if _, err := upload.Download(t.Context(), s, dir, []upload.Fetch{{Key: "k", Name: name}}, upload.TransferOptions{}); err == nil {
				t.Errorf("%q was written", name)
			}
		}
		if l, _ := os.ReadDir(outer); len(l) != 1 {
			t.Errorf("outside: %v", l)
		}
	})
}

// TestCopyBetween crosses every pair of kinds of store.
func TestCopyBetween(t *testing.T) {
	fake := fakeS3(t)
	a, b := bucket(t, fakeOptions(fake)), bucket(t, fakeOptions(fake))
	other, dir := bucket(t, fakeOptions(fakeS3(t))), open(t, t.TempDir(), upload.Options{})
	for _, n := range []int{0, 100_000, 17 << 20} {
		data := storetest.Bytes(uint64(n), n)
		if _, err := upload.PutBytes(t.Context(), a, "k", data, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		for _, hop := range []struct{ from, to upload.Store }{{a, b}, {b, other}, {other, dir}, {dir, a}} {
			if _, err := upload.Copy(t.Context(), hop.to, "k", hop.from, "k", upload.PutOptions{}); err != nil {
				t.Errorf("%s to %s: %v", hop.from, hop.to, err)
			}
			if got, _, err := upload.GetBytes(t.Context(), hop.to, "k", 1<<30); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s to %s: %d bytes, %v", hop.from, hop.to, len(got), err)
			}
		}
	}
}
