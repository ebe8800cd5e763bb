package main

import (
	"context"
	"path/filepath"

	"github.com/instar-image/instar/agent/restore"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/initrd/launch"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/upload/images"
)

// launchedImage is an Instar image that is launched.
type launchedImage struct {
	store *openedStore
	image *images.Image
	index *chunked.Index
	disk  *chunked.Stream
}

// images is where launch's image is: its options name all but the store as
// those of bundles do.
func (o *launchOptions) images() *imageStore {
	s := &imageStore{storage: o.download.storage, identities: o.identities, signers: o.signers, cache: o.cache, cacheSize: o.cacheSize}
	s.bucket = o.store
	return s
}

// openImage finds the image that is named and opens it.
func (o *launchOptions) openImage(ctx context.Context, a *app) (_ *launchedImage, err error) {
	l := new(launchedImage)
	if l.store, err = a.readImages(ctx, o.images()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.store.Close()
		}
	}()
	if l.image, err = a.resolve(ctx, l.store, o.image, &fresh{}); err != nil {
		return nil, err
	}
	if l.index, err = l.image.Open(ctx); err != nil {
		return nil, explainKeys(err)
	}
	if l.disk, err = l.index.Stream(chunked.StreamDisk); err != nil {
		return nil, err
	}
	return l, nil
}

// write restores one of the image's streams to a file.
func (l *launchedImage) write(ctx context.Context, a *app, stream, to string) error {
	s, err := l.index.Stream(stream)
	if err != nil {
		return err
	}
	d := &restore.Image{Stream: s, Name: l.image.Name}
	m, err := d.Map(ctx)
	if err != nil {
		return err
	}
	bar := a.ui.Progress("fetching the "+stream+" of "+l.image.Manifest.Name, m.Bytes())
	err = restore.ToFile(ctx, d, to, bar.Add)
	bar.End()
	return explainRestore(err)
}

// lazily is what the machine needs to fetch the image itself.
func (l *launchedImage) lazily(ctx context.Context) (*launch.Image, error) {
	key, err := l.image.IndexKey(ctx)
	if err != nil {
		return nil, explainKeys(err)
	}
	name := l.image.Manifest.Name
	return &launch.Image{
		Objects: l.store.Objects(), Name: name, Manifest: l.image.Name, Root: l.image.Manifest.Index.Root.Name, Key: key,
		Signers: keys.AllowedSigner{Principals: name, Key: l.image.Signer}.String() + "\n", Mode: ticket.Lazy,
	}, nil
}

// room is the least size of a disk that the image is fetched to while it runs,
// in whole MiB.
func (l *launchedImage) room() int64 {
	const mib = 1 << 20
	return (lazyroot.DiskSize(l.disk.Size()) + mib - 1) / mib * mib
}

// boots fetches the kernel and the initrd that were captured with the image.
func (l *launchedImage) boots(ctx context.Context, a *app, dir string) (kernel, ramdisk string, err error) {
	kernel, ramdisk = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	err = l.write(ctx, a, chunked.StreamKernel, kernel)
	if err == nil {
		err = l.write(ctx, a, chunked.StreamInitrd, ramdisk)
	}
	return kernel, ramdisk, err
}
