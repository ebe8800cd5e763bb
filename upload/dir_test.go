package upload_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/upload"
)

// TestDirStaysInside: no key and no planted link leads out of the directory.
func TestDirStaysInside(t *testing.T) {
	outer := t.TempDir()
	secret := filepath.Join(outer, "secret")
	os.WriteFile(secret, []byte("s"), 0o600)
	dir := filepath.Join(outer, "store")
	s := open(t, dir, upload.Options{CreateDir: true})
	os.Symlink(outer, filepath.Join(dir, "up"))
	os.Symlink(secret, filepath.Join(dir, "link"))
	for _, k := range []string{"up/secret", "link"} {
		if b, _, err := upload.GetBytes(t.Context(), s, k, 100); err == nil {
			t.Errorf("%s gives %q", k, b)
		}
		if _, err := upload.PutBytes(t.Context(), s, k, []byte("new"), upload.PutOptions{}); err == nil {
			t.Errorf("%s was written", k)
		}
		s.Delete(t.Context(), "up/secret")
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "s" {
		t.Errorf("outside: %q, %v", b, err)
	}
	if l := keysOf(t, s); len(l) != 0 {
		t.Errorf("links are listed: %q", l)
	}
}

// TestDirOddFiles: what is no regular file is no object, and never blocks.
func TestDirOddFiles(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, upload.Options{})
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	os.Mkdir(filepath.Join(dir, "sub"), 0o755)
	for _, k := range []string{"fifo", "sub"} {
		if _, err := s.Stat(t.Context(), k); !errors.Is(err, upload.ErrNotExist) {
			t.Errorf("stat %s: %v", k, err)
		}
		if _, err := upload.PutBytes(t.Context(), s, k, nil, upload.PutOptions{}); !errors.Is(err, upload.ErrKey) {
			t.Errorf("put %s: %v", k, err)
		}
	}
	if l := keysOf(t, s); len(l) != 0 {
		t.Errorf("listed: %q", l)
	}
}

// TestDirSweep: the leavings of a killed writer go, a living one's stay.
func TestDirSweep(t *testing.T) {
	dir := t.TempDir()
	old := time.Now().Add(-time.Minute)
	for _, n := range []string{"dead", "alive"} {
		p := filepath.Join(dir, ".instar-tmp-"+n)
		os.WriteFile(p, []byte("x"), 0o600)
		os.Chtimes(p, old, old)
	}
	f, err := os.Open(filepath.Join(dir, ".instar-tmp-alive"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, upload.Options{})
	if _, err := upload.PutBytes(t.Context(), s, "k", nil, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	l, _ := filepath.Glob(filepath.Join(dir, ".instar*"))
	if len(l) != 1 || !strings.HasSuffix(l[0], "alive") {
		t.Errorf("left: %q", l)
	}
	if k := keysOf(t, s); len(k) != 1 {
		t.Errorf("keys: %q", k)
	}
}

// TestDirProcesses: several processes that count up one object by If-Match lose
// no step.
func TestDirProcesses(t *testing.T) {
	const processes, steps = 3, 40
	if dir := os.Getenv("INSTAR_TEST_COUNTER"); dir != "" {
		s := open(t, dir, upload.Options{})
		for done := 0; done < steps; {
			b, o, err := upload.GetBytes(t.Context(), s, "n", 100)
			if errors.Is(err, upload.ErrCorrupt) || errors.Is(err, upload.ErrNotExist) {
				t.Fatal(err)
			}
			if err != nil {
				continue
			}
			var n int
			fmt.Sscan(string(b), &n)
			_, err = upload.PutBytes(t.Context(), s, "n", fmt.Append(nil, n+1), upload.PutOptions{IfMatch: o.ETag})
			if err == nil {
				done++
			} else if !errors.Is(err, upload.ErrExist) {
				t.Fatal(err)
			}
		}
		return
	}
	dir := t.TempDir()
	s := open(t, dir, upload.Options{})
	if _, err := upload.PutBytes(t.Context(), s, "n", []byte("0"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range processes {
		wg.Go(func() {
			if out, err := rerun(t, "TestDirProcesses", "INSTAR_TEST_COUNTER="+dir); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	b, _, err := upload.GetBytes(t.Context(), s, "n", 100)
	if err != nil || string(b) != fmt.Sprint(processes*steps) {
		t.Errorf("counted to %s, %v; want %d", b, err, processes*steps)
	}
}

// TestDirVanishing puts and deletes in one directory, which comes and goes.
func TestDirVanishing(t *testing.T) {
	s := open(t, t.TempDir(), upload.Options{})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for range 60 {
				k := fmt.Sprintf("a/b/c/%d", i)
				if _, err := upload.PutBytes(t.Context(), s, k, []byte("x"), upload.PutOptions{}); err != nil {
					t.Error(err)
				}
				if err := s.Delete(t.Context(), k); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// TestDirNoSpace fills a small filesystem: nothing half is left, and the same
// put succeeds once there is room.
func TestDirNoSpace(t *testing.T) {
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
	s := open(t, mnt, upload.Options{})
	if _, err := upload.PutBytes(t.Context(), s, "a/b", make([]byte, 600<<10), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("y"), 700<<10)
	for _, k := range []string{"c", "a/b", "new/dir/c"} {
		_, err := upload.PutBytes(t.Context(), s, k, big, upload.PutOptions{})
		if !errors.Is(err, upload.ErrNoSpace) || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("put %s: %v", k, err)
		}
	}
	if b, _, err := upload.GetBytes(t.Context(), s, "a/b", 1<<20); err != nil || len(b) != 600<<10 {
		t.Errorf("the old object: %d bytes, %v", len(b), err)
	}
	filepath.WalkDir(mnt, func(p string, d os.DirEntry, err error) error {
		if err == nil && strings.Contains(p, ".instar-tmp-") {
			t.Errorf("left: %s", p)
		}
		return nil
	})
	if err := s.Delete(t.Context(), "a/b"); err != nil {
		t.Fatal(err)
	}
	if _, err := upload.PutBytes(t.Context(), s, "c", big, upload.PutOptions{}); err != nil {
		t.Error(err)
	}
}

// TestDirKill kills writers with SIGKILL at random moments: each object is whole
// or absent, and the next run goes through.
func TestDirKill(t *testing.T) {
	if dir := os.Getenv("INSTAR_TEST_KILL"); dir != "" {
		s := open(t, dir, upload.Options{})
		for i := 0; ; i++ {
			k := fmt.Sprintf("d%d/k", i%7)
			if _, err := upload.PutBytes(t.Context(), s, k, bytes.Repeat([]byte{byte('a' + i%26)}, 40_000), upload.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				os.Stdout.WriteString("writing\n")
			}
		}
	}
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		out, in, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p, err := os.StartProcess(exe, []string{exe, "-test.run=^TestDirKill$"}, &os.ProcAttr{Env: append(os.Environ(), "INSTAR_TEST_KILL="+dir), Files: []*os.File{nil, in, nil}})
		in.Close()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // until it has written once
			t.Errorf("writer %d: %v", i, err)
		}
		time.Sleep(time.Duration(17*i) * time.Millisecond)
		p.Kill()
		p.Wait()
		out.Close()
		s := open(t, dir, upload.Options{})
		for _, k := range keysOf(t, s) {
			b, _, err := upload.GetBytes(t.Context(), s, k, 1<<20)
			if err != nil || len(b) != 40_000 || bytes.Count(b, b[:1]) != len(b) {
				t.Fatalf("after kill %d: %s has %d bytes, %v", i, k, len(b), err)
			}
		}
	}
	if len(keysOf(t, open(t, dir, upload.Options{}))) == 0 {
		t.Error("no writer came to write")
	}
}
