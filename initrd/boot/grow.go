package boot

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of ext4.h, btrfs.h and xfs_fs.h. golang.org/x/sys has none of them.
const (
	ext4ResizeFS  = 0x40086610 // EXT4_IOC_RESIZE_FS, a number of blocks
	btrfsResize   = 0x50009403 // BTRFS_IOC_RESIZE, a btrfsVolArgs
	xfsGeometryV1 = 0x80705864 // XFS_IOC_FSGEOMETRY_V1, an xfsGeometry
	xfsGrowData   = 0x4010586e // XFS_IOC_FSGROWFSDATA, an xfsGrow
)

// xfsGeometry is struct xfs_fsop_geom_v1.
type xfsGeometry struct {
	blockSize, rtextSize, agBlocks, agCount, logBlocks, sectSize, inodeSize, imaxPct uint32
	dataBlocks                                                                       uint64
	rest                                                                             [72]byte
}

// xfsGrow is struct xfs_growfs_data.
type xfsGrow struct {
	newBlocks uint64
	imaxPct   uint32 // of the space that may be inodes; not to be changed
	_         uint32
}

// btrfsVolArgs is struct btrfs_ioctl_vol_args.
type btrfsVolArgs struct {
	fd   int64
	name [4088]byte
}

// grow makes the mounted root as large as its device, by the filesystem's own
// request to the kernel. It is not worth failing a boot for.
func (m *machine) grow(d device) {
	var before, after unix.Statfs_t
	if err := unix.Statfs(rootDir, &before); err != nil {
		m.say("warning: growing the root: %v", err)
		return
	}
	if err := growTo(d.Kind, rootDir, d.Size); err != nil {
		m.say("warning: growing the root to %d bytes: %v", d.Size, err)
		return
	}
	if err := unix.Statfs(rootDir, &after); err == nil && after.Blocks > before.Blocks {
		m.say("root: grown from %d to %d MiB", before.Blocks*uint64(before.Bsize)>>20, after.Blocks*uint64(after.Bsize)>>20)
	}
}

// growTo grows the filesystem mounted at dir, on a device of size bytes.
func growTo(kind, dir string, size int64) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	switch kind {
	case "ext4":
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			return err
		}
		blocks := uint64(size) / uint64(st.Bsize)
		return ioctl(f, ext4ResizeFS, unsafe.Pointer(&blocks))
	case "btrfs":
		args := btrfsVolArgs{}
		copy(args.name[:], "max")
		return ioctl(f, btrfsResize, unsafe.Pointer(&args))
	case "xfs":
		var g xfsGeometry
		if err := ioctl(f, xfsGeometryV1, unsafe.Pointer(&g)); err != nil {
			return err
		}
		grow := xfsGrow{newBlocks: uint64(size) / uint64(g.blockSize), imaxPct: g.imaxPct}
		if grow.newBlocks <= g.dataBlocks {
			return nil
		}
		return ioctl(f, xfsGrowData, unsafe.Pointer(&grow))
	}
	return fmt.Errorf("%s: %w", kind, errors.ErrUnsupported)
}

func ioctl(f *os.File, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
