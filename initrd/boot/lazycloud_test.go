package boot_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/upload"
)

// lazyCloud has an Instar image in a store that can be made to misbehave, and
// gives out tickets for it, whose URLs may expire.
type lazyCloud struct {
	t     testing.TB
	dir   string // of the store
	image string // of the root's filesystem
	start int64  // of it on the disk
	boot.Captured
	port int
	mode ticket.Mode

	mu       sync.Mutex
	wrong    func(w http.ResponseWriter, r *http.Request) bool
	claims   int
	complete int
	stamp    int // of URLs that are good
	served   int64
	asked    []string
	reached  func(served int64) // called with what was given so far, if not nil
	slow     int                // bytes a second of each answer; 0: any number
	dead     chan struct{}      // until it is closed nothing is answered, if not nil
}

// bigFile is in the image what takes time to come.
const bigFile = 10 << 20

// newLazyCloud captures a root with guestinit as its system, bare or in a
// partition.
func newLazyCloud(t testing.TB, kind disk.Kind) *lazyCloud {
	t.Helper()
	return lazyCloudOf(t, kind, smallRoot(t, func(dir string) { addBig(t, dir) }))
}

// addBig adds to a root what takes time to come.
func addBig(t testing.TB, dir string) {
	t.Helper()
	data := make([]byte, bigFile)
	rng := rand.NewChaCha8([32]byte{7})
	rng.Read(data)
	must(t, os.WriteFile(filepath.Join(dir, "big"), data, 0o644))
}

// lazyCloudOf captures a root, bare or in a partition.
func lazyCloudOf(t testing.TB, kind disk.Kind, image string) *lazyCloud {
	t.Helper()
	c := &lazyCloud{t: t, dir: t.TempDir(), mode: ticket.Lazy, image: image}
	objects, err := upload.Open(t.Context(), "file://"+c.dir, upload.Options{})
	must(t, err)
	defer objects.Close()
	f, err := os.Open(c.image)
	must(t, err)
	defer f.Close()
	st, err := f.Stat()
	must(t, err)
	m, err := sparse.Scan(int(f.Fd()), st.Size())
	must(t, err)
	d, err := disk.Wrap(kind, st.Size(), m, [16]byte{1})
	must(t, err)
	whole, err := os.Create(filepath.Join(t.TempDir(), "whole"))
	must(t, err)
	defer whole.Close()
	must(t, whole.Truncate(d.Size()))
	must(t, d.Write(t.Context(), &sparseWriter{f: whole, m: d.Map()}, func(w io.Writer) error {
		_, err := io.Copy(w, sparse.NewReader(f, m))
		return err
	}))
	c.start, _ = d.Partition()
	c.Captured = boot.Capture(t, objects, whole, d.Size(), d.Map())
	c.port = port(t, "127.0.0.1:0", c)
	return c
}

func (c *lazyCloud) Claim(_ context.Context, in *metadata.Instance, body []byte) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.claims++
	_, to, err := ticket.ParseRequest(body)
	if err != nil {
		return nil, err
	}
	tk, err := c.ticket(in.ID, "10.0.2.2")
	if err != nil {
		return nil, err
	}
	return tk.Seal(to)
}

// ticket is an instance's ticket with URLs for who reaches the store at host. c.mu
// is held.
func (c *lazyCloud) ticket(instance, host string) (*ticket.Ticket, error) {
	tk := &ticket.Ticket{
		Version: 1, InstanceID: instance, Format: "instar", Mode: c.mode, Store: "s3://bucket", Manifest: c.Manifest, ManifestSHA256: c.Name,
		Signers: c.Signers, IndexKey: c.Identity, Objects: make(map[string]string),
	}
	return tk, filepath.WalkDir(c.dir, func(name string, d os.DirEntry, err error) error {
		if key, rerr := filepath.Rel(c.dir, name); err == nil && rerr == nil && d.Type().IsRegular() {
			tk.Objects[filepath.ToSlash(key)] = fmt.Sprintf("http://%s:%d/%s?stamp=%d", host, c.port, key, c.stamp)
		}
		return err
	})
}

func (c *lazyCloud) Complete(context.Context, *metadata.Instance, []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.complete++
	return nil
}

func (c *lazyCloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	c.asked = append(c.asked, r.URL.Path+" "+r.Header.Get("Range"))
	stale := r.URL.Query().Get("stamp") != fmt.Sprint(c.stamp)
	wrong, dead := c.wrong, c.dead
	c.mu.Unlock()
	if !c.answers(r.Context(), dead) {
		return
	}
	if stale {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	if wrong != nil && wrong(w, r) {
		return
	}
	f, err := os.Open(filepath.Join(c.dir, filepath.Clean(r.URL.Path)))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer f.Close()
	http.ServeContent(&counted{w, c, r.Context()}, r, "", time.Time{}, f)
}

// answers waits while the store is dead, and tells whether anybody still asks.
func (c *lazyCloud) answers(asked context.Context, dead chan struct{}) bool {
	if dead == nil {
		return true
	}
	select {
	case <-dead:
		return true
	case <-asked.Done():
		return false
	}
}

// die has the store answer nothing, not even the rest of what it began to answer,
// until it is revived.
func (c *lazyCloud) die() (revive func()) {
	dead := make(chan struct{})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = dead
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.dead = nil
		close(dead)
	}
}

// counted counts what a store gives.
type counted struct {
	http.ResponseWriter
	c     *lazyCloud
	asked context.Context
}

func (w *counted) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		w.c.mu.Lock()
		if dead := w.c.dead; dead != nil {
			w.c.mu.Unlock()
			if !w.c.answers(w.asked, dead) {
				return done, w.asked.Err()
			}
			continue
		}
		n := len(p) - done
		if w.c.slow > 0 {
			n = min(n, w.c.slow/10)
		}
		w.c.served += int64(n)
		if w.c.reached != nil {
			w.c.reached(w.c.served)
		}
		slow := w.c.slow > 0
		w.c.mu.Unlock()
		if _, err := w.ResponseWriter.Write(p[done : done+n]); err != nil {
			return done, err
		}
		if done += n; slow {
			time.Sleep(100 * time.Millisecond)
		}
	}
	return len(p), nil
}

// pace sets how fast answers are.
func (c *lazyCloud) pace(slow int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slow = slow
}

// when does something once, when the console first shows what.
func when(what string, do func()) func([]byte) bool {
	done := false
	return func(console []byte) bool {
		if !done && bytes.Contains(console, []byte(what)) {
			done = true
			do()
		}
		return false
	}
}

// serve starts a metadata server for an instance and returns the kernel's
// parameters for it.
func (c *lazyCloud) serve(t testing.TB, id string, keys ...metadata.PublicKey) string {
	t.Helper()
	set, err := metadata.NewSet(&metadata.Instance{
		ID: id, Hostname: "booted", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		Metadata: metadata.MetadataOptions{Tokens: "required"}, PublicKeys: keys,
		Launch: &metadata.Launch{
			Format: "instar", Store: "s3://bucket", Manifest: c.Manifest, ManifestSHA256: c.Name, Signers: c.Signers, IndexKey: c.Identity,
		},
	})
	must(t, err)
	h, err := metadata.New(metadata.Options{Source: metadata.Static(set), Launcher: c, AnyPort: true})
	must(t, err)
	return fmt.Sprintf("instar.metadata=http://10.0.2.2:%d instar.root=ticket instar.anyport ", port(t, "127.0.0.1:0", h))
}

// sparseWriter puts a stream of a map's bytes where the map has them.
type sparseWriter struct {
	f    *os.File
	m    sparse.Map
	done int64 // of m[0]
}

func (w *sparseWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		for w.done == w.m[0].Len {
			w.m, w.done = w.m[1:], 0
		}
		k := min(len(p)-n, int(w.m[0].Len-w.done))
		if _, err := w.f.WriteAt(p[n:n+k], w.m[0].Off+w.done); err != nil {
			return n, err
		}
		n, w.done = n+k, w.done+int64(k)
	}
	return n, nil
}
