package launch_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/nbd"
	"github.com/instar-image/instar/test/freeport"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache/cacheclient"
	"github.com/instar-image/instar/upload/images"
)

// hostCache runs "instar cache serve" for a store and gives its address and that
// of its metrics.
func hostCache(t *testing.T, env []string, dir string, store ...string) (place, admin string) {
	t.Helper()
	at := [2]string{freeport.Address(freeport.Port(t)), freeport.Address(freeport.Port(t))}
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, instar(t), append([]string{"cache", "serve", "--dir", dir, "--listen", at[0], "--admin", at[1]}, store...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var errs bytes.Buffer
	cmd.Stderr = &errs
	must(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // interrupted, or said below
		close(ended)
	}()
	t.Cleanup(func() {
		stop()
		<-ended
		if t.Failed() {
			t.Logf("the cache says:\n%s", errs.String())
		}
	})
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		select {
		case <-ended:
			t.Fatal("the cache has ended at once")
		default:
		}
		res, err := http.Get("http://" + at[1] + "/healthz")
		if err == nil {
			res.Body.Close()
			return "http://" + at[0], "http://" + at[1]
		}
		if time.Now().After(end) {
			t.Fatalf("the cache does not start: %v", err) // what it says, says the cleanup
		}
	}
}

// leftOnce sees that what a cache fetched is each byte of what it keeps, once.
func leftOnce(t *testing.T, admin, dir string) {
	t.Helper()
	var fetched, kept float64
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		res, err := http.Get(admin + "/metrics")
		must(t, err)
		text, err := io.ReadAll(res.Body)
		must(t, errors.Join(err, res.Body.Close()))
		_, rest, _ := strings.Cut(string(text), "\ninstar_cache_store_bytes_total ")
		if _, err := fmt.Sscan(rest, &fetched); err != nil {
			t.Fatalf("metrics: %v", err)
		}
		kept = 0
		for _, folder := range []string{"packs", "index"} {
			must(t, filepath.Walk(filepath.Join(dir, folder), func(_ string, st os.FileInfo, err error) error {
				if err == nil && st.Mode().IsRegular() {
					kept += float64(st.Size())
				}
				return err
			}))
		}
		if fetched == kept && kept > 0 {
			t.Logf("%.1f MB left the store, each once", kept/1e6)
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%.0f bytes left the store, %.0f are kept", fetched, kept)
		}
	}
}

// noStore is a store that is not asked for packs and index objects.
type noStore struct {
	chunked.Source
	t *testing.T
}

func (s noStore) ReadPack(_ context.Context, n chunked.Name, off int64, p []byte) error {
	s.t.Errorf("the store is asked for %d bytes at %d of pack %s", len(p), off, n)
	return errors.New("the cache has it")
}

// cached reads an image's objects from a cache.
type cached struct{ c *cacheclient.Client }

func (s cached) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	return s.c.ReadRange(ctx, chunked.PackKey(n), off, p)
}

func (s cached) ReadIndex(ctx context.Context, n chunked.Name, size int64) ([]byte, error) {
	return s.c.Get(ctx, chunked.IndexObjectKey(n), size)
}

// TestTenClientsOfAHost: ten read all of an image over NBD by way of the host's
// cache, at once and each in its own process: each pack leaves the store once.
func TestTenClientsOfAHost(t *testing.T) {
	dir := t.TempDir()
	tree, store := filepath.Join(dir, "tree"), filepath.Join(dir, "store")
	env := []string{"INSTAR_ETC=" + filepath.Join(dir, "etc"), "INSTAR_STATE=" + filepath.Join(dir, "state")}
	shell(t, `mkdir -p "$1/etc" && for i in $(seq 60); do head -c 600000 /dev/urandom >"$1/f$i"; done && head -c 9000000 /dev/urandom >"$1/large"`, tree)
	if out, errs, status := run(t, env, "create-image", "--store", store, "-n", "web", "-v", tree, "--all", "-r", "x86_64", "-s", "96"); status != 0 {
		t.Fatalf("create-image: exit status %d\n%s%s", status, out, errs)
	}
	want := filepath.Join(dir, "want")
	if out, errs, status := run(t, env, "restore", "web", "--store", store, "--to", want); status != 0 {
		t.Fatalf("restore: exit status %d\n%s%s", status, out, errs)
	}
	kept := filepath.Join(dir, "cache")
	place, admin := hostCache(t, env, kept, "--store", store)

	m := machine.Open(machine.Options{Dir: filepath.Join(dir, "etc")})
	ids, err := m.Identities()
	must(t, err)
	trust, err := m.Signers(nil)
	must(t, err)
	objects, err := upload.Open(t.Context(), "file://"+store, upload.Options{})
	must(t, err)
	defer objects.Close()
	s, err := images.Open(objects, images.Options{Trust: trust, Identities: ids})
	must(t, err)
	img, err := s.Resolve(t.Context(), "web", images.ResolveOptions{})
	must(t, err)
	var all sync.WaitGroup
	sums := make([]string, 10)
	for i := range sums {
		all.Go(func() {
			c, err := cacheclient.New(place)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			x, err := img.OpenWith(t.Context(), cached{c})
			if err != nil {
				t.Error(err)
				return
			}
			image, err := lazyroot.NewImage(x, lazyroot.ImageOptions{Sources: []lazyroot.NamedSource{{Name: "cache", Source: cached{c}}, {Name: "store", Source: noStore{s.Source(), t}}}})
			if err != nil {
				t.Error(err)
				return
			}
			dev, err := lazyroot.Open(t.Context(), lazyroot.Options{Image: image})
			if err != nil {
				t.Error(err)
				return
			}
			defer dev.Close()
			socket := filepath.Join(dir, fmt.Sprint("nbd-", i))
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Error(err)
				return
			}
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			go func() { served <- nbd.Serve(ctx, l, dev, nbd.Options{}, nil) }()
			out := filepath.Join(dir, fmt.Sprint("out-", i))
			text, err := exec.CommandContext(ctx, "nbdcopy", "--requests=8", "nbd+unix:///?socket="+socket, out).CombinedOutput()
			cancel()
			if err := errors.Join(err, <-served); err != nil {
				t.Errorf("client %d: %v\n%s", i, err, text)
				return
			}
			sums[i] = digest(t, out)
			os.Remove(out) // it is as large as the image
		})
	}
	all.Wait()
	for i, sum := range sums {
		if sum != digest(t, want) {
			t.Errorf("client %d has read something else", i)
		}
	}
	leftOnce(t, admin, kept)
}

func digest(t *testing.T, name string) string {
	f, err := os.Open(name)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Error(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// countStore has all that reads the store by env go through a proxy, and gives what
// then tells how many bytes of each pack and index object left the store. The
// proxy's address is signed like any other.
func countStore(t testing.TB, env *[]string) (left func() map[string]int64) {
	t.Helper()
	const name = "AWS_ENDPOINT_URL="
	var endpoint string
	for _, e := range *env {
		if at, ok := strings.CutPrefix(e, name); ok {
			endpoint = at
		}
	}
	target, err := url.Parse(endpoint)
	if err != nil || target.Host == "" {
		t.Fatalf("the store is at %q: %v", endpoint, err)
	}
	var mu sync.Mutex
	count := map[string]int64{}
	proxy := &httputil.ReverseProxy{
		Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 64, IdleConnTimeout: 10 * time.Second},
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
		},
		ModifyResponse: func(r *http.Response) error {
			for _, folder := range []string{"packs", "index"} {
				_, object, ok := strings.Cut(r.Request.URL.Path, "/"+folder+"/")
				if ok && r.Request.Method == http.MethodGet {
					r.Body = &countedBody{r.Body, func(n int) {
						mu.Lock()
						defer mu.Unlock()
						count[folder+"/"+object] += int64(n)
					}}
				}
			}
			return nil
		},
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	*env = append((*env)[:len(*env):len(*env)], name+server.URL)
	return func() map[string]int64 {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(count)
	}
}

// countedBody tells how much is read of it.
type countedBody struct {
	io.ReadCloser
	read func(n int)
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.read(n)
	return n, err
}

// TestLaunchTenGuests boots ten machines of one image on one host, lazily and by
// way of its cache, until all of it is on their disks: each pack leaves the store
// once. It is for "make evidence": TestTenClientsOfAHost is the same without
// machines.
func TestLaunchTenGuests(t *testing.T) {
	t.Parallel()
	if os.Getenv("INSTAR_EVIDENCE") == "" {
		return
	}
	store, env := image(t)
	before, _ := imageTree(t, env, store)
	left := countStore(t, &env)
	kept := filepath.Join(t.TempDir(), "cache")
	place, admin := hostCache(t, env, kept, store[:2]...)
	signer, pub := sshKey(t)
	// All run at the same time in the end; so many boot at a time that no program in
	// them waits in vain for another.
	booting := make(chan struct{}, max(2, runtime.NumCPU()/2))
	began := time.Now()
	var all sync.WaitGroup
	type machine struct {
		g      *guest
		client *ssh.Client
		disk   string
	}
	machines := make([]machine, 10)
	for i := range machines {
		m := &machines[i]
		m.disk = filepath.Join(t.TempDir(), "disk")
		must(t, os.WriteFile(m.disk, nil, 0o600))
		must(t, os.Truncate(m.disk, 1<<30))
		all.Go(func() {
			booting <- struct{}{}
			started := sync.OnceFunc(func() { <-booting })
			defer started()
			id := fmt.Sprint("web-", i)
			m.g = launch(t, env, append([]string{
				"web", "--lazy", "--cache", place, "--disk", m.disk, "--keep", "--ssh-key", pub, "--memory", "384", "--accel", "tcg",
				"--instance-id", id, "--hostname", id, "--scratch", t.TempDir(),
			}, store...)...)
			port, user := m.g.ready()
			m.client = login(t, port, user, signer)
			login := time.Since(began)
			started()
			expect(t, m.client, "", map[string]string{"hostname": "^" + id + "$", "echo written by the guest >/root/mine": "^$"})
			remote(t, m.client, complete)
			t.Logf("%s: login after %.0f s, all of it after %.0f s", id, login.Seconds(), time.Since(began).Seconds())
		})
	}
	all.Wait()
	for _, m := range machines {
		if m.client == nil {
			continue // said
		}
		m.g.powerOff(m.client, "")
		if said := m.g.stderr.String(); strings.Contains(said, "not all comes by way") {
			t.Errorf("the store was asked:\n%s", said)
		}
		sameTree(t, before, m.disk)
	}
	leftOnce(t, admin, kept)
	// What the cache fetched is all that left the store.
	for key, n := range left() {
		st, err := os.Stat(filepath.Join(kept, filepath.FromSlash(key)))
		if err != nil {
			t.Errorf("%d bytes of %s left the store, past the cache: %v", n, key, err)
		} else if st.Size() != n {
			t.Errorf("%d bytes of %s left the store; it has %d", n, key, st.Size())
		}
	}
}
