package quiesce

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// FIFREEZE and FITHAW of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// flush writes what a filesystem has in memory.
func flush(mount string) error {
	d, err := os.OpenFile(mount, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("flushing %s: %w", mount, err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("flushing %s: %w", mount, err)
	}
	return nil
}

// freeze brings a filesystem to rest: what was written is on its device, and
// whoever writes waits.
func freeze(mount string) error {
	if err := control(mount, fiFreeze); err != nil {
		return fmt.Errorf("freezing %s: %w", mount, err)
	}
	return nil
}

// thawLimit is how long thawing is waited for.
const thawLimit = 10 * time.Second

// thawAll lets filesystems go on; those that are not frozen are no error.
func thawAll(mounts []string) error {
	if len(mounts) == 0 {
		return nil
	}
	return sideBySide(mounts, time.After(thawLimit), func(m string) error {
		if err := control(m, fiThaw); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
		return nil
	})
}

// sideBySide thaws filesystems all at once, and waits for them until expired: a
// device that does not answer must not keep the others, or units, from going on.
// One that was not waited for may still be thawed.
func sideBySide(mounts []string, expired <-chan time.Time, thaw func(mount string) error) error {
	type end struct {
		mount string
		err   error
	}
	ends := make(chan end, len(mounts))
	waiting := make(map[string]bool, len(mounts))
	for _, m := range mounts {
		waiting[m] = true
		go func() { ends <- end{m, thaw(m)} }()
	}
	var errs []error
	for len(waiting) > 0 {
		select {
		case e := <-ends:
			delete(waiting, e.mount)
			if e.err != nil {
				errs = append(errs, fmt.Errorf("thawing %s: %w", e.mount, e.err))
			}
		case <-expired:
			for _, m := range slices.Sorted(maps.Keys(waiting)) {
				errs = append(errs, fmt.Errorf("thawing %s: no answer within %s", m, thawLimit))
			}
			return errors.Join(errs...)
		}
	}
	return errors.Join(errs...)
}

func control(mount string, request uint) error {
	d, err := os.OpenFile(mount, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NOATIME, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.IoctlSetInt(int(d.Fd()), request, 0)
}

// ErrUnsafe is wrapped where a filesystem must not be frozen.
var ErrUnsafe = errors.New("is not frozen")

// Safe reports whether filesystems can be frozen: those that the system itself
// writes to cannot, and none of the paths in writes, which the capture writes
// to. Without that rule a capture would wait for itself.
func Safe(mounts []string, writes ...string) error {
	system := []string{"/", "/usr", "/etc", "/var", "/var/log", "/var/lib", "/run", "/tmp", "/var/tmp", "/boot", "/dev"}
	for _, m := range mounts {
		var st, up unix.Stat_t
		var sfs unix.Statfs_t
		err := unix.Lstat(m, &st)
		if err == nil {
			err = unix.Lstat(filepath.Dir(m), &up)
		}
		if err == nil {
			err = unix.Statfs(m, &sfs)
		}
		switch {
		case err != nil:
			return fmt.Errorf("filesystem %s: %w", m, err)
		case st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Dev == up.Dev:
			return fmt.Errorf("%s %w: it is no mount point", m, ErrUnsafe)
		case sfs.Type == unix.BTRFS_SUPER_MAGIC:
			return fmt.Errorf("%s %w: btrfs is captured from a snapshot, which is of one moment anyway", m, ErrUnsafe)
		}
		for i, p := range append(slices.Clone(system), writes...) {
			var other unix.Stat_t
			if p == "" || unix.Stat(existing(p), &other) != nil || other.Dev != st.Dev {
				continue
			}
			if i < len(system) {
				return fmt.Errorf("%s %w: it holds %s, without which nothing could thaw it in time", m, ErrUnsafe, p)
			}
			return fmt.Errorf("%s %w: the capture itself writes to it (%s)", m, ErrUnsafe, p)
		}
	}
	return nil
}

// existing is a path, or the nearest above it that is there.
func existing(p string) string {
	for {
		if _, err := os.Lstat(p); err == nil || p == filepath.Dir(p) {
			return p
		}
		p = filepath.Dir(p)
	}
}
