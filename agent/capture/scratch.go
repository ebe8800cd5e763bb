package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/sparse"
)

// The scratch path: filesystems that cannot be streamed are made by their own
// mkfs in a sparse file, mounted by the kernel and filled from the tree.

// leastScratch is the smallest filesystem made, in bytes: mkfs.xfs wants 300 MiB.
const leastScratch = 512 << 20

func (o *VolumeOptions) scratched() bool { return o.FS == "xfs" || o.FS == "btrfs" }

// scratch is a filesystem in a file.
type scratch struct {
	kind  string
	dir   string // where the file and the mount point are made
	work  string // the directory made in it
	path  string
	size  int64 // bytes
	need  int64 // bytes of disk it is expected to take
	label string
	uuid  [16]byte
	file  *os.File
	m     sparse.Map
}

// layOutScratch settles sizes and refuses what the disk has no room for.
func (v *Volume) layOutScratch(o VolumeOptions, fo ext4.Options) error {
	s := &scratch{kind: o.FS, dir: o.Scratch, label: fo.Label, uuid: fo.UUID}
	if s.dir == "" {
		s.dir = os.TempDir()
	}
	if most := map[string]int{"xfs": 12, "btrfs": 255}[s.kind]; len(s.label) > most {
		if o.Label != nil {
			return fmt.Errorf("%w: label %q has more than the %d bytes that %s has room for", ErrOption, s.label, most, s.kind)
		}
		s.label = s.label[:most]
	}
	if s.uuid == [16]byte{} {
		s.uuid = pathUUID(o.Root.Volume)
	}
	content := v.Root.Seen.Bytes + int64(v.Root.Tree.Len())*1024
	s.need = content + content/8 + 256<<20
	s.size = fo.Size
	if least := max(s.need, leastScratch); s.size == 0 || o.SizeIfFits && s.size < least {
		s.size = (max(least+content/8, leastScratch) + 1<<20 - 1) &^ (1<<20 - 1)
	}
	if s.size < leastScratch || s.size < content {
		return fmt.Errorf("%w: %s of %d MiB has no room for %d MiB of content; at least %d MiB are needed", ErrOption,
			s.kind, s.size>>20, content>>20, max(content, leastScratch)>>20)
	}
	kind := o.Partition
	if kind == "" {
		kind = disk.None
	}
	// only the size is true yet; the map follows when the filesystem is made
	var err error
	if v.Disk, err = disk.Wrap(kind, s.size, nil, s.uuid); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("looking for scratch space in %s: %w", s.dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	v.report.Note(fmt.Sprintf("--fs %s needs about %d MiB of scratch space in %s, which has %d MiB free", s.kind, s.need>>20, s.dir, free>>20))
	if free < s.need {
		return fmt.Errorf("%w: not enough scratch space in %s: name another directory with --scratch, or use ext4, which needs none", ErrOption, s.dir)
	}
	v.scratch = s
	return nil
}

// makeScratch makes and fills the filesystem, once.
func (v *Volume) makeScratch(ctx context.Context) error {
	s := v.scratch
	if s.file != nil {
		return nil
	}
	var err error
	if s.work, err = os.MkdirTemp(s.dir, "instar-scratch-"); err != nil {
		return fmt.Errorf("making scratch space: %w", err)
	}
	s.path = filepath.Join(s.work, s.kind)
	mnt := filepath.Join(s.work, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return fmt.Errorf("making scratch space: %w", err)
	}
	if s.file, err = os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return fmt.Errorf("making scratch space: %w", err)
	}
	if err := s.file.Truncate(s.size); err != nil {
		return fmt.Errorf("making scratch space: %w", err)
	}
	if err := s.mkfs(ctx); err != nil {
		return err
	}
	v.report.Phase("filling "+s.path, v.Root.Seen.Bytes)
	if err := s.mounted(ctx, mnt, func() error { return v.fill(ctx, mnt) }); err != nil {
		return err
	}
	if s.kind == "btrfs" {
		// only now: the kernel mixes up two mounted btrfs of one UUID
		if err := command(ctx, "btrfstune", "-f", "-U", FormatUUID(s.uuid), s.path); err != nil {
			return err
		}
	}
	if s.m, err = sparse.Scan(int(s.file.Fd()), s.size); err != nil {
		return err
	}
	kind := v.opts.Partition
	if kind == "" {
		kind = disk.None
	}
	v.Disk, err = disk.Wrap(kind, s.size, s.m, s.uuid)
	return err
}

func (s *scratch) mkfs(ctx context.Context) error {
	args := []string{"-q", "-f"}
	if s.label != "" {
		args = append(args, "-L", s.label)
	}
	if s.kind == "xfs" {
		args = append(args, "-m", "uuid="+FormatUUID(s.uuid))
	}
	return command(ctx, "mkfs."+s.kind, append(args, s.path)...)
}

// mounted runs f while the filesystem is mounted, in a mount namespace that
// only f's thread is in: whatever ends this process unmounts it.
func (s *scratch) mounted(ctx context.Context, mnt string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("making a mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("making a mount namespace: %w", err)
			}
			opts := "loop"
			if s.kind == "xfs" {
				opts += ",nouuid"
			}
			if err := command(ctx, "mount", "-t", s.kind, "-o", opts, s.path, mnt); err != nil {
				return err
			}
			err := f()
			if uerr := unix.Unmount(mnt, 0); uerr != nil {
				err = errors.Join(err, fmt.Errorf("unmounting the scratch filesystem: %w", uerr))
			}
			return err
		}()
	}()
	return <-done
}

// command runs a program; its error has what the program said.
func command(ctx context.Context, name string, args ...string) error {
	var said bytes.Buffer
	c := exec.CommandContext(ctx, name, args...)
	c.Stdout, c.Stderr = &said, &said
	if err := c.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("%w: %s is not installed", ErrOption, name)
		}
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(said.String()))
	}
	return nil
}

// write writes the filesystem's data, holes left out.
func (s *scratch) write(ctx context.Context, w io.Writer) error {
	_, err := io.CopyBuffer(w, ctxReader{ctx, sparse.NewReader(s.file, slices.Clone(s.m))}, make([]byte, 1<<20))
	return err
}

func (s *scratch) remove() error {
	var err error
	if s.file != nil {
		err = s.file.Close()
	}
	if s.work != "" {
		err = errors.Join(err, os.RemoveAll(s.work))
	}
	return err
}
