package keys

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func block(t testing.TB, kind string, der []byte, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func certificate(t testing.TB, pub, priv any, until time.Time) []byte {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Unix(0, 0), NotAfter: until}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, pub, priv)
	return block(t, "CERTIFICATE", der, err)
}

func TestPrivateKeys(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	other, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs1 := block(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key), nil)
	pkcs8 := func(k any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		return block(t, "PRIVATE KEY", der, err)
	}
	ecDER, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	cert := certificate(t, &key.PublicKey, key, time.Unix(1, 0))
	join := func(b ...[]byte) []byte {
		var out []byte
		for _, x := range b {
			out = append(out, x...)
		}
		return out
	}
	for _, c := range []struct {
		name string
		pem  []byte
		want error
		says string
	}{
		{"PKCS#1", pkcs1, nil, ""},
		{"PKCS#8", pkcs8(key), nil, ""},
		{"with text and CRLF", []byte("Bag Attributes\r\n" + strings.ReplaceAll(string(pkcs8(key)), "\n", "\r\n")), nil, ""},
		{"after a certificate", join(cert, pkcs1), nil, ""},
		{"the same twice", join(pkcs1, pkcs8(key)), nil, ""},
		{"two keys", join(pkcs1, pkcs8(other)), ErrSeveral, ""},
		{"1024 bits", pkcs8(other), nil, ""},
		{"ed25519", pkcs8(ed), ErrNotRSA, "ed25519"},
		{"ECDSA", pkcs8(ec), ErrNotRSA, "ECDSA"},
		{"SEC1", block(t, "EC PRIVATE KEY", ecDER, nil), ErrNotRSA, "ECDSA"},
		{"DSA", block(t, "DSA PRIVATE KEY", []byte{1}, nil), ErrNotRSA, "DSA"},
		{"OpenSSH", block(t, "OPENSSH PRIVATE KEY", []byte("openssh-key-v1\x00"), nil), ErrNotRSA, "ssh-keygen"},
		{"certificate only", cert, ErrNotFound, "PRIVATE KEY"},
		{"nothing", nil, ErrNotFound, ""},
		{"garbage", []byte("hello"), ErrNotFound, ""},
		{"cut", pkcs1[:200], ErrNotFound, ""},
		{"damaged PKCS#1", block(t, "RSA PRIVATE KEY", []byte{1, 2, 3}, nil), ErrMalformed, ""},
		{"damaged PKCS#8", block(t, "PRIVATE KEY", []byte{1, 2, 3}, nil), ErrMalformed, ""},
		{"encrypted PKCS#8", block(t, "ENCRYPTED PRIVATE KEY", []byte{1}, nil), ErrPassphrase, "openssl pkcs8"},
		{"encrypted PKCS#1", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00"}, Bytes: []byte{1}}), ErrPassphrase, "openssl rsa"},
	} {
		got, err := ParsePrivateKey(c.pem)
		if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v with %q", c.name, err, c.want, c.says)
		}
		if c.want == nil && got == nil {
			t.Errorf("%s: no key", c.name)
		}
	}
}

// Keys as openssl itself makes and protects them.
func TestOpenSSLKeys(t *testing.T) {
	dir := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "openssl", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, out)
		}
	}
	run("genrsa", "-out", "pkcs8.pem", "2048")
	run("rsa", "-in", "pkcs8.pem", "-traditional", "-out", "pkcs1.pem")
	run("rsa", "-in", "pkcs8.pem", "-traditional", "-aes128", "-passout", "pass:secret", "-out", "enc1.pem")
	run("pkcs8", "-topk8", "-in", "pkcs8.pem", "-passout", "pass:secret", "-out", "enc8.pem")
	run("req", "-new", "-x509", "-key", "pkcs8.pem", "-subj", "/CN=x", "-days", "1", "-text", "-out", "cert.pem")
	run("genrsa", "-out", "short.pem", "768")
	a, err := ReadPrivateKey(filepath.Join(dir, "pkcs8.pem"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := ReadPrivateKey(filepath.Join(dir, "pkcs1.pem"))
	if err != nil || !a.Equal(b) {
		t.Errorf("PKCS#1 and PKCS#8 differ: %v", err)
	}
	for _, f := range []string{"enc1.pem", "enc8.pem"} {
		if _, err := ReadPrivateKey(filepath.Join(dir, f)); !errors.Is(err, ErrPassphrase) || !strings.Contains(err.Error(), f) {
			t.Errorf("%s: %v", f, err)
		}
	}
	if _, err := ReadPrivateKey(filepath.Join(dir, "short.pem")); !errors.Is(err, ErrWeak) && !errors.Is(err, ErrMalformed) {
		t.Errorf("768 bits: %v", err)
	}
	c, err := ReadCertificate(filepath.Join(dir, "cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckPair(c, a); err != nil {
		t.Error(err)
	}
	other, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckPair(c, other); !errors.Is(err, ErrMismatch) {
		t.Errorf("another key: %v", err)
	}
}

func TestCertificates(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	pub, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	expired := certificate(t, &key.PublicKey, key, time.Unix(1, 0))
	valid := certificate(t, &key.PublicKey, key, time.Now().Add(time.Hour))
	all, err := ParseCertificates(append(append([]byte("two:\n"), expired...), valid...))
	if err != nil || len(all) != 2 {
		t.Fatalf("%d certificates, %v", len(all), err)
	}
	if k, err := PublicKey(all[0]); err != nil || !k.Equal(&key.PublicKey) {
		t.Errorf("%v", err)
	}
	for name, c := range map[string]struct {
		pem  []byte
		want error
	}{
		"ed25519":     {certificate(t, pub, ed, time.Unix(1, 0)), ErrNotRSA},
		"private key": {block(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key), nil), ErrNotFound},
		"nothing":     {nil, ErrNotFound},
		"damaged":     {block(t, "CERTIFICATE", []byte{1, 2}, nil), ErrMalformed},
	} {
		if _, err := ParseCertificate(c.pem); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadPrivateKey(filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, MaxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadCertificate(big); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := ReadCertificates(dir); err == nil {
		t.Error("a folder: no error")
	}
}

func FuzzPEM(f *testing.F) {
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(block(f, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key), nil))
	f.Add(certificate(f, &key.PublicKey, key, time.Unix(1, 0)))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nMA==\n-----END PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMA==\n-----END RSA PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if k, err := ParsePrivateKey(data); (k == nil) == (err == nil) {
			t.Errorf("key %v, error %v", k != nil, err)
		}
		if c, err := ParseCertificates(data); (len(c) == 0) == (err == nil) {
			t.Errorf("%d certificates, error %v", len(c), err)
		}
	})
}
