package rootfs

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// snapshotPrefix begins the names of the snapshots taken for a capture, in
// the volume's root directory; seconds since 1970 and a process id follow.
const snapshotPrefix = ".instar-snapshot-"

// SnapshotKind says whether the volume is read from a snapshot.
type SnapshotKind string

// The kinds of quiescing. A filesystem is never frozen: nothing that this
// package does can hang the machine it captures.
const (
	SnapshotAuto SnapshotKind = ""     // from a snapshot where the volume is a btrfs subvolume, else live
	SnapshotNone SnapshotKind = "none" // live
)

const (
	btrfsSnapCreate  = 0x50009417 // BTRFS_IOC_SNAP_CREATE_V2
	btrfsSnapDestroy = 0x5000940f // BTRFS_IOC_SNAP_DESTROY
	btrfsReadOnly    = 1 << 1     // BTRFS_SUBVOL_RDONLY
	btrfsFirstInode  = 256        // of a subvolume: its root directory
	btrfsEmptyDir    = 2          // what a snapshot has in place of a subvolume within it
)

// snapshotStale is the age in seconds after which a snapshot that nobody has
// locked counts as left behind by a capture that was killed.
const snapshotStale = 60

// snapshot is a read-only btrfs snapshot of the volume.
type snapshot struct {
	live  int // handle of the volume; not owned
	fd    int
	name  string
	mtime [2]unix.Timespec // of the volume's root before and after
}

// takeSnapshot makes a snapshot of the subvolume that live is the root of.
func takeSnapshot(live int) (*snapshot, error) {
	s := &snapshot{live: live, name: fmt.Sprintf("%s%d-%d", snapshotPrefix, time.Now().Unix(), os.Getpid())}
	s.mtime[0] = mtimeOf(live)
	var a struct {
		fd      int64
		transid uint64
		flags   uint64
		unused  [4]uint64
		name    [4040]byte
	}
	a.fd, a.flags = int64(live), btrfsReadOnly
	copy(a.name[:], s.name)
	if err := ioctl(live, btrfsSnapCreate, unsafe.Pointer(&a)); err != nil {
		return nil, fmt.Errorf("creating a btrfs snapshot: %w", err)
	}
	s.mtime[1] = mtimeOf(live)
	var err error
	if s.fd, err = openat(live, s.name, openDir); err == nil {
		err = unix.Flock(s.fd, unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the btrfs snapshot: %w", err), s.close())
	}
	return s, nil
}

// close deletes the snapshot and gives the volume's root directory the
// modification time it had, so that capturing twice finds the same tree.
func (s *snapshot) close() error {
	if s.fd > 0 {
		unix.Close(s.fd)
	}
	if err := destroySnapshot(s.live, s.name); err != nil {
		return fmt.Errorf("deleting the btrfs snapshot %s (do it with `btrfs subvolume delete`): %w", s.name, err)
	}
	_ = unix.UtimesNanoAt(s.live, ".", []unix.Timespec{{Nsec: unix.UTIME_OMIT}, s.mtime[0]}, 0)
	return nil
}

func mtimeOf(fd int) unix.Timespec {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	}
	return st.Mtim
}

func destroySnapshot(live int, name string) error {
	var a struct {
		fd   int64
		name [4088]byte
	}
	copy(a.name[:], name)
	return ioctl(live, btrfsSnapDestroy, unsafe.Pointer(&a))
}

// sweepSnapshots deletes what captures that were killed left behind, and
// returns the names.
func sweepSnapshots(live int, now int64) ([]string, error) {
	fresh, err := openat(live, ".", openDir)
	if err != nil {
		return nil, err
	}
	names, err := readNames(fresh, make([]byte, 32<<10))
	unix.Close(fresh)
	var swept []string
	for _, name := range names {
		stamp, ok := strings.CutPrefix(name, snapshotPrefix)
		if !ok {
			continue
		}
		sec, _, _ := strings.Cut(stamp, "-")
		if made, e := strconv.ParseInt(sec, 10, 64); e != nil || made > now-snapshotStale {
			continue
		}
		fd, e := openat(live, name, openDir)
		if e != nil {
			continue
		}
		e = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		unix.Close(fd)
		if e == nil && destroySnapshot(live, name) == nil {
			swept = append(swept, name)
		}
	}
	return swept, err
}

// isSubvolume tells whether a directory is the root of a btrfs subvolume.
func isSubvolume(typ string, st *unix.Statx_t) bool {
	return typ == "btrfs" && st.Ino == btrfsFirstInode
}
