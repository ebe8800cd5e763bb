package main

import (
	"context"

	"github.com/spf13/cobra"
)

type keysOptions struct {
	catalogOptions
	kind, out string
	tags      []string
}

func newKeys(a *app) *cobra.Command {
	cmd := branch("keys", "create, import, list and delete the key pairs of an account", `
Key pairs are the SSH keys that machines let their users in with, kept in the
catalog by name for each account: their public halves. A private key is written
to a file or shown once when it is made, and stored nowhere.`, `
  instar keys create laptop --out laptop.pem --store s3://images/fleet
  instar keys import laptop ~/.ssh/id_ed25519.pub --store s3://images/fleet
  instar keys list --store s3://images/fleet
  instar keys delete laptop --store s3://images/fleet`)
	const test = "catalog-keys"
	var oc, oi, ol, od keysOptions
	create := a.named("create NAME", "make a key pair", `
Makes a key pair, notes its public half under NAME, and writes the private one to
--out, a new file that only you can read, or to standard output. It is not kept:
what is lost is lost.`, `
  instar keys create laptop --out laptop.pem --store s3://images/fleet
  instar keys create laptop --type ed25519 --out laptop.key --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runKeysCreate(ctx, a, &oc, args[0]) })
	f := flagsOf(create)
	f.choice(create, &oc.kind, []string{"rsa", "ed25519"}, "type", "", "`TYPE` of key: rsa (default) or ed25519", ofUs, test)
	f.text(&oc.out, "out", "", "write the private key to the new `FILE`, mode 0600", ofUs, test)
	completeFiles(create, "out")
	f.list(&oc.tags, "tag", "", "tag it `KEY=VALUE`; may be repeated", ofUs, test)
	oc.add(a, create, test, true)
	imported := a.named("import NAME FILE", "note the public half of a key pair you have", `
Notes a public key, ssh-rsa or ssh-ed25519, as ssh-keygen writes it, in PEM or in
RFC 4716's form.`, `
  instar keys import laptop ~/.ssh/id_ed25519.pub --store s3://images/fleet`, 2, 2,
		func(ctx context.Context, args []string) error { return runKeysImport(ctx, a, &oi, args[0], args[1]) })
	flagsOf(imported).list(&oi.tags, "tag", "", "tag it `KEY=VALUE`; may be repeated", ofUs, test)
	oi.add(a, imported, test, true)
	list := a.named("list [NAME]...", "list the key pairs of an account", `
Lists names, types and fingerprints: of imported RSA keys the MD5 of the public
key, of created ones the SHA-1 of the private key, of ed25519 keys the SHA-256, all
as EC2 shows them.`, `
  instar keys list --store s3://images/fleet`, 0, 1000,
		func(ctx context.Context, args []string) error { return runKeysList(ctx, a, &ol, args) })
	ol.add(a, list, test, false)
	remove := a.named("delete NAME...", "delete key pairs", `
Deletes key pairs from the catalog. Machines that have the public key keep it.`, `
  instar keys delete laptop --store s3://images/fleet`, 1, 1000,
		func(ctx context.Context, args []string) error { return runKeysDelete(ctx, a, &od, args) })
	od.add(a, remove, test, true)
	cmd.AddCommand(create, imported, list, remove)
	return cmd
}
