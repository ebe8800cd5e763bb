// Package fusefile shows a block device as a file, by FUSE, so that a loop
// device makes a disk of it that the kernel mounts.
//
// In goes a [Device] and an empty directory; out come a file named "disk" in
// it and, with [Attach], a loop device. It touches the directory and /dev. It
// needs root, or fusermount3 for the file alone. It does not log, and is not for
// the initrd: there the kernel's own nbd does it.
package fusefile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Device is what is shown. Its methods are called concurrently, with ranges
// inside Size, which does not change.
type Device interface {
	Size() int64
	ReadOnly() bool
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Flush returns when what was written before is durable.
	Flush(ctx context.Context) error
	Discard(ctx context.Context, off, n int64) error
	WriteZeroes(ctx context.Context, off, n int64) error
}

// fileName is the file's name in its directory.
const fileName = "disk"

// File is a device that is shown.
type File struct {
	dir    string
	server *fuse.Server
	node   *node
}

// Mount shows a device in dir. told, if it is not nil, is told of each error of
// the device, which who reads the file knows as EIO only.
func Mount(dir string, dev Device, told func(error)) (*File, error) {
	if told == nil {
		told = func(error) {}
	}
	n := &node{dev: dev, told: told, idle: make(chan struct{})}
	root := &fs.Inode{}
	forever := time.Hour
	server, err := fs.Mount(dir, root, &fs.Options{
		EntryTimeout: &forever, AttrTimeout: &forever,
		MountOptions: fuse.MountOptions{
			FsName: "instar", Name: "instar", DirectMount: true, MaxWrite: 1 << 20, DisableXAttrs: true,
			DisableReadDirPlus: true, Logger: log.New(io.Discard, "", 0),
		},
		OnAdd: func(ctx context.Context) {
			root.AddChild(fileName, root.NewPersistentInode(ctx, n, fs.StableAttr{Mode: fuse.S_IFREG}), false)
		},
		Logger: log.New(io.Discard, "", 0),
	})
	if err != nil {
		return nil, fmt.Errorf("show the disk in %s by FUSE: %w", dir, err)
	}
	return &File{dir, server, n}, nil
}

// Path is the file's.
func (f *File) Path() string { return filepath.Join(f.dir, fileName) }

// Idle is closed when the last one that had the file open has closed it.
func (f *File) Idle() <-chan struct{} { return f.node.idle }

// Unmount ends it. It fails while the file is open.
func (f *File) Unmount() error {
	if err := f.server.Unmount(); err != nil {
		return fmt.Errorf("unmount %s: %w", f.dir, err)
	}
	f.server.Wait()
	return nil
}

// Abort ends it whoever has the file open: they get errors.
func (f *File) Abort() error {
	if err := unix.Unmount(f.dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", f.dir, err)
	}
	f.server.Wait()
	return nil
}

// node is the file.
type node struct {
	fs.Inode
	dev  Device
	told func(error)

	mu   sync.Mutex
	open int
	idle chan struct{}
	done bool
}

var (
	_ fs.NodeGetattrer = (*node)(nil)
	_ fs.NodeOpener    = (*node)(nil)
	_ fs.NodeReader    = (*node)(nil)
	_ fs.NodeWriter    = (*node)(nil)
	_ fs.NodeFsyncer   = (*node)(nil)
	_ fs.NodeAllocater = (*node)(nil)
	_ fs.NodeReleaser  = (*node)(nil)
	_ fs.NodeSetattrer = (*node)(nil)
)

func (n *node) attr(out *fuse.Attr) {
	out.Mode = fuse.S_IFREG | 0o600
	if n.dev.ReadOnly() {
		out.Mode = fuse.S_IFREG | 0o400
	}
	out.Size = uint64(n.dev.Size())
	out.Blocks = (out.Size + 511) / 512
	out.Nlink = 1
}

// Getattr tells the size.
func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.attr(&out.Attr)
	return 0
}

// Setattr takes what changes nothing: times.
func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && int64(size) != n.dev.Size() {
		return syscall.EPERM
	}
	n.attr(&out.Attr)
	return 0
}

// handle is one opening of the file: of one without a handle the end is not told.
type handle struct{ _ byte }

// Open counts who has it open.
func (n *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if n.dev.ReadOnly() && flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open++
	return &handle{}, fuse.FOPEN_KEEP_CACHE, 0
}

// Release tells when nobody has it open.
func (n *node) Release(context.Context, fs.FileHandle) syscall.Errno {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open--; n.open == 0 && !n.done {
		n.done = true
		close(n.idle)
	}
	return 0
}

// errno is what the kernel is told of an error.
func (n *node) errno(err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.Is(err, unix.ENOSPC):
		n.told(err)
		return syscall.ENOSPC
	}
	n.told(err)
	return syscall.EIO
}

// Read reads up to the end.
func (n *node) Read(ctx context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	p = p[:max(0, min(int64(len(p)), n.dev.Size()-off))]
	if err := n.dev.ReadAt(ctx, p, off); err != nil {
		return nil, n.errno(err)
	}
	return fuse.ReadResultData(p), 0
}

// Write writes what lies within.
func (n *node) Write(ctx context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	if off > n.dev.Size()-int64(len(p)) {
		return 0, syscall.ENOSPC
	}
	// What is half done when somebody interrupts it is done.
	if err := n.dev.WriteAt(context.WithoutCancel(ctx), p, off); err != nil {
		return 0, n.errno(err)
	}
	return uint32(len(p)), 0
}

// Fsync makes durable what was written.
func (n *node) Fsync(ctx context.Context, _ fs.FileHandle, _ uint32) syscall.Errno {
	return n.errno(n.dev.Flush(context.WithoutCancel(ctx)))
}

// Allocate zeroes and discards, as loop devices have it done.
func (n *node) Allocate(ctx context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	end := uint64(n.dev.Size())
	if off > end || size > end-off {
		return syscall.ENOSPC
	}
	ctx = context.WithoutCancel(ctx)
	switch mode {
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		return n.errno(n.dev.Discard(ctx, int64(off), int64(size)))
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		return n.errno(n.dev.WriteZeroes(ctx, int64(off), int64(size)))
	}
	return syscall.EOPNOTSUPP
}
