package fusefile

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Range is a part of a file.
type Range struct {
	Off, Len int64 // bytes; Len 0 is all to the end
}

// attachTries is how often a loop device that was free may be another's when
// it is asked for.
const attachTries = 64

// Attach makes a loop device of a part of a file. It goes away by itself when
// nobody uses it any more: the caller closes the device once it is mounted.
func Attach(path string, part Range, readOnly bool) (*os.File, error) {
	fail := func(err error) (*os.File, error) { return nil, fmt.Errorf("make a loop device of %s: %w", path, err) }
	mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR)
	if readOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer control.Close()
	for range attachTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fail(err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), mode, 0)
		if err != nil {
			return fail(err)
		}
		c := &unix.LoopConfig{Fd: uint32(f.Fd()), Size: 512, Info: unix.LoopInfo64{Flags: flags, Offset: uint64(part.Off), Sizelimit: uint64(part.Len)}}
		copy(c.Info.File_name[:], path)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), c)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return fail(err)
		}
	}
	return fail(unix.EBUSY)
}
