package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/test/sysfault"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache"
)

// TestOnce: however many read, and whichever parts, a byte leaves the store once.
func TestOnce(t *testing.T) {
	defer goleak.VerifyNone(t)
	w := newWorld(t, 4, 5<<20)
	dir := t.TempDir()
	c := w.open(t, dir, 1<<30)
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for range 40 {
				key := w.keys[r.IntN(len(w.keys))]
				size := int64(len(w.objects[key]))
				off := r.Int64N(size)
				n := 1 + r.Int64N(min(size-off, 3<<20))
				if err := w.read(t.Context(), c, key, off, n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	waitFor(t, func() bool { n, _ := kept(t, dir); return n == len(w.keys) })
	sums, gets := w.store.left()
	for key, n := range sums {
		if n != int64(len(w.objects[key])) {
			t.Errorf("%d bytes of %s, which has %d, left the store", n, key, len(w.objects[key]))
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c = w.open(t, dir, 1<<30)
	for _, key := range w.keys {
		if err := w.read(t.Context(), c, key, 0, int64(len(w.objects[key]))); err != nil {
			t.Error(err)
		}
	}
	_, now := w.store.left()
	if s := c.Stats(); now != gets || s.Misses != 0 || s.Hits != int64(len(w.keys)) {
		t.Errorf("after a restart the store was asked %d times: %+v", now-gets, s)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// waitFor waits for what happens in the background.
func waitFor(t testing.TB, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come to an end")
		}
	}
}

// TestFirstBytes: what is asked for comes first, before the rest of its pack.
func TestFirstBytes(t *testing.T) {
	w := newWorld(t, 1, 12<<20)
	key := w.keys[0]
	stop := make(chan struct{})
	w.store.fail = func(get int, _ string) error {
		if get > 0 {
			<-stop // nothing else comes
		}
		return nil
	}
	c := w.open(t, t.TempDir(), 1<<30)
	if err := w.read(t.Context(), c, key, 11<<20, 1000); err != nil {
		t.Fatal(err)
	}
	if sums, _ := w.store.left(); sums[key] > 2<<20 {
		t.Errorf("%d bytes were fetched for 1000", sums[key])
	}
	close(stop)
}

// TestStoreFails: whichever request fails, before or in the middle of its
// answer, a reader is told, nothing wrong is handed out, and the next read is
// right.
func TestStoreFails(t *testing.T) {
	for _, torn := range []bool{false, true} {
		for at := 0; ; at++ {
			w := newWorld(t, 2, 3<<20)
			fired := false
			if torn {
				w.store.tear = func(get int) int64 {
					if get == at {
						fired = true
						return 1<<19 + 7
					}
					return 0
				}
			} else {
				w.store.fail = func(get int, _ string) error {
					if get == at {
						fired = true
						return errBroken
					}
					return nil
				}
			}
			c := w.open(t, t.TempDir(), 1<<30)
			failed := 0
			for _, key := range w.keys {
				size := int64(len(w.objects[key]))
				for _, off := range []int64{size - 100, 0, size / 2} {
					for {
						err := w.read(t.Context(), c, key, off, min(size-off, 100_000))
						if err == nil {
							break
						}
						if failed++; !errors.Is(err, errBroken) || failed > 3 {
							t.Fatalf("request %d, torn %v: %v", at, torn, err)
						}
					}
				}
			}
			w.store.mu.Lock()
			did := fired
			w.store.mu.Unlock()
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if !did {
				break
			}
		}
	}
}

// TestDamagedFiles: what was changed behind the cache's back is not handed out
// after the next start, nor once a reader complained.
func TestDamagedFiles(t *testing.T) {
	w := newWorld(t, 1, 2<<20)
	dir := t.TempDir()
	fill := func(c *cache.Cache) {
		t.Helper()
		for _, key := range w.keys {
			if err := w.read(t.Context(), c, key, 0, int64(len(w.objects[key]))); err != nil {
				t.Fatal(err)
			}
		}
		waitFor(t, func() bool { n, _ := kept(t, dir); return n == len(w.keys) })
	}
	harm := []func(name string) error{
		func(name string) error {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("other bytes"), 100)
			return err
		},
		func(name string) error { return os.Truncate(name, 1000) },
		os.Remove,
		func(name string) error { return errors.Join(os.Remove(name), os.Symlink("/etc/passwd", name)) },
		func(name string) error { return os.Truncate(name, 0) },
	}
	c := w.open(t, dir, 1<<30)
	fill(c)
	for i, h := range harm {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for _, key := range w.keys {
			if err := h(filepath.Join(dir, key)); err != nil {
				t.Fatal(err)
			}
		}
		c = w.open(t, dir, 1<<30)
		fill(c)
		if s := c.Stats(); s.Misses == 0 {
			t.Errorf("harm %d was not seen: %+v", i, s)
		}
	}
	// While it runs only who opens a chunk can tell.
	key := w.keys[0]
	if err := harm[0](filepath.Join(dir, key)); err != nil {
		t.Fatal(err)
	}
	if err := w.read(t.Context(), c, key, 0, 1000); !errors.Is(err, errWrong) {
		t.Fatalf("the file was not changed: %v", err)
	}
	c.Recheck(t.Context(), key)
	if err := w.read(t.Context(), c, key, 0, 1000); err != nil {
		t.Error(err)
	}
}

// TestStoreLies: bytes that are not their name's are not kept, and are not
// fetched over and over.
func TestStoreLies(t *testing.T) {
	w := newWorld(t, 1, 2<<20)
	dir := t.TempDir()
	c := w.open(t, dir, 1<<30)
	for _, key := range w.keys {
		w.store.lie[key] = true
		err := w.read(t.Context(), c, key, 0, int64(len(w.objects[key])))
		if index := key[:5] == "index"; index && !errors.Is(err, cache.ErrBad) || !index && !errors.Is(err, errWrong) {
			t.Errorf("%s: %v", key, err)
		}
		waitFor(t, func() bool {
			o, err := c.Get(t.Context(), key, 0, 1)
			if err == nil {
				o.Close()
			}
			return errors.Is(err, cache.ErrBad)
		})
	}
	if n, _ := kept(t, dir); n != 0 || c.Stats().Used != 0 {
		t.Errorf("%d files are kept: %+v", n, c.Stats())
	}
	if _, gets := w.store.left(); gets > 10 {
		t.Errorf("%d requests", gets)
	}
}

// TestLimit: the directory never holds more than it may; what was not used for
// longest goes, and what has no room at all is passed on.
func TestLimit(t *testing.T) {
	w := newWorld(t, 8, 1<<20)
	dir := t.TempDir()
	c := w.open(t, dir, 5<<20)
	r := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		key := w.keys[r.IntN(len(w.keys))]
		if err := w.read(t.Context(), c, key, 0, int64(len(w.objects[key]))); err != nil {
			t.Fatal(err)
		}
		if s := c.Stats(); s.Used > 5<<20 {
			t.Fatalf("%+v", s)
		}
	}
	if s := c.Stats(); s.Evicted == 0 || s.Hits == 0 {
		t.Errorf("%+v", s)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n, size := kept(t, dir); n == 0 || size > 5<<20 {
		t.Errorf("%d files of %d bytes", n, size)
	}
	c = w.open(t, dir, 1000)
	if n, _ := kept(t, dir); n != 0 {
		t.Errorf("%d files are kept under a lower limit", n)
	}
	for _, key := range w.keys {
		if err := w.read(t.Context(), c, key, 10, 900); err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Stats(); s.Bypassed != int64(len(w.keys)) || s.Used != 0 {
		t.Errorf("%+v", s)
	}
}

// TestDiskFull: when nothing can be written, all is handed on all the same.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	w := newWorld(t, 3, 4<<20) // none of them fits
	c := w.open(t, dir, 1<<30)
	for range 2 {
		for _, key := range w.keys {
			if err := w.read(t.Context(), c, key, 0, int64(len(w.objects[key]))); err != nil {
				t.Fatalf("%v: %+v", err, c.Stats())
			}
		}
	}
	if s := c.Stats(); s.DiskErrors == 0 {
		t.Errorf("the disk was never full: %+v", s)
	}
	kept(t, dir)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOtherDirectories: what is not the cache's is never touched.
func TestOtherDirectories(t *testing.T) {
	w := newWorld(t, 1, 5000)
	// A store looks like a cache, and must not be taken for one.
	if _, err := cache.Open(cache.Options{Dir: w.dir, Store: w.store}); !errors.Is(err, cache.ErrNotCache) {
		t.Fatalf("the store itself: %v", err)
	}
	dir := t.TempDir()
	c := w.open(t, dir, 1<<30)
	if _, err := cache.Open(cache.Options{Dir: dir, Store: w.store}); !errors.Is(err, cache.ErrInUse) {
		t.Errorf("a second time: %v", err)
	}
	for _, key := range []string{"images/web/head", "packs/../x", "packs/ab/cd", "", "gc/0123", "index/" + w.keys[0][6:] + "/"} {
		if _, err := c.Get(t.Context(), key, 0, 1); !errors.Is(err, upload.ErrKey) {
			t.Errorf("%q: %v", key, err)
		}
	}
	if _, err := c.Get(t.Context(), chunked.PackKey(chunked.Name{1}), 0, 1); !errors.Is(err, upload.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	if s := c.Stats(); s.Objects != 0 {
		t.Errorf("what is not there is remembered: %+v", s)
	}
	own := filepath.Join(dir, "packs", "note.txt")
	if err := errors.Join(os.MkdirAll(filepath.Dir(own), 0o700), os.WriteFile(own, []byte("mine"), 0o600), c.Close()); err != nil {
		t.Fatal(err)
	}
	w.open(t, dir, 1)
	if b, err := os.ReadFile(own); err != nil || string(b) != "mine" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestEndAndBeyond: reads at an object's borders.
func TestEndAndBeyond(t *testing.T) {
	w := newWorld(t, 1, 1<<20+5)
	c := w.open(t, t.TempDir(), 1<<30)
	size := int64(len(w.objects[w.keys[0]]))
	o, err := c.Get(t.Context(), w.keys[0], size+5, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if o.Size() != size {
		t.Fatalf("size %d", o.Size())
	}
	p := make([]byte, 10)
	for _, x := range []struct {
		off  int64
		want int
		eof  bool
	}{{0, 10, false}, {size - 3, 3, true}, {size, 0, true}, {size + 9, 0, true}, {1<<20 - 5, 10, false}} {
		n, err := o.ReadAt(t.Context(), p, x.off)
		if n != x.want || errors.Is(err, io.EOF) != x.eof || err != nil && !x.eof {
			t.Errorf("at %d: %d, %v", x.off, n, err)
			continue
		}
		if from := min(x.off, size); !bytes.Equal(p[:n], w.objects[w.keys[0]][from:from+int64(n)]) {
			t.Errorf("at %d: other bytes", x.off)
		}
	}
}

// useCache is the process that is killed: it reads all of a store by way of a
// cache with room for half of it, twice.
func useCache(store, dir string) int {
	objects, err := upload.OpenDir(store, false)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	c, err := cache.Open(cache.Options{Dir: dir, Limit: 3 << 20, Store: objects, Parallel: 1})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx := context.Background()
	for range 2 {
		for o, err := range objects.List(ctx, "") {
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			x, err := c.Get(ctx, o.Key, 0, 0)
			if err == nil {
				_, err = x.ReadAt(ctx, make([]byte, o.Size), 0)
				x.Close()
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
	}
	if err := c.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestKilled: killed at any of its file operations, the cache leaves nothing
// that is handed out wrong, and its next start cleans up.
func TestKilled(t *testing.T) {
	w := newWorld(t, 2, 1<<20)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	env := []string{killedEnv + "=1"}
	for at := 1; ; at++ {
		dir := filepath.Join(t.TempDir(), "cache")
		r := sysfault.Run(t, sysfault.Fault{Dir: dir, At: at}, env, program, w.dir, dir)
		kept(t, dir)
		c := w.open(t, dir, 1<<30)
		for _, key := range w.keys {
			if err := w.read(t.Context(), c, key, 0, int64(len(w.objects[key]))); err != nil {
				t.Fatalf("killed at %d: %v", at, err)
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(filepath.Join(dir, "filling"))
		if err != nil || len(left) > 0 {
			t.Fatalf("killed at %d: %v is left, %v", at, left, err)
		}
		if !r.Hit {
			if at < 10 {
				t.Fatalf("%d operations only: %+v", at, r)
			}
			break
		}
	}
}
