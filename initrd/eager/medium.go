// Package eager writes an image to the disk that becomes the root, so that a
// power cut at any moment leaves either the whole image or nothing that can be
// booted, and so that the next attempt goes on where the last one ended.
//
// In go a disk and the verified bytes of an image; out comes the disk with
// them. It touches that disk alone: the bytes of the image, and, while it is
// not whole, a record in the first sector and a spool behind the image. See
// docs/initrd.md for the layout and why.
package eager

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Medium is a disk. What was written or zeroed is durable once a Sync begun
// later has returned nil; until then a power cut keeps any part of it, by
// sectors of 512 bytes. Calls come from several goroutines, never for the
// same bytes at a time but for reads, whose results are then of no matter.
type Medium interface {
	io.ReaderAt
	io.WriterAt
	// Zero makes n bytes from off zero.
	Zero(off, n int64) error
	Sync() error
	// Size in bytes.
	Size() int64
}

// discarder is a medium that can be told which of its bytes are of no use.
type discarder interface{ Discard(off, n int64) error }

type device struct {
	*os.File
	size int64
}

// Device is the block device (or file) f of size bytes as a medium.
func Device(f *os.File, size int64) Medium { return device{f, size} }

func (d device) Size() int64 { return d.size }

var zeros [64 << 10]byte

// Zero lets the kernel do it where it can (BLKZEROOUT by way of fallocate),
// and writes elsewhere.
func (d device) Zero(off, n int64) error {
	// Whole logical blocks only; the ends are written.
	const block = 4096
	lead := min((block-off%block)%block, n)
	if err := d.write(off, lead); err != nil {
		return err
	}
	off, n = off+lead, n-lead
	if whole := n / block * block; whole > 0 {
		if unix.Fallocate(int(d.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, whole) == nil {
			off, n = off+whole, n-whole
		}
	}
	return d.write(off, n)
}

func (d device) write(off, n int64) error {
	for n > 0 {
		k, err := d.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// Discard tells the device that the bytes are of no use; not all can make
// something of it.
func (d device) Discard(off, n int64) error {
	err := unix.Fallocate(int(d.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("discarding %d bytes at %d: %w", n, off, err)
	}
	return nil
}
