package cache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
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
	if !checked { // else somebody may have asked for it meanwhile
		e.checked = true
	}
	c.touch(e, time.Now())
	if e.file != nil {
		f.Close()
		return nil
	}
	e.file = f
	return nil
}
