package boot

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache"
)

// guest reads all of the image as the server of a lazy root does, by way of a
// cache, and gives what was said.
func (s *instarStore) guest(t *testing.T, place string) string {
	t.Helper()
	img, said, err := s.open(t, nil)
	check(t, err)
	i := img.(*instarImage)
	tk := s.ticket
	tk.Cache = place
	size := lazyroot.DiskSize(i.stream.Size())
	c := &lazyConfig{
		Image: i.name, Manifest: i.manifest, Index: i.root.Name, IndexSize: i.root.Size, IndexRoot: i.rootObject, Key: i.key, Size: i.stream.Size(),
		Instance: "i-1", Ticket: &tk, Patience: 1, DiskSize: size,
	}
	f := usedDisk(t, int(size))
	disk := lazyroot.FileDisk(f, size)
	check(t, lazyroot.Format(disk, c.identity()))
	dev, _, err := c.open(t.Context(), nil, disk, nil, nil, said.say)
	check(t, err)
	got := make([]byte, len(s.image))
	check(t, dev.ReadAt(t.Context(), got, 0))
	check(t, dev.Close())
	if !bytes.Equal(got, s.image) {
		t.Error("the guest has read something else")
	}
	return strings.Join(said.lines, "\n")
}

// TestBadCache: a cache whose disk has changed gives wrong bytes. It is told, has
// them anew, and no guest goes to the store, neither this one nor the next. One that
// is wrong all the same is left alone.
func TestBadCache(t *testing.T) {
	s := newInstarStore(t)
	var direct atomic.Int64 // requests for packs by guests, not by the cache
	s.wrong = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/packs/") {
			direct.Add(1)
		}
		return false
	}
	objects, err := upload.Open(t.Context(), "file://"+s.dir, upload.Options{})
	check(t, err)
	dir := t.TempDir()
	kept, err := cache.Open(cache.Options{Dir: dir, Store: objects})
	check(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := cache.Serve(ctx, cache.ServeOptions{Cache: kept, Listeners: []net.Listener{l}}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		serving.Wait()
		check(t, kept.Close())
		check(t, objects.Close())
	})
	place := "http://" + l.Addr().String()

	if said := s.guest(t, place); said != "" || direct.Load() > 0 {
		t.Fatalf("by way of a cache that is well: %d requests to the store, %q", direct.Load(), said)
	}
	packs, err := filepath.Glob(filepath.Join(s.dir, chunked.PacksFolder, "*", "*"))
	check(t, err)
	for _, name := range packs {
		rel, err := filepath.Rel(s.dir, name)
		check(t, err)
		spoil(t, filepath.Join(dir, rel))
	}
	said := s.guest(t, place)
	if n := strings.Count(said, "the cache gives wrong bytes of pack"); n != len(packs) || strings.Contains(said, "ALARM") || direct.Load() > 0 {
		t.Errorf("by way of a cache that is spoilt: %d requests to the store, told %d times of %d packs, %q", direct.Load(), n, len(packs), said)
	}
	if n := kept.Stats().Corrupt; n != int64(len(packs)) {
		t.Errorf("the cache found %d of %d packs wrong", n, len(packs))
	}
	if said := s.guest(t, place); said != "" || direct.Load() > 0 {
		t.Errorf("the next guest: %d requests to the store, %q", direct.Load(), said)
	}

	// What has the bytes wrong whatever it is told.
	var asked atomic.Int64
	liar := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, err := os.ReadFile(filepath.Join(s.dir, filepath.Clean(r.URL.Path)))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		asked.Add(1)
		for i := range data {
			data[i] ^= 1
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer liar.Close()
	said = s.guest(t, liar.URL)
	if direct.Load() == 0 || !strings.Contains(said, "ALARM: cache: ") {
		t.Errorf("by way of a liar: %d requests to the store, %q", direct.Load(), said)
	}
	// One to look, one to tell, and those of the reads that are under way.
	if n, most := asked.Load(), int64((len(packs)+2)*2*distrustAfter); n > most {
		t.Errorf("the liar was asked %d times, not %d", n, most)
	}
}

// spoil changes a file that the cache has whole, when it has.
func spoil(t *testing.T, name string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		data, err := os.ReadFile(name)
		if err == nil {
			for i := range data {
				data[i] ^= 1
			}
			f, err := os.OpenFile(name, os.O_WRONLY, 0)
			check(t, err)
			defer f.Close()
			_, err = f.WriteAt(data, 0)
			check(t, err)
			return
		}
		if time.Now().After(end) || !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
}
