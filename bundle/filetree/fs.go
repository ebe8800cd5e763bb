package filetree

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// FS shows a tree and its content as a file system. Symbolic links are
// followed within the tree: an absolute one begins at its root, and ".." of the
// root is the root, as after chroot(2). What is opened is what the tree has,
// never what lies elsewhere on the machine. ctx bounds each opening of a file.
func FS(ctx context.Context, t *Tree, src Source) fs.FS { return &treeFS{ctx, t, src} }

// treeFS keeps a context because fs.FS has no place for one.
type treeFS struct {
	ctx context.Context
	t   *Tree
	src Source
}

// maxLinks is how many symbolic links one path may lead through, as in Linux.
const maxLinks = 40

var errLoop = errors.New("too many symbolic links")

// Resolve finds what a path leads to, symbolic links followed within the tree
// as [FS] does. The error wraps fs.ErrNotExist where nothing is found.
func (t *Tree) Resolve(name string) (ID, error) {
	var at []ID // from below the root to here
	here := func() ID {
		if len(at) == 0 {
			return Root
		}
		return at[len(at)-1]
	}
	rest, links := name, 0
	for rest != "" {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(len(at)-1, 0)]
			continue
		}
		id := t.child(here(), part)
		if id == None {
			return None, fs.ErrNotExist
		}
		if t.Mode(id)&unix.S_IFMT != unix.S_IFLNK {
			at = append(at, id)
			continue
		}
		if links++; links > maxLinks {
			return None, errLoop
		}
		target := string(t.Target(id))
		if strings.HasPrefix(target, "/") {
			at = at[:0]
		}
		rest = target + "/" + rest
	}
	return here(), nil
}

func (f *treeFS) find(op, name string) (ID, error) {
	if !fs.ValidPath(name) {
		return None, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	id, err := f.t.Resolve(name)
	if err != nil {
		return None, &fs.PathError{Op: op, Path: name, Err: err}
	}
	return id, nil
}

func (f *treeFS) Open(name string) (fs.File, error) {
	id, err := f.find("open", name)
	if err != nil {
		return nil, err
	}
	info := treeInfo{f.t, id, path.Base(name)}
	switch f.t.Mode(id) & unix.S_IFMT {
	case unix.S_IFDIR:
		return &treeDir{info: info}, nil
	case unix.S_IFREG:
		content, err := f.src.Open(f.ctx, id)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return &treeFile{io.NewSectionReader(content, 0, f.t.Size(id)), content, info}, nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
}

func (f *treeFS) Stat(name string) (fs.FileInfo, error) {
	id, err := f.find("stat", name)
	if err != nil {
		return nil, err
	}
	return treeInfo{f.t, id, path.Base(name)}, nil
}

// Lstat is Stat that does not follow the last name.
func (f *treeFS) Lstat(name string) (fs.FileInfo, error) {
	dir, err := f.find("lstat", path.Dir(name))
	if err != nil {
		return nil, err
	}
	id := dir
	if name != "." {
		if id = f.t.child(dir, path.Base(name)); id == None {
			return nil, &fs.PathError{Op: "lstat", Path: name, Err: fs.ErrNotExist}
		}
	}
	return treeInfo{f.t, id, path.Base(name)}, nil
}

// ReadLink is where a symbolic link points, as it says.
func (f *treeFS) ReadLink(name string) (string, error) {
	info, err := f.Lstat(name)
	if err != nil {
		return "", err
	}
	i, ok := info.(treeInfo)
	if !ok || i.Mode()&fs.ModeSymlink == 0 {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return string(f.t.Target(i.id)), nil
}

func (f *treeFS) ReadDir(name string) ([]fs.DirEntry, error) {
	id, err := f.find("readdir", name)
	if err != nil {
		return nil, err
	}
	return f.t.dirEntries(id), nil
}

func (t *Tree) dirEntries(dir ID) []fs.DirEntry {
	entries := make([]fs.DirEntry, 0, t.NumChildren(dir))
	for name, id := range t.Children(dir) {
		entries = append(entries, fs.FileInfoToDirEntry(treeInfo{t, id, string(name)}))
	}
	return entries
}

// treeInfo describes an inode under a name.
type treeInfo struct {
	t    *Tree
	id   ID
	name string
}

func (i treeInfo) Name() string { return i.name }
func (i treeInfo) Size() int64  { return i.t.Size(i.id) }
func (i treeInfo) IsDir() bool  { return i.Mode().IsDir() }
func (i treeInfo) Sys() any     { return nil }

func (i treeInfo) ModTime() time.Time {
	m := i.t.Attr(i.id).Mtime
	return time.Unix(m.Sec, int64(m.Nsec))
}

func (i treeInfo) Mode() fs.FileMode {
	m := i.t.Mode(i.id)
	mode := fs.FileMode(m & 0o777)
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	}
	return mode
}

type treeFile struct {
	*io.SectionReader
	content File
	info    treeInfo
}

func (f *treeFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *treeFile) Close() error               { return f.content.Close() }

type treeDir struct {
	info treeInfo
	rest []fs.DirEntry
	read bool
}

func (d *treeDir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *treeDir) Close() error               { return nil }
func (d *treeDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.info.name, Err: errors.New("is a directory")}
}

func (d *treeDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if !d.read {
		d.rest, d.read = d.info.t.dirEntries(d.info.id), true
	}
	out := d.rest
	if n > 0 {
		if len(out) == 0 {
			return nil, io.EOF
		}
		out = out[:min(n, len(out))]
	}
	d.rest = d.rest[len(out):]
	return out, nil
}
