package rootfs

import (
	"context"

	"golang.org/x/sys/unix"
)

// measure sums up what lies beneath the directory name in dir, on its own
// filesystem: allocated bytes of regular files, and names. It stops early,
// with what it has, when ctx ends.
func measure(ctx context.Context, dir int, name string) (bytes, files int64) {
	top, err := openat(dir, name, openDir)
	if err != nil {
		return -1, -1
	}
	var st unix.Statx_t
	if err := statFD(top, &st); err != nil {
		unix.Close(top)
		return -1, -1
	}
	dev, buf := device(&st), make([]byte, 32<<10)
	var sum func(fd, depth int)
	sum = func(fd, depth int) {
		defer unix.Close(fd)
		names, _ := readNames(fd, buf)
		for _, name := range names {
			if ctx.Err() != nil || statAt(fd, name, &st) != nil || device(&st) != dev {
				continue
			}
			files++
			switch uint32(st.Mode) & unix.S_IFMT {
			case unix.S_IFREG:
				bytes += int64(st.Blocks) * 512 / int64(max(st.Nlink, 1))
			case unix.S_IFDIR:
				if depth == maxDirs {
					continue
				}
				if sub, err := openat(fd, name, openDir); err == nil {
					sum(sub, depth+1)
				}
			}
		}
	}
	sum(top, 0)
	return bytes, files + 1
}
