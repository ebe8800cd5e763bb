package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/agent/restore"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/qcow2"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

// openedStore is a store of images, open.
type openedStore struct {
	*images.Store
	Close func() error
}

// readImages opens the store for reading images with this machine's keys.
func (a *app) readImages(ctx context.Context, o *imageStore) (*openedStore, error) {
	ids, trust, err := a.openingKeys(a.machineKeys(o, "", false))
	if err != nil {
		return nil, err
	}
	return a.openStored(ctx, o, images.Options{Trust: trust, Identities: ids})
}

// browseImages opens the store for looking at images without opening them: no
// identity is needed.
func (a *app) browseImages(ctx context.Context, o *imageStore) (*openedStore, error) {
	m := a.machineKeys(o, "", false)
	ids, err := m.Identities()
	if err != nil && (len(o.identities) > 0 || !errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	trust, err := trusted(m)
	if err != nil {
		return nil, err
	}
	return a.openStored(ctx, o, images.Options{Trust: trust, Identities: ids})
}

func (a *app) openStored(ctx context.Context, o *imageStore, io images.Options) (*openedStore, error) {
	objects, err := a.openImages(ctx, o, false)
	if err != nil {
		return nil, err
	}
	io.State = a.stateDir()
	if io.Trust != nil {
		io.Claim = a.guard(o, objects, io.Trust)
	}
	s, err := images.Open(objects, io)
	if err != nil {
		return nil, errors.Join(err, objects.Close())
	}
	return &openedStore{s, objects.Close}, nil
}

// resolve finds an image, and says how fresh it is known to be.
func (a *app) resolve(ctx context.Context, s *openedStore, ref string, o *fresh) (*images.Image, error) {
	age, err := parseSpan(o.maxAge)
	if err != nil {
		return nil, usagef("--max-age: %w", err)
	}
	if _, err := images.ParseRef(ref); err != nil {
		return nil, usagef("%w", err)
	}
	img, err := s.Resolve(ctx, ref, images.ResolveOptions{MaxAge: age, AtLeast: o.atLeast})
	if err != nil {
		return nil, explainImage(err)
	}
	if img.Freshness == images.NotProven {
		a.ui.Say("note: that this is the newest version is %s", img.Freshness)
	}
	return img, nil
}

// explainImage adds what to do about an image that is not believed.
func explainImage(err error) error {
	switch {
	case errors.Is(err, images.ErrNoImage):
		return withHint(err, "\"instar images list\" shows what is in the store.")
	case errors.Is(err, chunked.ErrRollback), errors.Is(err, chunked.ErrForked):
		return withHint(err, "The store shows an older state than this machine has seen: an older copy was put back, or somebody hides the newest version. NAME@ and all 64 digits, as \"instar images list --versions --json\" shows them, reads a version all the same.\nIf it was you who put an older copy back, \"instar images forget NAME\" has it believed.")
	case errors.Is(err, chunked.ErrStale):
		return withHint(err, "NAME@ and all 64 digits of a version reads it however old it is.")
	}
	return explainKeys(err)
}

// openDisk finds an image and opens one of its streams. The store is to be
// closed when both are needed no more.
func (a *app) openDisk(ctx context.Context, o *imageStore, ref string, f *fresh, stream string) (_ *images.Image, _ *restore.Image, closeStore func() error, err error) {
	st, err := a.readImages(ctx, o)
	if err != nil {
		return nil, nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, st.Close())
		}
	}()
	img, err := a.resolve(ctx, st, ref, f)
	if err != nil {
		return nil, nil, nil, err
	}
	index, err := img.Open(ctx)
	if err != nil {
		return nil, nil, nil, explainKeys(err)
	}
	s, err := index.Stream(stream)
	if errors.Is(err, chunked.ErrMissing) {
		err = withHint(failf(exitFile, "image %s@%s has no %s", img.Manifest.Name, img.Name.String()[:digits], stream), "It was captured with --no-kernel, or from a root without a kernel, or imported.")
	}
	if err != nil {
		return nil, nil, nil, err
	}
	return img, &restore.Image{Stream: s, Name: img.Name}, st.Close, nil
}

// target says what a path is: a device, or a file that may be written.
func target(path string, force bool) (device bool, err error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, failf(exitFile, "--to: %w", err)
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		return true, nil
	case !st.Mode().IsRegular():
		return false, failf(exitFile, "--to: %s is neither a file nor a block device", path)
	case !force:
		return false, withHint(failf(exitFile, "--to: %s: %w", path, fs.ErrExist), "--force replaces it, once the new one is complete.")
	}
	return false, nil
}

func runRestore(ctx context.Context, a *app, o *restoreOptions, ref string) error {
	if err := need(o.to, "--to"); err != nil {
		return err
	}
	device := false
	if o.to == "-" && o.force {
		return usagef("--force goes with a file or a device")
	}
	if o.to != "-" {
		var err error
		if device, err = target(o.to, o.force); err != nil {
			return err
		}
	}
	stream := o.stream
	if stream == "" {
		stream = chunked.StreamDisk
	}
	img, d, closeStore, err := a.openDisk(ctx, &o.imageStore, ref, &o.fresh, stream)
	if err != nil {
		return err
	}
	defer closeStore()
	m, err := d.Map(ctx)
	if err != nil {
		return err
	}
	bar := a.ui.Progress("restoring "+ref, m.Bytes())
	switch {
	case o.to == "-":
		err = restore.ToStream(ctx, d.Stream.ReaderAt(ctx, streamCache), d.Size(), m, a.stdout, bar.Add)
	case device:
		err = restore.ToDevice(ctx, d, o.to, o.force, bar.Add)
	default:
		err = restore.ToFile(ctx, d, o.to, bar.Add)
	}
	bar.End()
	if err != nil || o.to == "-" {
		return explainRestore(err)
	}
	return a.showRestored(img, stream, o.to, d.Size(), m.Bytes())
}

// explainRestore adds what to do about a restore that failed.
func explainRestore(err error) error {
	switch {
	case errors.Is(err, restore.ErrNotEmpty):
		return withHint(failf(exitFile, "%w", err), "--force writes over it. What is on it then is lost.")
	case errors.Is(err, restore.ErrInUse), errors.Is(err, restore.ErrTooSmall):
		return failf(exitFile, "%w", err)
	}
	return explainDamage(err)
}

// explainDamage adds what to do about an image that is not whole in the store.
func explainDamage(err error) error {
	if errors.Is(err, chunked.ErrCorrupt) || errors.Is(err, chunked.ErrMissing) {
		return withHint(err, "\"instar verify IMAGE --read-data\" tells which files are hurt; \"instar repair\" may bring back what another place still has.")
	}
	return err
}

// streamCache is how many bytes of an image are kept while it is read in order.
const streamCache = 64 << 20

func (a *app) showRestored(img *images.Image, stream, to string, size, data int64) error {
	return a.ui.Result("restored", fmt.Sprintf("%s of %s@%s is %s: %s, of which %s are data", stream, img.Manifest.Name, img.Name.String()[:12], to, ui.Size(size), ui.Size(data)),
		ui.Fields{"image": img.Manifest.Name, "manifest": img.Name.String(), "stream": stream, "path": to, "size": size, "data": data, "freshness": img.Freshness.String()})
}

func runExport(ctx context.Context, a *app, o *exportOptions, ref string) error {
	if o.format == "" {
		o.format = "qcow2"
	}
	if o.format == "ec2" {
		return exportBundle(ctx, a, o, ref)
	}
	if err := need(o.to, "--to"); err != nil {
		return err
	}
	if device, err := target(o.to, o.force); err != nil {
		return err
	} else if device {
		return withHint(usagef("--to: %s is a device", o.to), "\"instar restore\" writes devices.")
	}
	img, d, closeStore, err := a.openDisk(ctx, &o.imageStore, ref, &o.fresh, chunked.StreamDisk)
	if err != nil {
		return err
	}
	defer closeStore()
	m, err := d.Map(ctx)
	if err != nil {
		return err
	}
	write := restore.ToQCOW2
	if o.format == "raw" {
		write = restore.ToFile
	}
	bar := a.ui.Progress("exporting "+ref, m.Bytes())
	err = write(ctx, d, o.to, bar.Add)
	bar.End()
	if errors.Is(err, qcow2.ErrSize) {
		return failf(exitUsage, "%w", err)
	}
	if err != nil {
		return explainDamage(err)
	}
	return a.showRestored(img, chunked.StreamDisk, o.to, d.Size(), m.Bytes())
}

// exportBundle makes an EC2 bundle of an image.
func exportBundle(ctx context.Context, a *app, o *exportOptions, ref string) error {
	if o.to != "" {
		return usagef("--to and --format ec2 exclude each other: --destination names the bundle's directory")
	}
	if o.force {
		return usagef("--force and --format ec2 exclude each other")
	}
	p, err := a.party(&o.identity)
	if err != nil {
		return err
	}
	img, d, closeStore, err := a.openDisk(ctx, &o.imageStore, ref, &o.fresh, chunked.StreamDisk)
	if err != nil {
		return err
	}
	defer closeStore()
	if o.arch == "" {
		o.arch = img.Manifest.Architecture
	}
	b, err := a.bundleOptions(ctx, &o.imageOptions, p)
	if err != nil {
		return err
	}
	if len(b.BlockDeviceMapping) == 0 {
		for _, m := range img.Manifest.BlockDeviceMapping {
			b.BlockDeviceMapping = append(b.BlockDeviceMapping, ec2.Mapping{Virtual: m.Virtual, Device: m.Device})
		}
	}
	disk, err := restore.ForBundle(ctx, d.Stream, img.Manifest.Created, streamCache)
	if err != nil {
		return err
	}
	if disk.Name = o.prefix; disk.Name == "" {
		disk.Name = img.Manifest.Name
	}
	a.checkSize(disk.Size, &o.imageOptions)
	if o.destination == "" {
		o.destination = "."
	}
	dir, err := a.workDir(o.destination)
	if err != nil {
		return err
	}
	return explainDamage(a.bundle(ctx, b, disk, &capture.Dir{Path: dir}, dir))
}
