package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/servers"
)

// watched is a server behind a proxy that notes what it is asked for.
type watched struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string
}

func watch(t *testing.T, s *servers.Server) *watched {
	t.Helper()
	to, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	// The Host of a request is signed: it stays.
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Host = r.In.Host
	}}
	w := &watched{}
	w.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.asked = append(w.asked, r.Method+" "+r.URL.Path+" "+r.Header.Get("Range"))
		w.mu.Unlock()
		proxy.ServeHTTP(rw, r)
	}))
	t.Cleanup(w.Close)
	return w
}

// since gives what was asked for since it was called last.
func (w *watched) since() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := w.asked
	w.asked = nil
	return list
}

// TestMountRequests: a machine that has never seen an image has the first byte of any of
// its files after five requests, and when it mounts it again after two: of a first
// image, and of one whose metadata lie where its parent had them.
func TestMountRequests(t *testing.T) {
	server := servers.Versity(t)
	s := newImageStore(t, server)
	root := t.TempDir()
	r := rand.NewChaCha8([32]byte{7})
	write := func(name string, size int) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, size)
		r.Read(b)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	name := func(i int) string { return fmt.Sprintf("usr/share/%d/%d/file-%d", i%17, i%101, i) }
	for i := range 3000 {
		write(name(i), 3000+i%5000)
	}
	for nr, change := range []func(){func() {}, func() {
		for i := range 300 {
			write(fmt.Sprintf("var/lib/%d/new-%d", i%7, i), 2000)
			write(name(i*10), 4000)
		}
	}} {
		change()
		ref := "web@" + s.capture(t, root, "web")["manifest"].(string)
		w := watch(t, server)
		there := s.With("AWS_ENDPOINT_URL="+w.URL, "INSTAR_STATE="+filepath.Join(t.TempDir(), "state"))
		for again, most := range []int{5, 2} {
			at := t.TempDir()
			w.since()
			there.Want(t, instar.OK, append([]string{"mount", ref, at}, s.store()...)...)
			b, err := os.ReadFile(filepath.Join(at, name(1009+again)))
			want, _ := os.ReadFile(filepath.Join(root, name(1009+again)))
			if asked := w.since(); len(asked) > most {
				t.Errorf("image %d, mount %d: %d requests for the first file:\n%s", nr, again, len(asked), strings.Join(asked, "\n"))
			}
			if err != nil || string(b) != string(want) || len(want) == 0 {
				t.Errorf("image %d, mount %d: %s has %d bytes, not %d (%v)", nr, again, name(1009+again), len(b), len(want), err)
			}
			there.Want(t, instar.OK, "umount", at)
		}
		w.Close()
	}
}
