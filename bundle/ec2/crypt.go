package ec2

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"hash"
)

// All of the format's legacy cryptography: RSA PKCS#1 v1.5 for signatures and
// key transport, SHA-1, AES-128-CBC.

// BlockKey is an AES-128 key or a CBC initialisation vector: 16 bytes.
type BlockKey [aes.BlockSize]byte

// ParseBlockKey reads 32 hex digits, as --enc-key and --enc-iv take them.
func ParseBlockKey(digits string) (k BlockKey, err error) {
	if n, err := hex.Decode(k[:], []byte(digits[:min(len(digits), 2*len(k))])); err != nil || n != len(k) || len(digits) != 2*len(k) {
		return BlockKey{}, fail(ErrOption, "key or initialisation vector", "32 hex digits are needed")
	}
	return k, nil
}

// NewPartDigest makes the digest that manifests have of parts, SHA-1.
func NewPartDigest() hash.Hash { return sha1.New() }

func sha1Sum(b []byte) SHA1 { return sha1.Sum(b) }

// newCBC returns the cipher for key; 16-byte keys never fail.
func newBlock(key BlockKey) cipher.Block {
	b, err := aes.NewCipher(key[:])
	if err != nil {
		panic("ec2: AES refuses a 16-byte key: " + err.Error())
	}
	return b
}

// VerifySignature checks the manifest's signature with the public key pub.
// The error is of class ErrUnsigned or ErrSignature.
func (m *Manifest) VerifySignature(pub *rsa.PublicKey) error {
	if m.Signature == nil {
		return fail(ErrUnsigned, objManifest, "is not signed: anybody may have made or changed it")
	}
	sum := sha1.Sum(m.signed)
	if err := rsa.VerifyPKCS1v15(pub, crypto.SHA1, sum[:], m.Signature); err != nil {
		return &Error{Class: ErrSignature, Object: objManifest, Detail: "its signature was not made by this key, or the manifest was changed", Err: err}
	}
	return nil
}

// SignedBytes is what the signature is over: <machine_configuration> and
// <image> as they stand in the file, tags included, one after the other.
func (m *Manifest) SignedBytes() []byte { return bytes.Clone(m.signed) }

// Trust says whose manifests are believed.
type Trust struct {
	Keys          []*rsa.PublicKey // of signers; any one suffices
	AllowUnsigned bool             // accept UNSIGNED; a wrong signature is refused all the same
}

// CheckTrust checks the signature and returns the key that made it, or nil
// for an unsigned manifest that t allows. Errors are as for VerifySignature.
func (m *Manifest) CheckTrust(t Trust) (*rsa.PublicKey, error) {
	if m.Signature == nil && t.AllowUnsigned {
		return nil, nil
	}
	if m.Signature != nil && len(t.Keys) == 0 {
		return nil, fail(ErrSignature, objManifest, "cannot be checked: give the certificate of its signer")
	}
	err := fail(ErrUnsigned, objManifest, "is not signed: anybody may have made or changed it")
	for _, pub := range t.Keys {
		if err = m.VerifySignature(pub); err == nil {
			return pub, nil
		}
	}
	return nil, err
}

// Side tells whose encrypted key opened a bundle.
type Side string

// The two sides for whom a bundle is encrypted.
const (
	SideUser  Side = "user"
	SideCloud Side = "ec2"
)

// sessionKey recovers key and IV with either party's private key.
func (m *Manifest) sessionKey(priv *rsa.PrivateKey) (key, iv BlockKey, side Side, err error) {
	for _, pair := range []struct {
		side    Side
		key, iv []byte
	}{{SideUser, m.UserKey, m.UserIV}, {SideCloud, m.EC2Key, m.EC2IV}} {
		var ok bool
		if key, ok = unwrap(priv, pair.key); !ok {
			continue
		}
		if iv, ok = unwrap(priv, pair.iv); !ok {
			continue
		}
		return key, iv, pair.side, nil
	}
	// One answer for every way to fail: nothing to learn from asking often.
	return BlockKey{}, BlockKey{}, "", fail(ErrKey, objManifest, "was encrypted for other keys than this one")
}

// unwrap opens one RSA-encrypted value of 32 hex digits.
func unwrap(priv *rsa.PrivateKey, sealed []byte) (k BlockKey, ok bool) {
	if len(sealed) == 0 {
		return k, false
	}
	//lint:ignore SA1019 the format's key transport
	plain, err := rsa.DecryptPKCS1v15(nil, priv, sealed)
	if err != nil {
		return k, false
	}
	k, err = ParseBlockKey(string(plain))
	return k, err == nil
}

// wrap encrypts k's 32 hex digits (not its 16 bytes: the format's way).
func wrap(pub *rsa.PublicKey, k BlockKey) ([]byte, error) {
	//lint:ignore SA1019 the format's key transport
	return rsa.EncryptPKCS1v15(rand.Reader, pub, []byte(hex.EncodeToString(k[:])))
}

var errPadding = errors.New("bad padding")

// unpad removes PKCS#7 padding.
func unpad(b []byte) ([]byte, error) {
	if len(b) == 0 || len(b)%aes.BlockSize != 0 {
		return nil, errPadding
	}
	n := int(b[len(b)-1])
	if n == 0 || n > aes.BlockSize || !bytes.Equal(b[len(b)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		return nil, errPadding
	}
	return b[:len(b)-n], nil
}

// IsEncryptedManifest tells whether data is a manifest of the oldest kind,
// encrypted as a whole: its first byte is 1 or 2, the scheme.
func IsEncryptedManifest(data []byte) bool {
	return len(data) > 0 && (data[0] == 1 || data[0] == 2)
}

// DecryptManifest opens a manifest that is encrypted as a whole with the
// user's private key and returns the document. Neither scheme authenticates
// anything: the signature within is what counts. Errors are of class
// ErrFormat, ErrTruncated or ErrKey.
func DecryptManifest(data []byte, priv *rsa.PrivateKey) ([]byte, error) {
	if len(data) > maxManifest {
		return nil, fail(ErrLimit, objManifest, "is %d bytes long, more than %d", len(data), maxManifest)
	}
	if !IsEncryptedManifest(data) {
		return nil, fail(ErrFormat, objManifest, "is not encrypted by a known scheme")
	}
	var n, at int
	switch {
	case data[0] == 1 && len(data) >= 2:
		n, at = int(data[1]), 2
	case data[0] == 2 && len(data) >= 3:
		n, at = int(data[1])<<8|int(data[2]), 3
	}
	sealed, body := data[at:], []byte(nil)
	if at == 0 || n > len(sealed) {
		return nil, fail(ErrTruncated, objManifest, "ends within its encrypted key")
	}
	sealed, body = sealed[:n], bytes.Clone(sealed[n:])
	if len(body) == 0 || len(body)%aes.BlockSize != 0 {
		return nil, fail(ErrTruncated, objManifest, "has %d encrypted bytes, no multiple of %d", len(body), aes.BlockSize)
	}
	//lint:ignore SA1019 the format's key transport
	material, err := rsa.DecryptPKCS1v15(nil, priv, sealed)
	if err != nil || len(material) != 2*aes.BlockSize {
		return nil, fail(ErrKey, objManifest, "was encrypted for another key than this one")
	}
	key := BlockKey(material[:aes.BlockSize])
	cipher.NewCBCDecrypter(newBlock(key), material[aes.BlockSize:]).CryptBlocks(body, body)
	doc, err := unpad(body)
	if err != nil {
		return nil, &Error{Class: ErrFormat, Object: objManifest, Detail: "decrypts to garbage", Err: err}
	}
	return doc, nil
}
