package upload

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dirETag identifies one writing of a file. Every Put makes a new inode with
// its own time, so two of them share one only by a forged clock.
func dirETag(fi fs.FileInfo) string {
	var ino uint64
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		ino = st.Ino
	}
	return fmt.Sprintf("%x-%x-%x", ino, fi.Size(), fi.ModTime().UnixNano())
}

func dirObject(key string, fi fs.FileInfo) Object {
	return Object{Key: key, Size: fi.Size(), ETag: dirETag(fi), Modified: fi.ModTime()}
}

// open opens an object's file and refuses what is not one (without blocking on
// a FIFO).
func (d *dirStore) open(op, key string) (*os.File, Object, error) {
	f, err := d.root.OpenFile(key, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		// a path through a file means: no such object
		if errors.Is(err, unix.ENOTDIR) {
			err = fmt.Errorf("%s: %w", key, fs.ErrNotExist)
		}
		return nil, Object{}, d.err(op, key, err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file: %w", key, fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, Object{}, d.err(op, key, err)
	}
	return f, dirObject(key, fi), nil
}

func (d *dirStore) Get(ctx context.Context, key string, o GetOptions) (io.ReadCloser, Object, error) {
	if err := d.begin(ctx, "get", key); err != nil {
		return nil, Object{}, err
	}
	f, obj, err := d.open("get", key)
	if err != nil {
		return nil, Object{}, err
	}
	if o.IfMatch != "" && o.IfMatch != obj.ETag {
		f.Close()
		return nil, Object{}, newError("get", d.name, key, ErrChanged, nil)
	}
	off, n := o.span(obj.Size)
	return &dirReader{d: d, ctx: ctx, f: f, key: key, r: io.NewSectionReader(f, off, n), left: n}, obj, nil
}

// span is the part of an object of the given size that o selects.
func (o GetOptions) span(size int64) (off, n int64) {
	off = min(max(o.Offset, 0), size)
	n = size - off
	if o.Length > 0 {
		n = min(n, o.Length)
	}
	return off, n
}

type dirReader struct {
	d    *dirStore
	ctx  context.Context
	f    *os.File
	key  string
	r    *io.SectionReader
	left int64
}

func (r *dirReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, r.d.err("get", r.key, context.Cause(r.ctx))
	}
	n, err := r.r.Read(p)
	r.left -= int64(n)
	if err == io.EOF && r.left > 0 {
		err = r.d.err("get", r.key, fmt.Errorf("file became shorter: %w", io.ErrUnexpectedEOF))
	} else if err != nil && err != io.EOF {
		err = r.d.err("get", r.key, err)
	}
	return n, err
}

func (r *dirReader) Close() error { return r.f.Close() }

func (d *dirStore) Stat(ctx context.Context, key string) (Object, error) {
	if err := d.begin(ctx, "stat", key); err != nil {
		return Object{}, err
	}
	f, obj, err := d.open("stat", key)
	if err != nil {
		return Object{}, err
	}
	f.Close()
	return obj, nil
}

func (d *dirStore) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		dir := "."
		if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
			dir = path.Clean(prefix[:i])
		}
		if dir != "." && CheckKey(dir) != nil {
			return // no key can begin like that
		}
		if err := d.walk(ctx, dir, prefix, yield); err != nil && !errors.Is(err, errStop) {
			yield(Object{}, d.err("list", prefix, err))
		}
	}
}

var errStop = errors.New("stop")

// walk yields the files under dir in byte order of their keys: a directory
// sorts as if its name ended with the "/" that follows it in keys.
func (d *dirStore) walk(ctx context.Context, dir, prefix string, yield func(Object, error) bool) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	h, err := d.root.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		return err
	}
	entries, err := h.ReadDir(-1)
	h.Close()
	if err != nil {
		return err
	}
	sortName := func(e fs.DirEntry) string {
		if e.IsDir() {
			return e.Name() + "/"
		}
		return e.Name()
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(sortName(a), sortName(b)) })
	for _, e := range entries {
		key := path.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		if e.IsDir() {
			k := key + "/"
			if strings.HasPrefix(k, prefix) || strings.HasPrefix(prefix, k) {
				if err := d.walk(ctx, key, prefix, yield); err != nil {
					return err
				}
			}
			continue
		}
		if !e.Type().IsRegular() || !strings.HasPrefix(key, prefix) {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return err
		}
		if !yield(dirObject(key, fi), nil) {
			return errStop
		}
	}
	return nil
}

func (d *dirStore) Delete(ctx context.Context, keys ...string) error {
	var failed []*Error
	for _, key := range keys {
		if err := d.begin(ctx, "delete", key); err != nil {
			failed = appendFailed(failed, err)
			continue
		}
		err := d.changing(func() error { return d.remove(key) })
		if err != nil {
			failed = appendFailed(failed, d.err("delete", key, err))
		}
	}
	if failed != nil {
		return &DeleteError{failed}
	}
	return nil
}

func appendFailed(l []*Error, err error) []*Error {
	var e *Error
	if errors.As(err, &e) {
		return append(l, e)
	}
	return append(l, &Error{Op: "delete", Err: err})
}

// remove deletes a file and the directories that are empty without it, as no
// directory exists in an object store.
func (d *dirStore) remove(key string) error {
	fi, err := d.root.Lstat(key)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.IsDir() {
		return nil // a prefix of keys, itself none
	}
	if err := d.root.Remove(key); err != nil {
		return err
	}
	dir := path.Dir(key)
	if err := d.syncDir(dir); err != nil {
		return err
	}
	for ; dir != "."; dir = path.Dir(dir) {
		if d.root.Remove(dir) != nil {
			break
		}
	}
	return nil
}

func (d *dirStore) Copy(ctx context.Context, dst, src string, o PutOptions) (Object, error) {
	if err := d.begin(ctx, "copy", src); err != nil {
		return Object{}, err
	}
	f, obj, err := d.open("copy", src)
	if err != nil {
		return Object{}, err
	}
	defer f.Close()
	return d.put(ctx, "copy", dst, io.NewSectionReader(f, 0, obj.Size), obj.Size, o)
}

// ServerTime is this machine's clock.
func (d *dirStore) ServerTime(context.Context) (time.Time, error) { return time.Now(), nil }
