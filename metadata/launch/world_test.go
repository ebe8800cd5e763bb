package launch

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/test/selfsigned"
	"github.com/instar-image/instar/upload"
)

type pair struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
	pem  string
}

func newPair(t *testing.T) pair {
	t.Helper()
	key, cert := selfsigned.New(t)
	return pair{key, cert, selfsigned.PEM(cert)}
}

// presigning is a store that signs URLs, and may not be listed if it is unlisted.
type presigning struct {
	upload.Store
	unlisted bool
}

func (p presigning) List(ctx context.Context, prefix string) iter.Seq2[upload.Object, error] {
	if !p.unlisted {
		return p.Store.List(ctx, prefix)
	}
	return func(yield func(upload.Object, error) bool) {
		yield(upload.Object{}, fmt.Errorf("list %s: %w", prefix, upload.ErrAccess))
	}
}

func (presigning) PresignGet(_ context.Context, key string, valid time.Duration) (string, error) {
	return fmt.Sprintf("https://store.example/%s?valid=%s", key, valid.Round(time.Minute)), nil
}

type dirSink string

func (d dirSink) PutPart(_ context.Context, p ec2.Part) error {
	return os.WriteFile(filepath.Join(string(d), p.Name), p.Data, 0o600)
}

// world is a store with a bundle, and a metadata server for two instances on
// 127.0.0.1 and 127.0.0.2.
type world struct {
	store        string // directory
	user, cloud  pair
	manifest     *ec2.Manifest
	key, iv      ec2.BlockKey
	base         string
	state        metadata.State
	presign      bool
	unlisted     bool
	mu           sync.Mutex
	notes        []string // "STATUS NOTE" of requests for tickets
	instance     *metadata.Instance
	manifestFile string
}

func (w *world) Request(q *metadata.Request) {
	if strings.Contains(q.Path, "instar") {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.notes = append(w.notes, fmt.Sprintf("%s %d %s", q.Instance, q.Status, q.Note))
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{store: t.TempDir(), user: newPair(t), cloud: newPair(t), presign: true, state: metadata.NewState(), manifestFile: "web.manifest.xml"}
	rand.Read(w.key[:])
	rand.Read(w.iv[:])
	data := bytes.Repeat([]byte("image"), 100_000)
	m, text, err := ec2.Bundle(context.Background(), ec2.BundleOptions{
		Arch: "x86_64", Account: "123456789012", EC2Cert: w.cloud.cert, UserCert: w.user.cert, Key: w.user.key, EncKey: &w.key, EncIV: &w.iv,
	}, ec2.Image{Name: "web", Size: int64(len(data)), Write: func(_ context.Context, out io.Writer) error {
		_, err := out.Write(data)
		return err
	}}, dirSink(w.store))
	if err != nil {
		t.Fatal(err)
	}
	w.manifest = m
	w.put(t, text)
	w.instance = &metadata.Instance{
		ID: "i-1", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
		Launch: &metadata.Launch{Format: "ec2", Store: "file://" + w.store, Manifest: w.manifestFile, Certificate: w.user.pem, Reclaims: 2},
	}
	w.serve(t, metadata.Options{})
	return w
}

func (w *world) put(t *testing.T, manifest []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.store, w.manifestFile), manifest, 0o600); err != nil {
		t.Fatal(err)
	}
}

// serve starts a server for the instance as it is now.
func (w *world) serve(t *testing.T, o metadata.Options) {
	t.Helper()
	set, err := metadata.NewSet(w.instance, &metadata.Instance{ID: "i-2", Caller: metadata.Caller{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.2")}}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := New(Options{State: w.state, Keys: metadata.NewKeyRing(nil), EC2Key: w.cloud.key, Open: func(ctx context.Context, u string, o upload.Options) (upload.Store, error) {
		s, err := upload.Open(ctx, u, o)
		if err != nil || !w.presign {
			return s, err
		}
		return presigning{s, w.unlisted}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	o.Source, o.State, o.Launcher, o.Reporter, o.Rate = metadata.Static(set), w.state, l, w, -1
	h, err := metadata.New(o)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return metadata.ConnContext(ctx, c, "main", "")
	}
	srv.Start()
	t.Cleanup(srv.Close)
	w.base = srv.URL
}

func (w *world) client(t *testing.T, o ticket.Options) *ticket.Client {
	t.Helper()
	c, err := ticket.New(w.base, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// refused checks that err is a refusal and that a log line says so.
func (w *world) refused(t *testing.T, what string, err error, status int, note string) {
	t.Helper()
	var s *ticket.StatusError
	if !errors.As(err, &s) || s.Status != status {
		t.Errorf("%s: %v, want %d", what, err, status)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	last := w.notes[len(w.notes)-1]
	if !strings.Contains(last, fmt.Sprintf(" %d ", status)) || !strings.Contains(last, note) {
		t.Errorf("%s: the log has %q, want %d and %q in it", what, last, status, note)
	}
	for _, secret := range []string{hex.EncodeToString(w.key[:]), hex.EncodeToString(w.iv[:])} {
		if strings.Contains(last, secret) || err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: the log or the answer holds the bundle's key", what)
		}
	}
}

var ctx = context.Background()
