package boot

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/upload/cache/cacheclient"
)

// sources are where the image comes from: a cache beside this machine, if the
// ticket names one, then the store.
func (c *lazyConfig) sources(store *packSource, say func(string, ...any)) []lazyroot.NamedSource {
	list := []lazyroot.NamedSource{{Name: "store", Source: store}}
	if c.Ticket.Cache == "" {
		return list
	}
	cache, err := cacheclient.New(c.Ticket.Cache)
	if err != nil {
		say("root: warning: the ticket's cache is not used: %v", err)
		return list
	}
	return append([]lazyroot.NamedSource{{Name: "cache", Source: newCacheSource(cache, say), Hint: true}}, list...)
}

// Of an object that the cache was told of, and still has wrong so often, it is not
// asked for so long.
const (
	distrustTime  = time.Minute
	distrustAfter = 8
)

// errDistrusted: the cache is not asked, the store is.
var errDistrusted = errors.New("the cache has it wrong, and again after it was told")

// cacheSource reads an image's objects from a cache. One that gives wrong bytes is
// told: it then compares what it keeps with the object's name, and has it anew
// for everybody.
type cacheSource struct {
	c   *cacheclient.Client
	say func(format string, args ...any)

	mu   sync.Mutex
	told map[chunked.Name]*distrust
}

// distrust is what the cache was told of an object.
type distrust struct {
	at   time.Time
	done chan struct{} // closed when it has answered
	// wrong is how often its bytes were not right since. Some of that was read before.
	wrong int
}

func newCacheSource(c *cacheclient.Client, say func(string, ...any)) *cacheSource {
	return &cacheSource{c: c, say: say, told: make(map[chunked.Name]*distrust)}
}

// ReadPack reads a range of a pack.
func (s *cacheSource) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	if err := s.trusted(n); err != nil {
		return err
	}
	return s.c.ReadRange(ctx, chunked.PackKey(n), off, p)
}

// RereadPack is asked when the bytes that ReadPack gave were not the pack's.
func (s *cacheSource) RereadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	return s.again(ctx, "pack", n, chunked.PackKey(n), off, p)
}

// ReadIndex reads an index object.
func (s *cacheSource) ReadIndex(ctx context.Context, n chunked.Name, size int64) ([]byte, error) {
	if err := s.trusted(n); err != nil {
		return nil, err
	}
	key := chunked.IndexObjectKey(n)
	p, err := s.c.Get(ctx, key, size)
	if err != nil || chunked.NameOf(p) == n {
		return p, err
	}
	return p, s.again(ctx, "index", n, key, 0, p)
}

// trusted tells whether the cache is asked for an object.
func (s *cacheSource) trusted(n chunked.Name) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.told[n]; d != nil && d.wrong >= distrustAfter && time.Since(d.at) < distrustTime {
		return fmt.Errorf("%s: %w", n, errDistrusted)
	}
	return nil
}

// maxTold is how many objects are remembered of which the cache was told.
const maxTold = 4096

// again reads bytes of an object that were wrong. The first who found out tells
// the cache; those who read at the same time wait for what comes of it.
func (s *cacheSource) again(ctx context.Context, what string, n chunked.Name, key string, off int64, p []byte) error {
	s.mu.Lock()
	d := s.told[n]
	if d == nil || time.Since(d.at) >= distrustTime {
		if len(s.told) >= maxTold {
			clear(s.told)
		}
		d = &distrust{at: time.Now(), done: make(chan struct{})}
		s.told[n] = d
		s.mu.Unlock()
		defer close(d.done)
		s.say("root: warning: the cache gives wrong bytes of %s %s: it is told", what, n.String()[:8])
		return s.c.ReadAgain(ctx, key, off, p)
	}
	d.wrong++
	s.mu.Unlock()
	select {
	case <-d.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := s.trusted(n); err != nil {
		return err
	}
	return s.c.ReadRange(ctx, key, off, p)
}
