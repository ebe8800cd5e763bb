package chunked

import (
	"crypto/aes"
	"crypto/cipher"
)

// Type says what is sealed.
type Type byte

// The types of sealed objects.
const (
	TypeChunk   Type = 'C'
	TypeFooter  Type = 'F'
	TypeSegment Type = 'S'
	TypeRoot    Type = 'R'
)

// Codec says how a plaintext is encoded before it is sealed.
type Codec byte

// The codecs.
const (
	Stored Codec = 0 // as it is
	Zstd   Codec = 1 // one zstd frame
)

// SealOverhead is how much longer a sealed object is than what was encoded.
const SealOverhead = 1 + nonceSize + tagSize

const (
	nonceSize = 12
	tagSize   = 16
	adPrefix  = "instar-seal-1"
)

// sealer has what follows from a key of SPEC.md §4.
type sealer struct {
	aead cipher.AEAD
	nk   Key
}

func newSealer(k Key) *sealer {
	ek := kdf("seal encryption", k[:])
	block, err := aes.NewCipher(ek[:])
	if err != nil {
		panic("chunked: internal error: AES-256 refuses a key of 32 bytes: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("chunked: internal error: GCM refuses AES: " + err.Error())
	}
	return &sealer{aead: aead, nk: kdf("seal nonce", k[:])}
}

func additional(t Type, c Codec) []byte {
	return append(append(make([]byte, 0, len(adPrefix)+2), adPrefix...), byte(t), byte(c))
}

// AppendSeal appends the sealed form of b, which is a plaintext encoded by c,
// to dst: len(b)+[SealOverhead] bytes. b and the rest of dst's array must not
// overlap. Equal arguments give equal bytes.
func AppendSeal(dst []byte, k Key, t Type, c Codec, b []byte) []byte {
	s := newSealer(k)
	ad := additional(t, c)
	n := mac(s.nk, ad, b)
	dst = append(dst, byte(c))
	dst = append(dst, n[:nonceSize]...)
	return s.aead.Seal(dst, n[:nonceSize], b, ad)
}

// openSeal checks a sealed object and gives what was encoded, in sealed's own
// memory: sealed is overwritten, also if it is refused.
func openSeal(object string, k Key, t Type, sealed []byte) (Codec, []byte, error) {
	if len(sealed) < SealOverhead {
		return 0, nil, bad(ErrCorrupt, object, "%d bytes are too few for anything sealed", len(sealed))
	}
	c := Codec(sealed[0])
	nonce, text := sealed[1:1+nonceSize], sealed[1+nonceSize:]
	b, err := newSealer(k).aead.Open(text[:0], nonce, text, additional(t, c))
	if err != nil {
		return 0, nil, bad(ErrCorrupt, object, "it does not open: its bytes were changed, or the key is another object's")
	}
	if c > Zstd {
		return 0, nil, bad(ErrVersion, object, "codec %d; this program knows codecs 0 and 1: use a newer one", c)
	}
	return c, b, nil
}

// openExact opens a sealed object whose plaintext has size bytes, into dst if
// that has room.
func (u *unpacker) openExact(object string, k Key, t Type, sealed []byte, size int, dst []byte) ([]byte, error) {
	c, b, err := openSeal(object, k, t, sealed)
	if err != nil {
		return nil, err
	}
	if c == Zstd {
		return u.expand(object, b, size, dst)
	}
	if len(b) != size {
		return nil, bad(ErrCorrupt, object, "it has %d bytes, not %d", len(b), size)
	}
	return b, nil
}
