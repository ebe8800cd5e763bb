package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
)

// named makes a command that takes images' names, or other arguments, by
// position: at least min and at most max of them.
func (a *app) named(use, short, long, example string, min, max int, run func(ctx context.Context, args []string) error) *cobra.Command {
	name, _, _ := strings.Cut(use, " ")
	cmd := a.command(name, short, long, example, nil)
	cmd.Use = use
	cmd.Args = func(_ *cobra.Command, args []string) error {
		switch {
		case a.manual || a.showVersion:
		case len(args) < min:
			return usagef("missing argument: %s", use)
		case len(args) > max:
			return usagef("unexpected argument %q", args[max])
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return run(cmd.Context(), args) }
	return cmd
}

// fresh are the options that say how new an image must be.
type fresh struct {
	maxAge  string
	atLeast int64
}

func (o *fresh) add(cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.text(&o.maxAge, "max-age", "", "refuse an image whose newest version was published more than `TIME` ago: 12h, 7d, 8w", ofUs, test)
	f.size(&o.atLeast, "at-least", "", "refuse an image whose newest version is older than the one of `SEQUENCE`", ofUs, test)
}

// Where the parts of an image's name are explained.
const aboutNames = `
NAME is an image's newest version, NAME@parent the one before it and
NAME@DIGITS the version whose manifest's name begins with the digits.`

type restoreOptions struct {
	imageStore
	fresh
	to, stream string
	force      bool
}

func newRestore(a *app) *cobra.Command {
	var o restoreOptions
	const test = "restore"
	cmd := a.named("restore IMAGE", "write an image's disk to a file or a device", `
Writes the disk of an image to a file, whose holes are holes, or over a block
device, whose zeros are zeros. Nothing is written that was not verified: the
manifest's signature, by a key that --signers lists for this image, and the
digest of every piece.

A file appears under its name when it is complete; until then it is a hidden
file beside it that ends in .instar-part. A device has no beginning, and so no
filesystem and no partition table, until the rest of it is right; one whose
beginning is not empty is written over with --force only. A restore that was
interrupted goes on where it was if the command is repeated: what is on the
target is compared by digest, and only the rest is fetched. So is what another
version of the image has left on a device.
`+aboutNames, `
  instar restore web-1 --store s3://images/fleet --to root.img
  instar restore web-1@parent --store /backup/images --to /dev/vdb
  instar restore web-1 --store s3://images/fleet --stream kernel --to vmlinuz`, 1, 1,
		func(ctx context.Context, args []string) error { return runRestore(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.to, "to", "", "write to `FILE`, a block device, or - for standard output", ofUs, test)
	completeFiles(cmd, "to")
	f.choice(cmd, &o.stream, []string{"disk", "kernel", "initrd"}, "stream", "", "write this `PART` of the image: disk (default), kernel or initrd", ofUs, test)
	f.yes(&o.force, "force", "", "write over a file that exists, or a device that is not empty", ofUs, test)
	o.imageStore.add(a, cmd, test)
	o.addCache(cmd)
	o.fresh.add(cmd, test)
	return cmd
}

type exportOptions struct {
	imageStore
	fresh
	identity
	imageOptions
	to, format string
	force      bool
}

func newExport(a *app) *cobra.Command {
	var o exportOptions
	const test = "export"
	cmd := a.named("export IMAGE", "make a qcow2 or raw disk, or an EC2 bundle, of an image", `
Writes the disk of an image in another format: a raw or a qcow2 file for a
hypervisor, or an EC2 bundle, as bundle-image makes it, for ec2-ami-tools,
euca2ools and all who read those. No scratch file is needed.
`+aboutNames, `
  instar export web-1 --store s3://images/fleet --format qcow2 --to web-1.qcow2
  instar export web-1 --store /backup/images --format ec2 -d /var/tmp -k key.pem -c cert.pem -u 111122223333`, 1, 1,
		func(ctx context.Context, args []string) error { return runExport(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if n := givenOf(cmd, bundleFlags); n != "" && o.format != "ec2" {
			return usagef("--%s goes with --format ec2", n)
		}
		return run(cmd, args)
	}
	f.choice(cmd, &o.format, []string{"raw", "qcow2", "ec2"}, "format", "", "`FORMAT` to write: qcow2 (default), raw or ec2", ofUs, test)
	f.text(&o.to, "to", "", "write the raw or qcow2 disk to `FILE`", ofUs, test)
	completeFiles(cmd, "to")
	f.yes(&o.force, "force", "", "write over a file that exists", ofUs, test)
	f.text(&o.destination, "destination", "d", "put the EC2 bundle into `DIR`; default the current directory", ofUs, test)
	completeFiles(cmd, "destination")
	o.imageStore.add(a, cmd, test)
	o.addCache(cmd)
	o.fresh.add(cmd, test)
	o.identity.add(cmd, ofUs, test)
	o.imageOptions.add(a, cmd, test)
	return cmd
}

// bundleFlags are the options that say something about an EC2 bundle.
var bundleFlags = []string{
	"privatekey", "cert", "user", "ec2cert", "destination", "prefix", "arch", "kernel", "ramdisk",
	"block-device-mapping", "block-device-mappings", "productcodes", "part-size", "enc-key", "enc-iv",
}

// givenOf is the first of some options that is on the command line, "" if none is.
func givenOf(cmd *cobra.Command, names []string) string {
	for _, n := range names {
		if cmd.Flags().Changed(n) {
			return n
		}
	}
	return ""
}

type importOptions struct {
	createImageOptions
	trust
	key, source string
}

func newImport(a *app) *cobra.Command {
	var o importOptions
	const test = "import"
	cmd := a.named("import SOURCE", "make an image of a raw or qcow2 disk, or of an EC2 bundle", `
Makes an image of a disk that exists: a raw or qcow2 file, a block device, or an
EC2 bundle, named by its manifest, with its parts beside it or in --source. What
the store has of it already is not stored again. No scratch file is needed.

A bundle's signature and digests are checked as by unbundle; nothing is
published unless all of it was right.`, `
  instar import web-1.qcow2 --name web-1 --store s3://images/fleet
  instar import /dev/vdb --name db-1 --store /backup/images
  instar import web-1.manifest.xml -k key.pem --name web-1 --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImport(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.name, "name", "n", "`NAME` of the image: letters, digits and . _ -", ofUs, test)
	o.imageStore.add(a, cmd, test)
	o.addMakeBucket(cmd, test)
	o.addVersion(cmd, "default", test)
	f.text(&o.arch, "arch", "r", "`ARCH`itecture: x86_64, arm64 or i386; default a bundle's own, else this machine's", ofUs, test)
	complete(cmd, "arch", "x86_64", "arm64", "i386")
	f.add(&o.mappings, "block-device-mapping", "B", "devices as the instance sees them, `VIRTUAL=DEVICE,...`; default a bundle's own", ofUs, test)
	f.text(&o.key, "privatekey", "k", "of a bundle: the private key that opens it, `PEM`", ofUs, test)
	completeFiles(cmd, "privatekey", "pem")
	f.text(&o.source, "source", "", "of a bundle: its parts are in `DIR`; default the manifest's", ofUs, test)
	completeFiles(cmd, "source")
	o.trust.add(cmd, test)
	return cmd
}
