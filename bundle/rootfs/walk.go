package rootfs

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// walker fills a Root. Directories are read one after the other; each adds
// all its names to the tree before the first of its subdirectories is read.
type walker struct {
	ctx    context.Context
	o      *Options
	root   *Root
	filter *filter
	mounts *mountTable
	inodes *inodeReader
	b      *filetree.Builder
	extra  map[string]map[string]*virtual // by directory and name
	todo   []task
	bare   int // handle of the volume's filesystem without the mounts on it; 0: not tried, -1: not to be had
	buf    []byte
}

// task is a directory to be read.
type task struct {
	id    filetree.ID
	scope scope
	mount uint64 // the mount it is in, 0 if unknown
	real  bool   // it exists in the volume
	live  bool   // it is read from the volume though the rest comes from a snapshot
}

func (w *walker) walk(st *unix.Statx_t) error {
	e := filetree.Entry{Attr: attr(st), Link: filetree.None}
	if err := w.inodes.opened(&e, w.root.fd, st); err != nil {
		w.problem(".", err)
	}
	var err error
	if w.b, err = filetree.NewBuilder(e.Attr, e.Xattrs); err != nil {
		return err
	}
	w.root.dirs = newDirCache(w.b.Peek(), w.root.fd)
	defer func() {
		if w.bare > 0 {
			unix.Close(w.bare)
		}
	}()
	w.todo = []task{{id: filetree.Root, mount: mountID(st), real: true}}
	for len(w.todo) > 0 {
		t := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		if err := w.directory(t); err != nil {
			return err
		}
	}
	w.root.Tree = w.b.Tree()
	return w.filter.unmatched()
}

// directory adds the names in one directory and queues its subdirectories.
func (w *walker) directory(t task) error {
	if err := w.b.Begin(t.id); err != nil {
		return err
	}
	dir := w.b.Peek().Path(t.id)
	mark := len(w.todo)
	var names []string
	if t.real {
		// The handle stays valid after this: nothing else uses the cache
		// before the directory is done.
		err := w.root.dirs.with(t.id, func(fd int) (err error) {
			fresh, err := openat(fd, ".", openDir)
			if err != nil {
				return err
			}
			defer unix.Close(fresh)
			names, err = readNames(fresh, w.buf)
			return err
		})
		if err != nil {
			w.problem(dir, fmt.Errorf("reading the directory: %w", err))
		}
	}
	extra, found := w.extra[dir], names
	for name := range extra {
		if _, ok := slices.BinarySearch(found, name); !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	add := func(fd int) error {
		for i, name := range names {
			if i%256 == 0 {
				if err := w.ctx.Err(); err != nil {
					return err
				}
			}
			rel := name
			if dir != "." {
				rel = dir + "/" + name
			}
			if err := w.name(t, fd, name, rel, extra[name]); err != nil {
				return err
			}
		}
		return nil
	}
	var err error
	if !t.real {
		err = add(-1)
	} else if len(names) > 0 {
		err = w.root.dirs.with(t.id, add)
	}
	slices.Reverse(w.todo[mark:])
	return err
}

// name decides on one name and adds it.
func (w *walker) name(t task, dir int, name, rel string, v *virtual) error {
	w.root.Seen.Files++
	if w.o.Report != nil && w.root.Seen.Files%4096 == 0 {
		w.o.Report(w.root.Seen)
	}
	var st unix.Statx_t
	err := unix.ENOENT
	if dir >= 0 {
		if e := statAt(dir, name, &st); e != nil {
			errors.As(e, &err)
		} else {
			err = 0
		}
	}
	if v != nil && !(v.absent && err == 0) {
		return w.addVirtual(dir, name, rel, v, &st, err == 0)
	}
	if err != 0 {
		w.problem(rel, err)
		return nil
	}
	e := filetree.Entry{Name: name, Link: filetree.None, Attr: attr(&st)}
	if len(name) > 255 {
		w.leaveOut(Omission{Path: rel, Class: Unstorable, Why: "the name is longer than 255 bytes"}, dir, &st)
		return nil
	}
	child := task{real: true, live: t.live}
	if m, crossed := w.crossing(t, rel, &st); crossed {
		if !m.use {
			return w.mountPoint(&e, m, rel)
		}
		if w.root.snap != nil && !t.live && e.Type() == unix.S_IFDIR {
			return w.graft(&e, rel, t.scope)
		}
	}
	if w.root.snap != nil && !t.live && e.Type() == unix.S_IFDIR && st.Ino == btrfsEmptyDir {
		return w.graft(&e, rel, t.scope)
	}
	child.mount = mountID(&st)
	if e.Type() != unix.S_IFDIR && st.Nlink > 1 {
		if id := w.b.Linked(e.Dev, e.Ino); id != filetree.None && w.filter.linkable(t.scope, rel) {
			return w.add(&filetree.Entry{Name: name, Link: id}, rel, nil, false)
		}
	}
	v2 := w.filter.judge(t.scope, rel, &e.Attr)
	child.scope = v2.scope
	switch v2.action {
	case omit:
		w.leaveOut(v2.omission(rel), dir, &st)
		return nil
	case contents:
		o := v2.omission(rel)
		o.Kept = "empty directory"
		w.leaveOut(o, dir, &st)
		if !v2.descend {
			child.real = false
		}
	case empty:
		o := v2.omission(rel)
		o.Kept = "empty file"
		w.leaveOut(o, dir, &st)
		return w.addVirtual(dir, name, rel, &virtual{mode: unix.S_IFREG | 0o644}, &st, true)
	}
	if secret := w.inspect(&e, dir, rel, v2.check, &st); secret != nil {
		w.leaveOut(*secret, dir, &st)
		return nil
	}
	return w.add(&e, rel, &child, e.Type() != unix.S_IFDIR && st.Nlink > 1)
}

// inspect completes e; it returns an omission if the content is one that must
// stay out.
func (w *walker) inspect(e *filetree.Entry, dir int, rel string, check bool, st *unix.Statx_t) *Omission {
	var err error
	switch e.Type() {
	case unix.S_IFREG, unix.S_IFDIR:
		flags := openFile
		if e.Type() == unix.S_IFDIR {
			flags = openDir
		}
		var fd int
		if fd, err = openat(dir, e.Name, flags); err != nil {
			if e.Type() == unix.S_IFDIR {
				return nil // reading it will say so
			}
			err = fmt.Errorf("its content cannot be read: %w", err)
			break
		}
		defer unix.Close(fd)
		if err = statFD(fd, st); err != nil {
			break
		}
		if !same(st, &e.Attr) {
			err = filetree.ErrReplaced
			break
		}
		e.Attr = attr(st)
		if e.Type() == unix.S_IFREG {
			if o := w.filter.content(fd, rel, &e.Attr, check); o != nil {
				return o
			}
		}
		err = w.inodes.opened(e, fd, st)
	case unix.S_IFLNK:
		if e.Target, err = readlink(dir, e.Name); err != nil {
			break
		}
		err = w.inodes.unopened(e, dir, st)
	default:
		err = w.inodes.unopened(e, dir, st)
	}
	if err != nil {
		w.problem(rel, err)
	}
	return nil
}

// add puts e into the tree and, if it is a directory, child on the list of
// what is still to be read. It remembers what has more names.
func (w *walker) add(e *filetree.Entry, rel string, child *task, links bool) error {
	if e.Link == filetree.None && e.Type() == unix.S_IFLNK && e.Target == "" {
		return nil // it could not be read, which was reported
	}
	id, err := w.b.Add(e)
	if err != nil {
		return fmt.Errorf("%s: %w", display(rel), err)
	}
	if e.Link != filetree.None {
		return nil
	}
	if links {
		w.b.Remember(e.Dev, e.Ino, id)
	}
	switch e.Type() {
	case unix.S_IFREG:
		if e.Data != nil {
			w.root.Seen.Bytes += e.Data.Bytes()
		} else {
			w.root.Seen.Bytes += e.Size
		}
		if e.Ino == 0 { // stands for a file that a mount hides
			w.root.virtual[id] = nil
		}
	case unix.S_IFDIR:
		if child != nil {
			child.id = id
			w.todo = append(w.todo, *child)
		}
	}
	return nil
}

// crossing tells whether a name leads into another mount than its directory is in.
func (w *walker) crossing(t task, rel string, st *unix.Statx_t) (*mount, bool) {
	id := mountID(st)
	if id == 0 || t.mount == 0 || w.root.snap != nil && !t.live { // before Linux 5.8, or nothing is mounted in a snapshot
		m := w.mounts.byPath[rel]
		return m, m != nil
	}
	if id == t.mount {
		return nil, false
	}
	if m := w.mounts.byID[id]; m != nil {
		return m, true
	}
	return &mount{path: rel, class: NotLocal, why: "was mounted while the scan ran"}, true
}

// mountPoint adds the empty place where a mount that is not captured stands.
func (w *walker) mountPoint(e *filetree.Entry, m *mount, rel string) error {
	o := Omission{Path: rel, Class: m.class, Rule: m.typ, Why: m.why, Bytes: -1, Files: -1, Kept: "empty directory"}
	if e.Type() != unix.S_IFDIR {
		o.Kept = "empty file"
	}
	w.root.LeftOut = append(w.root.LeftOut, o)
	place := filetree.Entry{Name: e.Name, Link: filetree.None}
	if !w.beneathMount(&place, rel, e.Type()) {
		place.Attr = filetree.Attr{Mode: mountPointMode(e.Type(), rel), Mtime: w.b.Peek().Attr(filetree.Root).Mtime}
	}
	place.Size, place.Data, place.Dev, place.Ino = 0, nil, 0, 0
	return w.add(&place, rel, &task{}, false)
}

// graft adds a directory that a snapshot of the volume does not hold: another
// mount, or a subvolume. It is read live.
func (w *walker) graft(e *filetree.Entry, rel string, in scope) error {
	v := w.filter.judge(in, rel, &filetree.Attr{Mode: unix.S_IFDIR})
	if v.action != keep && !v.descend {
		o := v.omission(rel)
		o.Bytes, o.Files = -1, -1
		w.root.LeftOut = append(w.root.LeftOut, o)
		if v.action == contents {
			return w.add(e, rel, &task{}, false)
		}
		return nil
	}
	fd, err := openPath(w.root.live, rel)
	if err != nil {
		w.problem(rel, err)
		return w.add(e, rel, nil, false)
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := statFD(fd, &st); err != nil {
		w.problem(rel, err)
		return w.add(e, rel, nil, false)
	}
	e.Attr = attr(&st)
	if err := w.inodes.opened(e, fd, &st); err != nil {
		w.problem(rel, err)
	}
	if err := w.add(e, rel, &task{scope: v.scope, mount: mountID(&st), real: true, live: true}, false); err != nil {
		return err
	}
	id := w.todo[len(w.todo)-1].id
	w.root.dirs.grafts[id] = func() (int, error) { return openPath(w.root.live, rel) }
	w.root.Notes = append(w.root.Notes, display(rel)+" is not part of the snapshot and read live")
	return nil
}

// beneathMount completes e, of the type typ, from what a mount at rel hides. It
// can tell only of the volume's own filesystem, and only where the kernel
// gives a copy of the mount without those on top of it (open_tree(2), Linux
// 5.2, for root).
func (w *walker) beneathMount(e *filetree.Entry, rel string, typ uint32) bool {
	if w.bare == 0 {
		fd, err := unix.OpenTree(w.root.live, ".", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			fd = -1
		}
		w.bare = fd
	}
	if w.bare < 0 {
		return false
	}
	dir, err := openPath(w.bare, path.Dir(rel))
	if err != nil {
		return false
	}
	defer unix.Close(dir)
	var st unix.Statx_t
	if statAt(dir, e.Name, &st) != nil || uint32(st.Mode)&unix.S_IFMT != typ {
		return false
	}
	e.Attr = attr(&st)
	return w.inodes.unopened(e, dir, &st) == nil
}

// mountPointMode is the mode of what a mount hides, as distributions make it.
func mountPointMode(typ uint32, rel string) uint32 {
	switch {
	case typ == unix.S_IFREG:
		return typ | 0o644
	case rel == "proc" || rel == "sys":
		return typ | 0o555
	case rel == "tmp" || rel == "var/tmp":
		return typ | 0o1777
	}
	return typ | 0o755
}

func (w *walker) problem(rel string, err error) {
	w.root.Problems = append(w.root.Problems, Problem{rel, classify(err)})
}

// leaveOut notes an omission of a name in dir.
func (w *walker) leaveOut(o Omission, dir int, st *unix.Statx_t) {
	switch {
	case uint32(st.Mode)&unix.S_IFMT == unix.S_IFREG:
		o.Bytes, o.Files = int64(min(st.Size, st.Blocks*512)), 1
	case uint32(st.Mode)&unix.S_IFMT != unix.S_IFDIR:
		o.Bytes, o.Files = 0, 1
	case w.o.Measure:
		o.Bytes, o.Files = measure(w.ctx, dir, path.Base(o.Path))
	default:
		o.Bytes, o.Files = -1, -1
	}
	w.root.LeftOut = append(w.root.LeftOut, o)
}

func readlink(dir int, name string) (string, error) {
	buf := make([]byte, 4096)
	n, err := retry(func() (int, error) { return unix.Readlinkat(dir, name, buf) })
	if errors.Is(err, unix.EINVAL) {
		err = filetree.ErrReplaced // it is a link no more
	}
	if err != nil {
		return "", fmt.Errorf("reading the symbolic link: %w", err)
	}
	if n == 0 {
		return "", fmt.Errorf("reading the symbolic link: %w", unix.ENOENT)
	}
	return string(buf[:n]), nil
}
