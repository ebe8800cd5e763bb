package cache_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/test/sysfault"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache"
)

// killedEnv marks the test binary run as the process that is killed.
const killedEnv = "INSTAR_CACHE_KILLED"

func TestMain(m *testing.M) {
	sysfault.Helper()
	if os.Getenv(killedEnv) != "" {
		os.Exit(useCache(os.Args[len(os.Args)-2], os.Args[len(os.Args)-1]))
	}
	os.Exit(m.Run())
}

// counted is a store that counts what leaves it, and fails when told.
type counted struct {
	upload.Store
	mu    sync.Mutex
	bytes map[string]int64 // that were read, by key
	gets  int
	fail  func(get int, key string) error // before a request
	tear  func(get int) int64             // bytes after which an answer breaks; 0: not
	lie   map[string]bool                 // keys whose first byte is changed
}

var errBroken = errors.New("the line is broken")

func (s *counted) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	s.mu.Lock()
	n := s.gets
	s.gets++
	fail, tear, lie := s.fail, s.tear, s.lie[key]
	s.mu.Unlock()
	if fail != nil {
		if err := fail(n, key); err != nil {
			return nil, upload.Object{}, err
		}
	}
	r, obj, err := s.Store.Get(ctx, key, o)
	if err != nil {
		return nil, obj, err
	}
	c := &countedBody{ReadCloser: r, s: s, key: key, left: 1 << 60, lie: lie && o.Offset == 0}
	if tear != nil {
		if n := tear(n); n > 0 {
			c.left = n
		}
	}
	return c, obj, nil
}

// left are the bytes that left the store, by key, and the requests so far. What
// fills the cache may still count.
func (s *counted) left() (sums map[string]int64, gets int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.bytes), s.gets
}

type countedBody struct {
	io.ReadCloser
	s    *counted
	key  string
	left int64
	lie  bool
}

func (b *countedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errBroken
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	if n > 0 && b.lie {
		p[0] ^= 1
		b.lie = false
	}
	b.left -= int64(n)
	b.s.mu.Lock()
	b.s.bytes[b.key] += int64(n)
	b.s.mu.Unlock()
	return n, err
}

// world is a store with packs and index objects.
type world struct {
	store   *counted
	dir     string // of the store
	objects map[string][]byte
	keys    []string
}

func newWorld(t testing.TB, packs int, size int) *world {
	t.Helper()
	w := &world{dir: filepath.Join(t.TempDir(), "store"), objects: map[string][]byte{}}
	objects, err := upload.OpenDir(w.dir, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { objects.Close() })
	w.store = &counted{Store: objects, bytes: map[string]int64{}, lie: map[string]bool{}}
	r := rand.New(rand.NewPCG(1, 2))
	put := func(key func(chunked.Name) string, n int) {
		b := make([]byte, n)
		for i := 0; i+8 <= n; i += 8 {
			v := r.Uint64()
			for j := range 8 {
				b[i+j] = byte(v >> (8 * j))
			}
		}
		k := key(sha256.Sum256(b))
		if _, err := upload.PutBytes(t.Context(), objects, k, b, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		w.objects[k] = b
		w.keys = append(w.keys, k)
	}
	for i := range packs {
		put(chunked.PackKey, size+i*1000)
	}
	put(chunked.IndexObjectKey, 5000)
	put(chunked.IndexObjectKey, 1<<20+9)
	return w
}

func (w *world) open(t testing.TB, dir string, limit int64) *cache.Cache {
	t.Helper()
	c, err := cache.Open(cache.Options{Dir: dir, Limit: limit, Store: w.store})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() }) // most tests close it themselves, too
	return c
}

// read reads a part of an object and compares it.
func (w *world) read(ctx context.Context, c *cache.Cache, key string, off, n int64) error {
	o, err := c.Get(ctx, key, off, n)
	if err != nil {
		return err
	}
	defer o.Close()
	p := make([]byte, n)
	if _, err := o.ReadAt(ctx, p, off); err != nil {
		return err
	}
	if string(p) != string(w.objects[key][off:off+n]) {
		return fmt.Errorf("%w: %d bytes at %d of %s", errWrong, n, off, key)
	}
	return nil
}

var errWrong = errors.New("wrong bytes")

// kept looks at what the directory holds: each file under an object's name has
// its bytes. It returns how many there are, and how many bytes.
func kept(t testing.TB, dir string) (n int, size int64) {
	t.Helper()
	for _, folder := range []string{"packs", "index"} {
		err := filepath.WalkDir(filepath.Join(dir, folder), func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				if errors.Is(err, os.ErrNotExist) {
					return nil
				}
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if got := chunked.Name(sha256.Sum256(b)).String(); got != filepath.Base(path) {
				t.Errorf("%s has other bytes", strings.TrimPrefix(path, dir))
			}
			n++
			size += int64(len(b))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return n, size
}
