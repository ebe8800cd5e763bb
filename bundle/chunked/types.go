package chunked

import (
	"bytes"
	"encoding/hex"
	"fmt"
)

// Name is an object's name: the SHA-256 of its bytes.
type Name [32]byte

// String is the name as keys and documents have it: 64 lower-case hex digits.
func (n Name) String() string { return hex.EncodeToString(n[:]) }

// Compare orders names as their texts are ordered.
func (n Name) Compare(m Name) int { return bytes.Compare(n[:], m[:]) }

// ParseName reads what [Name.String] writes, and nothing else.
func ParseName(s string) (Name, error) {
	var n Name
	if len(s) != hex.EncodedLen(len(n)) {
		return Name{}, fmt.Errorf("%w: object name %q has not 64 hex digits", ErrFormat, clip(s))
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Name{}, fmt.Errorf("%w: object name %q has other characters than 0-9 and a-f", ErrFormat, s)
		}
	}
	if _, err := hex.Decode(n[:], []byte(s)); err != nil {
		return Name{}, fmt.Errorf("%w: object name %q: %w", ErrFormat, s, err)
	}
	return n, nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// Digest is the BLAKE3 hash of a plaintext.
type Digest [32]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// ID is the name a domain knows a chunk by.
type ID [32]byte

func (i ID) String() string { return hex.EncodeToString(i[:]) }

// Key is secret. It does not print.
type Key [32]byte

func (Key) String() string   { return "key(hidden)" }
func (Key) GoString() string { return "chunked.Key(hidden)" }

// Location is where a sealed chunk is.
type Location struct {
	Pack   Name
	Offset int64 // in the pack, bytes
	Sealed int   // length, bytes
}

// Chunk is all that a reader needs to get one chunk's plaintext.
type Chunk struct {
	Digest Digest
	Key    Key
	Size   int      // of the plaintext, 1 to MaxChunk bytes
	At     Location // a hint: digest and key say what it is
}

// ObjectSize is an object and how many bytes it has.
type ObjectSize struct {
	Name Name
	Size int64
}
