package cache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// Options of [Open]. Dir and Store are required.
type Options struct {
	Dir   string
	Limit int64 // bytes of objects in Dir; 0: DefaultLimit
	Store upload.Store
	// Parallel is how many requests to the store are under way at once; 0: 16.
	Parallel int
}

// DefaultLimit is how many bytes a cache keeps that is not told.
const DefaultLimit = 20 << 30

// Sizes, in bytes.
const (
	blockSize = 1 << 20 // of packs, the unit in which they are fetched
	runSize   = 4 << 20 // of one request to the store, at most
)

// badTime is how long an object that the store has wrong is not fetched again.
const badTime = time.Minute

// ErrBad says that the store's object has not the bytes its name says.
var ErrBad = errors.New("the store's object has not the bytes that its name says")

// Stats is what a cache did, and what it holds.
type Stats struct {
	Objects, Used, Limit int64 // kept now, complete or not; bytes
	Hits, Misses         int64 // reads of what was there, and of what was not
	Requests, Fetched    int64 // to the store, and bytes that came
	Bypassed             int64 // reads passed on, for there was no room
	Evicted, Corrupt     int64 // objects dropped for room, and for their bytes
	StoreErrors          int64 // requests that failed
	DiskErrors           int64 // writes that failed
}

// Cache is a directory of objects.
type Cache struct {
	o    Options
	lock *os.File
	ctx  context.Context //nolint:containedctx // of fetches, which outlive who asked first
	stop context.CancelFunc
	run  sync.WaitGroup
	slot chan struct{} // requests to the store

	count struct {
		hits, misses, requests, fetched, bypassed, evicted, corrupt, storeErrors, diskErrors atomic.Int64
	}

	mu      sync.Mutex
	work    *sync.Cond // something ended, or there is something to complete
	entries map[string]*entry
	lru     *list.List // of *entry, the last used in front
	used    int64
	made    int                  // files for what is being fetched
	bad     map[string]time.Time // until when objects are not fetched again
	demand  int                  // fetches somebody waits for
	parts   []*entry             // to be completed
	closed  bool
}

// Open opens the cache in a directory, which is made if need be: [ErrNotCache]
// if it holds something else, [ErrInUse] if another process has it open.
func Open(o Options) (*Cache, error) {
	if o.Limit == 0 {
		o.Limit = DefaultLimit
	}
	if o.Parallel <= 0 {
		o.Parallel = 16
	}
	if o.Dir == "" || o.Store == nil || o.Limit < 0 {
		return nil, errors.New("open a cache: it needs a directory, a store and a limit")
	}
	lock, err := openDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open the cache %s: %w", o.Dir, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &Cache{
		o: o, lock: lock, ctx: ctx, stop: stop, slot: make(chan struct{}, o.Parallel),
		entries: map[string]*entry{}, lru: list.New(), bad: map[string]time.Time{},
	}
	c.work = sync.NewCond(&c.mu)
	if err := c.scan(); err != nil {
		stop()
		lock.Close()
		return nil, fmt.Errorf("open the cache %s: %w", o.Dir, err)
	}
	c.mu.Lock()
	c.room(0) // the limit may be lower than before
	c.mu.Unlock()
	c.run.Go(c.complete)
	return c, nil
}

// Close ends what is under way and unlocks the directory. What is not complete
// is dropped.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	c.work.Broadcast()
	c.mu.Unlock()
	c.stop()
	c.run.Wait()
	c.mu.Lock()
	for _, e := range c.entries {
		if !e.whole {
			c.drop(e)
		}
	}
	c.mu.Unlock()
	return c.lock.Close()
}

// Stats tells what the cache did so far.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	n, used := len(c.entries), c.used
	c.mu.Unlock()
	k := &c.count
	return Stats{
		Objects: int64(n), Used: used, Limit: c.o.Limit, Hits: k.hits.Load(), Misses: k.misses.Load(),
		Requests: k.requests.Load(), Fetched: k.fetched.Load(), Bypassed: k.bypassed.Load(), Evicted: k.evicted.Load(),
		Corrupt: k.corrupt.Load(), StoreErrors: k.storeErrors.Load(), DiskErrors: k.diskErrors.Load(),
	}
}

// Object is an object being read. Close must be called.
type Object struct {
	c    *Cache
	e    *entry // nil: it is passed on, or data is all of it
	data []byte
	key  string
	size int64
	hit  bool
}

// Get opens an object for reading length bytes from off (0: to its end); more
// may be read all the same. Its error is the store's: upload.ErrNotExist if
// there is no such object, and [ErrBad]; or upload.ErrKey of a key that is not
// of a pack or index object.
func (c *Cache) Get(ctx context.Context, key string, off, length int64) (*Object, error) {
	n, err := parseKey(key)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", upload.ErrKey, err)
	}
	for {
		o, err := c.get(ctx, key, n, off, length)
		if !errors.Is(err, errAgain) {
			return o, err
		}
	}
}

var (
	errAgain  = errors.New("the entry is gone, another may be made")
	errNoRoom = errors.New("no room")
	errClosed = errors.New("the cache is closed")
)

func (c *Cache) get(ctx context.Context, key string, n chunked.Name, off, length int64) (*Object, error) {
	e, err := c.hold(key, n)
	if err != nil {
		return nil, err
	}
	o := &Object{c: c, e: e, key: key}
	o.hit, err = e.open(ctx, off, length)
	if err != nil {
		o.Close()
		if errors.Is(err, errNoRoom) {
			return c.bypass(ctx, key)
		}
		return nil, err
	}
	o.size = e.size
	if o.hit {
		c.count.hits.Add(1)
	} else {
		c.count.misses.Add(1)
	}
	if e.index {
		// Who reads an index object is given what was compared with its name.
		if err := e.wait(ctx, func() bool { return e.whole }); err != nil {
			o.Close()
			if errors.Is(err, errNoRoom) {
				return c.bypass(ctx, key)
			}
			return nil, err
		}
	}
	return o, nil
}

// hold finds or makes the entry of a key, and keeps it from going.
func (c *Cache) hold(key string, n chunked.Name) (*entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	if until, ok := c.bad[key]; ok {
		if time.Now().Before(until) {
			return nil, fmt.Errorf("%s: %w", key, ErrBad)
		}
		delete(c.bad, key)
	}
	e := c.entries[key]
	if e == nil {
		e = newEntry(c, key, n, -1)
		c.entries[key] = e
	}
	e.refs++
	if e.at != nil {
		c.lru.MoveToFront(e.at)
	}
	return e, nil
}

// maxIndex is the most bytes of an index object, as readers take them.
const maxIndex = 65 << 20

// bypass reads from the store what there is no room for.
func (c *Cache) bypass(ctx context.Context, key string) (*Object, error) {
	c.count.bypassed.Add(1)
	if strings.HasPrefix(key, chunked.IndexFolder) {
		b, _, err := upload.GetBytes(ctx, c.o.Store, key, maxIndex)
		if err != nil {
			return nil, err
		}
		n, err := parseKey(key)
		if err != nil || chunked.NameOf(b) != n {
			return nil, fmt.Errorf("%s: %w", key, ErrBad)
		}
		return &Object{c: c, key: key, size: int64(len(b)), data: b}, nil
	}
	o, err := c.o.Store.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	return &Object{c: c, key: key, size: o.Size}, nil
}

// Size is the object's length in bytes.
func (o *Object) Size() int64 { return o.size }

// Hit tells whether all that Get was asked for was there.
func (o *Object) Hit() bool { return o.hit }

// ReadAt reads len(p) bytes from off, as soon as they have come. At the
// object's end it returns io.EOF.
func (o *Object) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	short := false
	if rest := max(0, o.size-off); int64(len(p)) > rest {
		p, short = p[:rest], true
	}
	if len(p) > 0 {
		if err := o.read(ctx, p, off); err != nil {
			return 0, fmt.Errorf("read %d bytes at %d of %s: %w", len(p), off, o.key, err)
		}
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

func (o *Object) read(ctx context.Context, p []byte, off int64) error {
	switch {
	case o.e != nil:
		return o.e.read(ctx, p, off)
	case o.data != nil:
		copy(p, o.data[off:])
		return nil
	}
	r, _, err := o.c.o.Store.Get(ctx, o.key, upload.GetOptions{Offset: off, Length: int64(len(p))})
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.ReadFull(r, p)
	return err
}

// Close ends the reading.
func (o *Object) Close() {
	if o.e != nil {
		o.e.release()
		o.e = nil
	}
}

// Recheck compares what is kept of an object with its name and drops it if it
// is wrong, or not complete and read by nobody: for a reader that was given other
// bytes than it expected.
func (c *Cache) Recheck(ctx context.Context, key string) {
	c.mu.Lock()
	e := c.entries[key]
	for e != nil && e.ending { // it has its name soon, and what it has then is looked at
		news := e.news
		c.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
			return
		}
		c.mu.Lock()
		e = c.entries[key]
	}
	switch {
	case e == nil:
		c.mu.Unlock()
		return
	case !e.whole:
		if e.refs == 0 && e.flights == 0 && !e.ending {
			c.drop(e)
		}
		c.mu.Unlock()
		return
	}
	e.checked = false
	e.refs++
	c.mu.Unlock()
	_, _ = e.open(ctx, 0, 0) // which drops it
	e.release()
}
