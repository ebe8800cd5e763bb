package rootfs

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of linux/fs.h that package unix does not have.
const (
	fsIocGetUUID  = 0x80111500 // FS_IOC_GETFSUUID, since Linux 6.9
	fsIocGetLabel = 0x81009431 // FS_IOC_GETFSLABEL, since 4.18
)

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	_, err := retry(func() (int, error) {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); e != 0 {
			return 0, e
		}
		return 0, nil
	})
	return err
}

// kernelUUID and kernelLabel ask the mounted filesystem itself: not every
// capture may open the device.
func kernelUUID(fd int) (uuid [16]byte, err error) {
	var u struct {
		len  uint8
		uuid [16]byte
	}
	if err = ioctl(fd, fsIocGetUUID, unsafe.Pointer(&u)); err == nil && u.len != 16 {
		err = unix.EOPNOTSUPP
	}
	return u.uuid, err
}

func kernelLabel(fd int) (string, error) {
	var b [256]byte
	err := ioctl(fd, fsIocGetLabel, unsafe.Pointer(&b))
	return cString(b[:]), err
}
