package nbd

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

// maxWaiting is how many requests of a client may wait for their turn: each has
// some 100 bytes, if it is not a write.
const maxWaiting = 16 << 10

// waiting is a request that is not under way yet.
type waiting struct {
	r  request
	do func()
}

// queue begins requests that may take long in the order in which they came, so
// many at a time. Those that wait hold no memory but what is to be written.
type queue struct {
	requests int
	limit    int64 // bytes of reads under way, and again of writes
	places   chan struct{}
	writes   *semaphore.Weighted

	all   sync.WaitGroup
	mu    sync.Mutex
	list  []waiting
	busy  int
	bytes int64 // of reads that are under way
}

func newQueue(requests int, limit int64) *queue {
	return &queue{requests: requests, limit: limit, places: make(chan struct{}, maxWaiting), writes: semaphore.NewWeighted(limit)}
}

// admit waits for a place, and for the memory that a write needs at once.
func (q *queue) admit(ctx context.Context, r request) error {
	if r.command == cmdWrite {
		if err := q.writes.Acquire(ctx, min(r.weight(), q.limit)); err != nil {
			return err
		}
	}
	select {
	case q.places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// add puts a request that was admitted behind the others.
func (q *queue) add(w waiting) {
	q.all.Add(1)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, w)
	q.begin()
}

// begin begins what there is room for. q.mu is held.
func (q *queue) begin() {
	for len(q.list) > 0 && q.busy < q.requests {
		w := q.list[0]
		n := int64(0)
		if w.r.command != cmdWrite {
			n = min(w.r.weight(), q.limit)
		}
		if q.bytes > 0 && q.bytes+n > q.limit {
			return
		}
		q.list[0] = waiting{}
		q.list = q.list[1:]
		q.busy++
		q.bytes += n
		go func() {
			defer q.all.Done()
			w.do()
			q.end(w, n)
		}()
	}
}

func (q *queue) end(w waiting, n int64) {
	if w.r.command == cmdWrite {
		q.writes.Release(min(w.r.weight(), q.limit))
	}
	<-q.places
	q.mu.Lock()
	defer q.mu.Unlock()
	q.busy--
	q.bytes -= n
	q.begin()
}

// wait returns when all that were added have ended; none is added meanwhile.
func (q *queue) wait() { q.all.Wait() }
