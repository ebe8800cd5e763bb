package eager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// HeadSize is how much of the beginning is written last, in bytes: it covers
// the superblocks of the filesystems known, btrfs' at 64 KiB being the last,
// and partition tables.
const HeadSize = 1 << 20

// keyBlocks are the pieces of the head without which nothing can be mounted,
// in the order they are written, each once all before it is durable: btrfs'
// superblock (which has a checksum, so may be torn), ext4's, and the first
// sector, of partition tables and of xfs.
var keyBlocks = [...]struct{ off, n int64 }{{64 << 10, 4 << 10}, {1024, Sector}, {0, Sector}}

// Source is an image that can be written.
type Source interface {
	// Fill writes every byte of the image to t, zeros by t.Zero, each after it
	// was verified or before an error that tells that it was not. Of an
	// image written in part before it need not write again what it verified
	// to be on the disk.
	Fill(ctx context.Context, t *Target) error
}

// Target takes the bytes of an image. Its methods may be called concurrently
// for different bytes.
type Target struct {
	m     Medium
	image Image
	again bool

	mu   sync.Mutex
	head []byte // held back
	high int64  // first byte behind all that was written
	bad  error  // of a Sync: the kernel tells of it once
}

// Write writes the image over the disk. When it returns nil the image is
// whole and durable; the record says so until [Clear]. Before that there is
// nothing on the disk that can be mounted, whatever happens.
func Write(ctx context.Context, m Medium, i Image, src Source) error {
	if err := i.check(); err != nil {
		return err
	}
	if m.Size() < i.Size {
		return fmt.Errorf("the disk has %d bytes, the image %d", m.Size(), i.Size)
	}
	t := &Target{m: m, image: i, head: make([]byte, HeadSize)}
	if err := t.begin(); err != nil {
		return fmt.Errorf("taking the disk: %w", err)
	}
	if err := src.Fill(ctx, t); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := t.commit(); err != nil {
		return fmt.Errorf("completing the disk: %w", err)
	}
	return nil
}

// begin makes sure that there is nothing to mount and that the record stands.
func (t *Target) begin() error {
	first := make([]byte, HeadSize)
	if _, err := t.m.ReadAt(first, 0); err != nil {
		return err
	}
	t.again = t.image.stateIn(first) == Begun
	record := make([]byte, Sector)
	copy(record, t.image.record(Begun))
	if t.again {
		// A cut among the key blocks may have left some: they go, the record stays.
		if len(bytes.Trim(first[Sector:], "\x00")) == 0 {
			return nil
		}
		if err := t.m.Zero(Sector, HeadSize-Sector); err != nil {
			return err
		}
		return t.sync()
	}
	// What was bootable is made unbootable before anything else is touched; a
	// record stands only where that is done.
	if err := t.m.Zero(0, HeadSize); err != nil {
		return err
	}
	if err := t.sync(); err != nil {
		return err
	}
	if _, err := t.m.WriteAt(record, 0); err != nil {
		return err
	}
	return t.sync()
}

// commit makes the image one that can be mounted, when all else is durable.
func (t *Target) commit() error {
	if err := t.sync(); err != nil {
		return err
	}
	// Everything but the key blocks, which stay as they are: zero, and the
	// record.
	rest := bytes.Clone(t.head)
	for _, k := range keyBlocks {
		clear(rest[k.off : k.off+k.n])
	}
	if _, err := t.m.WriteAt(rest[Sector:], Sector); err != nil {
		return err
	}
	if err := t.sync(); err != nil {
		return err
	}
	if free(t.head) {
		copy(t.head, t.image.record(Whole))
	}
	for _, k := range keyBlocks {
		if _, err := t.m.WriteAt(t.head[k.off:k.off+k.n], k.off); err != nil {
			return err
		}
		if err := t.sync(); err != nil {
			return err
		}
	}
	return nil
}

// Again tells whether this image was being written to this disk before: then
// what is on the disk may be right already.
func (t *Target) Again() bool { return t.again }

// Size of the image in bytes.
func (t *Target) Size() int64 { return t.image.Size }

var errRange = errors.New("the image has more bytes than was said")

// reserve notes that the bytes are the image's now, not the spool's.
func (t *Target) reserve(off, n int64) error {
	if off < 0 || n < 0 || off > t.image.Size-n {
		return errRange
	}
	t.mu.Lock()
	t.high = max(t.high, off+n)
	t.mu.Unlock()
	return nil
}

// WriteAt writes bytes of the image.
func (t *Target) WriteAt(p []byte, off int64) (int, error) {
	if err := t.reserve(off, int64(len(p))); err != nil {
		return 0, err
	}
	n := 0
	if off < HeadSize {
		t.mu.Lock()
		n = copy(t.head[off:], p)
		t.mu.Unlock()
	}
	if n == len(p) {
		return n, nil
	}
	k, err := t.m.WriteAt(p[n:], off+int64(n))
	return n + k, err
}

// Zero writes zeros of the image, whatever the disk held.
func (t *Target) Zero(off, n int64) error {
	if err := t.reserve(off, n); err != nil {
		return err
	}
	if off < HeadSize {
		k := min(n, HeadSize-off)
		t.mu.Lock()
		clear(t.head[off : off+k])
		t.mu.Unlock()
		off, n = off+k, n-k
	}
	if n == 0 {
		return nil
	}
	return t.m.Zero(off, n)
}

// ReadAt reads back what is on the disk, for comparing. The head is not there
// before the image is whole.
func (t *Target) ReadAt(p []byte, off int64) (int, error) {
	if off < HeadSize {
		return 0, io.EOF
	}
	return t.m.ReadAt(p, off)
}

// Flush makes what was written durable, so that a power cut does not take it
// back. Its error stays: the image cannot become whole any more.
func (t *Target) Flush() error { return t.sync() }

// sync makes durable what was written. An error stays: whoever saw it first
// may have gone on.
func (t *Target) sync() error {
	err := t.m.Sync()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bad == nil {
		t.bad = err
	}
	return t.bad
}

// Stream is a target that takes its bytes in order, as [ec2.Output] gives them.
type Stream struct {
	t  *Target
	at int64
}

// NewStream returns a stream from the image's first byte on.
func NewStream(t *Target) *Stream { return &Stream{t: t} }

// Write writes the next bytes.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.t.WriteAt(p, s.at)
	s.at += int64(n)
	return n, err
}

// Skip writes n zeros.
func (s *Stream) Skip(n int64) error {
	if err := s.t.Zero(s.at, n); err != nil {
		return err
	}
	s.at += n
	return nil
}

// Finish returns how many bytes came.
func (s *Stream) Finish() (int64, error) {
	if s.at != s.t.Size() {
		return s.at, fmt.Errorf("%d bytes of an image of %d came", s.at, s.t.Size())
	}
	return s.at, nil
}
