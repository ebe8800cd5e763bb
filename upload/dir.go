package upload

import (
	"context"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// tempPrefix begins the names of files being written.
const tempPrefix = ".instar-tmp-"

// dirStore is a Store in a directory. A key is a relative path under it, an
// object a regular file; keys cannot leave it, not even by symbolic links.
//
// Durability: temporary file in the same directory, write, fsync, rename (or
// link, for IfNoneMatch), fsync of the directory and of those made for it.
// A writer holds a flock on its temporary file, so that the next writer in that
// directory can tell the leavings of a dead one and remove them.
type dirStore struct {
	name string
	root *os.Root
	lock *os.File // the directory itself; flock serialises changes between processes

	mu    sync.Mutex      // serialises changes within the process; covers swept
	swept map[string]bool // directories whose dead temporary files are gone
}

// OpenDir opens a directory as a store; it must exist unless create is set.
func OpenDir(name string, create bool) (Store, error) {
	if create {
		if err := os.MkdirAll(name, 0o755); err != nil {
			return nil, newError("open", name, "", dirKind(err), err)
		}
	}
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, newError("open", name, "", dirKind(err), err)
	}
	lock, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, newError("open", name, "", dirKind(err), err)
	}
	return &dirStore{name: name, root: root, lock: lock, swept: map[string]bool{}}, nil
}

func (d *dirStore) String() string { return d.name }

func (d *dirStore) Close() error {
	d.lock.Close()
	return d.root.Close()
}

// begin refuses cancelled contexts and bad keys.
func (d *dirStore) begin(ctx context.Context, op, key string) error {
	if ctx.Err() != nil {
		return d.err(op, key, context.Cause(ctx))
	}
	return keyErr(op, d.name, key)
}

func (d *dirStore) err(op, key string, err error) error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return newError(op, d.name, key, dirKind(err), err)
}

func dirKind(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ErrNotExist
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return ErrAccess
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return ErrNoSpace
	case errors.Is(err, unix.EISDIR), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
		return ErrKey
	}
	return nil
}

// changing runs f alone among all writers of the directory.
func (d *dirStore) changing(f func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// NFS may refuse to lock a directory; then only this process's writers
	// exclude each other.
	if unix.Flock(int(d.lock.Fd()), unix.LOCK_EX) == nil {
		defer unix.Flock(int(d.lock.Fd()), unix.LOCK_UN)
	}
	return f()
}

func (d *dirStore) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o PutOptions) (Object, error) {
	return d.put(ctx, "put", key, io.NewSectionReader(body, 0, size), size, o)
}

func (d *dirStore) PutStream(ctx context.Context, key string, r io.Reader, o PutOptions) (Object, error) {
	return d.put(ctx, "put", key, r, -1, o)
}

func (d *dirStore) put(ctx context.Context, op, key string, r io.Reader, size int64, o PutOptions) (_ Object, err error) {
	if err := d.begin(ctx, op, key); err != nil {
		return Object{}, err
	}
	if len(o.Tags) > 0 {
		return Object{}, newError(op, d.name, key, ErrUnsupported, errors.New("a file in a directory has no tags"))
	}
	sent := int64(0)
	defer func() {
		if err != nil && o.Progress != nil {
			o.Progress(-sent)
		}
	}()
	dir := path.Dir(key)
	temp, f, err := d.tempIn(dir)
	if err != nil {
		return Object{}, d.err(op, key, err)
	}
	defer f.Close()
	renamed := false
	defer func() {
		if !renamed {
			d.root.Remove(temp)
		}
	}()

	w := []io.Writer{f}
	var sum, sha hash.Hash
	if o.SHA256 != nil && !o.Fresh {
		sha = sha256.New()
		w = append(w, sha)
	}
	if o.MD5 != nil || o.SHA256 == nil { // who has a better digest need not pay for this one
		sum = md5.New()
		w = append(w, sum)
	}
	n, err := io.Copy(io.MultiWriter(w...), &countingReader{ctx: ctx, r: r, add: func(n int64) {
		sent += n
		if o.Progress != nil {
			o.Progress(n)
		}
	}})
	if err == nil && size >= 0 && n != size {
		err = fmt.Errorf("body has %d bytes, %d were announced: %w", n, size, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return Object{}, d.err(op, key, err)
	}
	var got []byte
	if sum != nil {
		got = sum.Sum(nil)
	}
	if o.MD5 != nil && string(o.MD5) != string(got) {
		return Object{}, newError(op, d.name, key, ErrCorrupt, fmt.Errorf("body has MD5 %x, %x was announced", got, o.MD5))
	}
	if sha != nil && string(sha.Sum(nil)) != string(o.SHA256) {
		return Object{}, newError(op, d.name, key, ErrCorrupt, fmt.Errorf("body has SHA-256 %x, %x was announced", sha.Sum(nil), o.SHA256))
	}
	if err := f.Chmod(0o644); err != nil {
		return Object{}, d.err(op, key, err)
	}
	// What takes long is done before the lock of all writers is taken, and after
	// it: those that wait then let the filesystem commit many files at a time.
	dated := time.Now()
	if err := setTime(f, dated); err != nil {
		return Object{}, d.err(op, key, err)
	}
	if err := f.Sync(); err != nil {
		return Object{}, d.err(op, key, err)
	}
	var obj Object
	var parent *os.File // open before a deleter may remove it as empty
	err = d.changing(func() error {
		old, err := d.root.Lstat(key)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		exists := err == nil
		if exists && !old.Mode().IsRegular() {
			return newError(op, d.name, key, ErrKey, errors.New("something other than a file has that name"))
		}
		if o.IfNoneMatch && exists {
			return newError(op, d.name, key, ErrExist, nil)
		}
		if o.IfMatch != "" && (!exists || dirETag(old) != o.IfMatch) {
			return newError(op, d.name, key, ErrExist, nil)
		}
		// An explicit time, later than the old one's, makes ETags differ
		// where the filesystem's own clock ticks too slowly.
		if exists && !dated.After(old.ModTime()) {
			if err := setTime(f, old.ModTime().Add(time.Microsecond)); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
		}
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if o.IfNoneMatch {
			if err := d.linkNew(temp, key); err != nil {
				return err
			}
		} else if err := d.root.Rename(temp, key); err != nil {
			return err
		}
		renamed = true
		if parent, err = d.root.Open(dir); err != nil {
			return err
		}
		obj = Object{Key: key, Size: n, ETag: dirETag(fi), MD5: got, SHA256: o.SHA256, Modified: fi.ModTime()}
		return nil
	})
	switch {
	case err == nil:
		err = errors.Join(syncOpen(parent, dir), parent.Close())
	case errors.Is(err, ErrExist):
		// Another's name is there; whoever is told so may build upon it.
		if serr := d.syncDir(dir); !errors.Is(serr, fs.ErrNotExist) {
			err = errors.Join(err, serr)
		}
	}
	if err != nil {
		return Object{}, d.err(op, key, err)
	}
	return obj, nil
}

func setTime(f *os.File, t time.Time) error {
	ts := unix.NsecToTimeval(t.UnixNano())
	if err := unix.Futimes(int(f.Fd()), []unix.Timeval{ts, ts}); err != nil {
		return fmt.Errorf("setting the time: %w", err)
	}
	return nil
}

// linkNew gives temp its final name if nothing has it, even against writers
// that do not take the lock.
func (d *dirStore) linkNew(temp, key string) error {
	err := d.root.Link(temp, key)
	switch {
	case errors.Is(err, fs.ErrExist):
		return newError("put", d.name, key, ErrExist, nil)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EMLINK):
		return d.root.Rename(temp, key) // no hard links here; the lock has to do
	case err != nil:
		return err
	}
	return d.root.Remove(temp)
}

// mkdirs makes a directory and its parents durable.
func (d *dirStore) mkdirs(dir string) error {
	if dir == "." {
		return nil
	}
	if fi, err := d.root.Stat(dir); err == nil && fi.IsDir() {
		return nil
	}
	if err := d.mkdirs(path.Dir(dir)); err != nil {
		return err
	}
	if err := d.root.Mkdir(dir, 0o755); err != nil {
		if errors.Is(err, fs.ErrExist) {
			if fi, serr := d.root.Stat(dir); serr == nil && fi.IsDir() {
				return nil // another writer was faster
			}
			return fmt.Errorf("%s: %w", dir, unix.ENOTDIR)
		}
		return err
	}
	return d.syncDir(path.Dir(dir))
}

func (d *dirStore) syncDir(dir string) error {
	f, err := d.root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return syncOpen(f, dir)
}

func syncOpen(f *os.File, dir string) error {
	// Some filesystems cannot sync a directory and say EINVAL.
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("fsync of directory %s: %w", dir, err)
	}
	return nil
}

// tempIn makes dir and a temporary file in it. A deleter may remove dir as
// empty in between, hence the loop.
func (d *dirStore) tempIn(dir string) (name string, f *os.File, err error) {
	for range 100 {
		if err = d.mkdirs(dir); err == nil {
			name, f, err = d.temp(dir)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return name, f, err
}

// temp creates a locked temporary file in dir and removes those of dead writers.
func (d *dirStore) temp(dir string) (string, *os.File, error) {
	d.sweep(dir)
	for range 100 {
		var b [10]byte
		rand.Read(b[:])
		name := path.Join(dir, tempPrefix+base32.StdEncoding.EncodeToString(b[:]))
		f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", nil, err
		}
		unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		return name, f, nil
	}
	return "", nil, errors.New("no free name for a temporary file")
}

// sweep removes temporary files in dir that no writer holds, once per directory.
// One just created and not yet locked is spared by its age.
func (d *dirStore) sweep(dir string) {
	d.mu.Lock()
	done := d.swept[dir]
	d.swept[dir] = true
	d.mu.Unlock()
	if done {
		return
	}
	h, err := d.root.Open(dir)
	if err != nil {
		return
	}
	defer h.Close()
	for {
		names, err := h.Readdirnames(1024)
		for _, n := range names {
			if len(n) < len(tempPrefix) || n[:len(tempPrefix)] != tempPrefix {
				continue
			}
			full := path.Join(dir, n)
			f, err := d.root.OpenFile(full, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
			if err != nil {
				continue
			}
			fi, err := f.Stat()
			if err == nil && time.Since(fi.ModTime()) > 10*time.Second && unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				d.root.Remove(full)
			}
			f.Close()
		}
		if err != nil {
			return
		}
	}
}

// countingReader stops at a cancelled context and reports what passes.
type countingReader struct {
	ctx context.Context
	r   io.Reader
	add func(int64)
}

func (c *countingReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	if n > 0 {
		c.add(int64(n))
	}
	return n, err
}
