package lazyroot

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// committer makes durable what was written, and then that it is there: data,
// flush, pages of the bitmap, flush. A page is never written before the data it
// tells of is durable, nor over the only durable version of itself.
type committer struct {
	disk        Disk
	lay         *layout
	key         []byte
	bits        *bitmap
	generations []uint64 // of the pages, as they are on the disk

	mu      sync.Mutex
	next    *commit // for who asks now; nil if nobody did since the last began
	running bool
	bad     error // of a flush: the kernel tells of it once
	plain   atomic.Bool
}

type commit struct {
	done chan struct{}
	err  error
}

// flush returns when all that was written before it was called is durable. What
// many ask for at a time is done once.
func (c *committer) flush(ctx context.Context) error {
	c.mu.Lock()
	if c.bad != nil {
		defer c.mu.Unlock()
		return c.bad
	}
	if c.next == nil {
		c.next = &commit{done: make(chan struct{})}
	}
	x := c.next
	if !c.running {
		c.running = true
		go c.run()
	}
	c.mu.Unlock()
	select {
	case <-x.done:
		return x.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *committer) run() {
	for {
		c.mu.Lock()
		x := c.next
		c.next = nil
		if x == nil {
			c.running = false
			c.mu.Unlock()
			return
		}
		err := c.bad
		c.mu.Unlock()
		if err == nil {
			err = c.commit()
		}
		x.err = c.remember(err)
		close(x.done)
	}
}

// remember notes that a flush failed, and gives the first that did.
func (c *committer) remember(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bad == nil {
		c.bad = err
	}
	return c.bad
}

// remembering is the disk for who flushes it beside the committer: whose flush
// fails, fails for all.
type remembering struct {
	Disk
	c *committer
}

func (r remembering) Sync() error {
	if err := r.Disk.Sync(); err != nil {
		return r.c.remember(fmt.Errorf("flush the disk: %w", err))
	}
	return nil
}

// dirtyPage is a page as it was when a commit began.
type dirtyPage struct {
	n     int64
	words []uint64
}

func (c *committer) commit() error {
	var pages []dirtyPage
	if c.key != nil && !c.plain.Load() {
		for n := range c.bits.dirty {
			if c.bits.dirty[n].Swap(false) {
				w := make([]uint64, pageWords)
				for k := range w {
					w[k] = atomic.LoadUint64(&c.bits.words[n*pageWords+k])
				}
				pages = append(pages, dirtyPage{int64(n), w})
			}
		}
	}
	if err := c.disk.Sync(); err != nil {
		return fmt.Errorf("flush the disk: %w", err)
	}
	if len(pages) == 0 {
		return nil
	}
	b := aligned(Block)
	for _, p := range pages {
		g := c.generations[p.n] + 1
		encodePage(b, c.key, p.n, g, p.words)
		if _, err := c.disk.WriteAt(b, c.lay.page(p.n, g%2)); err != nil {
			return fmt.Errorf("write page %d of the disk's bitmap: %w", p.n, err)
		}
	}
	if err := c.disk.Sync(); err != nil {
		return fmt.Errorf("flush the disk's bitmap: %w", err)
	}
	for _, p := range pages {
		c.generations[p.n]++
	}
	return nil
}

// compare marks the pages that say more than the disk does.
func (c *committer) compare(onDisk []uint64) {
	for n := range c.bits.dirty {
		from, to := n*pageWords, (n+1)*pageWords
		if !slices.Equal(c.bits.words[from:to], onDisk[from:to]) {
			c.bits.dirty[n].Store(true)
		}
	}
}
