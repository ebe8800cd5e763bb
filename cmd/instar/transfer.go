package main

import (
	"context"

	"github.com/spf13/cobra"
)

// The commands that move bundles.

type uploadOptions struct {
	storage
	manifest, directory string
	part                int
	skipManifest        bool
}

func newUploadBundle(a *app) *cobra.Command {
	var o uploadOptions
	const test = "upload-bundle"
	cmd := a.command("upload-bundle", "put a bundle into a bucket", `
Puts the parts of a bundle into a bucket, several at once, and then the
manifest, so that a bundle that can be seen is complete. Whether the bucket can
be written is found out first. A bucket that does not exist is made. Parts that
are there already, with the right content, are not sent again: after an
interruption the same command goes on where it stopped.`, `
  instar upload-bundle -b images/web-1 -m /tmp/web-1.manifest.xml --url https://minio:9000
  ec2-upload-bundle -b images -m /tmp/web-1.manifest.xml -a KEY -s SECRET --region eu-west-1 --retry --batch`,
		func(ctx context.Context) error { return runUpload(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.manifest, "manifest", "m", "the bundle's manifest, a `FILE`", ofBoth, test)
	completeFiles(cmd, "manifest", "xml")
	f.text(&o.directory, "directory", "d", "the parts are in `DIR`; default the manifest's", ofBoth, test)
	completeFiles(cmd, "directory")
	o.storage.add(a, cmd, ofBoth, test, short{true, true, true})
	o.storage.addACL(cmd, ofBoth, test)
	f.number(&o.part, "part", "", "begin with part number `N`", ofBoth, test)
	f.yes(&o.skipManifest, "skipmanifest", "", "do not put the manifest", ofBoth, test)
	addPolicy(cmd)
	return cmd
}

type bundleAndUploadOptions struct {
	identity
	imageOptions
	imageFile
	storage
	preserve   bool
	maxPending int
}

func newBundleAndUpload(a *app) *cobra.Command {
	o := bundleAndUploadOptions{maxPending: 2}
	const test = "bundle-and-upload-image"
	cmd := a.command("bundle-and-upload-image", "bundle an image file straight into a bucket", `
Bundles an image and puts its parts into a bucket as they are made; they do not
touch the disk unless --preserve-bundle is given. The manifest comes last; if
anything fails before, the parts are removed again.`, `
  instar bundle-and-upload-image -i root.img -b images/web-1 -k key.pem -c cert.pem -u 111122223333`,
		func(ctx context.Context) error { return runBundleAndUpload(ctx, a, &o) })
	o.imageFile.add(cmd, ofEuca, test)
	o.identity.add(cmd, ofEuca, test)
	o.imageOptions.add(a, cmd, test)
	f := flagsOf(cmd)
	o.storage.add(a, cmd, ofEuca, test, short{true, true, true})
	o.storage.addACL(cmd, ofEuca, test)
	addPolicy(cmd)
	f.yes(&o.preserve, "preserve-bundle", "", "keep the bundle in --destination too", ofEuca, test)
	f.text(&o.destination, "destination", "d", "with --preserve-bundle: put the bundle into `DIR`; default a new directory", ofEuca, test)
	completeFiles(cmd, "destination")
	f.number(&o.maxPending, "max-pending-parts", "", "let `N` parts wait for their upload before bundling waits; default 2", ofEuca, test)
	return cmd
}

type downloadOptions struct {
	storage
	trust
	manifest, prefix, localManifest string
	key, directory                  string
	digest                          string // hex SHA-256 that the manifest in the bucket must have; "" for any
}

// addSource adds the options that name a bundle in a bucket.
func (o *downloadOptions) addSource(cmd *cobra.Command, of origin, test string) {
	f := flagsOf(cmd)
	f.text(&o.manifest, "manifest", "m", "`NAME` of the manifest in the bucket", of, test)
	f.text(&o.prefix, "prefix", "p", "`NAME` of the bundle: its manifest is NAME.manifest.xml; default image", of, test)
	f.text(&o.localManifest, "local-manifest", "", "the manifest is this `FILE`, only the parts are in the bucket", ofEuca, test)
	completeFiles(cmd, "local-manifest", "xml")
}

func newDownloadBundle(a *app) *cobra.Command {
	var o downloadOptions
	const test = "download-bundle"
	cmd := a.command("download-bundle", "fetch a bundle from a bucket", `
Fetches the manifest and the parts of a bundle, several at once, and checks the
digest of each part before it gets its name. Parts that are there already and
right are not fetched again. With -d - the parts go to standard output, one
after the other. An old encrypted manifest is decrypted with -k and kept as
NAME.plaintext.`, `
  instar download-bundle -b images/web-1 -m web-1.manifest.xml -d /var/tmp/web-1`,
		func(ctx context.Context) error { return runDownload(ctx, a, &o) })
	f := flagsOf(cmd)
	o.addSource(cmd, ofBoth, test)
	f.text(&o.directory, "directory", "d", "put the bundle into `DIR`, or - for standard output; default the current directory", ofBoth, test)
	completeFiles(cmd, "directory")
	f.text(&o.key, "privatekey", "k", "the user's private key, `PEM`: only old encrypted manifests need it", ofEC2, test)
	completeFiles(cmd, "privatekey", "pem")
	o.storage.add(a, cmd, ofBoth, test, short{true, true, true})
	return cmd
}

func newDownloadAndUnbundle(a *app) *cobra.Command {
	var o downloadOptions
	const test = "download-and-unbundle"
	cmd := a.command("download-and-unbundle", "fetch a bundle and open it, no parts on disk", `
Fetches a bundle and writes its image. Every part is checked before it is
decrypted, the signature before anything else; the image appears under its name
only when all of it was right. With -d - it goes to standard output, where
nothing can be taken back: rely on the exit status.

The signature is checked with the public half of -k. To open a bundle with the
cloud's key, say with --cert or --trust whose signature to accept.`, `
  instar download-and-unbundle -b images/web-1 -m web-1.manifest.xml -k key.pem -d root.img
  instar download-and-unbundle -b images/web-1 -p web-1 -k key.pem -d - | dd of=/dev/sdb bs=1M`,
		func(ctx context.Context) error { return runDownloadAndUnbundle(ctx, a, &o) })
	f := flagsOf(cmd)
	o.addSource(cmd, ofEuca, test)
	f.text(&o.directory, "directory", "d", "write the image to this `FILE`, into this directory, or to standard output (-); default the current directory", ofEuca, test).
		also("destination", "", ofEuca)
	f.text(&o.key, "privatekey", "k", "the private key that opens the bundle, `PEM`", ofEuca, test)
	completeFiles(cmd, "privatekey", "pem")
	o.trust.add(cmd, test)
	o.storage.add(a, cmd, ofEuca, test, short{true, true, true})
	return cmd
}

type deleteOptions struct {
	storage
	manifest, prefix, localManifest string
	yes, clear                      bool
	versions                        bool
}

func newDeleteBundle(a *app) *cobra.Command {
	var o deleteOptions
	const test = "delete-bundle"
	cmd := a.command("delete-bundle", "remove a bundle from a bucket", `
Removes a bundle: the manifest first, so that nobody sees half a bundle, then
the parts it names and any other part of that name. It asks before, unless -y or
--batch is given or it is called as euca-delete-bundle. In a bucket that keeps
versions the old versions stay, which is said; --all-versions removes them too.
Objects that are locked are named.

-m is a local manifest as in ec2-delete-bundle if there is such a file, else the
manifest's name in the bucket as in euca-delete-bundle.`, `
  instar delete-bundle -b images/web-1 -p web-1
  ec2-delete-bundle -b images -m web-1.manifest.xml -a KEY -s SECRET -y --clear`,
		func(ctx context.Context) error { return runDelete(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.manifest, "manifest", "m", "the bundle's manifest: a `FILE`, or its name in the bucket", ofBoth, test)
	f.text(&o.prefix, "prefix", "p", "`NAME` of the bundle", ofBoth, test)
	f.text(&o.localManifest, "local-manifest", "", "the bundle's manifest, a `FILE`", ofEuca, test)
	completeFiles(cmd, "manifest", "xml")
	completeFiles(cmd, "local-manifest", "xml")
	f.yes(&o.clear, "clear", "", "remove the bucket too, if it is empty afterwards", ofBoth, test)
	f.yes(&o.yes, "yes", "y", "do not ask", ofEC2, test)
	f.yes(&o.versions, "all-versions", "", "remove every version, in a bucket that keeps them", ofUs, test)
	o.storage.add(a, cmd, ofBoth, test, short{true, true, true})
	return cmd
}
