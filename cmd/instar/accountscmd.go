package main

import (
	"context"

	"github.com/spf13/cobra"
)

type accountsOptions struct {
	imageStore
	sign, alias string
	keys        []string
}

func newAccounts(a *app) *cobra.Command {
	cmd := branch("accounts", "say what the catalog knows of accounts: aliases and public keys", `
An account is 12 digits. The catalog knows for each, if it is told, an alias to
show, and the public keys (age, ssh-ed25519, ssh-rsa) that Instar images shared
with it are wrapped for.`, `
  instar accounts set 222222222222 --alias team-b --key team-b.pub --store s3://images/fleet
  instar accounts list --store s3://images/fleet`)
	const test = "catalog-images"
	var os, ol, or accountsOptions
	set := a.named("set ACCOUNT", "note an account's alias and keys", `
Notes what is given, in place of what was noted before.`, `
  instar accounts set 222222222222 --alias team-b --key team-b.pub --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runAccountsSet(ctx, a, &os, args[0]) })
	f := flagsOf(set)
	f.text(&os.alias, "alias", "", "`NAME` to show for it: a-z, 0-9 and -", ofUs, test)
	f.list(&os.keys, "key", "", "an age or SSH public `KEY` of the account, or a file of them; may be repeated", ofUs, test)
	f.sign(&os.sign, test)
	os.imageStore.add(a, set, test)
	list := a.named("list", "list the accounts that anything is known of", `
Lists accounts, aliases and keys.`, `
  instar accounts list --store s3://images/fleet`, 0, 0,
		func(ctx context.Context, _ []string) error { return runAccountsList(ctx, a, &ol) })
	ol.imageStore.add(a, list, test)
	remove := a.named("remove ACCOUNT", "forget an account's alias and keys", `
Forgets what was noted. Images and permissions of the account stay.`, `
  instar accounts remove 222222222222 --store s3://images/fleet`, 1, 1,
		func(ctx context.Context, args []string) error { return runAccountsRemove(ctx, a, &or, args[0]) })
	flagsOf(remove).sign(&or.sign, test)
	or.imageStore.add(a, remove, test)
	cmd.AddCommand(set, list, remove)
	return cmd
}
