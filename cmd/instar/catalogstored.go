package main

import (
	"context"

	"github.com/spf13/cobra"
)

// The commands that store registered images as one object, and restore them.

type storeTaskOptions struct {
	catalogOptions
	into string
	tags []string
}

func newImagesStore(a *app) *cobra.Command {
	var o storeTaskOptions
	const test = "catalog-stored"
	cmd := a.named("store ID --into BUCKET", "store a registered image as one object", `
Stores an image, of either kind, as one object in a bucket: a tar archive named
IMAGE-ID.bin with all that the image consists of and what the catalog says of it,
signed. It can be copied anywhere, to an archive or over a gap of air, and "images
restore-from" makes an image of it again. It is what EC2's CreateStoreImageTask
does, and "catalog serve" shows the task to EC2's clients.

Every digest is compared on the way. The object is there when all of it is, or not
at all; the same command goes on with a task that was interrupted. An Instar image
stays encrypted for its recipients. The bucket is opened with the options of the
catalog's own; beside a store that is a directory buckets are directories too.
`+aboutIDs, `
  instar images store web --into archive --store s3://images/fleet
  instar images store ami-0123456789abcdef0 --into archive/2026 --object-tag keep=10y --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesStore(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.into, "into", "", "put the object into `BUCKET[/PREFIX]`", ofUs, test)
	f.list(&o.tags, "object-tag", "", "the object has the tag `KEY=VALUE`; may be repeated. Directories have none", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

type restoreFromOptions struct {
	catalogOptions
	name, token, folder string
	tags                []string
}

func newImagesRestoreFrom(a *app) *cobra.Command {
	var o restoreFromOptions
	const test = "catalog-stored"
	cmd := a.named("restore-from BUCKET/KEY", "restore a registered image from one object", `
Makes an image of an object that "images store" or CreateStoreImageTask has put,
here or in another region. The image has an id of its own and the tags it had; it
is pending while its pieces are fetched, and available when every one of them was
read back and found right. The same command goes on with a restoration that was
interrupted: it is known by its token, which unless given is made of the object and
the name.

The object must be signed by a key that this machine's allowed_signers file lets
speak for the region it was stored in (namespace instar-catalog).`, `
  instar images restore-from archive/ami-0123456789abcdef0.bin --name 'web again' --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runImagesRestoreFrom(ctx, a, &o, args[0]) })
	f := flagsOf(cmd)
	f.text(&o.name, "name", "", "`NAME` of the image; default the one it was stored under", ofUs, test)
	f.list(&o.tags, "tag", "", "tag it `KEY=VALUE` as well; may be repeated", ofUs, test)
	f.text(&o.folder, "folder", "", "a bundle goes to `BUCKET/PREFIX`; default bundles/ID beside the catalog", ofUs, test)
	f.text(&o.token, "token", "", "`TOKEN` by which the restoration is known when the command is run again", ofUs, test)
	o.catalogOptions.add(a, cmd, test, true)
	return cmd
}

func newImagesStored(a *app) *cobra.Command {
	var o catalogOptions
	cmd := a.named("stored [ID]...", "list what is being, or was, stored as one object", `
Lists the tasks of "images store" and CreateStoreImageTask of an account: the
image, the object, the state (InProgress, Completed, Failed), and how far it is. One
that ended is listed for 31 days.`, `
  instar images stored --store s3://images/fleet`, 0, 1000,
		func(ctx context.Context, args []string) error { return runImagesStored(ctx, a, &o, args) })
	o.add(a, cmd, "catalog-stored", false)
	return cmd
}
