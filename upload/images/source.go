package images

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// source reads packs and index objects for bundle/chunked, which verifies them.
type source struct {
	s     *Store
	moved group[chunked.Name, *chunked.Moved]
	run   bool // of the parent of a capture: what it lacks, garbage collection took
}

// Source gives readers of package chunked what they ask for. It may be used by
// several at once, and remembers what it learned of packs that were moved.
func (s *Store) Source() chunked.Source { return &source{s: s} }

// ReadPack reads len(p) bytes of a pack from off. An object that is not there is
// [chunked.ErrMissing].
func (x *source) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	key := chunked.PackKey(n)
	r, _, err := x.s.objects.Get(ctx, key, upload.GetOptions{Offset: off, Length: int64(len(p))})
	if err == nil {
		_, err = io.ReadFull(r, p)
		r.Close()
		if err == io.EOF || err == io.ErrUnexpectedEOF { // io.ReadFull's own: the object ends, not the connection
			err = fmt.Errorf("%w: the pack ends early: %w", chunked.ErrCorrupt, io.ErrUnexpectedEOF)
		}
	}
	if err != nil {
		return x.fail(fmt.Errorf("read %d bytes at %d of %s/%s: %w", len(p), off, x.s, key, err))
	}
	return nil
}

// uncached is implemented by stores that are read by way of a cache.
type uncached interface {
	// Uncached is the store itself, for who was given wrong bytes under key.
	Uncached(ctx context.Context, key string) upload.Store
}

// RereadPack is ReadPack past a cache. Without one there is nothing to read again.
func (x *source) RereadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	key := chunked.PackKey(n)
	c, ok := x.s.objects.(uncached)
	if !ok {
		return fmt.Errorf("%s/%s was read from the store itself: %w", x.s, key, chunked.ErrCorrupt)
	}
	r, _, err := c.Uncached(ctx, key).Get(ctx, key, upload.GetOptions{Offset: off, Length: int64(len(p))})
	if err == nil {
		_, err = io.ReadFull(r, p)
		r.Close()
	}
	if err != nil {
		return x.fail(fmt.Errorf("read %d bytes at %d of %s/%s: %w", len(p), off, x.s, key, err))
	}
	return nil
}

// ReadIndex reads an index object of the given size; its name is checked.
func (x *source) ReadIndex(ctx context.Context, n chunked.Name, size int64) ([]byte, error) {
	b, err := x.s.getRecalled(ctx, chunked.IndexObjectKey(n), n, size, maxIndex)
	if err != nil {
		return nil, x.fail(err)
	}
	return b, nil
}

// Moved says where a chunk is that is not, or not whole, where it was: one
// step, which the caller may repeat [SPEC.md §12.4].
func (x *source) Moved(ctx context.Context, at chunked.Location) (chunked.Location, error) {
	m, err := x.moved.do(ctx, at.Pack, func() (*chunked.Moved, error) {
		m, _, err := x.s.readMoved(ctx, at.Pack)
		if err == nil && m == nil {
			m = &chunked.Moved{} // remembered: it is asked for each chunk
		}
		return m, err
	})
	if err != nil {
		return chunked.Location{}, x.fail(err)
	}
	to, ok := m.Lookup(at.Offset)
	if !ok {
		return chunked.Location{}, fmt.Errorf("what was at %d of pack %s in %s: %w", at.Offset, at.Pack, x.s, chunked.ErrNotMoved)
	}
	return to, nil
}

func (x *source) fail(err error) error {
	switch {
	case errors.Is(err, upload.ErrNotExist) && x.run:
		return fmt.Errorf("%w: %w: %w", ErrCollected, chunked.ErrMissing, err)
	case errors.Is(err, upload.ErrNotExist):
		return fmt.Errorf("%w: %w", chunked.ErrMissing, err)
	case errors.Is(err, ErrDamaged), errors.Is(err, upload.ErrTooLarge):
		return fmt.Errorf("%w: %w", chunked.ErrCorrupt, err)
	}
	return err
}
