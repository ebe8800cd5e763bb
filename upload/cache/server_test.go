package cache_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/test/livelog"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache"
	"github.com/instar-image/instar/upload/cache/cacheclient"
)

// serve runs a server of c until the test ends, and gives its TCP address and
// its socket.
func serve(t testing.TB, c *cache.Cache, o cache.ServeOptions) (address, socket string) {
	t.Helper()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(t.TempDir(), "sock")
	unix, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	o.Cache, o.Listeners = c, []net.Listener{tcp, unix}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cache.Serve(ctx, o) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + tcp.Addr().String(), "unix:" + socket
}

func client(t testing.TB, place string) *cacheclient.Client {
	t.Helper()
	c, err := cacheclient.New(place)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestTenClients: ten clients read all of a store, in ranges of their own, by
// TCP and by a socket; each byte leaves the store once.
func TestTenClients(t *testing.T) {
	w := newWorld(t, 5, 6<<20)
	log := &livelog.Log{}
	admin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address, socket := serve(t, w.open(t, t.TempDir(), 1<<30), cache.ServeOptions{AccessLog: log, Admin: admin})
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			c := client(t, []string{address, socket}[i%2])
			r := rand.New(rand.NewPCG(uint64(i), 9))
			for _, k := range r.Perm(len(w.keys)) {
				key := w.keys[k]
				want := w.objects[key]
				got := make([]byte, len(want))
				for off := 0; off < len(want); {
					n := min(1+r.IntN(900_000), len(want)-off)
					if err := c.ReadRange(t.Context(), key, int64(off), got[off:off+n]); err != nil {
						t.Errorf("client %d: %v", i, err)
						return
					}
					off += n
				}
				if !bytes.Equal(got, want) {
					t.Errorf("client %d: other bytes of %s", i, key)
				}
			}
		})
	}
	all.Wait()
	sums, _ := w.store.left()
	for key, n := range sums {
		if n != int64(len(w.objects[key])) {
			t.Errorf("%d bytes of %s, which has %d, left the store", n, key, len(w.objects[key]))
		}
	}
	for line := range strings.Lines(log.String()) {
		var x struct {
			Path, Range string
			Status      int
			Bytes       int64
		}
		if err := json.Unmarshal([]byte(line), &x); err != nil || x.Status != 206 || x.Bytes == 0 || !strings.HasPrefix(x.Range, "bytes=") {
			t.Fatalf("log: %s %v", line, err)
		}
	}
	res, err := http.Get("http://" + admin.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, b := range w.objects {
		total += len(b)
	}
	for _, want := range []string{fmt.Sprintf("instar_cache_store_bytes_total %v", float64(total)), `instar_cache_requests_total{status="206"}`, "instar_cache_used_bytes "} {
		if !strings.Contains(string(text), want) {
			t.Errorf("metrics lack %q", want)
		}
	}
}

// TestRequests: the answers to what clients may and may not ask.
func TestRequests(t *testing.T) {
	w := newWorld(t, 1, 1<<20)
	base, _ := serve(t, w.open(t, t.TempDir(), 1<<30), cache.ServeOptions{})
	key := w.keys[0]
	size := len(w.objects[key])
	for _, x := range []struct {
		method, path, header string
		status               int
		from, to             int
	}{
		{"GET", "/" + key, "", 200, 0, size},
		{"GET", "/" + key, "bytes=0-0", 206, 0, 1},
		{"GET", "/" + key, "bytes=100-", 206, 100, size},
		{"GET", "/" + key, "bytes=-100", 206, size - 100, size},
		{"GET", "/" + key, fmt.Sprintf("bytes=0-%d", 10*size), 206, 0, size},
		{"GET", "/" + key, "bytes=5-4", 200, 0, size},
		{"GET", "/" + key, "bytes=0-1,5-6", 200, 0, size},
		{"GET", "/" + key, "bytes=99999999999999999999-", 416, 0, 0},
		{"GET", "/" + key, fmt.Sprintf("bytes=%d-", size), 416, 0, 0},
		{"GET", "/" + key, "bytes=-0", 416, 0, 0},
		{"HEAD", "/" + key, "", 200, 0, 0},
		{"GET", "/images/web/head", "", 404, 0, 0},
		{"GET", "/" + chunked.PackKey(chunked.Name{9}), "", 404, 0, 0},
		{"GET", "/" + key + "/", "", 404, 0, 0},
		{"GET", "/packs/../" + key, "", 404, 0, 0},
		{"GET", "/", "", 404, 0, 0},
		{"PUT", "/" + key, "", 405, 0, 0},
		{"DELETE", "/" + key, "", 405, 0, 0},
	} {
		req, err := http.NewRequestWithContext(t.Context(), x.method, base+x.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if x.header != "" {
			req.Header.Set("Range", x.header)
		}
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != x.status {
			t.Errorf("%s %s %s: %d, %v", x.method, x.path, x.header, res.StatusCode, err)
			continue
		}
		if x.to > 0 && !bytes.Equal(b, w.objects[key][x.from:x.to]) {
			t.Errorf("%s %s: %d bytes, not those from %d to %d", x.method, x.header, len(b), x.from, x.to)
		}
		if x.method == "HEAD" && res.ContentLength != int64(size) {
			t.Errorf("HEAD says %d bytes", res.ContentLength)
		}
	}
}

// TestWhoIsServed: others than this machine only if they are allowed, and each
// only so often at once.
func TestWhoIsServed(t *testing.T) {
	for _, x := range []struct {
		allow  string
		client string
		want   bool
	}{
		{"", "127.0.0.1", true},
		{"", "10.0.0.1", false},
		{"10.0.0.0/24", "10.0.0.1", true},
		{"10.0.0.0/24", "10.0.1.1", false},
		{"", "::1", true},
		{"", "fe80::1", false},
	} {
		var allow []netip.Prefix
		if x.allow != "" {
			allow = append(allow, netip.MustParsePrefix(x.allow))
		}
		if got := cache.Allowed(allow, netip.MustParseAddr(x.client)); got != x.want {
			t.Errorf("%s with %q: %v", x.client, x.allow, got)
		}
	}
	w := newWorld(t, 1, 5000)
	base, _ := serve(t, w.open(t, t.TempDir(), 1<<30), cache.ServeOptions{PerClient: 3})
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	answers := 0
	for range 6 {
		c, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
		fmt.Fprintf(c, "GET /%s HTTP/1.1\r\nHost: x\r\n\r\n", w.keys[0])
		if b := make([]byte, 12); func() error { _, err := io.ReadFull(c, b); return err }() == nil {
			answers++
		}
	}
	if answers != 3 {
		t.Errorf("%d of 6 connections were answered, not 3", answers)
	}
}

// TestDeadCache: a cache that is not there is found out once, and the store
// gives all.
func TestDeadCache(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	w := newWorld(t, 2, 1<<20)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepted atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			c.Close()
		}
	}()
	s := cache.WrapClient(w.store, client(t, "http://"+l.Addr().String()))
	var why []error
	s.OnFallback = func(_ string, err error) { why = append(why, err) }
	for _, key := range w.keys {
		readWrapped(t, s, w, key)
	}
	l.Close()
	// Whole packs are read from the store at once.
	if accepted.Load() > 2 || len(why) != 6 || !errors.Is(why[len(why)-1], cacheclient.ErrUnavailable) {
		t.Errorf("%d connections, %d reasons: %v", accepted.Load(), len(why), why)
	}
}

// readWrapped reads an object whole and a part of it.
func readWrapped(t *testing.T, s upload.Store, w *world, key string) {
	t.Helper()
	b, _, err := upload.GetBytes(t.Context(), s, key, 1<<30)
	if err != nil || !bytes.Equal(b, w.objects[key]) {
		t.Errorf("%s: %d bytes, %v", key, len(b), err)
	}
	r, o, err := s.Get(t.Context(), key, upload.GetOptions{Offset: 100, Length: 1000})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(p, w.objects[key][100:1100]) || o.Size != int64(len(w.objects[key])) {
		t.Errorf("%s: a part of %d bytes, size %d, %v", key, len(p), o.Size, err)
	}
}

// TestWrapped: the same by way of a cache that is well, here and elsewhere.
func TestWrapped(t *testing.T) {
	for _, how := range []string{"here", "served"} {
		w := newWorld(t, 2, 1<<20)
		c := w.open(t, t.TempDir(), 1<<30)
		var s *cache.Store
		if how == "here" {
			s = cache.Wrap(w.store, c)
		} else {
			_, socket := serve(t, c, cache.ServeOptions{})
			s = cache.WrapClient(w.store, client(t, socket))
		}
		s.OnFallback = func(key string, err error) { t.Errorf("%s: %s from the store: %v", how, key, err) }
		for _, key := range w.keys[2:] { // index objects, whole
			readWrapped(t, s, w, key)
			readWrapped(t, s, w, key)
			if sums, _ := w.store.left(); sums[key] != int64(len(w.objects[key])) {
				t.Errorf("%s: %d bytes left the store", how, sums[key])
			}
		}
		if _, _, err := s.Get(t.Context(), "images/web/head", upload.GetOptions{}); !errors.Is(err, upload.ErrNotExist) {
			t.Errorf("%s: what is not cached: %v", how, err)
		}
	}
}

// TestLyingCache: wrong index objects are found out here; of packs, whoever opens
// a chunk turns to the store.
func TestLyingCache(t *testing.T) {
	w := newWorld(t, 1, 1<<20)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Cache-Control") == "no-cache" {
			asked++
		}
		b := bytes.Clone(w.objects[strings.TrimPrefix(r.URL.Path, "/")])
		b[len(b)/2] ^= 1
		b[150] ^= 1
		http.ServeContent(rw, r, "", time.Time{}, bytes.NewReader(b))
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	s := cache.WrapClient(w.store, client(t, "http://"+l.Addr().String()))
	for _, key := range w.keys[1:] {
		b, _, err := upload.GetBytes(t.Context(), s, key, 1<<30)
		if err != nil || !bytes.Equal(b, w.objects[key]) {
			t.Errorf("%s: %v", key, err)
		}
	}
	r, _, err := s.Uncached(t.Context(), w.keys[0]).Get(t.Context(), w.keys[0], upload.GetOptions{Offset: 100, Length: 1000})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(p, w.objects[w.keys[0]][100:1100]) {
		t.Errorf("past the cache: %v", err)
	}
	if asked != 3 {
		t.Errorf("the cache was told of %d lies, not 3", asked)
	}
}

// TestPlaces: what names a cache and what does not.
func TestPlaces(t *testing.T) {
	for place, ok := range map[string]bool{
		"http://127.0.0.1:9255": true, "http://10.0.2.2:9255/": true, "unix:/run/x.sock": true, "http://[fd00::1]:80": true,
		"": false, "unix:x": false, "https://a": false, "http://u:p@a": false, "http://a/b": false, "http://a?b": false, "127.0.0.1:5": false,
	} {
		if err := cacheclient.CheckPlace(place); (err == nil) != ok {
			t.Errorf("%q: %v", place, err)
		}
	}
}
