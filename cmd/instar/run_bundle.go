package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// checkKind makes a kernel or ramdisk image of what euca2ools takes for one,
// and refuses what does not go together.
func (o *imageFile) checkKind(img *imageOptions) error {
	for _, k := range []struct{ value, kind string }{{img.kernel, ec2.TypeKernel}, {img.ramdisk, ec2.TypeRamdisk}} {
		if k.value != "true" {
			continue
		}
		if o.kind != "" && o.kind != k.kind {
			return usagef("--%s true and --image-type %s exclude each other", k.kind, o.kind)
		}
		o.kind = k.kind
	}
	if o.kind == ec2.TypeKernel || o.kind == ec2.TypeRamdisk {
		for _, x := range []struct {
			set    bool
			option string
		}{
			{img.kernel != "" && img.kernel != "true", "--kernel"},
			{img.ramdisk != "" && img.ramdisk != "true", "--ramdisk"},
			{img.kernel == "true" && img.ramdisk == "true", "--ramdisk"},
			{len(img.mappings) > 0, "--block-device-mapping"},
		} {
			if x.set {
				return usagef("a %s image takes no %s", o.kind, x.option)
			}
		}
	}
	return nil
}

// open opens the image. The name is the prefix, else the file's.
func (o *imageFile) open(a *app, prefix string) (ec2.Image, func() error, error) {
	none := func() error { return nil }
	if err := need(o.path, "--image"); err != nil {
		return ec2.Image{}, nil, err
	}
	if o.path == "-" {
		if prefix == "" || o.size == 0 {
			return ec2.Image{}, nil, usagef("an image from standard input needs --prefix and --image-size")
		}
		return capture.ReadImage(a.stdin, prefix, o.size), none, nil
	}
	if err := isFile(o.path, "--image"); err != nil {
		return ec2.Image{}, nil, err
	}
	img, closeImage, err := capture.OpenImage(o.path, o.size)
	if err == nil && prefix != "" {
		img.Name = prefix
	}
	return img, closeImage, err
}

func runBundleImage(ctx context.Context, a *app, o *bundleImageOptions) error {
	if err := o.checkKind(&o.imageOptions); err != nil {
		return err
	}
	p, err := a.party(&o.identity)
	if err != nil {
		return err
	}
	b, err := a.bundleOptions(ctx, &o.imageOptions, p)
	if err != nil {
		return err
	}
	b.Type = o.kind
	img, closeImage, err := o.open(a, o.prefix)
	if err != nil {
		return err
	}
	defer closeImage()
	a.checkSize(img.Size, &o.imageOptions)
	dir, err := a.workDir(o.destination)
	if err != nil {
		return err
	}
	return a.bundle(ctx, b, img, &capture.Dir{Path: dir}, dir)
}

// bundle bundles and tells where the bundle is. dir is where the parts are,
// "" when they are not in a directory of their own.
func (a *app) bundle(ctx context.Context, b ec2.BundleOptions, img ec2.Image, d capture.Destination, dir string) error {
	r := &reporter{ui: a.ui}
	res, err := capture.Bundle(ctx, b, img, d, r)
	r.end()
	if err != nil {
		return err
	}
	return a.showBundle(res, dir)
}

// showBundle prints the result as the family's tools do.
func (a *app) showBundle(res *capture.Result, dir string) error {
	m := res.Manifest
	parts := make([]string, len(m.Parts))
	for i, p := range m.Parts {
		parts[i] = p.Filename
	}
	f := ui.Fields{
		"manifest": res.Location, "name": m.Name, "size": m.Size, "bundled_size": m.BundledSize, "digest": m.Digest,
		"parts": parts, "signed": m.IsSigned(), "architecture": m.Arch,
	}
	var human strings.Builder
	switch a.family {
	case familyEuca:
		for _, p := range parts {
			if dir != "" {
				fmt.Fprintf(&human, "Wrote %s\n", filepath.Join(dir, p))
			}
		}
		fmt.Fprintf(&human, "Wrote manifest %s", res.Location)
	default:
		fmt.Fprintf(&human, "Bundle manifest is %s", res.Location)
		if a.family == familyEC2 {
			fmt.Fprintf(&human, "\n%s complete.", a.tool)
		}
	}
	return a.ui.Result("bundle", human.String(), f)
}

func runBundleAndUpload(ctx context.Context, a *app, o *bundleAndUploadOptions) error {
	if err := o.checkKind(&o.imageOptions); err != nil {
		return err
	}
	if o.maxPending == 0 {
		return usagef("--max-pending-parts must be at least 1")
	}
	p, err := a.party(&o.identity)
	if err != nil {
		return err
	}
	b, err := a.bundleOptions(ctx, &o.imageOptions, p)
	if err != nil {
		return err
	}
	b.Type, b.InFlight = o.kind, o.maxPending
	img, closeImage, err := o.open(a, o.prefix)
	if err != nil {
		return err
	}
	defer closeImage()
	a.checkSize(img.Size, &o.imageOptions)
	store, err := a.openWritable(ctx, &o.storage)
	if err != nil {
		return err
	}
	defer store.Close()
	var d capture.Destination = &capture.Bucket{Store: store, Replace: true, Removed: a.showRemoved}
	dir := ""
	if o.preserve {
		if a.family != familyEuca && o.destination == "" {
			o.destination = a.tempDir()
		}
		if dir, err = a.workDir(o.destination); err != nil {
			return err
		}
		d = &capture.Both{First: &capture.Dir{Path: dir}, Second: d}
	} else if o.destination != "" {
		a.ui.Warn("--destination has no effect without --preserve-bundle: parts do not touch the disk", nil)
	}
	return a.bundle(ctx, b, img, d, dir)
}

func (a *app) showRemoved(key string) {
	a.ui.Say("removed %s, which an earlier run had left", key)
}
