package main

import (
	"context"

	"github.com/spf13/cobra"
)

type migrateOptions struct {
	identity
	storage
	manifest, destination string
	kernel, ramdisk       string
	noMapping             bool
}

const mappingHelp = `
The manifest's kernel and ramdisk mean nothing in another cloud or region: give
the ones to use with --kernel and --ramdisk, or --no-mapping to have none.
Instar does not look up counterparts by itself (exit status 6 if it would have to).
The bundle's key is encrypted anew for the certificate of --ec2cert, if given,
so that another cloud can open it.`

func newMigrateManifest(a *app) *cobra.Command {
	var o migrateOptions
	const test = "migrate-manifest"
	cmd := a.command("migrate-manifest", "rewrite a manifest for another region or cloud", `
Checks the signature of a manifest with -c and rewrites it in place as version
2007-10-10, signed with -k; the old one is kept as FILE.bak.
`+mappingHelp, `
  instar migrate-manifest -m web-1.manifest.xml -c cert.pem -k key.pem --kernel aki-1 --ramdisk ari-1
  instar migrate-manifest -m web-1.manifest.xml -c cert.pem -k key.pem --no-mapping --ec2cert new-cloud.pem`,
		func(ctx context.Context) error { return runMigrateManifest(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.manifest, "manifest", "m", "the manifest, a `FILE`", ofEC2, test)
	completeFiles(cmd, "manifest", "xml")
	o.addCommon(cmd, test)
	const why = "it served to look up kernels with EC2, which Instar does not do; give --kernel and --ramdisk, or --no-mapping"
	f.refuse("access-key", "a", why, ofEC2, true)
	f.refuse("secret-key", "s", why, ofEC2, true)
	f.text(&a.region, "region", "", "the `REGION` the manifest is for; named in messages", ofEC2, test)
	return cmd
}

func (o *migrateOptions) addCommon(cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.text(&o.cert, "cert", "c", "the user's certificate, `PEM`: the manifest must be signed by its key", ofEC2, test)
	f.text(&o.key, "privatekey", "k", "the user's private key, `PEM`: signs the new manifest", ofEC2, test)
	f.text(&o.ec2Cert, "ec2cert", "", "certificate of the cloud that is to open the bundle, `PEM`; default as before", ofEC2, test)
	for _, n := range []string{"cert", "privatekey", "ec2cert"} {
		completeFiles(cmd, n, "pem")
	}
	f.text(&o.kernel, "kernel", "", "`ID` of the kernel image to boot with", ofEC2, test)
	f.text(&o.ramdisk, "ramdisk", "", "`ID` of the ramdisk image to boot with", ofEC2, test)
	f.yes(&o.noMapping, "no-mapping", "", "leave out a kernel and ramdisk that are not given", ofEC2, test)
}

func newMigrateBundle(a *app) *cobra.Command {
	var o migrateOptions
	const test = "migrate-bundle"
	cmd := a.command("migrate-bundle", "copy a bundle to another bucket, manifest rewritten", `
Copies the parts of a bundle to another bucket, within the store, and puts a
manifest rewritten as by migrate-manifest there, last.
`+mappingHelp, `
  instar migrate-bundle -b old -d new/web-1 -m web-1.manifest.xml -c cert.pem -k key.pem --no-mapping`,
		func(ctx context.Context) error { return runMigrateBundle(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.manifest, "manifest", "m", "`NAME` of the manifest in the bucket", ofEC2, test)
	f.text(&o.destination, "destination-bucket", "d", "`BUCKET[/PREFIX]` to copy to", ofEC2, test)
	o.addCommon(cmd, test)
	o.storage.add(a, cmd, ofEC2, test, short{true, true, true})
	o.storage.addACL(cmd, ofEC2, test)
	return cmd
}
