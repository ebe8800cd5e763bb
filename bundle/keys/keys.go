// Package keys reads the keys people have and uses them for Instar: X.509
// certificates and RSA keys in PEM for EC2 bundles; SSH keys, in files and in
// a running ssh-agent, that sign Instar images; allowed_signers files that say
// whose signatures count; age and SSH keys that images are encrypted to.
//
// Bytes or a path go in, keys come out. The package reads the files and speaks
// to the agent it is told to, writes the new keys it is asked for (mode 0600,
// durable, never over a file that exists), and touches nothing else.
//
// Keys it cannot use are refused with the reason and what to use instead.
package keys

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
)

// Reasons for refusing a key or certificate.
var (
	ErrNotFound   = errors.New("no such thing in the file")             // no PEM block of the kind
	ErrPassphrase = errors.New("protected by a passphrase")             // decrypt it first
	ErrNotRSA     = errors.New("not an RSA key")                        // the format knows RSA only
	ErrWeak       = errors.New("RSA key too short or too long")         // 1024 to 16384 bits are taken
	ErrSeveral    = errors.New("several private keys in one file")      // which one is meant?
	ErrMismatch   = errors.New("certificate and private key differ")    // they belong to different keys
	ErrMalformed  = errors.New("malformed key or certificate")          // what the PEM block holds
	ErrTooLarge   = errors.New("larger than any key or certificate is") // 1 MiB
)

// MaxFile is the size in bytes beyond which a file is not read.
const MaxFile = 1 << 20

const minBits, maxBits = 1024, 16384

// ReadPrivateKey reads the RSA private key in the PEM file at path.
func ReadPrivateKey(path string) (*rsa.PrivateKey, error) {
	return fromFile(path, "private key", ParsePrivateKey)
}

// ReadCertificate reads the first X.509 certificate in the PEM file at path.
func ReadCertificate(path string) (*x509.Certificate, error) {
	return fromFile(path, "certificate", ParseCertificate)
}

// ReadCertificates reads all X.509 certificates in the PEM file at path, such
// as a list of signers to trust. There is at least one.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	return fromFile(path, "certificates", ParseCertificates)
}

func fromFile[T any](path, what string, parse func([]byte) (T, error)) (T, error) {
	var none T
	f, err := os.Open(path)
	if err != nil {
		return none, fmt.Errorf("reading %s: %w", what, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return none, fmt.Errorf("reading %s: %w", what, err)
	}
	if len(data) > MaxFile {
		return none, fmt.Errorf("reading %s %s: %w", what, path, ErrTooLarge)
	}
	v, err := parse(data)
	if err != nil {
		return none, fmt.Errorf("reading %s %s: %w", what, path, err)
	}
	return v, nil
}

// ParsePrivateKey reads an RSA private key in PEM, PKCS#1 or PKCS#8. Other
// blocks (certificates, parameters) are passed over.
func ParsePrivateKey(data []byte) (*rsa.PrivateKey, error) {
	var found *rsa.PrivateKey
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		key, err := privateKey(b)
		if err != nil {
			return nil, err
		}
		if key == nil {
			continue
		}
		if found != nil && !found.Equal(key) {
			return nil, ErrSeveral
		}
		found = key
	}
	if found == nil {
		return nil, fmt.Errorf("%w: no PEM block \"PRIVATE KEY\" or \"RSA PRIVATE KEY\"", ErrNotFound)
	}
	return found, nil
}

// privateKey returns nil for a block of some other kind.
func privateKey(b *pem.Block) (*rsa.PrivateKey, error) {
	switch b.Type {
	case "RSA PRIVATE KEY":
		if bytes.Contains([]byte(b.Headers["Proc-Type"]), []byte("ENCRYPTED")) {
			return nil, fmt.Errorf("%w: remove it with `openssl rsa -in KEY -out NEWKEY`, or use another key", ErrPassphrase)
		}
		key, err := x509.ParsePKCS1PrivateKey(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		return key, checkSize(&key.PublicKey)
	case "PRIVATE KEY":
		any, err := x509.ParsePKCS8PrivateKey(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		key, ok := any.(*rsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("%w but %s: EC2 bundles are signed and opened with RSA keys only", ErrNotRSA, kind(any))
		}
		return key, checkSize(&key.PublicKey)
	case "ENCRYPTED PRIVATE KEY":
		return nil, fmt.Errorf("%w: remove it with `openssl pkcs8 -in KEY -out NEWKEY`, or use another key", ErrPassphrase)
	case "EC PRIVATE KEY":
		return nil, fmt.Errorf("%w but ECDSA: EC2 bundles are signed and opened with RSA keys only", ErrNotRSA)
	case "DSA PRIVATE KEY":
		return nil, fmt.Errorf("%w but DSA: EC2 bundles are signed and opened with RSA keys only", ErrNotRSA)
	case "OPENSSH PRIVATE KEY":
		return nil, fmt.Errorf("%w in PEM but OpenSSH's own format: an RSA key is converted by `ssh-keygen -p -m PEM -f COPY`; ed25519 and ECDSA keys cannot be used for EC2 bundles", ErrNotRSA)
	}
	return nil, nil
}

func kind(key any) string {
	switch key.(type) {
	case *ecdsa.PrivateKey, *ecdsa.PublicKey:
		return "ECDSA"
	case ed25519.PrivateKey, ed25519.PublicKey:
		return "ed25519"
	}
	return fmt.Sprintf("%T", key)
}

func checkSize(k *rsa.PublicKey) error {
	if n := k.N.BitLen(); n < minBits || n > maxBits {
		return fmt.Errorf("%w: %d bits, between %d and %d are taken", ErrWeak, n, minBits, maxBits)
	}
	return nil
}

// ParseCertificate reads the first X.509 certificate in PEM. Its dates and
// usages are not looked at: the tools that made bundles never did, and the
// clouds' own certificates have expired.
func ParseCertificate(data []byte) (*x509.Certificate, error) {
	all, err := ParseCertificates(data)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// ParseCertificates reads all X.509 certificates in PEM, at least one. Each
// is of an RSA key.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" && b.Type != "X509 CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		if _, err := PublicKey(c); err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: no PEM block \"CERTIFICATE\"", ErrNotFound)
	}
	return all, nil
}

// PublicKey is the RSA key of c.
func PublicKey(c *x509.Certificate) (*rsa.PublicKey, error) {
	k, ok := c.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("certificate of %s: %w but %s: EC2 bundles know RSA only", c.Subject, ErrNotRSA, kind(c.PublicKey))
	}
	return k, checkSize(k)
}

// CheckPair makes sure that c is a certificate of key.
func CheckPair(c *x509.Certificate, key *rsa.PrivateKey) error {
	if k, ok := c.PublicKey.(*rsa.PublicKey); !ok || !k.Equal(&key.PublicKey) {
		return fmt.Errorf("certificate of %s: %w", c.Subject, ErrMismatch)
	}
	return nil
}
