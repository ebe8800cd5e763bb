package chunked

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"

	"lukechampine.com/blake3"
)

// Secret is a domain's secret: who has it may add images to the domain, and
// can read no image by it but what it can guess. It does not print.
type Secret [32]byte

func (Secret) String() string   { return "secret(hidden)" }
func (Secret) GoString() string { return "chunked.Secret(hidden)" }

// NewSecret draws a secret.
func NewSecret() (Secret, error) {
	var s Secret
	if _, err := rand.Read(s[:]); err != nil {
		return Secret{}, fmt.Errorf("draw a domain's secret: %w", err)
	}
	return s, nil
}

// Label says in clear which secret made a pack.
type Label [12]byte

func (l Label) String() string { return hex.EncodeToString(l[:]) }

// Salt makes a pack's name and its footer's key new.
type Salt [16]byte

// Domain is what follows from a domain's secret (SPEC.md §4.1).
type Domain struct {
	id, chunk, segment, footer Key
	label                      Label
}

const contextPrefix = "instar 2026-11-22 "

// Domain derives the keys of the secret's domain.
func (s Secret) Domain() *Domain {
	d := &Domain{
		id:      kdf("chunk id", s[:]),
		chunk:   kdf("chunk key", s[:]),
		segment: kdf("segment key", s[:]),
		footer:  kdf("pack footer", s[:]),
	}
	l := kdf("domain label", s[:])
	copy(d.label[:], l[:])
	return d
}

// Label is the domain's label.
func (d *Domain) Label() Label { return d.label }

// ID is the name of the chunk whose plaintext has digest x.
func (d *Domain) ID(x Digest) ID { return ID(mac(d.id, x[:])) }

// ChunkKey seals the chunk whose plaintext has digest x.
func (d *Domain) ChunkKey(x Digest) Key { return mac(d.chunk, x[:]) }

// SegmentKey seals the index segment whose plaintext has digest x.
func (d *Domain) SegmentKey(x Digest) Key { return mac(d.segment, x[:]) }

// FooterKey seals the footer of the pack with this salt.
func (d *Domain) FooterKey(s Salt) Key { return mac(d.footer, s[:]) }

// DigestOf is the digest of a plaintext.
func DigestOf(p []byte) Digest { return blake3.Sum256(p) }

// kdf is KDF(contextPrefix ‖ purpose, k) of SPEC.md §1.
func kdf(purpose string, k []byte) (out Key) {
	blake3.DeriveKey(out[:], contextPrefix+purpose, k)
	return out
}

// mac is MAC(k, the parts one behind the other) of SPEC.md §1.
func mac(k Key, parts ...[]byte) (out Key) {
	h := blake3.New(len(out), k[:])
	for _, p := range parts {
		h.Write(p) // never fails
	}
	h.Sum(out[:0])
	return out
}
