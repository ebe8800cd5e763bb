package cache

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// entry is an object that is kept, or that is being fetched. c.mu guards all
// but checking.
type entry struct {
	c     *Cache
	key   string
	name  chunked.Name
	index bool

	refs    int           // who reads it
	flights int           // requests that are under way
	size    int64         // -1: not known yet
	at      *list.Element // nil: it takes no room
	file    *os.File      // nil: not open
	filling string        // the file's name while it is not whole
	whole   bool          // complete, compared, under its own name
	checked bool          // whole: compared since the cache was opened
	touched time.Time
	dead    bool // dropped: who holds it reads on, others make another
	ending  bool // all has come, and is being compared
	queued  bool // to be completed

	blocks  []state
	missing int              // blocks that are not present
	loose   map[int64][]byte // blocks that the disk did not take
	err     error            // of the last flight that failed
	news    chan struct{}    // closed, and made anew, when any of this changes

	checking sync.Mutex // one at a time compares the file with its name
}

// state is that of a block.
type state uint8

const (
	absent state = iota
	flying
	present
)

func newEntry(c *Cache, key string, n chunked.Name, size int64) *entry {
	return &entry{c: c, key: key, name: n, index: strings.HasPrefix(key, chunked.IndexFolder), size: size, news: make(chan struct{})}
}

// changed wakes who waits. c.mu is held.
func (e *entry) changed() {
	close(e.news)
	e.news = make(chan struct{})
}

// rest closes the file of an entry that nobody uses; one that is not whole stays
// open as long as it is kept. c.mu is held.
func (e *entry) rest() {
	if e.file == nil || e.refs > 0 || e.flights > 0 || e.ending || !e.whole && !e.dead {
		return
	}
	e.file.Close()
	e.file = nil
	if !e.whole {
		_ = os.Remove(e.filling) // else the next Open does
	}
}

// release ends one reader's hold.
func (e *entry) release() {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.refs--
	if e.size < 0 && e.refs == 0 && e.flights == 0 {
		e.c.drop(e)
	}
	e.rest()
}

// wait returns when ready does; it is called with c.mu held. The error is that
// of a flight, or of an entry that is gone without ever being ready.
func (e *entry) wait(ctx context.Context, ready func() bool) error {
	c := e.c
	for {
		c.mu.Lock()
		_, bad := c.bad[e.key]
		ok, dead, busy, err, news := ready(), e.dead, e.flights > 0 || e.ending, e.err, e.news
		c.mu.Unlock()
		switch {
		case ok:
			return nil
		case bad:
			return fmt.Errorf("%s: %w", e.key, ErrBad)
		case !busy && err != nil:
			return err
		case dead && !busy:
			return errAgain
		}
		select {
		case <-news:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// open makes the entry readable: its size is known, and what is asked for is
// there or on its way. It reports which.
func (e *entry) open(ctx context.Context, off, length int64) (hit bool, err error) {
	c := e.c
	c.mu.Lock()
	if e.dead {
		c.mu.Unlock()
		return false, errAgain
	}
	if e.whole {
		c.mu.Unlock()
		return true, e.openWhole()
	}
	known := e.size >= 0
	if !known {
		if e.flights == 0 {
			first := max(0, off) / blockSize
			last := first
			if length > 0 && off >= 0 {
				last = max(first, min((off+length-1)/blockSize, first+runSize/blockSize-1))
			}
			e.err = nil
			e.fly(first, last, true)
		}
		c.mu.Unlock()
		if err := e.wait(ctx, func() bool { return e.size >= 0 }); err != nil {
			return false, err
		}
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if e.whole {
		return false, nil
	}
	if e.index {
		off, length = 0, e.size
	}
	return e.want(off, length) && known, nil
}

// aheadSize is how much of an object that is read from end to end is asked for
// at once, in bytes.
const aheadSize = 16 << 20

// want has blocks fetched that are absent, and reports whether all are present.
// c.mu is held.
func (e *entry) want(off, length int64) bool {
	off = max(0, off)
	if length <= 0 || length > e.size-off {
		length = e.size - off
	}
	if length <= 0 {
		return true
	}
	all := true
	first, last := off/blockSize, (off+length-1)/blockSize
	for i := first; i <= last; i++ {
		if e.blocks[i] != present {
			all = false
		}
		if e.blocks[i] != absent || e.loose[i] != nil || i-first >= aheadSize/blockSize {
			continue
		}
		end := i
		for end < last && end-i+1 < runSize/blockSize && e.blocks[end+1] == absent && e.loose[end+1] == nil {
			end++
		}
		e.fly(i, end, true)
	}
	return all
}

// read reads len(p) bytes from off, all within the object.
func (e *entry) read(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		i := off / blockSize
		n := min(int64(len(p)), (i+1)*blockSize-off)
		if err := e.readBlock(ctx, i, p[:n], off, int64(len(p))); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (e *entry) readBlock(ctx context.Context, i int64, p []byte, off, ahead int64) error {
	c := e.c
	for asked := false; ; asked = true {
		c.mu.Lock()
		switch {
		case e.whole || e.blocks[i] == present:
			f := e.file
			c.mu.Unlock()
			_, err := f.ReadAt(p, off)
			return err
		case e.loose[i] != nil:
			copy(p, e.loose[i][off-i*blockSize:])
			c.mu.Unlock()
			return nil
		case e.blocks[i] == absent && asked:
			err := e.err
			c.mu.Unlock()
			if err == nil {
				err = errors.New("it did not come")
			}
			return err
		case e.blocks[i] == absent:
			e.err = nil
			e.want(off, ahead)
		}
		for e.blocks[i] == flying {
			news := e.news
			c.mu.Unlock()
			select {
			case <-news:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			c.mu.Lock()
		}
		c.mu.Unlock()
	}
}

// openWhole opens a complete file, and compares it if that was not done since
// the cache was opened.
func (e *entry) openWhole() error {
	c := e.c
	e.checking.Lock()
	defer e.checking.Unlock()
	c.mu.Lock()
	have, checked, dead := e.file != nil, e.checked, e.dead
	c.mu.Unlock()
	if dead {
		return errAgain
	}
	if have && checked {
		return nil
	}
	f, err := os.OpenFile(c.path(e.key), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err == nil {
		var st os.FileInfo
		if st, err = f.Stat(); err == nil && (st.Size() != e.size || !st.Mode().IsRegular()) {
			err = errors.New("it has another size")
		}
		if err == nil && !checked {
			err = check(f, e.size, e.name)
		}
		if err != nil {
			f.Close()
			c.count.corrupt.Add(1)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.drop(e)
		return errAgain
	}
	e.checked = true
	c.touch(e, time.Now())
	if e.file != nil {
		f.Close()
		return nil
	}
	e.file = f
	return nil
}

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
