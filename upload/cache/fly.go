package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// fly begins a request for blocks. c.mu is held.
func (e *entry) fly(first, last int64, demand bool) {
	c := e.c
	if c.closed {
		e.err = errClosed
		return
	}
	for i := first; i <= last && e.size >= 0; i++ {
		e.blocks[i] = flying
	}
	e.flights++
	if demand {
		c.demand++
	}
	c.run.Go(func() {
		err := c.fetch(e, first, last)
		c.mu.Lock()
		e.flights--
		if demand {
			c.demand--
		}
		for i := first; i <= last && i < int64(len(e.blocks)); i++ {
			if e.blocks[i] == flying {
				e.blocks[i] = absent
			}
		}
		if err != nil {
			e.err = err
			if !errors.Is(err, errNoRoom) {
				c.count.storeErrors.Add(1)
			}
			if e.size < 0 || errors.Is(err, upload.ErrChanged) {
				c.drop(e)
			}
		}
		// Another flight that ends meanwhile does not take it back.
		ending := e.size >= 0 && e.missing == 0 && !e.dead && !e.whole && !e.ending
		e.ending = e.ending || ending
		if !ending && !e.dead && !e.queued && e.missing > 0 && err == nil {
			e.queued = true
			c.parts = append(c.parts, e)
		}
		e.changed()
		e.rest()
		c.work.Broadcast()
		c.mu.Unlock()
		if ending {
			c.finish(e)
		}
	})
}

// fetch brings blocks.
func (c *Cache) fetch(e *entry, first, last int64) error {
	select {
	case c.slot <- struct{}{}:
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
	defer func() { <-c.slot }()
	c.count.requests.Add(1)
	r, o, err := c.o.Store.Get(c.ctx, e.key, upload.GetOptions{Offset: first * blockSize, Length: (last - first + 1) * blockSize})
	if err != nil {
		return err
	}
	defer r.Close()
	if err := c.sized(e, o.Size, first, last); err != nil {
		return err
	}
	buf := make([]byte, blockSize)
	for i := first; i <= last; i++ {
		n := min(blockSize, e.size-i*blockSize)
		if n <= 0 {
			break
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return fmt.Errorf("get %s/%s: %w", c.o.Store, e.key, err)
		}
		c.count.fetched.Add(n)
		c.keep(e, i, buf[:n])
	}
	return nil
}

// sized notes how large the object is, and makes room and a file for it.
func (c *Cache) sized(e *entry, size, first, last int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.size >= 0 {
		if e.size != size {
			return fmt.Errorf("get %s/%s: %w: it has %d bytes, and had %d", c.o.Store, e.key, upload.ErrChanged, size, e.size)
		}
		return nil
	}
	if size < 1 || size > chunked.MaxPack {
		return fmt.Errorf("get %s/%s: %w: it has %d bytes", c.o.Store, e.key, upload.ErrTooLarge, size)
	}
	if !c.room(size) {
		return errNoRoom
	}
	c.made++
	e.filling = filepath.Join(c.o.Dir, fillDir, e.name.String()+"-"+strconv.Itoa(c.made))
	f, err := os.OpenFile(e.filling, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		c.count.diskErrors.Add(1)
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	e.file, e.size = f, size
	e.at = c.lru.PushFront(e)
	c.used += size
	e.missing = int((size + blockSize - 1) / blockSize)
	e.blocks = make([]state, e.missing)
	for i := first; i <= last && i < int64(len(e.blocks)); i++ {
		e.blocks[i] = flying
	}
	e.changed()
	return nil
}

// keep writes a block. What the disk does not take is handed on from memory,
// and the object is not kept.
func (c *Cache) keep(e *entry, i int64, p []byte) {
	_, err := e.file.WriteAt(p, i*blockSize)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// Others took what the limit allows: some of what was not used for longest goes.
		c.mu.Lock()
		c.roomWithin(max(0, c.used-4*runSize), 0)
		c.mu.Unlock()
		_, err = e.file.WriteAt(p, i*blockSize)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.count.diskErrors.Add(1)
		if e.loose == nil {
			e.loose = map[int64][]byte{}
		}
		e.loose[i] = bytes.Clone(p)
		e.blocks[i] = absent
		e.err = fmt.Errorf("%w: %w", errNoRoom, err)
		c.drop(e)
		e.changed()
		return
	}
	e.blocks[i] = present
	e.missing--
	e.changed()
}

// finish compares a file that is complete with its name, and gives it that.
func (c *Cache) finish(e *entry) {
	err := check(e.file, e.size, e.name)
	wrong := err != nil
	if !wrong {
		// A crash later on may leave a name, never one with other bytes.
		if err = e.file.Sync(); err == nil {
			path := c.path(e.key)
			if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
				err = os.Rename(e.filling, path)
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e.ending = false
	switch {
	case wrong:
		c.count.corrupt.Add(1)
		if len(c.bad) >= 10_000 {
			clear(c.bad)
		}
		c.bad[e.key] = time.Now().Add(badTime)
		c.drop(e)
	case err != nil:
		c.count.diskErrors.Add(1)
		e.err = fmt.Errorf("%w: %w", errNoRoom, err)
		c.drop(e)
	case e.dead: // the disk was too full for another's block, or the cache closes
		_ = os.Remove(c.path(e.key))
	default:
		e.whole, e.checked, e.touched = true, true, time.Now()
	}
	e.changed()
	e.rest()
	c.work.Broadcast()
}

// complete fetches the rest of packs of which something was asked for, when
// nobody waits for anything else.
func (c *Cache) complete() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.closed {
		if len(c.parts) == 0 || c.demand > 0 {
			c.work.Wait()
			continue
		}
		e := c.parts[0]
		c.parts = c.parts[1:]
		e.queued = false
		if e.dead || e.whole || e.ending || e.flights > 0 || e.missing == 0 {
			continue // whoever flies puts it here again
		}
		first := int64(0)
		for e.blocks[first] != absent {
			first++
		}
		last := first
		for last+1 < int64(len(e.blocks)) && last-first+1 < runSize/blockSize && e.blocks[last+1] == absent {
			last++
		}
		e.fly(first, last, false)
		for e.flights > 0 && !c.closed {
			c.work.Wait()
		}
	}
}
