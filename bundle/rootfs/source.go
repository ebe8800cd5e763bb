package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// source opens what a Root's tree describes.
type source struct{ r *Root }

// leaseWait is how often and how long an open waits for a file server on this
// machine (Samba, NFS) to give a lease on the file back: the kernel makes it
// do so within 45 seconds.
const (
	leaseTries = 460
	leaseWait  = 100 * time.Millisecond
)

func (s source) Open(ctx context.Context, id filetree.ID) (filetree.File, error) {
	if content, ok := s.r.virtual[id]; ok {
		return virtualFile{bytes.NewReader(content)}, nil
	}
	t := s.r.Tree
	want := t.Attr(id)
	for try := 0; ; try++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var fd int
		err := s.r.dirs.with(t.Parent(id), func(dir int) (err error) {
			fd, err = openRegular(dir, t.Name(id), &want, func(fd int, st *unix.Statx_t) bool {
				return s.successor(st, id, &want) && (fd < 0 || s.attributes(fd, id))
			})
			return err
		})
		if errors.Is(err, unix.EWOULDBLOCK) && try < leaseTries {
			select {
			case <-time.After(leaseWait):
			case <-ctx.Done():
			}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("opening %q: %w", t.Path(id), classify(err))
		}
		_ = unix.Fadvise(fd, 0, 0, s.r.advice)
		return &liveFile{fd: fd, want: want, cold: want.Size >= polite && !cached(fd)}, nil
	}
}

// polite is the size in bytes from which a file that nobody had in memory is
// dropped from it after it was read: a capture must not push out of the page
// cache what the machine works with.
const polite = 1 << 20

// cached tells whether anything of a file is in the page cache; true if the
// kernel does not tell (before Linux 6.5).
func cached(fd int) bool {
	var st unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &st, 0)
	return err != nil || st.Cache > 0
}

// openRegular opens the regular file that want describes, or one that has taken
// its place and is accepted: of which fd is -1 as long as it is not open. It looks
// before it opens, so that devices are not opened and FIFOs' writers not woken,
// and once more after that.
func openRegular(dir int, name string, want *filetree.Attr, accept func(fd int, st *unix.Statx_t) bool) (int, error) {
	var st unix.Statx_t
	if err := statAt(dir, name, &st); err != nil {
		return -1, err
	}
	if !same(&st, want) && !accept(-1, &st) {
		return -1, filetree.ErrReplaced
	}
	fd, err := openat(dir, name, openFile)
	if err != nil {
		return -1, err
	}
	if err = statFD(fd, &st); err == nil && !same(&st, want) && !accept(fd, &st) {
		err = filetree.ErrReplaced
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func same(st *unix.Statx_t, want *filetree.Attr) bool {
	return device(st) == want.Dev && st.Ino == want.Ino && uint32(st.Mode)&unix.S_IFMT == want.Type()
}

// successor reports whether a file is the new version of another: programs
// that change a file carefully (/etc/passwd, the state of a daemon) write a new
// one and rename it over the old. The image is to have either version, and only
// the new one is left. Its metadata was planned from the old one's, so whoever
// may read it, and all else but its content, must be the same; and there must
// be neither holes, for what lies in them is not read, nor other names, which
// still lead to the old one.
func (s source) successor(st *unix.Statx_t, id filetree.ID, want *filetree.Attr) bool {
	now := attr(st)
	dense := s.r.Tree.Data(id)
	return now.Dev == want.Dev && now.Mode == want.Mode && want.Type() == unix.S_IFREG &&
		now.UID == want.UID && now.GID == want.GID &&
		st.Nlink == 1 && s.r.Tree.Names(id) == 1 &&
		len(dense) == 1 && dense[0].Len == want.Size
}

// attributes reports whether an open file has the extended attributes and
// flags that the tree has for id.
func (s source) attributes(fd int, id filetree.ID) bool {
	var st unix.Statx_t
	if statFD(fd, &st) != nil {
		return false
	}
	e := filetree.Entry{Attr: attr(&st)}
	e.Size = 0 // its holes are of no interest
	if newInodeReader().opened(&e, fd, &st) != nil || e.Flags != s.r.Tree.Attr(id).Flags {
		return false
	}
	slices.SortFunc(e.Xattrs, func(a, b filetree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return slices.EqualFunc(e.Xattrs, s.r.Tree.Xattrs(id), func(a, b filetree.Xattr) bool {
		return a.Name == b.Name && bytes.Equal(a.Value, b.Value)
	})
}

// liveFile is a regular file of the volume.
type liveFile struct {
	fd   int
	want filetree.Attr
	cold bool // it was not in the page cache when it was opened
}

func (f *liveFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		k, err := retry(func() (int, error) { return unix.Pread(f.fd, p[n:], off+int64(n)) })
		if err != nil {
			return n, fmt.Errorf("reading at byte %d: %w", off+int64(n), err)
		}
		if k == 0 {
			return n, io.EOF
		}
		n += k
	}
	return n, nil
}

func (f *liveFile) Changed() (bool, error) {
	var st unix.Statx_t
	if err := statFD(f.fd, &st); err != nil {
		return false, err
	}
	now := attr(&st)
	return now.Size != f.want.Size || now.Mtime != f.want.Mtime || now.Ctime != f.want.Ctime, nil
}

func (f *liveFile) Close() error {
	if f.cold {
		_ = unix.Fadvise(f.fd, 0, 0, unix.FADV_DONTNEED)
	}
	return unix.Close(f.fd)
}

// virtualFile is content that stands in the image in place of the volume's.
type virtualFile struct{ *bytes.Reader }

func (virtualFile) Changed() (bool, error) { return false, nil }
func (virtualFile) Close() error           { return nil }
