package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
)

// filler makes the files of a tree in a mounted filesystem. All is done
// relative to directory handles, so paths may be of any depth.
type filler struct {
	v     *Volume
	t     *filetree.Tree
	src   filetree.Source
	root  int
	made  map[filetree.ID]string // where files of several names were made first
	flags []filetree.ID          // to be set last: some forbid all change
	buf   []byte
}

// keptFlags are the inode flags of FS_IOC_SETFLAGS that all filesystems know.
const keptFlags = unix.STATX_ATTR_IMMUTABLE | unix.STATX_ATTR_APPEND | unix.STATX_ATTR_NODUMP | flagSync | flagNoAtime

const (
	flagSync    = 0x8  // FS_SYNC_FL
	flagNoAtime = 0x80 // FS_NOATIME_FL
)

func (v *Volume) fill(ctx context.Context, mnt string) error {
	fd, err := unix.Open(mnt, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the scratch filesystem: %w", err)
	}
	defer unix.Close(fd)
	f := &filler{v: v, t: v.Root.Tree, src: v.source(), root: fd, made: map[filetree.ID]string{}, buf: make([]byte, 1<<20)}
	if err := f.dir(ctx, fd, "", filetree.Root); err != nil {
		return err
	}
	for _, id := range f.flags {
		if err := f.setFlags(id); err != nil {
			v.report.Warn(f.t.Path(id), "its inode flags are not in the image: "+err.Error())
		}
	}
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("writing the scratch filesystem: %w", err)
	}
	return nil
}

// dir makes the children of a directory, then sets its own attributes.
func (f *filler) dir(ctx context.Context, fd int, path string, id filetree.ID) error {
	for name, child := range f.t.Children(id) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.entry(ctx, fd, path+string(name), string(name), child); err != nil {
			return fmt.Errorf("making %q: %w", f.t.Path(child), err)
		}
	}
	return f.attributes(fd, "", id)
}

func (f *filler) entry(ctx context.Context, dir int, path, name string, id filetree.ID) error {
	a := f.t.Attr(id)
	if f.t.Names(id) > 1 {
		if first, ok := f.made[id]; ok {
			return unix.Linkat(f.root, first, dir, name, 0)
		}
		f.made[id] = path
	}
	switch a.Type() {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(dir, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return f.dir(ctx, fd, path+"/", id)
	case unix.S_IFREG:
		return f.regular(ctx, dir, name, id)
	case unix.S_IFLNK:
		if err := unix.Symlinkat(string(f.t.Target(id)), dir, name); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(dir, name, a.Type()|0o600, int(unix.Mkdev(a.Major, a.Minor))); err != nil {
			return err
		}
	}
	return f.attributes(dir, name, id)
}

// regular copies a file's data. What has become of a file since the scan is
// told as for a streamed image; only a failing write is an error.
func (f *filler) regular(ctx context.Context, dir int, name string, id filetree.ID) error {
	size := f.t.Size(id)
	told := func(kind ext4.ChangeKind, off, lost int64, err error) {
		f.v.changed(ext4.Change{ID: id, Path: f.t.Path(id), Kind: kind, Off: off, Lost: lost, Err: err})
	}
	var src filetree.File
	if size > 0 {
		var err error
		src, err = f.src.Open(ctx, id)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, filetree.ErrVanished), errors.Is(err, filetree.ErrReplaced):
			kind := ext4.Vanished
			if errors.Is(err, filetree.ErrReplaced) {
				kind = ext4.Replaced
			}
			told(kind, 0, 0, err)
			delete(f.made, id)
			return nil
		case err != nil:
			told(ext4.Unreadable, 0, size, err)
		default:
			defer src.Close()
		}
	}
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(fd), name)
	defer out.Close()
	if src != nil {
		if size, err = f.copy(ctx, out, src, id, told); err != nil {
			return err
		}
	} else {
		size = 0
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	return f.attributes(fd, "", id)
}

// copy copies the data of a file and returns the size it has in the image.
func (f *filler) copy(ctx context.Context, out *os.File, src filetree.File, id filetree.ID, told func(ext4.ChangeKind, int64, int64, error)) (int64, error) {
	size := f.t.Size(id)
	for _, e := range f.t.Data(id) {
		for off := e.Off; off < e.End(); {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			n, err := src.ReadAt(f.buf[:min(int64(len(f.buf)), e.End()-off)], off)
			if _, werr := out.WriteAt(f.buf[:n], off); werr != nil {
				return 0, werr
			}
			f.v.report.Add(int64(n))
			off += int64(n)
			switch {
			case err == nil:
			case errors.Is(err, io.EOF):
				if off < e.End() {
					told(ext4.Shrank, off, 0, nil)
					return off, nil
				}
			default:
				told(ext4.Unreadable, off, e.End()-off, err)
				off = e.End()
			}
		}
	}
	if changed, err := src.Changed(); err != nil || changed {
		told(ext4.Modified, 0, 0, err)
	}
	return size, nil
}

// attributes sets owner, mode, extended attributes and times of dir/name, or
// of dir itself where name is "". The order matters: a change of owner clears
// set-id bits and capabilities.
func (f *filler) attributes(dir int, name string, id filetree.ID) error {
	a := f.t.Attr(id)
	path := "/proc/self/fd/" + strconv.Itoa(dir)
	at := func(err error, what string) error {
		if err != nil {
			return fmt.Errorf("setting the %s: %w", what, err)
		}
		return nil
	}
	setXattr := unix.Setxattr
	if name != "" {
		path += "/" + name
		setXattr = unix.Lsetxattr
		if err := at(unix.Fchownat(dir, name, int(a.UID), int(a.GID), unix.AT_SYMLINK_NOFOLLOW), "owner"); err != nil {
			return err
		}
		if a.Type() != unix.S_IFLNK {
			if err := at(unix.Fchmodat(dir, name, a.Mode&0o7777, 0), "mode"); err != nil {
				return err
			}
		}
	} else {
		if err := at(unix.Fchown(dir, int(a.UID), int(a.GID)), "owner"); err != nil {
			return err
		}
		if err := at(unix.Fchmod(dir, a.Mode&0o7777), "mode"); err != nil {
			return err
		}
	}
	for _, x := range f.t.Xattrs(id) {
		if err := setXattr(path, x.Name, x.Value, 0); err != nil {
			f.v.report.Warn(f.t.Path(id), fmt.Sprintf("its attribute %s is not in the image: %v", x.Name, err))
		}
	}
	if a.Flags&keptFlags != 0 && (a.Type() == unix.S_IFREG || a.Type() == unix.S_IFDIR) {
		f.flags = append(f.flags, id)
	}
	// atime := mtime, as in streamed images
	ts := []unix.Timespec{{Sec: a.Mtime.Sec, Nsec: int64(a.Mtime.Nsec)}, {Sec: a.Mtime.Sec, Nsec: int64(a.Mtime.Nsec)}}
	if name == "" {
		return at(unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, 0), "times")
	}
	return at(unix.UtimesNanoAt(dir, name, ts, unix.AT_SYMLINK_NOFOLLOW), "times")
}

func (f *filler) setFlags(id filetree.ID) error {
	fd, err := unix.Openat(f.root, f.t.Path(id), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	flags := f.t.Attr(id).Flags & keptFlags
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_SETFLAGS, uintptr(unsafe.Pointer(&flags)))
	if errno != 0 {
		return errno
	}
	return nil
}
