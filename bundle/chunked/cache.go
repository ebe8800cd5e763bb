package chunked

import (
	clist "container/list"
	"context"
	"sync"
)

// cache keeps what was loaded, up to a limit of cost, and loads each value
// once however many ask for it at a time.
type cache[K comparable, V any] struct {
	limit int64

	mu      sync.Mutex
	used    int64
	entries map[K]*cacheEntry[K, V]
	order   *clist.List // of *cacheEntry, the last used in front
}

type cacheEntry[K comparable, V any] struct {
	key   K
	value V
	err   error
	cost  int64
	done  chan struct{}  // closed when value or err is there
	at    *clist.Element // nil while it is loaded
}

func newCache[K comparable, V any](limit int64) *cache[K, V] {
	return &cache[K, V]{limit: limit, entries: map[K]*cacheEntry[K, V]{}, order: clist.New()}
}

// get gives the value of k, loading it if need be; load says what it costs to
// keep. Errors are not kept.
func (c *cache[K, V]) get(ctx context.Context, k K, load func() (V, int64, error)) (V, error) {
	for {
		c.mu.Lock()
		e := c.entries[k]
		if e == nil {
			e = &cacheEntry[K, V]{key: k, done: make(chan struct{})}
			c.entries[k] = e
			c.mu.Unlock()
			return c.load(e, load)
		}
		if e.at != nil {
			c.order.MoveToFront(e.at)
			c.mu.Unlock()
			return e.value, nil
		}
		c.mu.Unlock()
		select {
		case <-e.done:
			// Who loaded it may have been cancelled, which is no reason for others.
			if e.err == nil {
				return e.value, nil
			}
			if ctx.Err() == nil && isCancelled(e.err) {
				continue
			}
			return e.value, e.err
		case <-ctx.Done():
			var none V
			return none, context.Cause(ctx)
		}
	}
}

func (c *cache[K, V]) load(e *cacheEntry[K, V], load func() (V, int64, error)) (V, error) {
	e.value, e.cost, e.err = load()
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(e.done)
	if e.err != nil {
		delete(c.entries, e.key)
		return e.value, e.err
	}
	e.at = c.order.PushFront(e)
	c.used += e.cost
	for c.used > c.limit {
		old := c.order.Remove(c.order.Back()).(*cacheEntry[K, V])
		delete(c.entries, old.key)
		c.used -= old.cost
	}
	return e.value, nil
}
