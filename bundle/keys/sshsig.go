package keys

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

// Reasons for refusing a signature or the key that made it.
var (
	ErrSignature = errors.New("bad signature")                            // malformed, or not of these bytes by this key
	ErrNamespace = errors.New("signature made for another purpose")       // its namespace is another
	ErrKeyType   = errors.New("a kind of key that does not sign")         // or too short
	ErrUntrusted = errors.New("signed by a key that is not trusted here") // not in the allowed_signers file for this name
	ErrExpired   = errors.New("key not valid at the time of signing")     // by valid-after or valid-before
)

const (
	signatureBegin = "-----BEGIN SSH SIGNATURE-----\n"
	signatureEnd   = "-----END SSH SIGNATURE-----\n"
	armorColumns   = 70 // as ssh-keygen breaks its lines

	// MaxSignature is the length in bytes of the longest armored signature
	// that is read. One by an RSA key of 16384 bits takes 5.7 KB.
	MaxSignature = 16 << 10

	minSSHBits = 2048
)

// Signature is one SSHSIG (OpenSSH's PROTOCOL.sshsig), not yet checked.
type Signature struct {
	parsed *sshsig.Signature
}

// Key is the public key the signature says it was made with.
func (s *Signature) Key() ssh.PublicKey { return s.parsed.PublicKey }

// Namespace is the purpose the signature says it was made for.
func (s *Signature) Namespace() string { return s.parsed.Namespace }

// CheckSigningKey makes sure that key is of a kind that signs images: ed25519,
// RSA of 2048 bits and more, ECDSA on P-256, P-384 or P-521, or one of the
// two kinds of security key. Others are ErrKeyType.
func CheckSigningKey(key ssh.PublicKey) error {
	switch key.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
		ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return nil
	case ssh.KeyAlgoRSA:
		if err := checkSSHSize(key); err != nil {
			return fmt.Errorf("%w: %w", ErrKeyType, err)
		}
		return nil
	}
	return fmt.Errorf("%w: %s; use ssh-ed25519, ssh-rsa, ecdsa or sk- keys", ErrKeyType, key.Type())
}

func checkSSHSize(key ssh.PublicKey) error {
	if bits := rsaBits(key); bits < minSSHBits {
		return fmt.Errorf("ssh-rsa of %d bits, at least %d are needed", bits, minSSHBits)
	}
	return nil
}

// ParseSignature reads an armored signature exactly as `ssh-keygen -Y sign`
// writes it: any other form of the same signature, and anything in front of
// it or behind it, is ErrSignature. A key that may not sign is ErrKeyType.
func ParseSignature(armored []byte) (*Signature, error) {
	if len(armored) > MaxSignature {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrSignature, MaxSignature)
	}
	body, ok := bytes.CutPrefix(armored, []byte(signatureBegin))
	if !ok {
		return nil, fmt.Errorf("%w: does not begin with a line %q", ErrSignature, signatureBegin[:len(signatureBegin)-1])
	}
	if body, ok = bytes.CutSuffix(body, []byte(signatureEnd)); !ok {
		return nil, fmt.Errorf("%w: does not end with a line %q", ErrSignature, signatureEnd[:len(signatureEnd)-1])
	}
	blob := make([]byte, base64.StdEncoding.DecodedLen(len(body)))
	n, err := base64.StdEncoding.Decode(blob, body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignature, err)
	}
	blob = blob[:n]
	if !bytes.Equal(armor(blob), armored) {
		return nil, fmt.Errorf("%w: not in the form in which ssh-keygen writes it", ErrSignature)
	}
	p, err := sshsig.ParseSignature(blob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignature, err)
	}
	if err := CheckSigningKey(p.PublicKey); err != nil {
		return nil, err
	}
	// Only a security key's signature has fields behind the signature itself.
	if len(p.Signature.Rest) > 0 && !isSecurityKey(p.PublicKey) || !bytes.Equal(p.Marshal(), blob) {
		return nil, fmt.Errorf("%w: bytes that mean nothing", ErrSignature)
	}
	if p.HashAlgorithm != sshsig.HashSHA512 {
		return nil, fmt.Errorf("%w: made over a %s digest, sha512 is needed", ErrSignature, p.HashAlgorithm)
	}
	if p.PublicKey.Type() == ssh.KeyAlgoRSA && p.Signature.Format != ssh.KeyAlgoRSASHA512 {
		return nil, fmt.Errorf("%w: of kind %s, %s is needed", ErrSignature, p.Signature.Format, ssh.KeyAlgoRSASHA512)
	}
	return &Signature{p}, nil
}

// Verify checks that the signature is of message, for namespace and by Key.
// Security keys must have been touched. It does not say that Key is anybody's.
func (s *Signature) Verify(message []byte, namespace string) error {
	if s.parsed.Namespace != namespace {
		return fmt.Errorf("%w: namespace %q, not %q", ErrNamespace, s.parsed.Namespace, namespace)
	}
	err := sshsig.Verify(bytes.NewReader(message), s.parsed, s.parsed.PublicKey, sshsig.HashSHA512, namespace)
	if err != nil {
		return fmt.Errorf("%w by %s: %w", ErrSignature, Fingerprint(s.Key()), err)
	}
	return nil
}

// Fingerprint is key's kind and SHA-256 fingerprint, as ssh-keygen -l shows it.
func Fingerprint(key ssh.PublicKey) string { return key.Type() + " " + ssh.FingerprintSHA256(key) }

// signSSH makes an armored signature with s and checks it: an agent's answer
// is outside data.
func signSSH(ctx context.Context, s ssh.Signer, namespace string, message []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	made, err := sshsig.Sign(bytes.NewReader(message), s, sshsig.HashSHA512, namespace)
	if err != nil {
		return nil, err
	}
	armored := armor(made.Marshal())
	read, err := ParseSignature(armored)
	if err != nil {
		return nil, err
	}
	if err := read.Verify(message, namespace); err != nil {
		return nil, err
	}
	return armored, nil
}

func armor(blob []byte) []byte {
	text := base64.StdEncoding.EncodeToString(blob)
	out := make([]byte, 0, len(text)+len(text)/armorColumns+len(signatureBegin)+len(signatureEnd)+1)
	out = append(out, signatureBegin...)
	for len(text) > 0 {
		n := min(armorColumns, len(text))
		out = append(append(out, text[:n]...), '\n')
		text = text[n:]
	}
	return append(out, signatureEnd...)
}

func isSecurityKey(key ssh.PublicKey) bool {
	return key.Type() == ssh.KeyAlgoSKED25519 || key.Type() == ssh.KeyAlgoSKECDSA256
}
