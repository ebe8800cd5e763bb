package main

import (
	"context"

	"github.com/spf13/cobra"
)

// imageFile is the image that bundle-image and bundle-and-upload-image read.
type imageFile struct {
	path, kind string
	size       int64
}

func (o *imageFile) add(cmd *cobra.Command, of origin, test string) {
	f := flagsOf(cmd)
	f.text(&o.path, "image", "i", "the image: a `FILE`, a block device, or - for standard input (then with --prefix and --image-size)", of, test)
	f.size(&o.size, "image-size", "", "the image has `SIZE` bytes (k, m, g, t): anything else is an error", ofEuca, test)
	f.choice(cmd, &o.kind, []string{"machine", "kernel", "ramdisk"}, "image-type", "", "`TYPE` of image: machine, kernel or ramdisk", ofEuca, test).hidden()
}

type bundleImageOptions struct {
	identity
	imageOptions
	imageFile
}

func newBundleImage(a *app) *cobra.Command {
	var o bundleImageOptions
	cmd := a.command("bundle-image", "bundle an image file", `
Makes a bundle of a filesystem or disk image: encrypted parts NAME.part.N and,
last, the signed manifest NAME.manifest.xml. The parts can be opened with the
user's private key, and with the cloud's. Holes of the image stay holes and cost
nothing. Nothing is written under its final name before it is complete, and
nothing stays behind when it fails.

Without --ec2cert the cloud's certificate is looked for in the configuration, in
/etc/instar/ec2-cert.pem and in an installation of ec2-ami-tools; if there is
none, the user's own is taken, with a notice: such a bundle opens with the
user's key alone.`, `
  instar bundle-image -i root.img -k key.pem -c cert.pem -u 111122223333 -d /var/tmp
  zcat disk.gz | instar bundle-image -i - --image-size 8g -p web -k key.pem -c cert.pem -u 111122223333`,
		func(ctx context.Context) error { return runBundleImage(ctx, a, &o) })
	o.imageFile.add(cmd, ofBoth, "bundle-image")
	o.identity.add(cmd, ofBoth, "bundle-image")
	o.imageOptions.add(a, cmd, "bundle-image")
	f := flagsOf(cmd)
	f.text(&o.destination, "destination", "d", "put the bundle into `DIR`; default /tmp (as euca-bundle-image: a new directory)", ofBoth, "bundle-image")
	completeFiles(cmd, "destination")
	f.yes(&o.noSizeChecks, "no-size-checks", "", "say nothing about images over 10 GiB, which old clouds refuse", ofEC2, "bundle-image")
	f.text(&a.region, "region", "", "pick euca2ools' settings of USER@`REGION`", ofEuca, "config")
	return cmd
}
