package lazyroot

import (
	"context"
	"slices"
	"sync"
)

// ranges excludes operations on the same blocks from each other, in the order
// in which they came.
type ranges struct {
	mu   sync.Mutex
	held []*held // in order of arrival, also those that wait
}

type held struct {
	from, to int64 // blocks
	done     chan struct{}
}

// lock waits for all that came before for any of the blocks. unlock must be called once.
func (r *ranges) lock(ctx context.Context, from, to int64) (unlock func(), err error) {
	h := &held{from, to, make(chan struct{})}
	var before []*held
	r.mu.Lock()
	for _, o := range r.held {
		if o.from < to && from < o.to {
			before = append(before, o)
		}
	}
	r.held = append(r.held, h)
	r.mu.Unlock()
	unlock = func() {
		r.mu.Lock()
		i := slices.Index(r.held, h)
		r.held = slices.Delete(r.held, i, i+1)
		r.mu.Unlock()
		close(h.done)
	}
	for _, o := range before {
		select {
		case <-o.done:
		case <-ctx.Done():
			unlock()
			return nil, context.Cause(ctx)
		}
	}
	return unlock, nil
}
