package main

import (
	"context"

	"github.com/spf13/cobra"
)

// The commands about registered images: those of the catalog in a store.

const aboutIDs = `
ID is an image's id, ami-…, or the name it is registered under: NAME of one's
own, or ACCOUNT/NAME of another account's. Images are changed in
the name of the account they are registered for; whoever's key the catalog's
readers trust (allowed_signers, namespace instar-catalog) may do so.`

// catalogOptions are what all commands about the catalog have.
type catalogOptions struct {
	imageStore
	account, sign string
}

func (o *catalogOptions) add(a *app, cmd *cobra.Command, test string, change bool) {
	f := flagsOf(cmd)
	f.text(&o.account, "account", "", "act for `ACCOUNT`, 12 digits; default account_id of the configuration", ofUs, test)
	if change {
		f.sign(&o.sign, test)
	}
	o.imageStore.add(a, cmd, test)
}

type registerOptions struct {
	catalogOptions
	name, description, arch, kernel, ramdisk, rootDevice, virtualization, platform, bootMode string
	sourceImage, sourceInstance, token                                                       string
	parameters, gettingStarted                                                               string
	inject, templates, tags                                                                  []string
	mappings                                                                                 mappings
}

func newImagesRegister(a *app) *cobra.Command {
	var o registerOptions
	const test = "catalog-images"
	cmd := a.named("register LOCATION", "give an image an id and a name in the catalog", `
Registers an image: it gets an id, ami-…, that is never used again, and a name
that no other of the account's images in this catalog has. LOCATION is an EC2
bundle, BUCKET/PREFIX/NAME.manifest.xml, or an Instar image of the store, NAME or
NAME@VERSION; a version is registered, not a name that moves on. It is fetched and
checked first, and says what is not given here.

What the image wants to know at each launch is in the --parameters file, a YAML
list of name, type (string, integer, boolean, choice, secret), default, required,
choices and help. Files given by --inject are put into each machine at its
start; in those of --inject-template ${NAME} becomes the parameter's value.

A store without a catalog gets one by "instar catalog create".`, `
  instar images register web-1 --name 'web 2026-11' --tag env=prod --store s3://images/fleet
  instar images register images/web-1/image.manifest.xml --name web-bundle --store s3://images/fleet
  instar images register web-1 --name web --parameters web.yaml --inject-template /etc/web.conf=web.conf`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesRegister(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.name, "name", "", "`NAME`, 3 to 128 characters", ofUs, test)
	f.text(&o.description, "description", "", "what it is: `TEXT` of at most 255 bytes", ofUs, test)
	f.choice(cmd, &o.arch, []string{"x86_64", "arm64", "i386"}, "machine", "", "`ARCH`itecture; default the image's", ofUs, test)
	f.text(&o.kernel, "kernel", "", "`ID` of the kernel image, aki-…", ofUs, test)
	f.text(&o.ramdisk, "ramdisk", "", "`ID` of the ramdisk image, ari-…", ofUs, test)
	f.text(&o.rootDevice, "root-device", "", "`DEVICE` the root is; default the image's", ofUs, test)
	f.choice(cmd, &o.virtualization, []string{"hvm", "paravirtual"}, "virtualization", "", "`TYPE` of virtualization", ofUs, test)
	f.choice(cmd, &o.platform, []string{"windows"}, "platform", "", "`NAME` of the platform, if it is not Linux", ofUs, test)
	f.choice(cmd, &o.bootMode, []string{"legacy-bios", "uefi", "uefi-preferred"}, "boot-mode", "", "`MODE` the machine's firmware boots in", ofUs, test)
	f.add(&o.mappings, "block-device-mapping", "B", "devices as the instance sees them, `VIRTUAL=DEVICE,...`", ofUs, test)
	f.list(&o.tags, "tag", "", "tag it `KEY=VALUE`; may be repeated", ofUs, test)
	f.text(&o.sourceImage, "source-image", "", "`ID` of the image it was made from", ofUs, test)
	f.text(&o.sourceInstance, "source-instance", "", "`ID` of the instance it was made from", ofUs, test)
	f.text(&o.parameters, "parameters", "", "the image's parameters are in `FILE`, YAML", ofUs, test)
	completeFiles(cmd, "parameters", "yaml", "yml")
	f.text(&o.gettingStarted, "getting-started", "", "how to begin with it is told in `FILE`, text or Markdown", ofUs, test)
	completeFiles(cmd, "getting-started", "md", "txt")
	f.list(&o.inject, "inject", "", "put FILE into each machine as PATH: `PATH=FILE`; may be repeated", ofUs, test)
	f.list(&o.templates, "inject-template", "", "the same of a file with ${NAME} in it: `PATH=FILE`", ofUs, test)
	f.text(&o.token, "token", "", "`TOKEN`: the same command again registers nothing anew", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

type tagOptions struct {
	catalogOptions
	remove []string
}

func newImagesTag(a *app) *cobra.Command {
	var o tagOptions
	const test = "catalog-images"
	cmd := a.named("tag ID [KEY=VALUE]...", "put tags on a registered image, and take them off", `
Puts tags on an image, 50 at most; one of the same key gets the new value.
--remove takes those of a key off.
`+aboutIDs, `
  instar images tag ami-0123456789abcdef0 env=prod team=web --store s3://images/fleet
  instar images tag web --remove team --store s3://images/fleet`, 1, 60,
		func(ctx context.Context, args []string) error { return runImagesTag(ctx, a, &o, args[0], args[1:]) })
	flagsOf(cmd).list(&o.remove, "remove", "", "take off the tag of `KEY`; may be repeated", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

type shareOptions struct {
	catalogOptions
	with, withdraw               []string
	public, private, reset, flag bool
}

func newImagesShare(a *app) *cobra.Command {
	var o shareOptions
	const test = "catalog-images"
	cmd := a.named("share ID", "say which accounts may launch a registered image", `
Gives accounts permission to see and launch an image, or takes it back; --public
gives it to everybody. The owner has his always.

For an Instar image the permission is a key: what opens the image is wrapped for
the public keys that "instar accounts set" has noted for the account, with this
machine's identity. --flag-only leaves keys alone. Taking a permission back takes
the account's keys off the image, and cannot take back what was read: who must
not have it any more gets no later version. --public wraps nothing: everybody
is shown the image, and whom its recipients trust can open it.
`+aboutIDs, `
  instar images share web --with 222222222222,333333333333 --store s3://images/fleet
  instar images share web --withdraw 222222222222 --store s3://images/fleet
  instar images share web --public --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesShare(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.list(&o.with, "with", "", "give `ACCOUNT` permission; may be repeated", ofUs, test)
	f.list(&o.withdraw, "withdraw", "", "take `ACCOUNT`'s permission back; may be repeated", ofUs, test)
	f.yes(&o.public, "public", "", "give everybody permission", ofUs, test)
	f.yes(&o.private, "private", "", "take everybody's permission back", ofUs, test)
	f.yes(&o.reset, "reset", "", "take all permissions back, and keys", ofUs, test)
	f.yes(&o.flag, "flag-only", "", "change the permission, and no keys", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

type copyOptions struct {
	catalogOptions
	to, toURL, toAccessKey, toSecretFile, toCACert, toRegion string
	name, description, token, folder                         string
	copyTags                                                 bool
}

func newImagesCopy(a *app) *cobra.Command {
	var o copyOptions
	const test = "catalog-images"
	cmd := a.named("copy ID --to STORE", "copy a registered image to another region", `
Copies an image to the catalog of another region: another bucket, perhaps at
another endpoint, whose catalog exists. The copy has an id of its own, is pending
while objects are copied, by the server where it has both, and available when
every one of them was read back and found right. The same command goes on with
a copy that was interrupted: it is known by its token, which unless given is made
of the image, the region and the name.

Permissions are not copied, tags with --copy-tags. An Instar image keeps its
recipients; its head there is signed with this machine's key.
`+aboutIDs, `
  instar images copy web --to s3://images-eu/fleet --to-url https://minio.eu.example:9000 --store s3://images/fleet
  instar images copy ami-0123456789abcdef0 --to /backup/region --name web-backup --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesCopy(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.to, "to", "", "where the other catalog is: `STORE` is s3://BUCKET/PREFIX or a directory", ofUs, test)
	f.text(&o.toURL, "to-url", "", "`URL` of the S3 service there; default this one's", ofUs, test)
	f.text(&o.toRegion, "to-region", "", "the other catalog is of region `NAME`, and nothing is done if it is not", ofUs, test)
	f.text(&o.toAccessKey, "to-access-key", "", "S3 access `KEY` there; default this one's", ofUs, test)
	f.text(&o.toSecretFile, "to-secret-key-file", "", "read the S3 secret key there from `FILE`", ofUs, test)
	f.text(&o.toCACert, "to-ca-cert", "", "trust the certificate authorities in `FILE` (PEM) for the endpoint there", ofUs, test)
	completeFiles(cmd, "to-ca-cert", "pem", "crt")
	f.text(&o.name, "name", "", "`NAME` of the copy; default the same", ofUs, test)
	f.text(&o.description, "description", "", "what the copy is: `TEXT`; default the same", ofUs, test)
	f.text(&o.folder, "folder", "", "a bundle goes to `BUCKET/PREFIX`; default bundles/ID beside the catalog there", ofUs, test)
	f.text(&o.token, "token", "", "`TOKEN` by which the copy is known when the command is run again", ofUs, test)
	f.yes(&o.copyTags, "copy-tags", "", "copy the image's tags", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

type deprecateOptions struct {
	catalogOptions
	at    string
	never bool
}

func newImagesDeprecate(a *app) *cobra.Command {
	var o deprecateOptions
	const test = "catalog-images"
	cmd := a.named("deprecate ID", "say from when on a registered image is out of date", `
From the time on that is given others do not see the image in lists any more,
unless they ask for deprecated ones. It can be launched as before.
`+aboutIDs, `
  instar images deprecate web --at 30d --store s3://images/fleet
  instar images deprecate web --at 2027-01-15T08:00:00Z --store s3://images/fleet
  instar images deprecate web --never --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesDeprecate(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.at, "at", "", "`TIME`, as 2027-01-15T08:00:00Z, or from now, as 30d; default now", ofUs, test)
	f.yes(&o.never, "never", "", "it is not out of date, and will not be", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

type protectOptions struct {
	catalogOptions
	off, cooldown bool
}

func newImagesProtect(a *app) *cobra.Command {
	var o protectOptions
	const test = "catalog-images"
	cmd := a.named("protect ID", "protect a registered image against being deregistered", `
A protected image cannot be deregistered. --off ends that: at once, or after a
day if it was protected with --cooldown.
`+aboutIDs, `
  instar images protect web --cooldown --store s3://images/fleet
  instar images protect web --off --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesProtect(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.yes(&o.off, "off", "", "end the protection", ofUs, test)
	f.yes(&o.cooldown, "cooldown", "", "when it is ended, it holds for another day", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

// newImagesVerb makes the commands that do one thing to one image.
func newImagesVerb(a *app, verb, short, long string, run func(context.Context, *app, *catalogOptions, string) error) *cobra.Command {
	var o catalogOptions
	cmd := a.named(verb+" ID", short, long+"\n"+aboutIDs, "\n  instar images "+verb+" web --store s3://images/fleet", 1, 1,
		func(ctx context.Context, args []string) error { return run(ctx, a, &o, args[0]) })
	o.add(a, cmd, "catalog-images", true)
	return cmd
}

// newCatalogImages are the commands of "instar images" about registered ones.
func newCatalogImages(a *app) []*cobra.Command {
	return []*cobra.Command{
		newImagesRegister(a), newImagesTag(a), newImagesShare(a), newImagesCopy(a), newImagesStore(a), newImagesStored(a), newImagesRestoreFrom(a), newImagesDeprecate(a), newImagesProtect(a),
		newImagesVerb(a, "disable", "take a registered image out of use", `
A disabled image is launched by nobody and seen by its owner alone; permissions
that others had end.`, runImagesDisable),
		newImagesVerb(a, "enable", "put a disabled image into use again", `
The image is available again, to its owner.`, runImagesEnable),
		newImagesVerb(a, "deregister", "end a registered image's life in the catalog", `
Nobody can launch the image any more. Machines that run from it go on; its
id is never used again, its name is free. What it consists of stays in the store
until it is deleted: "instar delete-bundle", "instar images delete", "instar gc".
You are asked first; --batch asks nothing.`, runImagesDeregister),
	}
}

// newCatalogVerbs are the commands of "instar catalog" about the catalog as a
// whole.
func newCatalogVerbs(a *app) []*cobra.Command {
	const test = "catalog-images"
	var os, og, of struct {
		imageStore
		sign   string
		dryRun bool
	}
	show := a.named("show", "show what a catalog is and who changed it last", `
Shows the region, the number of the newest change, its time and signer, and how
many images, key pairs and accounts there are.`, `
  instar catalog show --store s3://images/fleet`, 0, 0,
		func(ctx context.Context, _ []string) error { return runCatalogShow(ctx, a, &os.imageStore) })
	os.imageStore.add(a, show, test)
	gc := a.named("gc", "delete what the catalog's past states have left", `
Deletes the objects below catalog/data that the catalog does not use any more, and
forgets client tokens older than a week. It may run at any time.`, `
  instar catalog gc --store s3://images/fleet`, 0, 0,
		func(ctx context.Context, _ []string) error {
			return runCatalogGC(ctx, a, &og.imageStore, og.sign, og.dryRun)
		})
	flagsOf(gc).yes(&og.dryRun, "dry-run", "", "change nothing; tell what would be done", ofUs, test)
	flagsOf(gc).sign(&og.sign, test)
	og.imageStore.add(a, gc, test)
	forget := a.named("forget", "accept an older state of the catalog, once", `
This machine remembers the newest state of the catalog it has seen, and takes
nothing older. After an older copy of the store was put back by you, let it
forget what it saw. You are asked first; --batch asks nothing.`, `
  instar catalog forget --store s3://images/fleet`, 0, 0,
		func(ctx context.Context, _ []string) error { return runCatalogForget(ctx, a, &of.imageStore) })
	of.imageStore.add(a, forget, test)
	return []*cobra.Command{show, gc, forget}
}
