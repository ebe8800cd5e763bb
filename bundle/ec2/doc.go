// Package ec2 reads, writes, verifies and migrates EC2 bundles, the format of
// ec2-ami-tools and euca2ools: a signed XML manifest (version 2007-10-10) and
// numbered parts, which together are one file, the image, in tar, gzip and
// AES-128-CBC. Older manifests (3, 2007-08-29, encrypted ones) are read.
//
// An [Image] goes in and parts and a manifest come out ([Bundle]), or parts
// and a manifest go in and the image comes out ([Unbundle]). Parts leave and
// enter through the [PartSink] and [PartSource] of the caller; the package
// itself touches no network and, but for [UnbundleFile] and the spool file of
// very large parts, no disk.
//
// # What the format promises, and what it does not
//
// The signature is RSA PKCS#1 v1.5 over SHA-1, the cipher has no
// authentication of its own: legacy, weak. All of that stays in this package.
// What it does promise is kept strictly: the signature is checked before
// anything else is believed, each part's digest before it is decrypted, the
// archive's digest and size before the image is given away. <version>,
// <bundler> and the XML declaration are not signed at all; nothing but what
// is displayed depends on them.
package ec2
