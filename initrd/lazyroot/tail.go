package lazyroot

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/instar-image/instar/bundle/chunked"
)

// What a caller may branch on.
var (
	// ErrForeign: the disk's tail is not of this image, instance and secret.
	ErrForeign = errors.New("the disk was not being filled with this image for this instance")
	// ErrDamaged: the tail is ours, but what it says of some blocks is lost.
	ErrDamaged = errors.New("the disk's record of what is on it is damaged")
)

// Identity is what a disk is being filled with, and for whom.
type Identity struct {
	Manifest chunked.Name // SHA-256 of the signed manifest
	Size     int64        // of the image, bytes
	Instance string       // 1 to 128 bytes
	// Secret, known to who may open the image, authenticates what the tail says:
	// who had the disk before cannot make one. 16 bytes and more.
	Secret []byte
}

// State of a disk, as its tail has it.
type State byte

// States.
const (
	None     State = iota // no tail that is known
	Filling               // the image is being brought
	Complete              // the disk is the image and what was written to it
)

func (s State) String() string {
	switch s {
	case Filling:
		return "being filled"
	case Complete:
		return "complete"
	}
	return "not known"
}

// HeadSize is how much of the beginning is kept in the tail until the disk is
// complete, in bytes: what makes a disk one that can be mounted or that has a
// partition table.
const HeadSize = 128 << 10

// The tail, from the end of the disk (its size rounded down to whole blocks):
// two superblocks, the head, the pages of the bitmap twice. docs/lazyroot.md
// has every byte.
const (
	magic       = "instar lazy v1\r\n"
	maxInstance = 128
	superSize   = 2 * Block
	macSize     = sha256.Size
	superMAC    = Block - macSize
	pageHeader  = 64
	pageBytes   = Block - pageHeader // of bits
	pageBits    = pageBytes * 8
	pageWords   = pageBytes / 8
)

// layout says where things are on a disk, in bytes.
type layout struct {
	disk   int64 // whole blocks
	device int64 // what the guest sees: from 0 on
	image  int64
	blocks int64 // of the image, the last perhaps in part
	pages  int64
	bitmap int64 // page p is at bitmap + slot*pages*Block + p*Block
	head   int64
	super  int64
}

func layoutOf(disk, image int64) (layout, error) {
	if image < 1 || image > 1<<53 {
		return layout{}, fmt.Errorf("an image of %d bytes cannot be", image)
	}
	l := layout{disk: disk / Block * Block, image: image, blocks: (image + Block - 1) / Block}
	l.pages = (l.blocks + pageBits - 1) / pageBits
	l.super = l.disk - superSize
	l.head = l.super - HeadSize
	l.bitmap = l.head - 2*l.pages*Block
	l.device = l.bitmap
	if need := max(l.blocks*Block, HeadSize); l.device < need {
		return layout{}, fmt.Errorf("the disk has %d bytes; this image needs %d, of which %d are to remember what is there",
			disk, need+l.disk-l.bitmap, l.disk-l.bitmap)
	}
	return l, nil
}

// DeviceSize is how many bytes of a disk the guest sees: all but the tail.
func DeviceSize(disk, image int64) (int64, error) {
	l, err := layoutOf(disk, image)
	return l.device, err
}

// DiskSize is the least size of a disk for an image, in bytes.
func DiskSize(image int64) int64 {
	blocks := (image + Block - 1) / Block
	pages := (blocks + pageBits - 1) / pageBits
	return max(blocks*Block, HeadSize) + superSize + HeadSize + 2*pages*Block
}

func (l *layout) page(p int64, slot uint64) int64 {
	return l.bitmap + (int64(slot)*l.pages+p)*Block
}

// Record is what a tail says. It is not authenticated: [Open] does that.
type Record struct {
	State      State
	Manifest   chunked.Name
	Instance   string
	ImageSize  int64
	DeviceSize int64 // what the guest sees
}

// super is a superblock.
type super struct {
	Record
	generation uint64
	nonce      [16]byte
	disk       int64
}

func (s *super) encode(secret []byte) []byte {
	b := aligned(Block)
	copy(b, magic)
	binary.LittleEndian.PutUint64(b[16:], s.generation)
	b[24], b[25] = byte(s.State), byte(len(s.Instance))
	binary.LittleEndian.PutUint64(b[32:], uint64(s.ImageSize))
	binary.LittleEndian.PutUint64(b[40:], uint64(s.DeviceSize))
	binary.LittleEndian.PutUint64(b[48:], uint64(s.disk))
	copy(b[56:72], s.nonce[:])
	copy(b[72:104], s.Manifest[:])
	copy(b[104:104+maxInstance], s.Instance)
	copy(b[superMAC:], mac(secret, "instar lazy record\x00", b[:superMAC]))
	return b
}

func mac(key []byte, purpose string, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(purpose))
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// parseSuper reads a superblock without a key: false if it is none.
func parseSuper(b []byte) (super, bool) {
	if len(b) != Block || string(b[:len(magic)]) != magic {
		return super{}, false
	}
	n := int(b[25])
	s := super{generation: binary.LittleEndian.Uint64(b[16:]), disk: int64(binary.LittleEndian.Uint64(b[48:]))}
	s.State = State(b[24])
	if s.State != Filling && s.State != Complete || n < 1 || n > maxInstance {
		return super{}, false
	}
	s.ImageSize = int64(binary.LittleEndian.Uint64(b[32:]))
	s.DeviceSize = int64(binary.LittleEndian.Uint64(b[40:]))
	copy(s.nonce[:], b[56:])
	copy(s.Manifest[:], b[72:])
	s.Instance = string(b[104 : 104+n])
	l, err := layoutOf(s.disk, s.ImageSize)
	if err != nil || l.device != s.DeviceSize || l.disk != s.disk {
		return super{}, false
	}
	return s, true
}

// readSupers gives the superblocks of a disk of size bytes that good accepts,
// the newest, and how it lies on the disk.
func readSupers(r io.ReaderAt, size int64, good func(s super, b []byte) bool) (best super, err error) {
	at := size/Block*Block - superSize
	if at < 0 {
		return super{}, nil
	}
	b := aligned(superSize)
	if _, err := r.ReadAt(b, at); err != nil {
		return super{}, fmt.Errorf("read the disk's tail: %w", err)
	}
	for _, c := range [][]byte{b[:Block], b[Block:]} {
		s, ok := parseSuper(c)
		if ok && s.disk == size/Block*Block && good(s, c) && s.generation >= best.generation {
			best = s
		}
	}
	return best, nil
}

// StateOf tells what the tail of a disk of size bytes says, without a key: a
// hint what to do, which [Open] checks.
func StateOf(r io.ReaderAt, size int64) (Record, error) {
	s, err := readSupers(r, size, func(super, []byte) bool { return true })
	return s.Record, err
}

func (i *Identity) check() error {
	switch {
	case i.Instance == "" || len(i.Instance) > maxInstance:
		return errors.New("the instance's name is empty or longer than 128 bytes")
	case len(i.Secret) < 16:
		return errors.New("the secret that authenticates the disk's record is shorter than 16 bytes")
	}
	return nil
}

// find reads the superblock that is this identity's, in every respect.
func (i *Identity) find(d Disk) (super, error) {
	return readSupers(d, d.Size(), func(s super, b []byte) bool {
		return hmac.Equal(b[superMAC:], mac(i.Secret, "instar lazy record\x00", b[:superMAC])) &&
			s.Manifest == i.Manifest && s.Instance == i.Instance && s.ImageSize == i.Size
	})
}

// pageKey authenticates the bitmap of one disk: no page of another image's,
// instance's, or former filling's is taken for its own.
func (i *Identity) pageKey(s *super) []byte {
	return mac(i.Secret, "instar lazy bitmap\x00", s.nonce[:], i.Manifest[:], []byte(i.Instance))
}

// Format takes a disk: whatever can be mounted or is a partition table goes
// from its head, and its tail says that it is being filled, with nothing of the image there
// yet. A disk on which it is cut short is as without a tail.
func Format(d Disk, i Identity) error {
	if err := i.check(); err != nil {
		return err
	}
	l, err := layoutOf(d.Size(), i.Size)
	if err != nil {
		return err
	}
	fail := func(err error) error { return fmt.Errorf("prepare the disk: %w", err) }
	if err := forgetOlder(d, l.super); err != nil {
		return fail(err)
	}
	// No tail is believed and nothing can be mounted, before anything else.
	for _, z := range [][2]int64{{0, HeadSize}, {l.super, superSize}} {
		if err := d.Zero(z[0], z[1]); err != nil {
			return fail(err)
		}
	}
	if err := d.Sync(); err != nil {
		return fail(err)
	}
	s := super{Record: Record{Filling, i.Manifest, i.Instance, i.Size, l.device}, generation: 1, disk: l.disk}
	if _, err := rand.Read(s.nonce[:]); err != nil {
		return fail(err)
	}
	if err := d.Zero(l.head, HeadSize); err != nil {
		return fail(err)
	}
	key := i.pageKey(&s)
	empty := make([]uint64, pageWords)
	page := aligned(Block)
	for p := range l.pages {
		encodePage(page, key, p, 1, empty)
		if _, err := d.WriteAt(page, l.page(p, 1)); err != nil {
			return fail(err)
		}
	}
	if err := d.Sync(); err != nil {
		return fail(err)
	}
	if err := writeSuper(d, &l, &s, i.Secret); err != nil {
		return fail(err)
	}
	return nil
}

// writeSuper makes a superblock durable, in the place where the one before it is not.
func writeSuper(d Disk, l *layout, s *super, secret []byte) error {
	if _, err := d.WriteAt(s.encode(secret), l.super+int64(s.generation%2)*Block); err != nil {
		return err
	}
	return d.Sync()
}

// Clear makes a disk one without a tail. What is in front of the tail stays.
func Clear(d Disk) error {
	at := d.Size()/Block*Block - superSize
	if at < 0 {
		return nil
	}
	if err := forgetOlder(d, at); err != nil {
		return fmt.Errorf("clear the disk's tail: %w", err)
	}
	if err := d.Zero(at, superSize); err != nil {
		return fmt.Errorf("clear the disk's tail: %w", err)
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("clear the disk's tail: %w", err)
	}
	return nil
}

// forgetOlder clears the superblock that is not the newest: should the newest
// go alone, a disk that is complete would again be one that is being filled.
func forgetOlder(d Disk, at int64) error {
	newest, err := readSupers(d, d.Size(), func(super, []byte) bool { return true })
	if err != nil {
		return err
	}
	older := (newest.generation + 1) % 2
	if err := d.Zero(at+int64(older)*Block, Block); err != nil {
		return err
	}
	return d.Sync()
}

// isZero tells whether all of p is zero.
func isZero(p []byte) bool {
	for len(p) >= len(zeroBlock) {
		if !bytes.Equal(p[:len(zeroBlock)], zeroBlock[:]) {
			return false
		}
		p = p[len(zeroBlock):]
	}
	return bytes.Equal(p, zeroBlock[:len(p)])
}

var zeroBlock [Block]byte
