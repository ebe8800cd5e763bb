package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Class says why something stays out of an image.
type Class string

// The classes of an [Omission].
const (
	Fixed      Class = "fixed"      // contents that never belong in an image: /proc, /tmp …
	Own        Class = "own"        // what this capture reads and makes: keys, destination, Instar's state
	Excluded   Class = "excluded"   // Options.Exclude
	Secret     Class = "secret"     // keys, credentials, histories
	Machine    Class = "machine"    // state that must not be the same on two machines
	Leftover   Class = "leftover"   // editors' swap and backup files
	Swap       Class = "swap"       // swap files
	Pseudo     Class = "pseudo"     // mounts of the kernel's own filesystems
	NotLocal   Class = "not local"  // mounts of other machines' files, of memory, of images
	Duplicate  Class = "duplicate"  // mounts of what is captured elsewhere
	Unstorable Class = "unstorable" // names or types that no image can hold
)

// Omission is one file or directory that stays out, with all beneath it.
type Omission struct {
	Path  string // relative to the volume: "etc/ssh/ssh_host_rsa_key"
	Class Class
	Rule  string // the pattern or the finding that decided
	Why   string // in words, for people
	Bytes int64  // content left out; -1 if it was not measured (see Options.Measure)
	Files int64  // files and directories left out; -1 if not measured
	// Kept is what stands in its place: "" nothing, else "empty file" or
	// "empty directory".
	Kept string
}

// Problem is something in the volume that could not be read as it should.
// The walk goes on; the file is in the tree as far as it is known.
type Problem struct {
	Path string // relative to the volume
	Err  error
}

func (p Problem) Error() string { return fmt.Sprintf("%s: %v", display(p.Path), p.Err) }

// Unwrap gives the cause.
func (p Problem) Unwrap() error { return p.Err }

// Progress is how far a walk has come.
type Progress struct {
	Files int64 // names seen
	Bytes int64 // data of the files among them, holes not counted
}

// Options say what to capture. The zero value captures / with the filter on.
type Options struct {
	// Volume is the directory to capture; "" is "/".
	Volume string
	// All also captures filesystems that are not on local disks: network
	// filesystems, tmpfs, FUSE. The kernel's own (proc, sysfs …) never.
	All bool
	// Exclude are patterns of what stays out with all beneath it. A pattern
	// with a slash is a path, relative to the volume or, if it lies there, as
	// the machine has it; one without is a path from the volume's root if it
	// exists there, else a name anywhere. Each must stand for something.
	Exclude []string
	// ExcludeLoose are more of these, which may stand for nothing.
	ExcludeLoose []string
	// Include are patterns of what goes in whatever Exclude, the filter and
	// the fixed exclusions say, with all beneath it. Each must stand for something.
	Include []string
	// NoFilter turns the filter of secrets and machine state off.
	NoFilter bool
	// Never are absolute paths on this machine, their last component possibly
	// with wildcards, that stay out under all circumstances: key files and
	// the capture's own output. The files found there when the scan begins are
	// left out under any other name, too.
	Never []string
	// Fstab, if not nil, becomes etc/fstab as it is; else FstabKind says what
	// becomes of it. The old one stays as etc/fstab.old if it is replaced.
	Fstab     []byte
	FstabKind FstabKind
	// RootSpec is what the root's line of etc/fstab shall begin with in the
	// image ("UUID=…", "LABEL=…"); "" is the UUID of the volume's filesystem,
	// for an image that keeps it. RootType is its type; "" is ext4.
	RootSpec, RootType string
	// GrubConfig, if not nil, becomes boot/grub/menu.lst, and
	// boot/grub/grub.conf a link to it.
	GrubConfig []byte
	// Snapshot says whether the volume is read from a snapshot.
	Snapshot SnapshotKind
	// Snapshotted is called when a snapshot has been taken: what happens to the
	// volume after that is not seen. nil for nobody.
	Snapshotted func()
	// Script, if not nil, is run before the walk and may change the image.
	Script *Script
	// NoReadAhead keeps the kernel from reading more of a file than was asked for,
	// so that who reads slowly leaves the disk's queue to others.
	NoReadAhead bool
	// Measure makes omitted directories be walked to learn their size.
	Measure bool
	// Report, if not nil, is called now and then during the walk.
	Report func(Progress)
}

// Root is a captured root: what goes into the image, and how to read it.
type Root struct {
	Tree     *filetree.Tree
	LeftOut  []Omission // in the order they were found
	Problems []Problem
	Notes    []string // what an operator should know: one sentence each
	Seen     Progress // how much the walk saw
	Fstab    []FstabChange
	Facts    Facts

	volume  string
	live    int // handle of the volume
	fd      int // handle of what is walked in its place
	snap    *snapshot
	view    *overlay
	dirs    *dirCache
	virtual map[filetree.ID][]byte
	advice  int // of fadvise, for files that are opened
}

// ErrNoMatch is wrapped by the error for a pattern of Options.Exclude or
// Options.Include that stands for nothing.
var ErrNoMatch = errors.New("matches nothing")

// ErrNoFiles is wrapped by the error for a volume like /proc.
var ErrNoFiles = errors.New("the volume shows the kernel's state, it holds no files to capture")

// Scan walks the volume. Files that cannot be read are listed in
// [Root.Problems] and never fail the scan. Needs root to see everything;
// Close the result.
func Scan(ctx context.Context, o Options) (*Root, error) {
	volume, err := volumeDir(o.Volume)
	if err != nil {
		return nil, err
	}
	live, err := retry(func() (int, error) { return unix.Open(volume, openDir, 0) })
	if err != nil {
		return nil, fmt.Errorf("opening the volume %s: %w", volume, err)
	}
	// The advice doubles the read-ahead; it costs nothing when everything is cached.
	r := &Root{volume: volume, live: live, fd: live, virtual: map[filetree.ID][]byte{}, advice: unix.FADV_SEQUENTIAL}
	if o.NoReadAhead {
		r.advice = unix.FADV_RANDOM
	}
	if err := r.scan(ctx, &o); err != nil {
		return nil, errors.Join(fmt.Errorf("scanning %s: %w", volume, err), r.Close())
	}
	return r, nil
}

func volumeDir(dir string) (string, error) {
	if dir == "" {
		dir = "/"
	}
	abs, err := filepath.Abs(dir)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return "", fmt.Errorf("finding the volume %s: %w", dir, err)
	}
	return abs, nil
}

func (r *Root) scan(ctx context.Context, o *Options) error {
	f, err := newFilter(o, r.volume)
	if err != nil {
		return err
	}
	var st unix.Statx_t
	if err := statFD(r.live, &st); err != nil {
		return err
	}
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("reading what is mounted: %w", err)
	}
	mounts, err := newMountTable(infos, r.volume, mountID(&st), o.All, f.leavesOut)
	if err != nil {
		return err
	}
	if r.Facts, err = gatherFacts(r.live, mounts.root, mounts.root.at == r.volume); err != nil {
		r.Notes = append(r.Notes, fmt.Sprintf("what is known of the volume's filesystem is incomplete: %v", err))
	}
	if r.volume == "/" {
		f.addSwaps(activeSwaps())
	}
	w := &walker{ctx: ctx, o: o, root: r, filter: f, mounts: mounts, inodes: newInodeReader(), buf: make([]byte, 64<<10)}
	w.extra = map[string]map[string]*virtual{".": skeleton(), "dev": classicNodes()}
	if err := w.quiesce(&st); err != nil {
		return err
	}
	if err := w.replaceFiles(); err != nil {
		return err
	}
	return w.walk(&st)
}

// quiesce decides what is walked: a snapshot, the view a script has changed,
// or the volume as it lives. st becomes that of the walked root.
func (w *walker) quiesce(st *unix.Statx_t) error {
	r, o := w.root, w.o
	switch {
	case o.Script != nil:
		view, err := runScript(w.ctx, o.Script, r.volume, w.mounts)
		if err != nil {
			return err
		}
		r.view, r.fd = view, view.fd
		if w.mounts, err = w.mounts.within(view.infos, view.merged, o.All, w.filter.leavesOut); err != nil {
			return err
		}
		if err := w.filter.addNever([]string{view.scratch}, r.volume); err != nil {
			return err
		}
		r.Notes = append(r.Notes, "read live: files that change meanwhile are named, but no moment in time is captured")
	case o.Snapshot == SnapshotAuto && isSubvolume(w.mounts.root.typ, st):
		swept, err := sweepSnapshots(r.live, time.Now().Unix())
		for _, name := range swept {
			r.Notes = append(r.Notes, "deleted the snapshot "+name+" that an interrupted capture left")
		}
		if err == nil {
			r.snap, err = takeSnapshot(r.live)
		}
		if err != nil {
			r.Notes = append(r.Notes, fmt.Sprintf("read live, since no snapshot could be taken: %v", err))
			return nil
		}
		if o.Snapshotted != nil {
			o.Snapshotted()
		}
		w.filter.neverIn(device(st), r.snap.fd)
		r.fd = r.snap.fd
		r.Notes = append(r.Notes, "read from a btrfs snapshot: the volume as it was at one moment")
	default:
		r.Notes = append(r.Notes, "read live: files that change meanwhile are named, but no moment in time is captured")
		return nil
	}
	return statFD(r.fd, st)
}

// Volume is the absolute path of the directory that was scanned.
func (r *Root) Volume() string { return r.volume }

// Virtual reports whether a file's content is made for the image and not the
// volume's.
func (r *Root) Virtual(id filetree.ID) bool {
	_, ok := r.virtual[id]
	return ok
}

// Source opens the content of the tree's files until the Root is closed. It
// may be used by several goroutines at once.
func (r *Root) Source() filetree.Source { return source{r} }

// Close releases the volume and deletes what was made to read it: the
// snapshot, the script's view. Closing again does nothing.
func (r *Root) Close() error {
	if r.live < 0 {
		return nil
	}
	var errs []error
	if r.dirs != nil {
		r.dirs.close()
	}
	if r.snap != nil {
		errs = append(errs, r.snap.close())
	}
	if r.view != nil {
		errs = append(errs, r.view.close())
	}
	errs = append(errs, os.NewSyscallError("close", unix.Close(r.live)))
	r.live, r.fd = -1, -1
	return errors.Join(errs...)
}

func mountID(st *unix.Statx_t) uint64 {
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return 0
	}
	return st.Mnt_id
}
