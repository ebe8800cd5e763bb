// Package compare says how two file hierarchies differ, with means that share
// nothing with the product: a walk of its own, and Debian's rsync, getfacl and
// getcap.
package compare

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Options say what of the trees is compared.
type Options struct {
	Skip     func(path string) bool // paths, relative to the roots, left out with what is below
	NoFlags  bool                   // inode flags (immutable, append, nodump) may differ
	NoSparse bool                   // holes may be filled
}

// Tree is what a walk found: a description of each name.
type Tree map[string]Node

// Node is one name of a tree.
type Node struct {
	Facts     string // all that must be equal, in words
	Flags     string
	Size      int64  // bytes of a regular file
	Allocated int64  // bytes of disk it takes
	Links     string // the first name of the same inode
}

// Trees walks both hierarchies and returns their differences, one a line.
func Trees(a, b string, o Options) ([]string, error) {
	ta, err := Walk(a, o)
	if err != nil {
		return nil, err
	}
	tb, err := Walk(b, o)
	if err != nil {
		return nil, err
	}
	return Diff(ta, tb, o), nil
}

// Diff returns the differences of two walked trees, one a line, sorted.
func Diff(a, b Tree, o Options) []string {
	var diffs []string
	say := func(path, format string, args ...any) {
		diffs = append(diffs, fmt.Sprintf("%.200q: ", path)+fmt.Sprintf(format, args...))
	}
	for path, na := range a {
		nb, ok := b[path]
		switch {
		case !ok:
			say(path, "missing")
			continue
		case na.Facts != nb.Facts:
			say(path, "%s, want %s", difference(nb.Facts, na.Facts), difference(na.Facts, nb.Facts))
		case na.Links != nb.Links:
			say(path, "is a link of %.200q, want %.200q", nb.Links, na.Links)
		}
		if !o.NoFlags && na.Flags != nb.Flags {
			say(path, "flags %q, want %q", nb.Flags, na.Flags)
		}
		// A file with holes must not come back filled. 1 MiB covers what two
		// filesystems round differently.
		const slack = 1 << 20
		if !o.NoSparse && na.Size > na.Allocated+slack && nb.Allocated > na.Allocated+slack {
			say(path, "takes %d bytes of disk, want about %d", nb.Allocated, na.Allocated)
		}
	}
	for path := range b {
		if _, ok := a[path]; !ok {
			say(path, "should not be there")
		}
	}
	sort.Strings(diffs)
	return diffs
}

// difference is the facts of a that b does not have.
func difference(a, b string) string {
	have := strings.Split(b, "; ")
	var out []string
	for _, fact := range strings.Split(a, "; ") {
		if !slices.Contains(have, fact) {
			out = append(out, fmt.Sprintf("%.300s", fact))
		}
	}
	return "[" + strings.Join(out, "; ") + "]"
}

// Walk describes a hierarchy. It follows no symbolic link, opens nothing that
// could block, and can go deeper than PATH_MAX.
func Walk(root string, o Options) (Tree, error) {
	w := &walker{options: o, tree: Tree{}, inodes: map[[2]uint64]string{}}
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", root, err)
	}
	if err := w.node(fd, ".", "."); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return w.tree, w.dir(fd, "")
}

type walker struct {
	options Options
	tree    Tree
	inodes  map[[2]uint64]string // first name of each inode
	names   [64 << 10]byte       // buffers for attributes and content
	value   [64 << 10]byte
	block   [4096]byte
}

// dir walks what is in a directory and closes it.
func (w *walker) dir(fd int, path string) error {
	d := os.NewFile(uintptr(fd), path)
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("reading directory %q: %w", path, err)
	}
	sort.Strings(names)
	for _, name := range names {
		p := path + "/" + name
		if w.options.Skip != nil && w.options.Skip(p[1:]) {
			continue
		}
		if err := w.node(fd, name, p[1:]); err != nil {
			return err
		}
		if !strings.HasPrefix(w.tree[p[1:]].Facts, "directory") {
			continue
		}
		sub, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening directory %q: %w", p, err)
		}
		if err := w.dir(sub, p); err != nil {
			return err
		}
	}
	return nil
}

var kinds = map[uint16]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "directory", unix.S_IFLNK: "symlink", unix.S_IFIFO: "fifo",
	unix.S_IFSOCK: "socket", unix.S_IFCHR: "character device", unix.S_IFBLK: "block device",
}

// node describes one name in a directory.
func (w *walker) node(dir int, name, path string) error {
	var st unix.Statx_t
	err := unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st)
	if err != nil {
		return fmt.Errorf("statx %q: %w", path, err)
	}
	kind := st.Mode & unix.S_IFMT
	facts := []string{
		kinds[kind], fmt.Sprintf("mode %04o", st.Mode&^unix.S_IFMT), fmt.Sprintf("owner %d:%d", st.Uid, st.Gid),
		fmt.Sprintf("mtime %d.%09d", st.Mtime.Sec, st.Mtime.Nsec),
	}
	n := Node{Links: path}
	switch kind {
	case unix.S_IFREG:
		n.Size, n.Allocated = int64(st.Size), int64(st.Blocks)*512
		sum, err := w.digest(dir, name, int64(st.Size))
		if err != nil {
			return fmt.Errorf("reading %q: %w", path, err)
		}
		facts = append(facts, fmt.Sprintf("size %d", st.Size), "content "+sum)
	case unix.S_IFLNK:
		target := make([]byte, 8192)
		l, err := unix.Readlinkat(dir, name, target)
		if err != nil {
			return fmt.Errorf("readlink %q: %w", path, err)
		}
		facts = append(facts, fmt.Sprintf("target %q", target[:l]))
	case unix.S_IFCHR, unix.S_IFBLK:
		facts = append(facts, fmt.Sprintf("device %d:%d", st.Rdev_major, st.Rdev_minor))
	}
	xattrs, err := w.attributes(fmt.Sprintf("/proc/self/fd/%d/%s", dir, name))
	if err != nil {
		return fmt.Errorf("attributes of %q: %w", path, err)
	}
	facts = append(facts, xattrs...)
	if kind != unix.S_IFDIR {
		facts = append(facts, fmt.Sprintf("%d links", st.Nlink))
		id := [2]uint64{uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), st.Ino}
		if first, ok := w.inodes[id]; ok {
			n.Links = first
		} else {
			w.inodes[id] = path
		}
	}
	for bit, flag := range map[uint64]string{
		unix.STATX_ATTR_IMMUTABLE: "immutable", unix.STATX_ATTR_APPEND: "append", unix.STATX_ATTR_NODUMP: "nodump",
	} {
		if st.Attributes&bit != 0 {
			n.Flags += flag + " "
		}
	}
	n.Facts = strings.Join(facts, "; ")
	w.tree[path] = n
	return nil
}

// digest is over the blocks of a file that are not all zero and where they are,
// so that it does not depend on holes and reads none.
func (w *walker) digest(dir int, name string, size int64) (string, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	const block = int64(len(w.block))
	h := sha256.New()
	buf := w.block[:]
	var zero [block]byte
	for off := int64(0); off < size; {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		} else if err != nil {
			return "", err
		}
		end, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			return "", err
		}
		for off = data - data%block; off < end && off < size; off += block {
			n, err := f.ReadAt(buf[:min(block, size-off)], off)
			if err != nil && !(errors.Is(err, io.EOF) && n > 0) {
				return "", err
			}
			if string(buf[:n]) != string(zero[:n]) {
				fmt.Fprintf(h, "%d+%d:", off, n)
				h.Write(buf[:n])
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:12]), nil
}

// attributes lists all extended attributes, sorted by name, with their values.
func (w *walker) attributes(path string) ([]string, error) {
	n, err := unix.Llistxattr(path, w.names[:])
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var out []string
	for name := range strings.SplitSeq(strings.Trim(string(w.names[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		l, err := unix.Lgetxattr(path, name, w.value[:])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		sum := sha256.Sum256(w.value[:l])
		out = append(out, fmt.Sprintf("xattr %s=%.40q(%d, %x)", name, w.value[:l], l, sum[:4]))
	}
	sort.Strings(out)
	return out, nil
}
