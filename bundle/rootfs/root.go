package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
	Seen     Progress // what went in
	Fstab    []FstabChange
	Facts    Facts

	volume  string
	fd      int
	dirs    *dirCache
	virtual map[filetree.ID][]byte
}

// ErrNoMatch is wrapped by the error for a pattern of Options.Exclude or
// Options.Include that stands for nothing.
var ErrNoMatch = errors.New("matches nothing")

// Scan walks the volume. Files that cannot be read are listed in
// [Root.Problems] and never fail the scan. Needs root to see everything;
// Close the result.
func Scan(ctx context.Context, o Options) (*Root, error) {
	volume, err := volumeDir(o.Volume)
	if err != nil {
		return nil, err
	}
	fd, err := retry(func() (int, error) { return unix.Open(volume, openDir, 0) })
	if err != nil {
		return nil, fmt.Errorf("opening the volume %s: %w", volume, err)
	}
	r := &Root{volume: volume, fd: fd, virtual: map[filetree.ID][]byte{}}
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
	if err := statFD(r.fd, &st); err != nil {
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
	if r.Facts, err = gatherFacts(r.fd, mounts.root, mounts.root.at == r.volume); err != nil {
		r.Notes = append(r.Notes, fmt.Sprintf("what is known of the volume's filesystem is incomplete: %v", err))
	}
	w := &walker{ctx: ctx, o: o, root: r, filter: f, mounts: mounts, inodes: newInodeReader(), buf: make([]byte, 64<<10)}
	w.extra = map[string]map[string]*virtual{".": skeleton(), "dev": classicNodes()}
	if r.volume == "/" {
		f.addSwaps(activeSwaps())
	}
	if err := w.replaceFiles(); err != nil {
		return err
	}
	return w.walk(&st)
}

// Source opens the content of the tree's files until the Root is closed. It
// may be used by several goroutines at once.
func (r *Root) Source() filetree.Source { return source{r} }

// Close releases the volume.
func (r *Root) Close() error {
	if r.dirs != nil {
		r.dirs.close()
	}
	if err := unix.Close(r.fd); err != nil {
		return os.NewSyscallError("close", err)
	}
	return nil
}

func mountID(st *unix.Statx_t) uint64 {
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return 0
	}
	return st.Mnt_id
}
