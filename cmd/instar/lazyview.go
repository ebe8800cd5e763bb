package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/upload/images"
)

// What mount and nbd share: an image as a disk that is fetched as it is read.

type viewOptions struct {
	imageStore
	fresh
	overlay     bool
	overlayFile string
}

func (o *viewOptions) add(a *app, cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.yes(&o.overlay, "overlay", "", "let it be written to; what is written lies in a scratch file under TMPDIR and is gone afterwards", ofUs, test)
	f.text(&o.overlayFile, "overlay-file", "", "let it be written to, and keep what is written, and what was fetched, in `FILE`: the next time it goes on there", ofUs, test)
	completeFiles(cmd, "overlay-file")
	o.imageStore.add(a, cmd, test)
	o.addCache(cmd)
	o.fresh.add(cmd, test)
}

// view is an image as a disk.
type view struct {
	img   *images.Image
	dev   *lazyroot.Device
	close func() error
}

// Bytes of an image that are kept in memory, and that are fetched with what is asked for.
const (
	viewMemory = 64 << 20
	viewAround = 1 << 20
)

// openView finds an image and makes a disk of it.
func (a *app) openView(ctx context.Context, o *viewOptions, ref string, alarm func(lazyroot.Alarm)) (_ *view, err error) {
	if o.overlay && o.overlayFile != "" {
		return nil, usagef("--overlay and --overlay-file exclude each other")
	}
	ids, trust, err := a.openingKeys(a.machineKeys(&o.imageStore, "", false))
	if err != nil {
		return nil, err
	}
	st, err := a.openStored(ctx, &o.imageStore, images.Options{Trust: trust, Identities: ids, Remember: true})
	if err != nil {
		return nil, err
	}
	v := &view{close: st.Close}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.close())
		}
	}()
	if v.img, err = a.resolve(ctx, st, ref, &o.fresh); err != nil {
		return nil, err
	}
	index, key, err := v.img.OpenFirst(ctx, st.Source(), func(err error) { alarm(lazyroot.Alarm{Source: "the store", Err: err}) })
	if err != nil {
		return nil, explainKeys(err)
	}
	img, err := lazyroot.NewImage(index, lazyroot.ImageOptions{Alarm: alarm, Memory: viewMemory, Around: viewAround})
	if err != nil {
		return nil, err
	}
	lo := lazyroot.Options{Image: img, Volatile: true}
	lo.Identity = lazyroot.Identity{Manifest: v.img.Name, Size: img.Size(), Instance: "overlay", Secret: key[:]}
	var file *os.File
	switch {
	case o.overlay:
		file, err = scratchOverlay(a.tempDir(), img.Size())
	case o.overlayFile != "":
		lo.Volatile = false
		file, err = keptOverlay(o.overlayFile, lo.Identity)
	}
	if err != nil {
		return nil, err
	}
	if file != nil {
		v.close = func() error { return errors.Join(file.Close(), st.Close()) }
		size, err := file.Seek(0, 2)
		if err != nil {
			return nil, failf(exitFile, "the overlay: %w", err)
		}
		lo.Disk = lazyroot.FileDisk(file, size)
	}
	if v.dev, err = lazyroot.Open(ctx, lo); errors.Is(err, lazyroot.ErrForeign) {
		return nil, withHint(failf(exitFile, "--overlay-file: %s is not an overlay of this version of the image", o.overlayFile), "IMAGE@DIGITS names the version it was made with; a file that does not exist is made.")
	}
	if err != nil {
		return nil, err
	}
	rest := v.close
	v.close = func() error { return errors.Join(v.dev.Close(), rest()) }
	return v, nil
}

// scratchOverlay is a file without a name.
func scratchOverlay(dir string, size int64) (*os.File, error) {
	f, err := os.CreateTemp(dir, "instar-overlay-")
	if err != nil {
		return nil, failf(exitFile, "--overlay: %w", err)
	}
	size = (size + lazyroot.Block - 1) / lazyroot.Block * lazyroot.Block
	if err := errors.Join(os.Remove(f.Name()), f.Truncate(size)); err != nil {
		return nil, errors.Join(failf(exitFile, "--overlay: %w", err), f.Close())
	}
	return f, nil
}

// keptOverlay is a file that is made, or used again, by one at a time.
func keptOverlay(path string, id lazyroot.Identity) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, failf(exitFile, "--overlay-file: %w", err)
	}
	fail := func(err error) (*os.File, error) {
		return nil, errors.Join(failf(exitFile, "--overlay-file %s: %w", path, err), f.Close())
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fail(fmt.Errorf("it is in use: %w", err))
	}
	st, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	if !st.Mode().IsRegular() {
		return fail(errors.New("it is not a file"))
	}
	if st.Size() > 0 {
		return f, nil
	}
	size := lazyroot.DiskSize(id.Size)
	if err := f.Truncate(size); err != nil {
		return fail(err)
	}
	if err := lazyroot.Format(lazyroot.FileDisk(f, size), id); err != nil {
		return fail(errors.Join(err, f.Truncate(0)))
	}
	return f, nil
}
