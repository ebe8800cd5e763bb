package main

import (
	"github.com/spf13/cobra"
)

// Groups of options several commands share.

// identity is who bundles and for whom.
type identity struct {
	cert, key, ec2Cert, user string
}

func (o *identity) add(cmd *cobra.Command, of origin, test string) {
	f := flagsOf(cmd)
	f.text(&o.key, "privatekey", "k", "the user's RSA private key, `PEM`: signs the manifest", of, test)
	f.text(&o.cert, "cert", "c", "the user's certificate, `PEM`: its holder can open the bundle", of, test)
	f.text(&o.user, "user", "u", "the user's `ACCOUNT` number, 12 digits; hyphens are dropped", of, test)
	f.text(&o.ec2Cert, "ec2cert", "", "certificate of the cloud that is to open the bundle, `PEM`", of, test)
	f.refuse("bootstrap-url", "", "Instar does not ask Eucalyptus for its certificate; save it in a file and give --ec2cert FILE", ofEuca, true)
	for _, n := range []string{"privatekey", "cert", "ec2cert"} {
		completeFiles(cmd, n, "pem")
	}
}

// imageOptions describe a bundle.
type imageOptions struct {
	arch, prefix, destination string
	kernel, ramdisk           string
	mappings                  mappings
	rawCodes                  string
	partSize                  int64
	encKey, encIV             string
	noSizeChecks              bool
}

func (o *imageOptions) add(a *app, cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.text(&o.prefix, "prefix", "p", "`NAME` of the bundle's files", ofBoth, test)
	f.text(&o.arch, "arch", "r", "`ARCH`itecture: x86_64, i386, arm64, armhf, ppc, ppc64, ppc64le; default this machine's", ofBoth, test)
	complete(cmd, "arch", "x86_64", "arm64", "i386", "armhf", "ppc", "ppc64", "ppc64le")
	f.text(&o.kernel, "kernel", "", "`ID` of the kernel image to boot with", ofBoth, test)
	f.text(&o.ramdisk, "ramdisk", "", "`ID` of the ramdisk image to boot with", ofBoth, test)
	f.add(&o.mappings, "block-device-mapping", "B", "devices as the instance sees them, `VIRTUAL=DEVICE,...`", ofBoth, test).
		also("block-device-mappings", "", ofEuca)
	f.text(&o.rawCodes, "productcodes", "", "product codes, `CODE,...`", ofBoth, test)
	f.size(&o.partSize, "part-size", "", "`SIZE` of a part, with k, m or g; default 10m", ofEuca, test).hidden()
	f.text(&o.encKey, "enc-key", "", "AES key in place of a random one, 32 `HEX` digits", ofEuca, test).hidden()
	f.text(&o.encIV, "enc-iv", "", "initialisation vector in place of a random one, 32 `HEX` digits", ofEuca, test).hidden()
}

// storage is where the bucket is and who asks.
type storage struct {
	bucket                      string
	accessKey, secretKey, token string
	secretKeyFile, url, caCert  string
	acl, location, sigv         string
	retry                       bool
	rate                        int64
}

// short says which short options a command has left for storage.
type short struct{ access, secret, token bool }

func (o *storage) add(a *app, cmd *cobra.Command, of origin, test string, s short) {
	f := flagsOf(cmd)
	regionOf := of
	if of == ofUs {
		regionOf = ofEuca // bundle-vol's only option of these that euca2ools has
	}
	letter := func(free bool, l string) string {
		if free {
			return l
		}
		return ""
	}
	f.text(&o.bucket, "bucket", "b", "`BUCKET[/PREFIX]`, or a URL s3://BUCKET/PREFIX or file:///DIRECTORY", of, test)
	f.text(&o.url, "url", "", "`URL` of the S3 service; file:///DIR keeps buckets as directories of DIR", of, test).
		also("", "U", of&ofEuca)
	f.text(&a.region, "region", "", "`REGION` requests are signed for; USER@REGION also picks euca2ools' settings", regionOf, test)
	f.text(&o.accessKey, "access-key", letter(s.access, "a"), "S3 access `KEY`", of&^ofEuca, test).
		also("access-key-id", "I", of&ofEuca)
	f.text(&o.secretKey, "secret-key", letter(s.secret, "s"), "S3 secret `KEY`; others can see it in ps(1) for a moment: better --secret-key-file, or AWS_SECRET_ACCESS_KEY", of, test)
	if cmd.Flags().ShorthandLookup("S") == nil {
		flagsOf(cmd).text(&o.secretKey, "secret-key-S", "S", "the same as --secret-key", of&ofEuca, test).hidden()
	}
	f.text(&o.secretKeyFile, "secret-key-file", "", "read the S3 secret key from `FILE` (- is standard input)", ofUs, test)
	f.text(&o.token, "delegation-token", letter(s.token, "t"), "session `TOKEN` of temporary credentials", of&^ofEuca, test).
		also("security-token", "", of&ofEuca)
	f.text(&o.caCert, "ca-cert", "", "trust the certificate authorities in `FILE` (PEM) for the endpoint", ofUs, test)
	completeFiles(cmd, "ca-cert", "pem", "crt")
	f.yes(&o.retry, "retry", "", "try failed requests up to 15 times; without it 8 times", of, test)
	f.add(sigVersion{&o.sigv}, "sigv", "", "signature `VERSION`: 4", of&^ofEuca, "TestRefused")
	complete(cmd, "sigv", "4")
	f.size(&o.rate, "limit-rate", "", "move at most `BYTES` a second, with k, m or g", ofUs, test)
}

// addACL adds what matters when objects are made.
func (o *storage) addACL(cmd *cobra.Command, of origin, test string) {
	f := flagsOf(cmd)
	f.choice(cmd, &o.acl, []string{"public-read", "aws-exec-read", "ec2-bundle-read", "private"}, "acl", "",
		"who may read the objects, `ACL`: aws-exec-read (default), public-read, ec2-bundle-read or private; MinIO ignores it, use a bucket policy there", of, test)
	f.text(&o.location, "location", "", "where to make the bucket if it does not exist, and where it must be if it does: `REGION`, EU or US", of, test)
}

// addPolicy refuses the options of pre-signed uploads.
func addPolicy(cmd *cobra.Command) {
	const why = "a POST policy signs with SigV2, which current servers refuse; use credentials of your own, temporary ones with --security-token"
	f := flagsOf(cmd)
	f.refuse("upload-policy", "", why, ofEuca, true)
	f.refuse("upload-policy-file", "", why, ofEuca, true)
	f.refuse("upload-policy-signature", "", why, ofEuca, true)
}

// sigVersion accepts 4 and refuses 2 by name.
type sigVersion struct{ p *string }

func (v sigVersion) String() string { return "" }
func (v sigVersion) Type() string   { return "string" }
func (v sigVersion) Set(s string) error {
	switch s {
	case "4":
		*v.p = s
		return nil
	case "2":
		return &refusedError{"--sigv 2", "signature version 2 is gone from current servers and hid their errors; leave --sigv out"}
	default:
		return usagef("unknown signature version %q: 4 is the one in use", s)
	}
}

// trust is how a manifest's signature is judged.
type trust struct {
	cert, file    string
	allowUnsigned bool
}

func (o *trust) add(cmd *cobra.Command, test string) {
	f := flagsOf(cmd)
	f.text(&o.cert, "cert", "c", "accept signatures made by the key of this certificate, `PEM`", ofUs, test)
	f.text(&o.file, "trust", "", "accept signatures made by the key of any certificate in `FILE` (PEM)", ofUs, test)
	f.yes(&o.allowUnsigned, "allow-unsigned", "", "open a bundle that says it is not signed (of euca-bundle-image without a key)", ofUs, test)
	completeFiles(cmd, "cert", "pem")
	completeFiles(cmd, "trust", "pem")
}

// sign adds --sign, whose key a command signs with.
func (f flags) sign(p *string, test string) {
	f.text(p, "sign", "", "sign with the SSH `KEY`: a private key's file, a public one's whose other half the SSH agent has, or agent", ofUs, test)
}
