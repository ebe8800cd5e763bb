package rootfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

func TestSourceNoticesWhatChanged(t *testing.T) {
	dir := t.TempDir()
	names := []string{"same", "grown", "shrunk", "touched", "gone", "replaced", "renewed", "longer", "attributed", "linked", "holey", "fifo", "link", "dir", "d/inner", "e/inner", "f/inner"}
	files := map[string]string{}
	for _, n := range names {
		files[n] = "0123456789"
	}
	for i := range 100 { // read last: the directories before are not held open any more
		files[fmt.Sprintf("z%d/x", i)] = "x"
	}
	write(t, dir, files)
	at := func(n string) string { return filepath.Join(dir, n) }
	must(t, os.Link(at("linked"), at("linked.other")))
	must(t, os.Truncate(at("holey"), 1<<20))
	r := scan(t, rootfs.Options{Volume: dir})

	must(t, os.WriteFile(at("grown"), []byte("0123456789+"), 0o644))
	must(t, os.Truncate(at("shrunk"), 4))
	must(t, os.Chmod(at("touched"), 0o600))
	for _, n := range []string{"gone", "replaced", "fifo", "link", "dir"} {
		must(t, os.Rename(at(n), at(n+".old"))) // its inode number stays taken
	}
	must(t, os.WriteFile(at("replaced"), []byte("0123456789"), 0o600)) // others may not read this one
	for _, n := range []string{"renewed", "attributed", "linked", "holey", "longer"} {
		must(t, os.WriteFile(at(n+".new"), []byte("9876543210+")[:10], 0o644))
		must(t, os.Rename(at(n), at(n+".old")))
		must(t, os.Rename(at(n+".new"), at(n)))
	}
	must(t, os.WriteFile(at("longer"), []byte("9876543210+"), 0o644))
	must(t, unix.Setxattr(at("attributed"), "user.label", []byte("x"), 0))
	must(t, unix.Mkfifo(at("fifo"), 0o644))
	must(t, os.Symlink("same", at("link")))
	must(t, os.Mkdir(at("dir"), 0o755))
	must(t, os.Rename(at("d"), at("d.old")))
	must(t, os.Symlink("e", at("d")))
	must(t, os.Rename(at("f"), at("f.old")))
	must(t, os.Mkdir(at("f"), 0o755))
	must(t, os.WriteFile(at("f/inner"), []byte("0123456789"), 0o644))

	for path, want := range map[string]error{
		"gone": filetree.ErrVanished, "replaced": filetree.ErrReplaced, "attributed": filetree.ErrReplaced, "linked": filetree.ErrReplaced, "holey": filetree.ErrReplaced, "fifo": filetree.ErrReplaced, "link": filetree.ErrReplaced, "dir": filetree.ErrReplaced,
		"d/inner": filetree.ErrReplaced, "f/inner": filetree.ErrReplaced,
	} {
		f, err := r.Source().Open(t.Context(), r.Tree.Find(path))
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
		if err == nil {
			f.Close()
		}
	}
	buf := make([]byte, 10)
	for path, want := range map[string]struct {
		n       int
		changed bool
	}{"same": {10, false}, "grown": {10, true}, "shrunk": {4, true}, "touched": {10, true}, "renewed": {10, true}, "longer": {10, true}, "e/inner": {10, false}} {
		f, err := r.Source().Open(t.Context(), r.Tree.Find(path))
		must(t, err)
		n, err := f.ReadAt(buf, 0)
		if n != want.n || n < len(buf) != errors.Is(err, io.EOF) {
			t.Errorf("%s: read %d bytes, %v", path, n, err)
		}
		if changed, err := f.Changed(); changed != want.changed || err != nil {
			t.Errorf("%s: changed %v, %v", path, changed, err)
		}
		must(t, f.Close())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Source().Open(ctx, r.Tree.Find("same")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := rootfs.Scan(ctx, rootfs.Options{Volume: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled scan: %v", err)
	}
}

// TestSwaps: while directories and files turn into links to a marker, into
// FIFOs and back, nothing of the marker is ever captured, and nothing hangs.
func TestSwaps(t *testing.T) {
	const marker = "MARKER-outside-the-volume"
	outside, dir := t.TempDir(), t.TempDir()
	write(t, outside, map[string]string{"file": marker, "sub/file": marker, "only-outside": marker})
	write(t, dir, map[string]string{"v/a/file": "inside", "v/a/sub/file": "inside", "v/b": "inside"})
	at := func(n string) string { return filepath.Join(dir, n) }
	must(t, os.Symlink(outside, at("v/evil")))
	must(t, os.Symlink(filepath.Join(outside, "file"), at("v/evilfile")))
	must(t, unix.Mkfifo(at("v/pipe"), 0o644))

	stop := make(chan struct{})
	var swaps atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		exchange := func(a, b string) {
			// RENAME_EXCHANGE leaves no moment at which a name is missing.
			if err := unix.Renameat2(unix.AT_FDCWD, at(a), unix.AT_FDCWD, at(b), unix.RENAME_EXCHANGE); err != nil {
				t.Errorf("exchanging: %v", err)
			}
			swaps.Add(1)
		}
		for {
			select {
			case <-stop:
				return
			default:
			}
			exchange("v/a", "v/evil")
			exchange("v/b", "v/evilfile")
			exchange("v/b", "v/pipe")
		}
	})
	captured, met := 0, 0
	buf := make([]byte, 64)
	// As long as it takes for both to have happened often.
	for rounds := 0; rounds < 300 || captured < 500 || met < 20 || swaps.Load() < 3000; rounds++ {
		r, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir, Snapshot: rootfs.SnapshotNone})
		if err != nil {
			t.Error(err)
			break
		}
		met += len(r.Problems)
		for id := range filetree.ID(r.Tree.Len()) {
			if r.Tree.Name(id) == "only-outside" {
				t.Errorf("the walk left the volume: %s", r.Tree.Path(id))
			}
			if r.Tree.Mode(id)&unix.S_IFMT != unix.S_IFREG || r.Tree.Size(id) == 0 {
				continue
			}
			f, err := r.Source().Open(t.Context(), id)
			if err != nil {
				if !errors.Is(err, filetree.ErrReplaced) && !errors.Is(err, filetree.ErrVanished) {
					t.Errorf("%s: %v", r.Tree.Path(id), err)
				}
				met++
				continue
			}
			n, _ := f.ReadAt(buf, 0)
			if bytes.Contains(buf[:n], []byte(marker)) {
				t.Errorf("%s has the marker's content", r.Tree.Path(id))
			}
			captured++
			f.Close()
		}
		must(t, r.Close())
	}
	close(stop)
	wg.Wait()
	t.Logf("%d swaps, %d files read, %d met changed", swaps.Load(), captured, met)
}

// TestChanging: files come, go, grow and change type during the walks.
func TestChanging(t *testing.T) {
	dir := mounted(t, "tmpfs")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			base := filepath.Join(dir, string(rune('a'+w)))
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := filepath.Join(base, "d", string(rune('a'+i%20)))
				os.MkdirAll(filepath.Dir(name), 0o755)
				switch i % 5 {
				case 0:
					os.WriteFile(name, bytes.Repeat([]byte("x"), i%9000), 0o644)
				case 1:
					os.RemoveAll(name)
					unix.Mkfifo(name, 0o644)
				case 2:
					os.RemoveAll(name)
					os.MkdirAll(filepath.Join(name, "x/y"), 0o755)
				case 3:
					os.RemoveAll(filepath.Join(base, "d"))
				case 4:
					os.Symlink("x", name)
				}
			}
		})
	}
	for range 60 {
		r, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir})
		if err != nil {
			t.Error(err)
			break
		}
		for _, p := range r.Problems {
			if !errors.Is(p, filetree.ErrReplaced) && !errors.Is(p, filetree.ErrVanished) {
				t.Errorf("%v", p)
			}
		}
		must(t, r.Close())
	}
	close(stop)
	wg.Wait()
}

// TestReadErrors: a damaged filesystem costs the files it damaged, by name.
func TestReadErrors(t *testing.T) {
	img := filepath.Join(t.TempDir(), "img")
	run(t, "truncate", "-s", "64M", img)
	run(t, "mkfs.ext4", "-q", "-O", "^has_journal,metadata_csum", img)
	dir := t.TempDir()
	run(t, "mount", "-o", "loop", img, dir)
	write(t, dir, map[string]string{"bad/lost": "x", "good/file": "fine", "zlast/file": "fine"})
	run(t, "umount", dir)
	run(t, "debugfs", "-w", "-R", "zap_block -f /bad -p 0x5a 0", img)
	run(t, "mount", "-o", "loop,errors=continue", img, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	r := scan(t, rootfs.Options{Volume: dir})
	if len(r.Problems) == 0 || r.Problems[0].Path != "bad" || !strings.Contains(r.Problems[0].Error(), "reading the directory") {
		t.Errorf("problems: %v", r.Problems)
	}
	for _, path := range []string{"good/file", "zlast/file"} {
		if got := read(t, r, path); got != "fine" {
			t.Errorf("%s reads %q", path, got)
		}
	}
}

// TestBlocksThatCannotBeRead: the error of a read is the read's, with its offset.
func TestBlocksThatCannotBeRead(t *testing.T) {
	img := filepath.Join(t.TempDir(), "img")
	run(t, "truncate", "-s", "64M", img)
	run(t, "mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", img)
	dir := t.TempDir()
	run(t, "mount", "-o", "loop", img, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	f, err := os.Create(filepath.Join(dir, "file"))
	must(t, err)
	_, err = f.Write(bytes.Repeat([]byte("x"), 48<<20))
	must(t, err)
	must(t, f.Sync())
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	must(t, f.Close())
	r := scan(t, rootfs.Options{Volume: dir})
	st, err := os.Stat(img)
	must(t, err)
	must(t, os.Truncate(img, 20<<20)) // the disk ends in the middle of the file
	defer os.Truncate(img, st.Size())
	g, err := r.Source().Open(t.Context(), r.Tree.Find("file"))
	must(t, err)
	defer g.Close()
	n, err := g.ReadAt(make([]byte, 48<<20), 0)
	if !errors.Is(err, unix.EIO) || n == 0 || n >= 48<<20 || !strings.Contains(err.Error(), "reading at byte") {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

// TestNoWaiting: a FIFO without a writer is captured in no time.
func TestNoWaiting(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mkfifo(filepath.Join(dir, "id_fifo.pem"), 0o644))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		r, err := rootfs.Scan(ctx, rootfs.Options{Volume: dir})
		if err == nil {
			err = r.Close()
		}
		done <- err
	}()
	select {
	case err := <-done:
		must(t, err)
	case <-ctx.Done():
		t.Fatal("the walk waits for a FIFO's writer")
	}
}

// TestPageCache: what was not in memory before a capture is not there after
// it, what was stays.
func TestPageCache(t *testing.T) {
	dir := mounted(t, "ext4")
	for _, name := range []string{"cold", "warm"} {
		must(t, os.WriteFile(filepath.Join(dir, name), make([]byte, 4<<20), 0o644))
	}
	run(t, "sync", "-f", dir)
	inMemory := func(name string) uint64 {
		f, err := os.Open(filepath.Join(dir, name))
		must(t, err)
		defer f.Close()
		var st unix.Cachestat_t
		must(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))
		return st.Cache
	}
	f, err := os.Open(filepath.Join(dir, "cold"))
	must(t, err)
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	must(t, f.Close())
	if cold, warm := inMemory("cold"), inMemory("warm"); cold != 0 || warm == 0 {
		t.Fatalf("to begin with, %d and %d pages are in memory", cold, warm)
	}
	r := scan(t, rootfs.Options{Volume: dir})
	for _, name := range []string{"cold", "warm"} {
		if got := len(read(t, r, name)); got != 4<<20 {
			t.Errorf("%s has %d bytes", name, got)
		}
	}
	if cold, warm := inMemory("cold"), inMemory("warm"); cold != 0 || warm == 0 {
		t.Errorf("after it, %d and %d pages are in memory", cold, warm)
	}
}

// TestNoReadAhead: the kernel brings what was asked for and not a page more.
func TestNoReadAhead(t *testing.T) {
	for _, c := range []struct {
		no   bool
		want func(pages uint64) bool
	}{
		{true, func(pages uint64) bool { return pages == 32 }},
		{false, func(pages uint64) bool { return pages > 32 }},
	} {
		dir := mounted(t, "ext4")
		must(t, os.WriteFile(filepath.Join(dir, "file"), make([]byte, 4<<20), 0o644))
		run(t, "sync", "-f", dir)
		f, err := os.Open(filepath.Join(dir, "file"))
		must(t, err)
		defer f.Close()
		must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		r := scan(t, rootfs.Options{Volume: dir, NoReadAhead: c.no})
		g, err := r.Source().Open(t.Context(), r.Tree.Find("file"))
		must(t, err)
		if _, err := g.ReadAt(make([]byte, 128<<10), 0); err != nil {
			t.Fatal(err)
		}
		var st unix.Cachestat_t
		must(t, unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0))
		if !c.want(st.Cache) {
			t.Errorf("no read-ahead %v: %d pages are in memory after 32 were read", c.no, st.Cache)
		}
		must(t, g.Close())
	}
}
