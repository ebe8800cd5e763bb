package main

import (
	"context"

	"github.com/spf13/cobra"
)

type createImageOptions struct {
	imageStore
	volumeOptions
	name, domain, description, sign string
	recipients                      []string
	expires, dedup, compression     string
	bootTrace                       string
	arch, kernel, init              string
	mappings                        mappings
	noKernel, verifyContent, full   bool
}

// addVersion adds what every new version of an image is told, and how it is
// stored. auto says what --compression auto is.
func (o *createImageOptions) addVersion(cmd *cobra.Command, auto, test string) {
	f := flagsOf(cmd)
	f.text(&o.description, "description", "", "`TEXT` about this version, up to 255 bytes; everybody who reads the store sees it", ofUs, test)
	f.list(&o.recipients, "recipient", "", "let `KEY` open the image: an age recipient, an SSH public key, or a file of them; may be repeated", ofUs, test)
	f.sign(&o.sign, test)
	f.text(&o.expires, "expires", "", "readers shall take this version for the newest no longer than `TIME`: 12h, 7d, 8w; default for ever", ofUs, test)
	f.text(&o.domain, "domain", "", "share stored pieces with the images of `DOMAIN`; default default", ofUs, test)
	f.choice(cmd, &o.dedup, []string{"own", "domain"}, "dedup", "", "whose stored pieces are used again, `WHOSE`: own (default: what this machine stored), domain (all of the domain's creators, who are trusted then)", ofUs, test)
	f.choice(cmd, &o.compression, []string{"auto", "fastest", "default", "better"}, "compression", "", "`LEVEL` of compression: auto (default: "+auto+"), fastest, default, better", ofUs, test)
}

func newCreateImage(a *app) *cobra.Command {
	var o createImageOptions
	const test = "create-image"
	cmd := a.command("create-image [EXCLUDE]...", "capture the running machine's root into an image: only what changed is stored", `
Captures a directory tree, by default the live root filesystem, as an ext4
image and publishes it under --name in a store: an S3 bucket and prefix, or a
directory. Each file is read once and goes straight to the store, in pieces
that are compressed and encrypted; pieces that the store has already are not
stored again. Nothing is written to this machine's disks.

The second capture of a name takes the first as its parent: files that did not
change since (same size, times, inode) are not even read. Files written in the
last two seconds before the parent's capture are read again, and
--verify-content reads everything. A capture that was interrupted is simply run
again: what is stored already is found.

What goes in and what stays out is as with bundle-vol; "--dry-run" lists it.
The newest kernel of the captured root and an initrd with its modules go along,
so that the image can be booted anywhere.

Keys: the first run makes what is missing in /etc/instar (for others than root
~/.config/instar) and says so: identity.age, which opens this machine's images
and never gets into one; signing.key, an SSH key that signs them; and
allowed_signers, whose images this machine accepts. --recipient adds others who
can open the image. Anybody can check an image's signature with ssh-keygen -Y.

Files that change while they are read do not break the image: each is named and
the exit status is 24. Arguments that are no options are further excludes.`, `
  instar create-image --store s3://images/fleet --name web-1 --dry-run
  instar create-image --store s3://images/fleet --name web-1 --url https://minio:9000 --create-bucket
  instar create-image --store /backup/images --name web-1 --recipient ~/.ssh/id_ed25519.pub
  instar create-image --store s3://images/fleet --name db-1 --sign agent --expires 7d --description 'before the upgrade'`,
		func(ctx context.Context) error { return runCreateImage(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.name, "name", "n", "`NAME` of the image: letters, digits and . _ -", ofUs, test)
	o.imageStore.add(a, cmd, test)
	o.addMakeBucket(cmd, test)
	o.volumeOptions.add(cmd, ofUs, test)
	o.addVersion(cmd, "fastest for large files, default for small ones and where at most 128 MiB are read", test)
	f.yes(&o.verifyContent, "verify-content", "", "read every file and compare it with the parent by content, whatever its size and times say", ofUs, test)
	f.yes(&o.full, "full", "", "take no parent: lay the image out afresh, as small and in order as a first one", ofUs, test)
	f.text(&o.bootTrace, "boot-trace", "", "lay out together what the boot trace of `IMAGE` says a boot reads, and take it for this version's, too: a lazy boot then reads few pieces", ofUs, test)
	f.text(&o.arch, "arch", "r", "`ARCH`itecture: x86_64, arm64 or i386; default that of the captured root's programs", ofUs, test)
	complete(cmd, "arch", "x86_64", "arm64", "i386")
	f.add(&o.mappings, "block-device-mapping", "B", "devices as the instance sees them, `VIRTUAL=DEVICE,...`", ofUs, test)
	f.text(&o.kernel, "kernel", "", "of several kernels in the captured root, that of `RELEASE`; default the newest", ofUs, test)
	f.yes(&o.noKernel, "no-kernel", "", "leave kernel and initrd out of the image", ofUs, test)
	f.text(&o.init, "init", "", "the initrd's init is `FILE`, a static instar-init", ofUs, test)
	completeFiles(cmd, "init")
	return cmd
}
