package server

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/internal/durable"
	"github.com/instar-image/instar/metadata"
)

// StateDir keeps what changes while instances run in a directory, one JSON
// file per instance: it survives a restart. Token keys are in memory alone, so
// that a restart revokes every token. It is made by [OpenState].
type StateDir struct {
	metadata.State // what is served from
	dir            string
	mu             sync.Mutex // writers: file and memory change together
}

// OpenState reads the directory, and makes it if it is not there.
func OpenState(dir string) (*StateDir, error) {
	live := filepath.Join(dir, "live")
	if err := os.MkdirAll(live, 0o700); err != nil {
		return nil, fmt.Errorf("opening the state directory: %w", err)
	}
	entries, err := os.ReadDir(live)
	if err != nil {
		return nil, fmt.Errorf("opening the state directory: %w", err)
	}
	s := &StateDir{State: metadata.NewState(), dir: live}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		var l metadata.Live
		b, err := os.ReadFile(filepath.Join(live, e.Name()))
		if err == nil {
			err = json.Unmarshal(b, &l)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the state of instance %s: %w", id, err)
		}
		err = s.State.Update(context.Background(), id, func(to *metadata.Live) error { *to = l; return nil })
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Update changes what is known of an instance, on disk and then in memory.
func (s *StateDir) Update(ctx context.Context, id string, change func(*metadata.Live) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.Live(id)
	if err := change(&l); err != nil {
		return err
	}
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return fmt.Errorf("keeping the state of instance %s: %w", id, err)
	}
	if err := durable.Replace(filepath.Join(s.dir, id+".json"), 0o600, append(b, '\n')); err != nil {
		return fmt.Errorf("keeping the state of instance %s: %w", id, err)
	}
	return s.State.Update(ctx, id, func(to *metadata.Live) error { *to = l; return nil })
}

// OpenSigner reads the key that identity documents are signed with and its
// certificate, identity-key.pem and identity-cert.pem, from a directory. What
// is missing is made: a key of 2,048 bits, or a certificate for the key.
func OpenSigner(dir string) (*metadata.Signer, error) {
	keyPath, certPath := filepath.Join(dir, "identity-key.pem"), filepath.Join(dir, "identity-cert.pem")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the identity key: %w", err)
	}
	key, err := readKey(keyPath)
	if errors.Is(err, fs.ErrNotExist) {
		if key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return nil, fmt.Errorf("making the identity key: %w", err)
		}
		var der []byte
		if der, err = x509.MarshalPKCS8PrivateKey(key); err == nil {
			err = durable.Replace(keyPath, 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("opening the identity key: %w", err)
	}
	cert, err := readCert(certPath)
	if errors.Is(err, fs.ErrNotExist) {
		cert, err = makeCert(key, certPath)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the identity certificate: %w", err)
	}
	return metadata.NewSigner(key, cert)
}

func readPEM(path, kind string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s holds no %s in PEM", path, kind)
	}
	return block.Bytes, nil
}

func readKey(path string) (*rsa.PrivateKey, error) {
	der, err := readPEM(path, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	key, ok := k.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, not an RSA key", path, k)
	}
	return key, nil
}

func readCert(path string) (*x509.Certificate, error) {
	der, err := readPEM(path, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func makeCert(key *rsa.PrivateKey, path string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Instar instance identity documents"},
		// Guests' clocks may be far off; the key is what is trusted.
		NotBefore: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2199, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	if err := durable.Replace(path, 0o600, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
