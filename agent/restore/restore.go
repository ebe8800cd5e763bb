// Package restore writes the disk of an Instar image to where it is wanted: a
// file, a block device, a qcow2 file or a stream.
//
// In goes a Disk, whose bytes are verified before it gives them away; out comes
// the target, whole, or an error. A file appears under its name only when all of
// it is on disk; a device does not look like a filesystem or a partitioned disk
// until then. An interrupted restore to a file or a device is continued: what is
// there is compared with the image by digest and only the rest is fetched. The
// package touches nothing but the target.
package restore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/qcow2"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/internal/durable"
)

// Disk is what is restored.
type Disk interface {
	// Size is its size in bytes.
	Size() int64
	// Map tells which bytes may be other than zero.
	Map(ctx context.Context) (sparse.Map, error)
	// Copy writes all that Map tells to out, in any order and from several
	// goroutines, verified, and reports how many bytes were dealt with. What
	// present, if it is not nil, turns out to hold already is left alone.
	Copy(ctx context.Context, out io.WriterAt, present io.ReaderAt, report func(bytes int64)) error
	// ID names the image's content, whatever it is called.
	ID() string
}

// ErrTooSmall is wrapped by errors about a device that cannot hold the disk.
var ErrTooSmall = errors.New("device is too small")

// ErrNotEmpty is wrapped by errors about a device that holds something.
var ErrNotEmpty = errors.New("device is not empty")

// ErrInUse is wrapped by errors about a device that is mounted or otherwise taken.
var ErrInUse = errors.New("device is in use")

// ToFile writes the disk to a new file, holes as holes. Until it is complete it
// lies beside its place under a name of its own, ".NAME.ID.instar-part", from
// which a later call for the same image goes on.
func ToFile(ctx context.Context, d Disk, path string, report func(bytes int64)) error {
	id := sha256.Sum256([]byte(d.ID()))
	part := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%.200s.%x.instar-part", filepath.Base(path), id[:6]))
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("making %s: %w", path, err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("making %s: %s belongs to another restore that is going on: %w", path, part, err)
	}
	m, err := d.Map(ctx)
	if err != nil {
		return err
	}
	var present io.ReaderAt
	if st, err := f.Stat(); err == nil && st.Size() == d.Size() {
		present = f
		if err := punchHoles(f, m, d.Size()); err != nil {
			return fmt.Errorf("making %s: %w", path, err)
		}
	} else if err := errors.Join(f.Truncate(0), f.Truncate(d.Size())); err != nil {
		return fmt.Errorf("making %s: %w", path, err)
	}
	if err := d.Copy(ctx, f, present, report); err != nil {
		return fmt.Errorf("restoring to %s: %w", path, err)
	}
	return publish(f, part, path)
}

// publish gives a finished file its name.
func publish(f *os.File, from, to string) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing %s to disk: %w", to, err)
	}
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("naming the restored file: %w", err)
	}
	if err := durable.SyncDir(filepath.Dir(to)); err != nil {
		return fmt.Errorf("writing the directory of %s to disk: %w", to, err)
	}
	return nil
}

// ToQCOW2 writes the disk to a new qcow2 file, what is zero left out. It
// appears under its name when it is complete; after an error nothing is left.
func ToQCOW2(ctx context.Context, d Disk, path string, report func(bytes int64)) error {
	m, err := d.Map(ctx)
	if err != nil {
		return err
	}
	err = durable.Fill(path, 0o600, func(f *os.File) error {
		w, err := qcow2.NewWriter(f, d.Size(), m)
		if err != nil {
			return err
		}
		return d.Copy(ctx, w, nil, report)
	})
	if err != nil {
		return fmt.Errorf("restoring to %s: %w", path, err)
	}
	return nil
}

// ToDevice writes the disk over a block device (or an existing file) from its
// beginning. What is zero in the disk is zero on the device, whatever was there;
// what lies beyond the disk is left alone. What the device holds of the image
// already, from an earlier restore of this image or one like it, is not fetched.
//
// The first MiB, without which nothing recognises a filesystem or a partition
// table, is cleared before all else and written after all else. If anything is
// there at first and over is not set, nothing is written: ErrNotEmpty. What an
// interrupted restore has left is none, so it is continued without over.
func ToDevice(ctx context.Context, d Disk, path string, over bool, report func(bytes int64)) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %s: unmount it first", ErrInUse, path)
	}
	if err != nil {
		return fmt.Errorf("opening the device: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("finding the size of %s: %w", path, err)
	}
	if size < d.Size() {
		return fmt.Errorf("%w: %s has %d bytes, the image %d", ErrTooSmall, path, size, d.Size())
	}
	m, err := d.Map(ctx)
	if err != nil {
		return err
	}
	front := &frontLast{f: f, head: make([]byte, min(frontBytes, d.Size()))}
	if !over {
		if err := empty(f, min(frontBytes, size)); err != nil {
			return err
		}
	}
	if err := errors.Join(zero(f, 0, int64(len(front.head))), f.Sync()); err != nil {
		return fmt.Errorf("clearing the beginning of %s: %w", path, err)
	}
	if err := zeroHoles(ctx, f, m, d.Size()); err != nil {
		return fmt.Errorf("clearing %s: %w", path, err)
	}
	if err := d.Copy(ctx, front, f, report); err != nil {
		return fmt.Errorf("restoring to %s: %w", path, err)
	}
	if err := front.finish(); err != nil {
		return fmt.Errorf("writing to %s: %w", path, err)
	}
	return nil
}

// ToStream writes the whole disk, zeros included, in order.
func ToStream(ctx context.Context, d io.ReaderAt, size int64, m sparse.Map, out io.Writer, report func(bytes int64)) error {
	buf, zeros := make([]byte, 1<<20), make([]byte, 1<<20)
	emit := func(n int64, read func(p []byte, at int64) ([]byte, error), at int64) error {
		for n > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			p, err := read(buf[:min(n, int64(len(buf)))], at)
			if err != nil {
				return err
			}
			if _, err := out.Write(p); err != nil {
				return fmt.Errorf("writing the disk: %w", err)
			}
			n -= int64(len(p))
			at += int64(len(p))
		}
		return nil
	}
	hole := func(p []byte, _ int64) ([]byte, error) { return zeros[:len(p)], nil }
	data := func(p []byte, at int64) ([]byte, error) {
		k, err := d.ReadAt(p, at)
		if k == len(p) {
			report(int64(k))
			return p, nil
		}
		return nil, err
	}
	at := int64(0)
	for _, e := range m {
		if err := emit(e.Off-at, hole, at); err != nil {
			return err
		}
		if err := emit(e.Len, data, e.Off); err != nil {
			return err
		}
		at = e.End()
	}
	return emit(size-at, hole, at)
}
