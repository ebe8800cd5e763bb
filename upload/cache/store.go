package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache/cacheclient"
)

// reader is what a store is read by way of: a cache here, or a client of one.
type reader interface {
	// read gives the bytes of an object from off on, as many as p has, and the
	// object's size.
	read(ctx context.Context, key string, off int64, p []byte) (int64, error)
	// size is the object's.
	size(ctx context.Context, key string) (int64, error)
	// distrust says that it gave wrong bytes.
	distrust(ctx context.Context, key string)
	close() error
}

// Store is an [upload.Store] whose packs and index objects are read by way of a
// cache, and from the store itself whenever the cache does not give them.
type Store struct {
	upload.Store
	by reader
	// OnFallback, if set before the first use, is told why the store was asked
	// instead. It may be called concurrently.
	OnFallback func(key string, err error)
}

// WrapClient reads a store by way of a cache that serves. Close closes both.
func WrapClient(s upload.Store, c *cacheclient.Client) *Store { return &Store{Store: s, by: remote{c}} }

// Wrap reads a store by way of a cache in this process, which must be of the
// same store. Close closes both.
func Wrap(s upload.Store, c *Cache) *Store { return &Store{Store: s, by: local{c}} }

// throughMost is the longest read that goes by way of a cache, in bytes: those
// who read more go through whole packs once, to check them.
const throughMost = 32 << 20

// Get opens an object, or a range of it.
func (s *Store) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	if n, err := parseKey(key); err == nil && o.IfMatch == "" && o.Offset >= 0 {
		p, obj, err := s.through(ctx, key, n, o)
		switch {
		case err == nil:
			return io.NopCloser(bytes.NewReader(p)), obj, nil
		case ctx.Err() != nil:
			return nil, upload.Object{}, context.Cause(ctx)
		case s.OnFallback != nil && !errors.Is(err, errTooLong):
			s.OnFallback(key, err)
		}
	}
	return s.Store.Get(ctx, key, o)
}

var errTooLong = errors.New("it is longer than what goes by way of a cache")

// through reads by way of the cache. An index object, which is read whole, is
// compared with its name; what is read of a pack only its reader can judge.
func (s *Store) through(ctx context.Context, key string, n chunked.Name, o upload.GetOptions) ([]byte, upload.Object, error) {
	index := strings.HasPrefix(key, chunked.IndexFolder)
	length := o.Length
	if index && o.Offset == 0 && length == 0 {
		size, err := s.by.size(ctx, key)
		if err != nil {
			return nil, upload.Object{}, err
		}
		length = size
	}
	if length <= 0 || length > throughMost && (!index || length > maxIndex) {
		return nil, upload.Object{}, errTooLong
	}
	p := make([]byte, length)
	size, err := s.by.read(ctx, key, o.Offset, p)
	if err != nil {
		return nil, upload.Object{}, err
	}
	if size == length && chunked.Name(sha256.Sum256(p)) != n {
		s.by.distrust(ctx, key)
		return nil, upload.Object{}, fmt.Errorf("the cache's bytes: %w", upload.ErrCorrupt)
	}
	return p, upload.Object{Key: key, Size: size}, nil
}

// Uncached is the store itself, for who was given wrong bytes of an object.
func (s *Store) Uncached(ctx context.Context, key string) upload.Store {
	s.by.distrust(ctx, key)
	return s.Store
}

// Place is that of the store itself.
func (s *Store) Place() string {
	if p, ok := s.Store.(upload.Placer); ok {
		return p.Place()
	}
	return s.Store.String()
}

// ServerTime is that of the store itself.
func (s *Store) ServerTime(ctx context.Context) (time.Time, error) {
	clock, ok := s.Store.(upload.Clock)
	if !ok {
		return time.Time{}, fmt.Errorf("%s has no clock: %w", s.Store, upload.ErrUnsupported)
	}
	return clock.ServerTime(ctx)
}

// Close closes the cache, or the connection to it, and the store.
func (s *Store) Close() error { return errors.Join(s.by.close(), s.Store.Close()) }

type remote struct{ c *cacheclient.Client }

func (r remote) read(ctx context.Context, key string, off int64, p []byte) (int64, error) {
	return r.c.ReadSized(ctx, key, off, p)
}

func (r remote) size(ctx context.Context, key string) (int64, error) { return r.c.Size(ctx, key) }

func (r remote) distrust(ctx context.Context, key string) {
	_ = r.c.Distrust(ctx, key) // it is not asked for this read any more
}

func (r remote) close() error {
	r.c.Close()
	return nil
}

type local struct{ c *Cache }

func (l local) read(ctx context.Context, key string, off int64, p []byte) (int64, error) {
	o, err := l.c.Get(ctx, key, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer o.Close()
	_, err = o.ReadAt(ctx, p, off)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return o.Size(), err
}

func (l local) size(ctx context.Context, key string) (int64, error) {
	o, err := l.c.Get(ctx, key, 0, 1)
	if err != nil {
		return 0, err
	}
	defer o.Close()
	return o.Size(), nil
}

func (l local) distrust(ctx context.Context, key string) { l.c.Recheck(ctx, key) }
func (l local) close() error                             { return l.c.Close() }
