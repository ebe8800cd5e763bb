// Package dirsource reads instance records from a directory: one YAML file per
// instance, named *.yaml or *.yml; names that begin with a dot are left alone.
//
// What goes in: a directory, and the files that records name as user data.
// What comes out: a [metadata.Source] whose set is replaced as a whole when
// the files change. A set is only replaced by one without errors: while any
// file is wrong, the last good set stays.
package dirsource

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/metadata"
)

// Dir is a directory of records. It is made by [Open].
type Dir struct {
	path string
	set  atomic.Pointer[metadata.Set]

	mu    sync.Mutex // one load at a time
	files map[string]file
}

var _ metadata.Source = (*Dir)(nil)

// file is a record as it was read, kept so that a reload reads only what
// changed and instances that did not change keep their record.
type file struct {
	id       identity
	userData string   // the file that user-data-file named, "" if none
	dataID   identity // its identity
	in       *metadata.Instance
}

// identity tells whether a file is still the one that was read. The change
// time is the kernel's and cannot be set back.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// Open reads the directory. The error names every problem of every file, one
// a line, as "FILE:LINE: KEY: what is wrong".
func Open(path string) (*Dir, error) {
	d := &Dir{path: path}
	if err := d.Reload(); err != nil {
		return nil, err
	}
	return d, nil
}

// Instances returns the last good set.
func (d *Dir) Instances() *metadata.Set { return d.set.Load() }

// Reload reads what changed. On an error the set stays as it was.
func (d *Dir) Reload() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("reading the instance directory: %w", err)
	}
	files := make(map[string]file, len(entries))
	read := make([]file, len(entries))
	errs := make([]error, len(entries))
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i, e := range entries {
		name := e.Name()
		ext := filepath.Ext(name)
		if strings.HasPrefix(name, ".") || ext != ".yaml" && ext != ".yml" {
			continue
		}
		group.Go(func() error {
			read[i], errs[i] = d.read(name)
			if errors.Is(errs[i], fs.ErrNotExist) { // removed while we looked
				read[i], errs[i] = file{}, nil
			}
			return nil
		})
	}
	if err := errors.Join(group.Wait(), errors.Join(errs...)); err != nil {
		return err
	}
	instances := make([]*metadata.Instance, 0, len(entries))
	for i, f := range read {
		if f.in != nil {
			files[entries[i].Name()] = f
			instances = append(instances, f.in)
		}
	}
	set, err := metadata.NewSet(instances...)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	d.files = files
	d.set.Store(set)
	return nil
}

func (d *Dir) read(name string) (file, error) {
	path := filepath.Join(d.path, name)
	data, id, err := readFile(path, 256<<10)
	if err != nil {
		return file{}, fmt.Errorf("reading an instance record: %w", err)
	}
	if old, ok := d.files[name]; ok && old.id == id {
		if old.userData == "" {
			return old, nil
		}
		if now, err := stat(old.userData); err == nil && now == old.dataID {
			return old, nil
		}
	}
	f := file{id: id}
	f.in, err = metadata.Decode(path, data, metadata.DecodeOptions{
		Files: true,
		ReadFile: func(name string) ([]byte, error) {
			if !filepath.IsAbs(name) {
				name = filepath.Join(d.path, name)
			}
			b, id, err := readFile(name, metadata.MaxUserData)
			f.userData, f.dataID = name, id
			return b, err
		},
	})
	return f, err
}

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, identity, error) {
	// O_NONBLOCK: a FIFO of that name must not hold up every other instance.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, identity{}, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, identity{}, fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, identity{}, fmt.Errorf("%s is not a regular file", path)
	}
	if st.Size > limit {
		return nil, identity{}, fmt.Errorf("%s has more than the %d bytes it may have", path, limit)
	}
	// One that grows meanwhile is read again when the watch says so.
	b := make([]byte, st.Size)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, identity{}, err
	}
	return b[:n], identify(&st), nil
}

func stat(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return identity{}, fmt.Errorf("stat %s: %w", path, err)
	}
	return identify(&st), nil
}

func identify(st *unix.Stat_t) identity {
	return identity{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

// settle is how long the directory must be quiet before it is read again;
// atMost is when it is read even so, for some never are.
const (
	settle = 100 * time.Millisecond
	atMost = 2 * time.Second
)

// Watch reloads whenever something in the directory changes, or a file that a
// record took its user data from, until ctx ends. after is called after each
// reload with its error.
func (d *Dir) Watch(ctx context.Context, after func(error)) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching %s: %w", d.path, err)
	}
	defer w.Close()
	if err := w.Add(d.path); err != nil {
		return fmt.Errorf("watching %s: %w", d.path, err)
	}
	watched := d.watchUserData(w, nil)
	// What changed before the watch began would otherwise go unseen.
	timer := time.NewTimer(0)
	defer timer.Stop()
	var first time.Time // of the changes that were not read yet
	soon := func() {
		now := time.Now()
		if first.IsZero() {
			first = now
		}
		timer.Reset(min(settle, max(first.Add(atMost).Sub(now), 0)))
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.Events:
			if !ok {
				return errors.New("the watch ended")
			}
			soon()
		case err, ok := <-w.Errors:
			if !ok {
				return errors.New("the watch ended")
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				after(fmt.Errorf("watching %s: %w", d.path, err))
			}
			soon()
		case <-timer.C:
			first = time.Time{}
			err := d.Reload()
			if _, gone := os.Stat(d.path); gone == nil {
				// A directory that was replaced is another inode: watch that.
				err = errors.Join(err, w.Add(d.path))
			}
			watched = d.watchUserData(w, watched)
			after(err)
		}
	}
}

// watchUserData watches the directories of user data files elsewhere.
func (d *Dir) watchUserData(w *fsnotify.Watcher, before []string) []string {
	d.mu.Lock()
	var dirs []string
	for _, f := range d.files {
		if dir := filepath.Dir(f.userData); f.userData != "" && dir != filepath.Clean(d.path) {
			dirs = append(dirs, dir)
		}
	}
	d.mu.Unlock()
	slices.Sort(dirs)
	dirs = slices.Compact(dirs)
	for _, dir := range before {
		if !slices.Contains(dirs, dir) {
			w.Remove(dir) // an error only says that it is gone
		}
	}
	for _, dir := range dirs {
		w.Add(dir) // one that cannot be watched is read again at the next reload
	}
	return dirs
}
