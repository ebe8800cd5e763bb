package lazyroot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Block is the granularity, in bytes, in which a device knows what is on its
// disk, and in which it reads and writes the disk.
const Block = 4096

// Disk is where a device keeps what it fetched and what was written. What was
// written or zeroed is durable once a Sync begun later has returned nil; until
// then a power cut keeps any part of it, by sectors of 512 bytes. Positions and
// lengths are whole blocks. Calls come from several goroutines, never writing
// and zeroing the same bytes at a time.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	// Zero makes n bytes from off zero; it may let go of their storage.
	Zero(off, n int64) error
	Sync() error
	// Size in bytes.
	Size() int64
}

// bounceSize is how much is copied at a time to or from memory that O_DIRECT
// does not take, and bounces how often at a time.
const (
	bounceSize = 256 << 10
	bounces    = 8
)

type fileDisk struct {
	f     *os.File
	size  int64
	spare chan []byte
}

// FileDisk is an open block device or file of size bytes, which may have been
// opened with O_DIRECT. The file stays the caller's.
func FileDisk(f *os.File, size int64) Disk {
	return &fileDisk{f: f, size: size, spare: make(chan []byte, bounces)}
}

func (d *fileDisk) Size() int64 { return d.size }

func (d *fileDisk) Sync() error { return d.f.Sync() }

// aligned allocates memory that O_DIRECT takes.
func aligned(n int) []byte {
	b := make([]byte, n+Block)
	off := int(-uintptr(unsafe.Pointer(&b[0])) & (Block - 1))
	return b[off : off+n : off+n]
}

func isAligned(p []byte) bool { return uintptr(unsafe.Pointer(&p[0]))&(Block-1) == 0 }

func (d *fileDisk) bounce() []byte {
	select {
	case b := <-d.spare:
		return b
	default:
		return aligned(bounceSize)
	}
}

func (d *fileDisk) giveBack(b []byte) {
	select {
	case d.spare <- b:
	default:
	}
}

func (d *fileDisk) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == 0 || isAligned(p) {
		return d.f.ReadAt(p, off)
	}
	b := d.bounce()
	defer d.giveBack(b)
	done := 0
	for done < len(p) {
		n, err := d.f.ReadAt(b[:min(len(b), len(p)-done)], off+int64(done))
		done += copy(p[done:], b[:n])
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (d *fileDisk) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 || isAligned(p) {
		return d.f.WriteAt(p, off)
	}
	b := d.bounce()
	defer d.giveBack(b)
	done := 0
	for done < len(p) {
		n := copy(b, p[done:])
		k, err := d.f.WriteAt(b[:n], off+int64(done))
		done += k
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Zero lets the kernel do it where it can: by letting go of the storage, else
// by zeroing, both of which read as zeros for certain; else it writes.
func (d *fileDisk) Zero(off, n int64) error {
	if n == 0 {
		return nil
	}
	for _, mode := range []uint32{unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE} {
		err := unix.Fallocate(int(d.f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("zero %d bytes at %d of %s: %w", n, off, d.f.Name(), err)
		}
	}
	b := d.bounce()
	defer d.giveBack(b)
	clear(b)
	for n > 0 {
		k, err := d.f.WriteAt(b[:min(n, int64(len(b)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}
