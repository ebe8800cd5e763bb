package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
)

// Names in the cache's directory. What else is there is not the cache's, and a
// directory that has such things but no mark is none.
const (
	markFile = "instar-cache" // says whose directory it is, and is locked by who uses it
	fillDir  = "filling"
)

const markText = "Copies of a store's packs and index objects, kept by instar. They may be deleted while nobody uses them.\n"

// ErrInUse says that another process uses the directory.
var ErrInUse = errors.New("another process uses it")

// ErrNotCache says that a directory holds other things.
var ErrNotCache = errors.New("it is neither empty nor a cache")

// openDir makes the directory the cache's, or finds that it is, and locks it.
func openDir(dir string) (lock *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	mark := filepath.Join(dir, markFile)
	if _, err := os.Lstat(mark); errors.Is(err, fs.ErrNotExist) {
		names, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		if len(names) > 0 {
			return nil, fmt.Errorf("%w: it holds %q", ErrNotCache, names[0].Name())
		}
	}
	lock, err = os.OpenFile(mark, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrInUse
		}
		return nil, err
	}
	if st, err := lock.Stat(); err != nil {
		return nil, err
	} else if st.Size() == 0 {
		// The text is for people: a disk too full for it is no reason to stop.
		_, _ = lock.WriteString(markText)
	}
	if err := os.RemoveAll(filepath.Join(dir, fillDir)); err != nil {
		return nil, err
	}
	return lock, os.Mkdir(filepath.Join(dir, fillDir), 0o700)
}

// scan takes stock of what is kept, the least recently used first.
func (c *Cache) scan() error {
	type found struct {
		e    *entry
		used time.Time
	}
	var all []found
	for _, folder := range []string{chunked.PacksFolder, chunked.IndexFolder} {
		root := filepath.Join(c.o.Dir, folder)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			if !d.Type().IsRegular() {
				return nil
			}
			key, err := filepath.Rel(c.o.Dir, path)
			if err != nil {
				return err
			}
			n, err := parseKey(key)
			if err != nil {
				return nil // not the cache's
			}
			st, err := d.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			e := newEntry(c, key, n, st.Size())
			e.whole = true
			all = append(all, found{e, st.ModTime()})
			return nil
		})
		if err != nil {
			return err
		}
	}
	slices.SortFunc(all, func(a, b found) int { return a.used.Compare(b.used) })
	for _, f := range all {
		f.e.at = c.lru.PushFront(f.e)
		c.entries[f.e.key] = f.e
		c.used += f.e.size
	}
	return nil
}

// parseKey reads the key of an object that may be cached.
func parseKey(key string) (chunked.Name, error) {
	if strings.HasPrefix(key, chunked.IndexFolder) {
		return chunked.ParseFanned(chunked.IndexFolder, key)
	}
	return chunked.ParseFanned(chunked.PacksFolder, key)
}

// room makes place for n more bytes by dropping what was not used for longest
// and nobody reads or fetches. c.mu is held. It reports whether there is room.
func (c *Cache) room(n int64) bool { return c.roomWithin(c.o.Limit, n) }

func (c *Cache) roomWithin(limit, n int64) bool {
	for el := c.lru.Back(); el != nil && c.used+n > limit; {
		e, before := el.Value.(*entry), el.Prev()
		if e.refs == 0 && e.flights == 0 && !e.ending {
			c.drop(e)
			c.count.evicted.Add(1)
		}
		el = before
	}
	return c.used+n <= limit
}

// drop forgets an entry and removes its file; who reads it goes on. c.mu is held.
func (c *Cache) drop(e *entry) {
	if e.dead {
		return
	}
	e.dead = true
	if c.entries[e.key] == e {
		delete(c.entries, e.key)
	}
	if e.at != nil {
		c.lru.Remove(e.at)
		e.at = nil
		c.used -= e.size
	}
	if e.whole {
		_ = os.Remove(c.path(e.key)) // gone already, or found again by the next scan
	}
	e.changed()
	e.rest()
}

func (c *Cache) path(key string) string { return filepath.Join(c.o.Dir, key) }

// touch notes on the disk that an entry was used, to the minute.
func (c *Cache) touch(e *entry, now time.Time) {
	if now.Sub(e.touched) < time.Minute {
		return
	}
	e.touched = now
	_ = os.Chtimes(c.path(e.key), time.Time{}, now) // only the order of going is lost
}

// check compares a file's bytes with its name.
func check(f io.ReaderAt, size int64, n chunked.Name) error {
	h := sha256.New()
	if _, err := io.CopyBuffer(h, io.NewSectionReader(f, 0, size), make([]byte, 256<<10)); err != nil {
		return err
	}
	if got := chunked.Name(h.Sum(nil)); got != n {
		return fmt.Errorf("its SHA-256 is %s", got)
	}
	return nil
}
