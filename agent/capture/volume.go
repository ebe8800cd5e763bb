package capture

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/internal/durable"
)

// ErrOption is wrapped by errors about options that cannot be fulfilled.
var ErrOption = errors.New("invalid capture option")

// VolumeOptions say what to capture and what image to make of it.
type VolumeOptions struct {
	Root rootfs.Options
	// Size of the image in bytes, partition table included. 0: as the content
	// needs, with some room.
	Size int64
	// SizeIfFits makes Size a wish: where the content does not fit, 0 holds.
	SizeIfFits bool
	Partition  disk.Kind // "" is disk.None
	// Label of the filesystem; nil keeps the volume's.
	Label *string
	// UUID of the filesystem. nil keeps the volume's if the volume is a
	// filesystem of its own; a mere directory gets one derived from its path,
	// btrfs a random one.
	UUID *[16]byte
	// FS is the filesystem of the image: "" or "ext4", which is streamed, or
	// "xfs" or "btrfs", which are made in a scratch file in Scratch, as large as
	// their content.
	FS, Scratch string
	// Parent, if not nil, is asked once, after the volume was scanned, for where
	// everything was in the image that this one follows, or nil: what did not
	// change keeps its place.
	Parent func() (*ext4.Layout, error)
	// ReadShare is how much of the time is spent reading files at most, in percent;
	// 0 and 100: as much as there is.
	ReadShare int
}

// Volume is a live volume, scanned and planned, nothing written yet.
type Volume struct {
	Root *rootfs.Root
	Plan *ext4.Plan
	Disk *disk.Disk

	opts    VolumeOptions
	scratch *scratch // filesystems other than ext4, once made
	report  Reporter
	flawed  int        // files of which the filesystem cannot have something
	mu      sync.Mutex // covers changes
	change  []ext4.Change
}

func (o *VolumeOptions) gentle() bool { return o.ReadShare > 0 && o.ReadShare < 100 }

// PlanVolume scans a volume and plans its image. The result is to be closed.
func PlanVolume(ctx context.Context, o VolumeOptions, r Reporter) (*Volume, error) {
	r.Phase("reading the metadata of "+o.Root.Volume, 0)
	whole, err := mountinfo.Mounted(o.Root.Volume)
	if err != nil {
		return nil, fmt.Errorf("looking at the volume: %w", err)
	}
	switch {
	case o.UUID != nil:
	case o.FS == "btrfs":
		// btrfstune refuses a UUID that a filesystem of this machine has, and the
		// captured one has it.
		id := randomUUID()
		o.UUID = &id
		r.Note("btrfs cannot have the UUID of another filesystem in sight: the image's is " + FormatUUID(id))
	case !whole:
		id := pathUUID(o.Root.Volume)
		o.UUID = &id
	}
	if o.UUID != nil {
		o.Root.RootSpec = fmt.Sprintf("UUID=%s", FormatUUID(*o.UUID))
	}
	if o.scratched() {
		o.Root.RootType = o.FS
	}
	if o.ReadShare < 0 || o.ReadShare > 100 {
		return nil, fmt.Errorf("%w: %d %% of the time is not 1 to 100", ErrOption, o.ReadShare)
	}
	o.Root.NoReadAhead = o.Root.NoReadAhead || o.gentle()
	root, err := rootfs.Scan(ctx, o.Root)
	if err != nil {
		return nil, err
	}
	v := &Volume{Root: root, opts: o, report: r}
	if err := v.layOut(o, whole); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	for _, c := range root.Fstab {
		r.Note(fmt.Sprintf("%s line %d reads differently in the image (%s): %s", c.File, c.Line, c.Why, c.After))
	}
	for _, n := range root.Notes {
		r.Note(n)
	}
	for _, n := range v.Disk.Notes() {
		r.Note(n)
	}
	if v.Plan != nil {
		for w := range v.Plan.Warnings() {
			v.flawed++
			r.Warn(root.Tree.Path(w.ID), w.Err.Error())
		}
	}
	for _, p := range root.Problems {
		r.Warn(p.Path, p.Err.Error())
	}
	return v, nil
}

// FormatUUID writes a UUID as people do.
func FormatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// randomUUID is a UUID of version 4.
func randomUUID() (u [16]byte) {
	rand.Read(u[:]) // never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return u
}

// pathUUID is the UUID of an image of a directory that is no filesystem of its
// own: always the same for one directory, so that captures stay comparable.
func pathUUID(path string) (u [16]byte) {
	sum := sha256.Sum256([]byte("instar volume\x00" + filepath.Clean(path)))
	copy(u[:], sum[:])
	u[6], u[8] = u[6]&0x0f|0x80, u[8]&0x3f|0x80 // version 8, RFC 9562's variant
	return u
}

func (v *Volume) layOut(o VolumeOptions, whole bool) error {
	kind := o.Partition
	if kind == "" {
		kind = disk.None
	}
	fo := ext4.Options{NotAfter: time.Now().Unix()}
	if o.Parent != nil {
		var err error
		if fo.Parent, err = o.Parent(); err != nil {
			return err
		}
	}
	switch {
	case o.Label != nil:
		fo.Label = *o.Label
	case whole:
		fo.Label = v.Root.Facts.Label
		if len(fo.Label) > 16 {
			fo.Label = fo.Label[:16]
			v.report.Note(fmt.Sprintf("the label %q is cut to %q: ext4 has room for 16 bytes", v.Root.Facts.Label, fo.Label))
		}
	}
	if o.UUID != nil {
		fo.UUID = *o.UUID
	} else {
		fo.UUID = v.Root.Facts.UUID
	}
	if o.Size != 0 {
		if fo.Size = o.Size - kind.Overhead(); fo.Size <= 0 {
			return fmt.Errorf("%w: an image of %d bytes has no room for a filesystem", ErrOption, o.Size)
		}
	}
	if o.scratched() {
		return v.layOutScratch(o, fo)
	}
	plan, err := ext4.NewPlan(v.Root.Tree, fo)
	var small *ext4.TooSmallError
	if errors.As(err, &small) && o.SizeIfFits {
		fo.Size = 0
		plan, err = ext4.NewPlan(v.Root.Tree, fo)
	}
	if err != nil {
		return fmt.Errorf("planning the filesystem: %w", err)
	}
	v.Plan = plan
	v.Disk, err = disk.Wrap(kind, plan.Size(), plan.Map(), plan.UUID())
	return err
}

// Image is the volume as something to bundle, under a name. For filesystems
// other than ext4 this is where the scratch file is made, which takes a while.
func (v *Volume) Image(ctx context.Context, name string) (ec2.Image, error) {
	// The archive's member has no time of its own, so that equal trees give equal
	// bytes.
	img := ec2.Image{Name: name, Mtime: time.Unix(0, 0), Mode: 0o644}
	fs := func(ctx context.Context, w io.Writer) error { return v.Plan.Write(ctx, w, v.source(), v.changed) }
	if v.opts.scratched() {
		if err := v.makeScratch(ctx); err != nil {
			return img, err
		}
		fs = v.scratch.write
	}
	img.Size, img.Map = v.Disk.Size(), v.Disk.Map()
	img.Write = func(ctx context.Context, w io.Writer) error {
		return v.Disk.Write(ctx, w, func(w io.Writer) error { return fs(ctx, w) })
	}
	return img, nil
}

// source opens the volume's files.
func (v *Volume) source() filetree.Source {
	if v.opts.gentle() {
		return newGentle(v.Root.Source(), v.opts.ReadShare)
	}
	return v.Root.Source()
}

// changed takes note of a file that is not what the plan has.
func (v *Volume) changed(c ext4.Change) {
	v.mu.Lock()
	v.change = append(v.change, c)
	v.mu.Unlock()
	v.report.Warn(c.Path, describe(c))
}

func describe(c ext4.Change) string {
	switch c.Kind {
	case ext4.Vanished:
		return "vanished before it was read: it is not in the image"
	case ext4.Replaced:
		return "was replaced before it was read: it is not in the image"
	case ext4.Shrank:
		return fmt.Sprintf("became shorter while it was captured: the image has its first %d bytes", c.Off)
	case ext4.Grew:
		return fmt.Sprintf("grew while it was captured: the image has its first %d bytes", c.Off)
	case ext4.Modified:
		return "was written to or renewed while it was captured: the image may hold parts of both versions"
	case ext4.Unreadable:
		return fmt.Sprintf("%d bytes could not be read and are zero in the image: %v", c.Lost, c.Err)
	}
	return c.String()
}

// Changes are the files that were not in the image what the scan had seen.
func (v *Volume) Changes() []ext4.Change {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.change
}

// Flawed is the number of files that the image's filesystem cannot have as
// they are; each was warned of.
func (v *Volume) Flawed() int { return v.flawed }

// Close releases the volume and removes what scratch files there are.
func (v *Volume) Close() error {
	err := v.Root.Close()
	if v.scratch != nil {
		err = errors.Join(err, v.scratch.remove())
	}
	return err
}

// WriteImage writes an image to a new file, holes as holes. It appears under
// its name when it is complete and on disk; until then, and for good after an
// error, nothing does.
func WriteImage(ctx context.Context, img ec2.Image, path string, r Reporter) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s: %w", path, os.ErrExist)
	}
	r.Phase("writing "+path, img.Map.Bytes())
	err := durable.Fill(path, 0o600, func(f *os.File) error {
		out := &mapWriter{w: sparse.NewWriter(f), m: img.Map, size: img.Size}
		if err := img.Write(ctx, counter{out, r}); err != nil {
			return err
		}
		return out.finish()
	})
	if err != nil {
		return fmt.Errorf("writing the image %s: %w", path, err)
	}
	return nil
}

// mapWriter puts the bytes of a map's extents where they belong.
type mapWriter struct {
	w    *sparse.Writer
	m    sparse.Map
	at   int64 // of the file
	in   int64 // within m[0]
	size int64
}

func (w *mapWriter) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if len(w.m) == 0 {
			return total - len(p), errors.New("the image has more bytes than its map")
		}
		e := w.m[0]
		if w.in == 0 {
			if err := w.w.Skip(e.Off - w.at); err != nil {
				return total - len(p), err
			}
			w.at = e.Off
		}
		n := min(int64(len(p)), e.Len-w.in)
		if _, err := w.w.Write(p[:n]); err != nil {
			return total - len(p), err
		}
		w.at += n
		w.in += n
		p = p[n:]
		if w.in == e.Len {
			w.m, w.in = w.m[1:], 0
		}
	}
	return total, nil
}

func (w *mapWriter) finish() error {
	if len(w.m) != 0 {
		return errors.New("the image has fewer bytes than its map")
	}
	if err := w.w.Skip(w.size - w.at); err != nil {
		return err
	}
	_, err := w.w.Finish()
	return err
}
