package eager

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// Sector is what a disk writes as a whole or not at all, in bytes.
const Sector = 512

// Image names what is written, and for whom.
type Image struct {
	Manifest [sha256.Size]byte // SHA-256 of the signed manifest
	Size     int64             // bytes
	Instance string            // at most 128 bytes
	// Secret, known to who may open the image, authenticates the record: who
	// had the disk before cannot make one.
	Secret []byte
}

// State of a disk, as its record has it.
type State byte

// States.
const (
	Foreign State = iota // no record, or another image's, instance's or secret's
	Begun                // the image is being written
	Whole                // the image is whole; nobody has noted it yet
)

// The record stands in the first sector, before the bytes that a partition
// table has there: where there is boot code, which images started by a kernel
// and an initrd do not have. All integers are little-endian.
//
//	0    16  magic
//	16   1   state
//	17   1   bytes of the instance's name
//	18   6   zero
//	24   8   size of the image
//	32   32  SHA-256 of the manifest
//	64   128 instance, then zeros
//	192  32  HMAC-SHA-256 of bytes 0 to 191, keyed by the secret
const (
	magic       = "instar root v1\r\n"
	instanceAt  = 64
	maxInstance = 128
	macAt       = 192
	recordSize  = macAt + sha256.Size
	bootCode    = 440 // bytes of the first sector before a partition table's
)

func (i Image) check() error {
	switch {
	case i.Size < HeadSize:
		return fmt.Errorf("the image has %d bytes: fewer than the %d of any root", i.Size, HeadSize)
	case i.Instance == "" || len(i.Instance) > maxInstance:
		return errors.New("the instance's name is empty or longer than 128 bytes")
	case len(i.Secret) == 0:
		return errors.New("no secret to authenticate the record with")
	}
	return nil
}

// record makes the first bytes of the first sector.
func (i Image) record(s State) []byte {
	b := make([]byte, recordSize)
	copy(b, magic)
	b[16], b[17] = byte(s), byte(len(i.Instance))
	binary.LittleEndian.PutUint64(b[24:], uint64(i.Size))
	copy(b[32:], i.Manifest[:])
	copy(b[instanceAt:macAt], i.Instance)
	copy(b[macAt:], i.mac(b[:macAt]))
	return b
}

func (i Image) mac(b []byte) []byte {
	h := hmac.New(sha256.New, i.Secret)
	h.Write([]byte("instar root record\x00"))
	h.Write(b)
	return h.Sum(nil)
}

// stateIn reads the record in a first sector. Whatever does not agree in every
// byte is foreign.
func (i Image) stateIn(sector []byte) State {
	if len(sector) < recordSize {
		return Foreign
	}
	for _, s := range []State{Begun, Whole} {
		if hmac.Equal(sector[:recordSize], i.record(s)) {
			return s
		}
	}
	return Foreign
}

// Claimed tells whether a disk has a record for the instance, of whatever
// image. It is not authenticated: it is a reason to ask for what authenticates
// it, and for nothing else.
func Claimed(m Medium, instance string) bool {
	b := make([]byte, Sector)
	if _, err := m.ReadAt(b, 0); err != nil {
		return false
	}
	n := int(b[17])
	return string(b[:16]) == magic && n <= maxInstance && instance != "" && string(b[instanceAt:instanceAt+n]) == instance
}

// StateOf reads a disk's record.
func StateOf(m Medium, i Image) (State, error) {
	b := make([]byte, Sector)
	if _, err := m.ReadAt(b, 0); err != nil {
		return Foreign, fmt.Errorf("reading the disk's record: %w", err)
	}
	return i.stateIn(b), nil
}

// Clear removes the record of an image that is whole and noted, and lets go
// of the spool. The filesystem in it must not be mounted, nor grown yet.
func Clear(m Medium, i Image) error {
	b := make([]byte, Sector)
	if _, err := m.ReadAt(b, 0); err != nil {
		return fmt.Errorf("clearing the disk's record: %w", err)
	}
	if i.stateIn(b) != Foreign {
		clear(b[:recordSize])
		if _, err := m.WriteAt(b, 0); err != nil {
			return fmt.Errorf("clearing the disk's record: %w", err)
		}
		if err := m.Sync(); err != nil {
			return fmt.Errorf("clearing the disk's record: %w", err)
		}
	}
	if d, ok := m.(discarder); ok && m.Size() > i.Size {
		at := (i.Size + slotAlign - 1) / slotAlign * slotAlign
		if n := (m.Size() - at) / slotAlign * slotAlign; n > 0 {
			return d.Discard(at, n)
		}
	}
	return nil
}

// free tells whether a first sector has room for the record.
func free(sector []byte) bool { return len(bytes.Trim(sector[:bootCode], "\x00")) == 0 }
