// Package inroot works on a root directory from outside as a process chrooted
// there would see it: neither ".." nor a symbolic link leads out of it.
//
// In goes the directory; what is touched lies below it. Files are replaced
// durably and never written through.
package inroot

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// MaxSmall bounds the files read whole: passwd, fstab, authorized_keys.
const MaxSmall = 4 << 20

// Root is a root directory seen only through a handle: every path is
// resolved as a process chrooted there would, so that neither ".." nor a
// symbolic link, absolute ones included, leads out of it.
type Root struct {
	dir      *os.File
	contexts *fileContexts // of the root's SELinux policy, once they are asked for
}

// Dir is the handle of the root itself, for resolving paths below it.
func (r *Root) Dir() *os.File { return r.dir }

// Open opens the root directory dir.
func Open(dir string) (*Root, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening root directory %q: %w", dir, err)
	}
	return &Root{dir: os.NewFile(uintptr(fd), dir)}, nil
}

// Close releases the handle.
func (r *Root) Close() error { return r.dir.Close() }

// OpenDir opens a directory for use as a handle, following links inside the root.
func (r *Root) OpenDir(name string) (*os.File, error) {
	return Openat2(r.dir, name, unix.O_RDONLY|unix.O_DIRECTORY, 0, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

// OpenFile opens a regular file for reading. A FIFO or device in its place is
// refused without being waited for.
func (r *Root) OpenFile(name string) (*os.File, error) {
	f, err := Openat2(r.dir, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &os.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReadFile reads a regular file of at most MaxSmall bytes.
func (r *Root) ReadFile(name string) ([]byte, error) {
	f, err := r.OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadSmall(f)
}

// ReadSmall reads an open file of at most MaxSmall bytes to its end.
func ReadSmall(f *os.File) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, MaxSmall+1))
	if err == nil && len(data) > MaxSmall {
		err = &os.PathError{Op: "read", Path: f.Name(), Err: fmt.Errorf("longer than %d bytes", MaxSmall)}
	}
	return data, err
}

// Exists tells whether name leads to anything at all inside the root.
func (r *Root) Exists(name string) bool {
	f, err := Openat2(r.dir, name, unix.O_PATH, 0, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// Mkdir makes the directory name and those above it, owned by root and
// labelled.
func (r *Root) Mkdir(name string, perm uint32) error {
	at := ""
	for _, part := range strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/") {
		parent, err := r.OpenDir("/" + at)
		if err != nil {
			return err
		}
		err = unix.Mkdirat(int(parent.Fd()), part, perm)
		at = path.Join(at, part)
		switch {
		case errors.Is(err, unix.EEXIST):
			err = nil
		case err != nil:
			err = &os.PathError{Op: "mkdir", Path: "/" + at, Err: err}
		default:
			err = r.labelMade(parent, part, "/"+at)
		}
		parent.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// labelMade labels the directory base of parent, just made.
func (r *Root) labelMade(parent *os.File, base, name string) error {
	made, err := Openat2(parent, base, unix.O_RDONLY|unix.O_DIRECTORY, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer made.Close()
	return Label(made, parent, r.LabelFor(name, true))
}

// WriteFile replaces name by a new file, durably: whatever name was, a link
// included, is replaced and not written through. The directory must exist.
func (r *Root) WriteFile(name string, data []byte, perm uint32) error {
	dir, err := r.OpenDir(path.Dir("/" + name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return ReplaceAt(dir, path.Base(name), data, perm, r.LabelFor(name, false))
}

// Symlink makes name a symbolic link to target, in place of what is there.
func (r *Root) Symlink(target, name string) error {
	dir, err := r.OpenDir(path.Dir("/" + name))
	if err != nil {
		return err
	}
	defer dir.Close()
	temp := tempName(path.Base(name))
	if err := unix.Symlinkat(target, int(dir.Fd()), temp); err != nil {
		return &os.PathError{Op: "symlink", Path: name, Err: err}
	}
	if err := unix.Renameat(int(dir.Fd()), temp, int(dir.Fd()), path.Base(name)); err != nil {
		unix.Unlinkat(int(dir.Fd()), temp, 0)
		return &os.PathError{Op: "rename", Path: name, Err: err}
	}
	return dir.Sync()
}

// Remove removes a file or link; that it is absent already is no error.
func (r *Root) Remove(name string) error {
	dir, err := r.OpenDir(path.Dir("/" + name))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Unlinkat(int(dir.Fd()), path.Base(name), 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlink", Path: name, Err: err}
	}
	return dir.Sync()
}

func tempName(base string) string {
	random := make([]byte, 8)
	rand.Read(random)
	return "." + base + "." + hex.EncodeToString(random)
}

// ReplaceAt puts data under the name base of dir: a new file in dir, synced,
// renamed over base, and dir synced. The file belongs to the calling thread's
// filesystem user. In a directory with an SELinux label it has the old file's,
// else label, else the directory's.
func ReplaceAt(dir *os.File, base string, data []byte, perm uint32, label string) (err error) {
	temp := tempName(base)
	fd, err := unix.Openat(int(dir.Fd()), temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: path.Join(dir.Name(), temp), Err: err}
	}
	f := os.NewFile(uintptr(fd), path.Join(dir.Name(), temp))
	defer func() {
		f.Close()
		if err != nil {
			unix.Unlinkat(int(dir.Fd()), temp, 0)
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, perm); err != nil {
		return &os.PathError{Op: "chmod", Path: f.Name(), Err: err}
	}
	if old := labelThere(dir, base); old != "" {
		label = old
	}
	if err := Label(f, dir, label); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Renameat(int(dir.Fd()), temp, int(dir.Fd()), base); err != nil {
		return &os.PathError{Op: "rename", Path: path.Join(dir.Name(), base), Err: err}
	}
	return dir.Sync()
}

// Openat2 opens name below the handle dir by openat2(2); resolve is a set of
// unix.RESOLVE_ flags.
func Openat2(dir *os.File, name string, flags int, mode, resolve uint64) (*os.File, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Mode: mode, Resolve: resolve}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), name, &how)
		// EAGAIN: something was renamed or mounted while a ".." was resolved.
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat2", Path: path.Join(dir.Name(), name), Err: err}
		}
		return os.NewFile(uintptr(fd), path.Join(dir.Name(), name)), nil
	}
}

// IsFile tells whether name is a regular file itself, not a link to one.
func (r *Root) IsFile(name string) bool {
	dir, err := r.OpenDir(path.Dir("/" + name))
	if err != nil {
		return false
	}
	defer dir.Close()
	var st unix.Stat_t
	err = unix.Fstatat(int(dir.Fd()), path.Base(name), &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}
