package main

import (
	"context"

	"github.com/spf13/cobra"
)

type unbundleOptions struct {
	trust
	key, manifest, source, destination string
}

func newUnbundle(a *app) *cobra.Command {
	var o unbundleOptions
	const test = "unbundle"
	cmd := a.command("unbundle", "open a bundle", `
Opens a bundle and writes its image, holes as holes, under the bundle's name in
--destination. The signature is checked first, every part before it is
decrypted; the image appears under its name only when all of it was right.

The signature is checked with the public half of -k. To open a bundle with the
cloud's key, say with --cert or --trust whose signature to accept.`, `
  instar unbundle -m web-1.manifest.xml -k key.pem -d /var/tmp
  instar unbundle -m web-1.manifest.xml -k ec2-key.pem --cert user-cert.pem`,
		func(ctx context.Context) error { return runUnbundle(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.manifest, "manifest", "m", "the bundle's manifest, a `FILE`", ofBoth, test)
	completeFiles(cmd, "manifest", "xml")
	f.text(&o.key, "privatekey", "k", "the private key that opens the bundle, `PEM`", ofBoth, test)
	completeFiles(cmd, "privatekey", "pem")
	f.text(&o.source, "source", "s", "the parts are in `DIR`; default the current directory", ofBoth, test)
	completeFiles(cmd, "source")
	f.text(&o.destination, "destination", "d", "write the image into `DIR`; default the current directory", ofBoth, test)
	completeFiles(cmd, "destination")
	o.trust.add(cmd, test)
	f.text(&a.region, "region", "", "pick euca2ools' settings of USER@`REGION`", ofEuca, "config")
	return cmd
}

type streamOptions struct {
	in, out, key, iv, digest string
	size                     int64
}

func newUnbundleStream(a *app) *cobra.Command {
	var o streamOptions
	const test = "unbundle-stream"
	cmd := a.command("unbundle-stream", "open the joined parts of a bundle, key given", `
Reads the parts of a bundle joined into one stream and writes the image. There
is no manifest here, so nothing is checked but --image-size and --sha1-digest
(the digest of the archive within): without them a damaged or foreign stream can
pass.`, `
  cat web-1.part.* | instar unbundle-stream --enc-key 0123... --enc-iv 4567... -o root.img`,
		func(ctx context.Context) error { return runUnbundleStream(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.in, "input", "i", "read `FILE`; default standard input", ofEuca, test)
	f.text(&o.out, "output", "o", "write `FILE`; default standard output", ofEuca, test)
	f.text(&o.key, "enc-key", "", "the bundle's AES key, 32 `HEX` digits", ofEuca, test)
	f.text(&o.iv, "enc-iv", "", "the bundle's initialisation vector, 32 `HEX` digits", ofEuca, test)
	f.size(&o.size, "image-size", "", "the image must have `SIZE` bytes", ofEuca, test)
	f.text(&o.digest, "sha1-digest", "", "the archive's SHA-1 must be `HEX`", ofEuca, test)
	f.text(&a.region, "region", "", "pick euca2ools' settings of USER@`REGION`", ofEuca, "config")
	return cmd
}

type verifyOptions struct {
	storage
	trust
	manifest, prefix, source, key string

	store, signers  string
	identities      []string
	readData, scrub bool
}

// imageFlags are verify's options about images, bundleOnly those about bundles.
var (
	imageFlags = []string{"store", "identity", "signers", "read-data", "scrub"}
	bundleOnly = []string{"manifest", "prefix", "source", "privatekey", "bucket", "cert", "trust", "allow-unsigned"}
)

func newVerify(a *app) *cobra.Command {
	var o verifyOptions
	const test = "verify"
	cmd := a.named("verify [IMAGE]...", "check images of a store, or an EC2 bundle", `
Checks, without writing anything, images of a store, or one EC2 bundle if an option
speaks of it. Exit status 4 says that something is not right, and what.

Of images, all versions of all if none is named, the signatures, keys and the index
are checked, and that every pack is there with its size; --read-data reads and
checks the data too. What is damaged is told by version, range and file. --scrub
reads every object of the store and needs no key: whoever keeps the store can do it.

Of a bundle, in a directory or a bucket, is checked who signed it, that every part is
there, has its size and its digest and, given a key that opens it, that the archive
within is what the manifest says. What the format does not sign (version, bundler)
is shown as such.`, `
  instar verify web-1 --store s3://images/fleet --read-data
  instar verify --store s3://images/fleet
  instar verify --scrub --store s3://images/fleet
  instar verify -m web-1.manifest.xml -c cert.pem
  instar verify -b images/web-1 -m web-1.manifest.xml --trust signers.pem --json`, 0, 1000,
		func(ctx context.Context, _ []string) error { return runVerify(ctx, a, &o) })
	bundles := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ofBundle := givenOf(cmd, bundleOnly)
		ofImages := len(args) > 0 || givenOf(cmd, imageFlags) != ""
		if !ofImages && ofBundle != "" {
			return bundles(cmd, args)
		}
		if !ofImages && a.conf.Get("store").Text == "" {
			return withHint(usagef("nothing is named that is to be checked"), "--store STORE checks its images, --manifest FILE a bundle.")
		}
		if ofBundle != "" {
			return usagef("--%s is about EC2 bundles: it does not go with images", ofBundle)
		}
		return verifyImages(cmd.Context(), a, &o, args)
	}
	f := flagsOf(cmd)
	f.text(&o.store, "store", "", "where the images are: `STORE` is s3://BUCKET/PREFIX, BUCKET/PREFIX or a directory, /DIR or ./DIR", ofUs, test)
	completeFiles(cmd, "store")
	f.yes(&o.readData, "read-data", "", "of images: read and check all their data", ofUs, test)
	f.yes(&o.scrub, "scrub", "", "check every object of the store by its name, without keys", ofUs, test)
	f.list(&o.identities, "identity", "", "of images: open them with the age identity or SSH private key in `FILE` in place of the machine's own; may be repeated", ofUs, test)
	f.text(&o.signers, "signers", "", "of images: believe whom the allowed_signers `FILE` lists", ofUs, test)
	f.text(&o.manifest, "manifest", "m", "the bundle's manifest: a `FILE`, with -b its name in the bucket", ofUs, test)
	f.text(&o.prefix, "prefix", "p", "with -b: `NAME` of the bundle", ofUs, test)
	f.text(&o.source, "source", "d", "the parts are in `DIR`; default the manifest's", ofUs, test)
	f.text(&o.key, "privatekey", "k", "a private key that opens the bundle, `PEM`: check the archive within too", ofUs, test)
	o.trust.add(cmd, test)
	o.storage.add(a, cmd, ofUs, test, short{true, true, true})
	return cmd
}
