package catalog

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/md5"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/ec2"
)

// The sizes of RSA keys, in bits.
const (
	createdBits = 2048
	leastBits   = 1024
	mostBits    = 16384
)

// CreateKeyPair makes a key pair of type rsa or ed25519 ("" is rsa) and keeps
// its public half. private is the other half, in PEM (PKCS#1 as EC2's, or
// OpenSSH's for ed25519): it is stored nowhere.
func (c *Catalog) CreateKeyPair(ctx context.Context, call Call, name, kind string, tags Tags) (k *KeyPair, private []byte, err error) {
	var pub ssh.PublicKey
	var fingerprint string
	switch kind {
	case "", "rsa":
		kind = "rsa"
		key, err := rsa.GenerateKey(rand.Reader, createdBits)
		if err != nil {
			return nil, nil, fmt.Errorf("make a key pair: %w", err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, nil, fmt.Errorf("make a key pair: %w", err)
		}
		sum := ec2.Sum(der)
		fingerprint = colons(sum[:])
		private = pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
		if pub, err = ssh.NewPublicKey(&key.PublicKey); err != nil {
			return nil, nil, fmt.Errorf("make a key pair: %w", err)
		}
	case "ed25519":
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, nil, fmt.Errorf("make a key pair: %w", err)
		}
		block, err := ssh.MarshalPrivateKey(key, "")
		if err != nil {
			return nil, nil, fmt.Errorf("make a key pair: %w", err)
		}
		private = pem.EncodeToMemory(block)
		if pub, err = ssh.NewPublicKey(key.Public()); err != nil {
			return nil, nil, fmt.Errorf("make a key pair: %w", err)
		}
		fingerprint = Fingerprint256(pub)
	default:
		return nil, nil, refuse(CodeParameterValue, "Invalid value '%s' for keyType: it is rsa or ed25519", clip(kind))
	}
	k, err = c.addKeyPair(ctx, call, &KeyPair{Name: name, Type: kind, Fingerprint: fingerprint, PublicKey: authorized(pub), Tags: tags})
	if err != nil {
		return nil, nil, err
	}
	return k, private, nil
}

// ImportKeyPair keeps the public half of a key pair made elsewhere: an
// authorized_keys line, a PEM or DER public key, or RFC 4716's form.
func (c *Catalog) ImportKeyPair(ctx context.Context, call Call, name string, material []byte, tags Tags) (*KeyPair, error) {
	pub, err := ParsePublicKey(material)
	if err != nil {
		return nil, &Error{Code: CodeKeyFormat, Message: "Key is not in valid OpenSSH public key format", Err: err}
	}
	k := &KeyPair{Name: name, Type: "ed25519", Fingerprint: Fingerprint256(pub), PublicKey: authorized(pub), Tags: tags}
	if pub.Type() == ssh.KeyAlgoRSA {
		k.Type = "rsa"
		if k.Fingerprint, err = fingerprintMD5(pub); err != nil {
			return nil, &Error{Code: CodeKeyFormat, Message: "Key is not usable", Err: err}
		}
	}
	return c.addKeyPair(ctx, call, k)
}

func (c *Catalog) addKeyPair(ctx context.Context, call Call, k *KeyPair) (*KeyPair, error) {
	if err := checkKeyName(k.Name); err != nil {
		return nil, &Error{Code: CodeParameterValue, Message: "The key pair's name is not one", Err: err}
	}
	if err := k.Tags.check(); err != nil {
		return nil, &Error{Code: CodeParameterValue, Message: "These tags are not allowed", Err: err}
	}
	if len(k.Tags) == 0 {
		k.Tags = nil
	}
	var made *KeyPair
	err := c.run(ctx, call, func(t *Tx) error {
		made = nil
		has, err := t.KeyPair(ctx, call.Account, k.Name)
		if err != nil {
			return err
		}
		if has != nil {
			return refuse(CodeKeyDuplicate, "The keypair '%s' already exists.", k.Name)
		}
		n := *k
		n.Owner, n.Created = call.Account, t.Now()
		if n.ID, err = t.newID(ctx, "key"); err != nil {
			return err
		}
		made = &n
		return t.PutKeyPair(ctx, &n)
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// DeleteKeyPair removes a key pair by its name, or by its id if name is "". One
// that is not there is no error, as with EC2: then it is nil.
func (c *Catalog) DeleteKeyPair(ctx context.Context, call Call, name, id string) (gone *KeyPair, err error) {
	err = c.run(ctx, call, func(t *Tx) error {
		gone = nil
		k, err := t.KeyPair(ctx, call.Account, name)
		if name == "" {
			k, err = t.KeyPairByID(ctx, id)
		}
		if err != nil || k == nil || k.Owner != call.Account {
			return err
		}
		t.DeleteKeyPair(k)
		gone = k
		return nil
	})
	return gone, err
}

// ParsePublicKey reads the public half of a key pair, rsa or ed25519: an
// authorized_keys line, PEM or DER (SubjectPublicKeyInfo or PKCS#1), or RFC
// 4716's form.
func ParsePublicKey(material []byte) (ssh.PublicKey, error) {
	if len(material) > 64<<10 {
		return nil, errors.New("longer than any public key")
	}
	pub, err := parsePublicKey(bytes.TrimSpace(material))
	if err != nil {
		return nil, err
	}
	switch pub.Type() {
	case ssh.KeyAlgoED25519:
	case ssh.KeyAlgoRSA:
		bits := pub.(ssh.CryptoPublicKey).CryptoPublicKey().(*rsa.PublicKey).N.BitLen()
		if bits < leastBits || bits > mostBits {
			return nil, fmt.Errorf("an RSA key of %d bits; %d to %d are taken", bits, leastBits, mostBits)
		}
	default:
		return nil, fmt.Errorf("a key of type %s; ssh-rsa and ssh-ed25519 are taken", pub.Type())
	}
	return pub, nil
}

func parsePublicKey(b []byte) (ssh.PublicKey, error) {
	if bytes.Contains(b, []byte("PRIVATE KEY")) {
		return nil, errors.New("this is a private key: import its public half, and keep this one to yourself")
	}
	switch {
	case bytes.HasPrefix(b, []byte("---- BEGIN SSH2 PUBLIC KEY ----")):
		return parseRFC4716(string(b))
	case bytes.HasPrefix(b, []byte("-----BEGIN")):
		block, rest := pem.Decode(b)
		if block == nil || len(bytes.TrimSpace(rest)) > 0 {
			return nil, errors.New("not one PEM block")
		}
		return parseDER(block.Bytes)
	case bytes.HasPrefix(b, []byte{0x30, 0x81}), bytes.HasPrefix(b, []byte{0x30, 0x82}), bytes.HasPrefix(b, []byte{0x30, 0x2a}):
		return parseDER(b)
	}
	if bytes.ContainsAny(b, "\r\n") {
		return nil, errors.New("more than one line")
	}
	pub, _, options, rest, err := ssh.ParseAuthorizedKey(b)
	switch {
	case err != nil:
		if raw, berr := base64.StdEncoding.DecodeString(string(b)); berr == nil && (bytes.HasPrefix(raw, []byte("ssh-")) || bytes.HasPrefix(raw, []byte("-----BEGIN"))) {
			return nil, errors.New("it is base64 of a public key, once too often: aws ec2 import-key-pair takes --public-key-material fileb://KEY.pub")
		}
		return nil, err
	case len(options) > 0 || len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("options in front of the key, or more than one line")
	}
	return pub, nil
}

func parseDER(der []byte) (ssh.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		if k, err := x509.ParsePKCS1PublicKey(der); err == nil {
			return ssh.NewPublicKey(k)
		}
		return nil, err
	}
	return ssh.NewPublicKey(key)
}

// parseRFC4716 reads SSH2's own form of a public key.
func parseRFC4716(s string) (ssh.PublicKey, error) {
	lines := strings.Split(strings.ReplaceAll(s, "\r\n", "\n"), "\n")
	if len(lines) < 3 || strings.TrimSpace(lines[len(lines)-1]) != "---- END SSH2 PUBLIC KEY ----" {
		return nil, errors.New("an SSH2 public key without its end")
	}
	var text strings.Builder
	header := false
	for _, l := range lines[1 : len(lines)-1] {
		switch {
		case header, strings.Contains(l, ":"):
			header = strings.HasSuffix(l, `\`)
		default:
			text.WriteString(strings.TrimSpace(l))
		}
	}
	raw, err := base64.StdEncoding.DecodeString(text.String())
	if err != nil {
		return nil, err
	}
	return ssh.ParsePublicKey(raw)
}

// authorized is a key as an authorized_keys line has it, without a comment.
func authorized(pub ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub)))
}

// Fingerprint256 is how EC2 shows ed25519 keys: base64 of the SHA-256 of the
// key, without a prefix.
func Fingerprint256(pub ssh.PublicKey) string {
	return strings.TrimPrefix(ssh.FingerprintSHA256(pub), "SHA256:")
}

// fingerprintMD5 is how EC2 shows imported RSA keys: the MD5 of the public key
// in DER.
func fingerprintMD5(pub ssh.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub.(ssh.CryptoPublicKey).CryptoPublicKey())
	if err != nil {
		return "", err
	}
	sum := md5.Sum(der)
	return colons(sum[:]), nil
}

func colons(b []byte) string {
	s := make([]string, len(b))
	for i, c := range b {
		s[i] = fmt.Sprintf("%02x", c)
	}
	return strings.Join(s, ":")
}
