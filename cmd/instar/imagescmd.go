package main

import (
	"context"

	"github.com/spf13/cobra"
)

// The commands about the images of a store.

func newImages(a *app) *cobra.Command {
	cmd := branch("images", "list, show, compare and delete the images of a store; register, share and copy them", `
Shows what images a store holds, what one consists of, and how two of them
differ; deletes images, or single versions. "instar gc" gives back the room of
what was deleted.

A store may have a catalog ("instar catalog create"), in which images, EC2
bundles too, are registered: under an id and a name, with an owner, tags, and
permissions. register, tag, share, copy, deprecate, protect, disable, enable and
deregister are about those; list and show know both.
`+aboutNames, `
  instar images list --store s3://images/fleet
  instar images show web-1 --store s3://images/fleet
  instar images diff web-1@parent web-1 --store s3://images/fleet
  instar images delete web-1@parent --store s3://images/fleet
  instar images prune web-1 --keep-daily 7 --store s3://images/fleet
  instar images trace web-1 --store s3://images/fleet
  instar images forget web-1 --store s3://images/fleet`)
	cmd.AddCommand(newImagesList(a), newImagesShow(a), newImagesDiff(a), newImagesDelete(a), newImagesPrune(a), newImagesTrace(a), newImagesForget(a))
	cmd.AddCommand(newCatalogImages(a)...)
	return cmd
}

type listOptions struct {
	imageStore
	versions, registered bool
	query                catalogQuery
}

func newImagesList(a *app) *cobra.Command {
	var o listOptions
	const test = "images"
	cmd := a.named("list [PREFIX]", "list the images of a store", `
Lists the images whose names begin with PREFIX: the newest version of each, or
with --versions all. An image whose signature is not by somebody --signers lists
for it is shown as such, and nothing it says is.

Where the store has a catalog, registered images come first, with their ids, then
those that are not registered. --registered, or any option that says which,
lists registered images only; PREFIX is then of their names. Values may have the
wildcards * and ?; filters are EC2's: architecture, name, state, tag:KEY,
root-device-type, is-public, manifest-location and so on.`, `
  instar images list --store s3://images/fleet
  instar images list web- --versions --json --store s3://images/fleet
  instar images list --tag 'env=prod*' --architecture arm64 --store s3://images/fleet
  instar images list --account 222222222222 --executable-by self --store s3://images/fleet`, 0, 1,
		func(ctx context.Context, args []string) error { return runImagesList(ctx, a, &o, args) })
	f := flagsOf(cmd)
	f.yes(&o.versions, "versions", "", "list older versions too, and what was left of captures that were interrupted", ofUs, test)
	f.yes(&o.registered, "registered", "", "list registered images only", ofUs, "catalog-images")
	o.query.add(cmd, "catalog-images")
	o.imageStore.add(a, cmd, test)
	return cmd
}

type showOptions struct {
	imageStore
	fresh
	manifest bool
}

func newImagesShow(a *app) *cobra.Command {
	var o showOptions
	const test = "images"
	cmd := a.named("show IMAGE", "show what an image is, who signed it and who can open it", `
Shows a version of an image: when and from what it was made, its parts and
their sizes, its signer, its recipients, and how sure it is to be the newest.
IMAGE may also be the id or the name of a registered image, an EC2 bundle too.

With --manifest the signed document goes to standard output as it is stored, and
stock tools can check it:

  instar images show web-1 --manifest >m
  sed '/^-----BEGIN SSH SIGNATURE-----$/,$d' m >m.json
  sed -n '/^-----BEGIN SSH SIGNATURE-----$/,$p' m >m.json.sig
  ssh-keygen -Y verify -f allowed_signers -I web-1 -n instar-image -s m.json.sig <m.json
`+aboutNames, `
  instar images show web-1 --store s3://images/fleet
  instar images show web-1@parent --json --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesShow(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.yes(&o.manifest, "manifest", "", "print the signed manifest as it is stored", ofUs, test)
	o.imageStore.add(a, cmd, test)
	o.fresh.add(cmd, test)
	return cmd
}

type diffOptions struct {
	imageStore
	fresh
	touched bool
}

func newImagesDiff(a *app) *cobra.Command {
	var o diffOptions
	const test = "images"
	cmd := a.named("diff IMAGE IMAGE", "tell which files differ between two images, and by how many bytes", `
Lists the files that only one of two images has or whose content differs, with
the number of bytes that are not the first one's. What the images have in common
is known by its digest and not fetched. Both must have been made by create-image.
`+aboutNames, `
  instar images diff web-1@parent web-1 --store s3://images/fleet
  instar images diff web-1 web-2 --json --store s3://images/fleet`, 2, 2,
		func(ctx context.Context, args []string) error { return runImagesDiff(ctx, a, &o, args[0], args[1]) })
	f := flagsOf(cmd)
	f.yes(&o.touched, "touched", "", "list files too whose times or attributes alone were changed", ofUs, test)
	o.imageStore.add(a, cmd, test)
	o.fresh.add(cmd, test)
	return cmd
}

type deleteImageOptions struct {
	imageStore
	sign string
}

func newImagesDelete(a *app) *cobra.Command {
	var o deleteImageOptions
	const test = "images"
	cmd := a.named("delete IMAGE", "delete an image or one version of it", `
Deletes an image with all its versions, or, by NAME@DIGITS or NAME@parent, one
version. The name remains as deleted in the store, so that nobody can pass an
old version off as new. The room is given back by "instar gc". You are asked
first; --batch asks nothing.`, `
  instar images delete web-1 --store s3://images/fleet
  instar images delete web-1@parent --batch --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesDelete(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.sign(&o.sign, test)
	o.imageStore.add(a, cmd, test)
	return cmd
}

func newImagesForget(a *app) *cobra.Command {
	var o imageStore
	const test = "images"
	cmd := a.named("forget IMAGE...", "accept an older state of images, once", `
This machine remembers the newest version of each image that it has seen, and
takes nothing older for the newest again: that is how it notices that somebody
hides what is new. After an older copy of the store was put back by you, let it
forget what it saw; each machine that uses the store has to. You are asked
first; --batch asks nothing.`, `
  instar images forget web-1 --store s3://images/fleet
  instar images forget web-1 web-2 --batch --store /backup/images`, 1, 1000,
		func(ctx context.Context, args []string) error { return runImagesForget(ctx, a, &o, args) })
	o.add(a, cmd, test)
	return cmd
}

type gcOptions struct {
	imageStore
	grace, domain    string
	repack           int
	versions, dryRun bool
}

func newGC(a *app) *cobra.Command {
	o := gcOptions{grace: "24h"}
	const test = "gc"
	cmd := a.command("gc", "give back the room of what no image needs any more", `
Deletes what deleted images and interrupted captures have left, in two steps: a
first run condemns what nothing refers to and is older than --grace; a run that
is --grace later deletes what still nothing refers to. It may run at any time,
beside captures and other collections, and be interrupted.

No key is needed for that. --repack also copies what is still needed out of
packs that are mostly garbage; for that this machine's keys must open all images
of the domain that use them.`, `
  instar gc --store s3://images/fleet --dry-run
  instar gc --store s3://images/fleet --grace 7d
  instar gc --store s3://images/fleet --repack 50`,
		func(ctx context.Context) error { return runGC(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.grace, "grace", "", "leave alone what is younger than `TIME`: 30m, 12h, 7d; 0 for none; default 24h", ofUs, test)
	f.number(&o.repack, "repack", "", "rewrite packs of which less than `PERCENT` are in use", ofUs, test)
	f.text(&o.domain, "domain", "", "with --repack: the `DOMAIN` whose packs are rewritten; default default", ofUs, test)
	f.yes(&o.versions, "versions", "", "in a bucket that keeps versions, remove those of what was deleted longer than the grace ago", ofUs, test)
	f.yes(&o.dryRun, "dry-run", "", "change nothing; tell what would be done", ofUs, test)
	o.imageStore.add(a, cmd, test)
	return cmd
}

type repairOptions struct {
	imageStore
	from, disks []string
	domain      string
}

func newRepair(a *app) *cobra.Command {
	var o repairOptions
	const test = "repair"
	cmd := a.command("repair", "bring back what of a store is damaged or lost", `
Scrubs a store and mends what it can: objects that another store has are put
back; pieces of damaged packs are taken from what is left of them, from other
packs, other stores and copies of disks, each verified, and stored anew. What
is damaged is set aside under quarantine/ before it is replaced. What cannot be
brought back is told by version, range and file; exit status 4 says that there is
such.

"instar verify" and "instar verify --scrub" show what is damaged and change nothing.`, `
  instar repair --store s3://images/fleet
  instar repair --store s3://images/fleet --from /backup/images --disk web-1.img`,
		func(ctx context.Context) error { return runRepair(ctx, a, &o) })
	f := flagsOf(cmd)
	f.list(&o.from, "from", "", "another `STORE`, a copy of this one or one of the same domain; may be repeated", ofUs, test)
	completeFiles(cmd, "from")
	f.list(&o.disks, "disk", "", "a raw copy of a disk, `FILE` or device, that was captured or restored; may be repeated", ofUs, test)
	completeFiles(cmd, "disk")
	f.text(&o.domain, "domain", "", "mend packs of `DOMAIN`; default default", ofUs, test)
	o.imageStore.add(a, cmd, test)
	return cmd
}

type recipientsOptions struct {
	imageStore
	fresh
	sign, domain string
	creators     bool
}

func newRecipients(a *app) *cobra.Command {
	cmd := branch("recipients", "say who can open an image, and who can add images to a domain", `
An image is opened by its recipients: age keys and SSH keys (ssh-ed25519,
ssh-rsa), its own machine's among them. Adding one needs a key that opens the
image, and changes no other object. Removing one keeps it from being opened by a
new reader; what was read, or copied, cannot be taken back.

With --creators the commands are about the creators of a domain: machines whose
images share stored pieces.`, `
  instar recipients list web-1 --store s3://images/fleet
  instar recipients add web-1 ~/.ssh/id_ed25519.pub --store s3://images/fleet
  instar recipients add --creators age1... --store s3://images/fleet`)
	cmd.AddCommand(
		newRecipientsVerb(a, "list", "list [IMAGE]", "list who can open an image, as the store says", `
Lists the recipients of an image, or with --creators the creators of a domain.
The list is the store's word: what counts is who has a key.`, runRecipientsList, 1),
		newRecipientsVerb(a, "add", "add [IMAGE] KEY...", "let others open an image", `
Adds recipients to an image: KEY is an age recipient, an SSH public key, or a
file of them. With --creators it adds creators to a domain.`, runRecipientsAdd, 1000),
		newRecipientsVerb(a, "remove", "remove [IMAGE] KEY...", "let others open an image no longer", `
Removes recipients from an image. Who has opened it before, or kept a copy of
its key, can open it still: to exclude him, delete the image and capture anew.`, runRecipientsRemove, 1000))
	return cmd
}

func newRecipientsVerb(a *app, verb, use, short, long string, run func(context.Context, *app, *recipientsOptions, []string) error, most int) *cobra.Command {
	var o recipientsOptions
	const test = "recipients"
	example := "  instar recipients " + verb + " web-1"
	if verb != "list" {
		example += " ~/.ssh/id_ed25519.pub"
	}
	cmd := a.named(use, short, long, example+" --store s3://images/fleet", 0, most,
		func(ctx context.Context, args []string) error { return run(ctx, a, &o, args) })
	f := flagsOf(cmd)
	f.yes(&o.creators, "creators", "", "the creators of a domain, not the recipients of an image", ofUs, test)
	f.text(&o.domain, "domain", "", "with --creators: the `DOMAIN`; default default", ofUs, test)
	if verb != "list" {
		f.text(&o.sign, "sign", "", "with --creators: sign with the SSH `KEY`: a private key's file, a public one's whose other half the SSH agent has, or agent", ofUs, test)
	}
	o.imageStore.add(a, cmd, test)
	o.fresh.add(cmd, test)
	return cmd
}
