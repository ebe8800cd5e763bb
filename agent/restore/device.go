package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/sparse"
)

// frontBytes is how much of a device's beginning is written last, in bytes.
const frontBytes = 1 << 20

// empty fails with ErrNotEmpty if a device's first n bytes are not all zero.
func empty(f *os.File, n int64) error {
	p := make([]byte, n)
	if _, err := f.ReadAt(p, 0); err != nil {
		return fmt.Errorf("reading the beginning of %s: %w", f.Name(), err)
	}
	if at := bytes.IndexFunc(p, func(r rune) bool { return r != 0 }); at >= 0 {
		return fmt.Errorf("%w: %s has data at byte %d", ErrNotEmpty, f.Name(), at)
	}
	return nil
}

// frontLast writes through, but for what belongs into the front, which is kept
// until finish.
type frontLast struct {
	f    *os.File
	mu   sync.Mutex
	head []byte
}

// WriteAt writes or keeps p.
func (w *frontLast) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	if off < int64(len(w.head)) {
		w.mu.Lock()
		n = copy(w.head[off:], p)
		w.mu.Unlock()
	}
	if n == len(p) {
		return n, nil
	}
	k, err := w.f.WriteAt(p[n:], off+int64(n))
	return n + k, err
}

// finish writes the front once all else is on disk.
func (w *frontLast) finish() error {
	if err := w.f.Sync(); err != nil {
		return err
	}
	if _, err := w.f.WriteAt(w.head, 0); err != nil {
		return err
	}
	return w.f.Sync()
}

// zeroHoles clears what the map does not tell of.
func zeroHoles(ctx context.Context, f *os.File, m sparse.Map, size int64) error {
	at := int64(0)
	for _, e := range m {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := zero(f, at, e.Off-at); err != nil {
			return err
		}
		at = e.End()
	}
	return zero(f, at, size-at)
}

// block is the granularity, in bytes, in which the kernel is asked to clear.
const block = 4096

// zero clears a range: by the kernel (BLKZEROOUT and the like, through
// fallocate) as far as it does whole blocks, else by writing.
func zero(f *os.File, off, n int64) error {
	if lead := (block - off%block) % block; lead > 0 {
		k := min(lead, n)
		if err := writeZeros(f, off, k); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	if whole := n / block * block; whole > 0 && unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, whole) == nil {
		off, n = off+whole, n-whole
	}
	return writeZeros(f, off, n)
}

func writeZeros(f *os.File, off, n int64) error {
	zeros := make([]byte, min(max(n, 0), 1<<20))
	for n > 0 {
		k, err := f.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// punchHoles makes holes of what the map does not tell of in a file that an
// earlier restore has left.
func punchHoles(f *os.File, m sparse.Map, size int64) error {
	at := int64(0)
	punch := func(n int64) error {
		if n <= 0 {
			return nil
		}
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return writeZeros(f, at, n)
		}
		return err
	}
	for _, e := range m {
		if err := punch(e.Off - at); err != nil {
			return err
		}
		at = e.End()
	}
	return punch(size - at)
}
