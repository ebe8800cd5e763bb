package rootfs

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/sparse"
)

// Inode flags (FS_IOC_GETFLAGS, linux/fs.h) that mean the same on any
// filesystem and go into the image. The others describe how this filesystem
// stores the file.
const (
	flagSync      = 0x00000008
	flagImmutable = 0x00000010
	flagAppend    = 0x00000020
	flagNoDump    = 0x00000040
	flagNoAtime   = 0x00000080
	flagDirSync   = 0x00010000
	flagsKept     = flagSync | flagImmutable | flagAppend | flagNoDump | flagNoAtime | flagDirSync
)

// attr translates what statx(2) says.
func attr(st *unix.Statx_t) filetree.Attr {
	a := filetree.Attr{
		Mode: uint32(st.Mode), UID: st.Uid, GID: st.Gid,
		Mtime: filetree.Time{Sec: st.Mtime.Sec, Nsec: st.Mtime.Nsec},
		Ctime: filetree.Time{Sec: st.Ctime.Sec, Nsec: st.Ctime.Nsec},
		Dev:   device(st), Ino: st.Ino,
	}
	switch a.Type() {
	case unix.S_IFREG:
		a.Size = int64(st.Size)
	case unix.S_IFCHR, unix.S_IFBLK:
		a.Major, a.Minor = st.Rdev_major, st.Rdev_minor
	}
	return a
}

// flagsOf are the flags statx(2) tells, where the file itself cannot be opened.
func flagsOf(st *unix.Statx_t) uint32 {
	var f uint32
	for _, x := range []struct {
		attr uint64
		flag uint32
	}{{unix.STATX_ATTR_IMMUTABLE, flagImmutable}, {unix.STATX_ATTR_APPEND, flagAppend}, {unix.STATX_ATTR_NODUMP, flagNoDump}} {
		if st.Attributes&x.attr != 0 {
			f |= x.flag
		}
	}
	return f
}

// inodeReader collects what statx(2) does not tell of an inode. It is not for
// concurrent use.
type inodeReader struct {
	list, value []byte
}

func newInodeReader() *inodeReader {
	return &inodeReader{list: make([]byte, 1024), value: make([]byte, 1024)}
}

// opened completes e from an open file or directory.
func (r *inodeReader) opened(e *filetree.Entry, fd int, st *unix.Statx_t) error {
	e.Flags = flagsOf(st)
	if flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS); err == nil {
		e.Flags = flags & flagsKept
	}
	if e.Type() == unix.S_IFREG && e.Size > 0 && int64(st.Blocks)*512 < e.Size {
		m, err := sparse.Scan(fd, e.Size)
		if err != nil {
			return err
		}
		if e.Data = m; m == nil {
			e.Data = sparse.Map{} // nothing but a hole
		}
	}
	var err error
	e.Xattrs, err = r.xattrs(
		func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) })
	return err
}

// unopened completes e, a name in dir, without opening it: what is neither a
// file nor a directory must not be opened. The attributes are reached through
// /proc/self/fd, since a handle that was not opened for reading has none.
func (r *inodeReader) unopened(e *filetree.Entry, dir int, st *unix.Statx_t) error {
	e.Flags = flagsOf(st)
	path := fmt.Sprintf("/proc/self/fd/%d/%s", dir, e.Name)
	var err error
	e.Xattrs, err = r.xattrs(
		func(b []byte) (int, error) { return unix.Llistxattr(path, b) },
		func(name string, b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
	if len(e.Xattrs) == 0 {
		return err
	}
	// Another inode may have been put under the name between the two looks.
	var now unix.Statx_t
	if statAt(dir, e.Name, &now) != nil || now.Ino != st.Ino || now.Ctime != st.Ctime {
		e.Xattrs = nil
		return filetree.ErrReplaced
	}
	return err
}

// foreignXattrs are attributes by which a filesystem shows how it stores a
// file: they mean nothing on another one.
var foreignXattrs = []string{"btrfs.", "bcachefs.", "bcachefs_effective.", "ceph.", "lustre.", "glusterfs.", "system.nfs4", "system.cifs", "system.smb3", "system.ntfs", "system.fuse"}

func (r *inodeReader) xattrs(list func([]byte) (int, error), get func(string, []byte) (int, error)) ([]filetree.Xattr, error) {
	n, err := grow(&r.list, list)
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing extended attributes: %w", err)
	}
	var xs []filetree.Xattr
	var failed error
	for name := range bytes.SplitSeq(bytes.TrimSuffix(r.list[:n], []byte{0}), []byte{0}) {
		name := string(name)
		if slices.ContainsFunc(foreignXattrs, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		n, err := grow(&r.value, func(b []byte) (int, error) { return get(name, b) })
		switch {
		case errors.Is(err, unix.ENODATA):
			continue // removed meanwhile, or listed by a filesystem that does not have it
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("reading extended attribute %q: %w", name, err))
			continue
		}
		xs = append(xs, filetree.Xattr{Name: name, Value: bytes.Clone(r.value[:n])})
	}
	return xs, failed
}

// grow calls f with *buf, made larger as long as f finds it too small.
func grow(buf *[]byte, f func([]byte) (int, error)) (int, error) {
	for {
		n, err := retry(func() (int, error) { return f(*buf) })
		if !errors.Is(err, unix.ERANGE) || len(*buf) >= 1<<20 {
			return n, err
		}
		*buf = make([]byte, 4*len(*buf))
	}
}
