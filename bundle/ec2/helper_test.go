package ec2

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/sparse"
)

const fixtureSHA256 = "37c8a5c634fee8617e62549ee6104d5e564df968c264983fcf38c25a3d7af299"

func fixture(parts ...string) string {
	return filepath.Join(append([]string{"testdata", "fixtures"}, parts...)...)
}

type party struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

func loadParty(t testing.TB, name string) party {
	t.Helper()
	key, err := keys.ReadPrivateKey(fixture("keys", name+"-pk.pem"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := keys.ReadCertificate(fixture("keys", name+"-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return party{key, cert}
}

// parsed is a manifest that can be read.
func parsed(t testing.TB, doc []byte) *Manifest {
	t.Helper()
	m, err := ParseManifest(doc)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (p party) pub() *rsa.PublicKey { return &p.key.PublicKey }

// dirSource gives parts from a directory.
type dirSource string

func (d dirSource) OpenPart(_ context.Context, name string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(d), name))
}

// memStore is a PartSink and PartSource in memory.
type memStore struct {
	mu    sync.Mutex
	parts map[string][]byte
}

func newMemStore() *memStore { return &memStore{parts: make(map[string][]byte)} }

func (s *memStore) PutPart(_ context.Context, p Part) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parts[p.Name] = bytes.Clone(p.Data)
	return nil
}

func (s *memStore) OpenPart(_ context.Context, name string) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.parts[name]
	if !ok {
		return nil, fmt.Errorf("part %q: %w", name, fs.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// renamingStore is a memStore that can rename.
type renamingStore struct{ *memStore }

func (s renamingStore) RenamePart(_ context.Context, from, to string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.parts[from]
	if !ok {
		return fs.ErrNotExist
	}
	delete(s.parts, from)
	s.parts[to] = b
	return nil
}

func readManifest(t testing.TB, path string) *Manifest {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseManifest(b)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// memoryImage is an image whose content is data where m says so.
func memoryImage(name string, data []byte, m sparse.Map) Image {
	src := m
	if src == nil {
		src = sparse.Dense(int64(len(data)))
	}
	return Image{
		Name: name, Size: int64(len(data)), Map: m, Mtime: time.Unix(1700000000, 0),
		Write: func(_ context.Context, w io.Writer) error {
			_, err := io.Copy(w, sparse.NewReader(bytes.NewReader(data), src))
			return err
		},
	}
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func unbundleBytes(t testing.TB, o UnbundleOptions, m *Manifest, src PartSource) ([]byte, error) {
	t.Helper()
	var buf bytes.Buffer
	err := Unbundle(t.Context(), o, m, src, NewStreamOutput(&buf))
	return buf.Bytes(), err
}

func options(t testing.TB) BundleOptions {
	t.Helper()
	user, cloud := loadParty(t, "user"), loadParty(t, "ec2")
	return BundleOptions{Arch: "x86_64", Account: "123456789012", EC2Cert: cloud.cert, UserCert: user.cert, Key: user.key}
}
