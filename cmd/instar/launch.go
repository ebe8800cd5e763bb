package main

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/initrd"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/launch"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/images"
)

type launchOptions struct {
	download                     downloadOptions
	bundle, directory            string // what BUNDLE names; directory: it is a file, beside its parts
	image, store, signers        string // an Instar image instead
	identities                   []string
	cache                        string
	cacheSize                    int64
	lazy, recordTrace            bool
	recordFor                    int
	sign                         string
	disk, kernel, modules, init  string
	sshKeys                      []string
	keyPairs, parameters         []string
	pairs                        []metadata.PublicKey // of keyPairs
	userData, hostname, id, user string
	memory, cpus, port           int
	diskSize                     int64
	arch, accel, append, scratch string
	keep, console                bool
}

func newLaunch(a *app) *cobra.Command {
	var o launchOptions
	const test, testLazy, testRecord, testCatalog = "TestLaunch", "TestLaunchLazy", "TestRecordTrace", "catalog-launch"
	cmd := a.command("launch", "boot a bundle or an image in a virtual machine here, with your SSH key in it", `
Opens a bundle (signature first, every part before it is decrypted) or an Instar
image, or takes the disk image of --disk, and boots it in QEMU with a metadata
server of its own: with your SSH keys, hostname and user data, by the image's own
kernel. It says how to log in, runs until the machine powers off or Ctrl-C, and
leaves nothing behind. What the machine writes is thrown away unless --keep is
given with --disk; a reboot keeps it. Metadata is at http://169.254.169.254 in the
machine, as long as it runs; of the machine's connections only those go elsewhere
than they say. No privilege is needed.

With --lazy nothing but the kernel and the initrd of an Instar image is fetched
before: the machine runs while its disk is filled, through this command, which
has the store's credentials. --disk names the disk, which is filled further, or is
complete, the next time, if --keep is given. docs/lazyroot.md tells more.

--record-trace notes what of an Instar image's disk the machine reads while it
boots, until --record-for seconds after its sshd answers or until it powers off;
signs that as the image's boot trace, with this machine's key or --sign, and ends
the machine. Later lazy boots fetch it ahead, and "create-image --boot-trace"
lays it out together. Log in meanwhile, and what that reads is in it, too.

An image that is registered in the store's catalog is named by its id, ami-…, or
its name there. What it wants to know is checked, and asked for where --parameter
does not say it; the machine finds it in /etc/instar/parameters, and the image's
files in their places.

The kernel is the newest in the image's /boot, which debugfs (e2fsprogs) reads;
for an image that is partitioned, not ext4, or without a kernel,
--kernel-file and --modules name one.`, `
  instar launch images/web-1/web-1.manifest.xml -k key.pem --ssh-key ~/.ssh/id_ed25519.pub
  instar launch -b images/web-1 -m web-1.manifest.xml -k key.pem --ssh-key ~/.ssh/id_ed25519.pub
  instar launch web-1 --store s3://images/fleet --lazy --ssh-key ~/.ssh/id_ed25519.pub
  instar launch web-1 --store s3://images/fleet --record-trace --ssh-key ~/.ssh/id_ed25519.pub
  instar launch --disk root.img --ssh-key key.pub --user-data setup.sh --memory 2048`,
		func(ctx context.Context) error { return runLaunch(ctx, a, &o) })
	cmd.Use = "launch [BUNDLE | IMAGE | ID]"
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if err := atMostArgs(a, 1, "launch takes one bundle or image")(cmd, args); err != nil || len(args) == 0 {
			return err
		}
		return o.name(args[0])
	}
	f := flagsOf(cmd)
	f.text(&o.store, "store", "", "where the Instar image is: `STORE` is s3://BUCKET/PREFIX, BUCKET/PREFIX or a directory, /DIR or ./DIR", ofUs, testLazy)
	completeFiles(cmd, "store")
	f.yes(&o.lazy, "lazy", "", "start the Instar image at once: the machine fetches it while it runs", ofUs, testLazy)
	f.yes(&o.recordTrace, "record-trace", "", "note what the machine reads of the Instar image while it boots, and store that as its boot trace", ofUs, testRecord)
	f.number(&o.recordFor, "record-for", "", "with --record-trace: go on for `SECONDS` once the machine's sshd answers; default 20", ofUs, testRecord)
	f.text(&o.sign, "sign", "", "with --record-trace: sign with the SSH `KEY`: a private key's file, a public one's whose other half the SSH agent has, or agent", ofUs, testRecord)
	addCacheFlags(cmd, &o.cache, &o.cacheSize)
	f.list(&o.identities, "identity", "", "open Instar images with the age identity or SSH private key in `FILE` in place of the machine's own; may be repeated", ofUs, testLazy)
	completeFiles(cmd, "identity")
	f.text(&o.signers, "signers", "", "of Instar images: believe whom the allowed_signers `FILE` lists", ofUs, testLazy)
	completeFiles(cmd, "signers")
	f.list(&o.keyPairs, "key-pair", "", "put the catalog's key pair `NAME` in for the login user, as --ssh-key; may be repeated", ofUs, testCatalog)
	f.add((*lines)(&o.parameters), "parameter", "", "of a registered image: the parameter `NAME=VALUE`; may be repeated", ofUs, testCatalog)
	f.text(&o.disk, "disk", "", "boot the disk image `FILE` instead of a bundle; with --lazy: fill it", ofUs, test)
	completeFiles(cmd, "disk")
	f.yes(&o.keep, "keep", "", "with --disk: what the machine writes stays in the file", ofUs, test)
	f.size(&o.diskSize, "disk-size", "", "give the machine a disk of `SIZE`; the root grows to it", ofUs, test)
	f.text(&o.download.manifest, "manifest", "m", "`NAME` of the manifest in the bucket", ofUs, test)
	f.text(&o.download.prefix, "prefix", "p", "`NAME` of the bundle: its manifest is NAME.manifest.xml; default image", ofUs, test)
	f.text(&o.download.key, "privatekey", "k", "the private key that opens the bundle, `PEM`", ofUs, test)
	completeFiles(cmd, "privatekey", "pem")
	f.list(&o.sshKeys, "ssh-key", "", "public key `FILE` for the login user; may be repeated", ofUs, test)
	completeFiles(cmd, "ssh-key", "pub")
	f.text(&o.user, "login", "", "the login user is `NAME`; default root, or what cloud-init in the image is set to", ofUs, test)
	f.text(&o.userData, "user-data", "", "the user data is in `FILE`", ofUs, test)
	completeFiles(cmd, "user-data")
	f.text(&o.hostname, "hostname", "", "`NAME` of the machine; default the instance id", ofUs, test)
	f.text(&o.id, "instance-id", "", "`ID` of the instance; a new one runs user data again; default i-launch", ofUs, test)
	f.text(&o.kernel, "kernel-file", "", "boot the kernel `FILE` instead of the image's", ofUs, test)
	completeFiles(cmd, "kernel-file")
	f.text(&o.modules, "modules", "", "its modules are in `DIR`: lib/modules/RELEASE, or a root directory", ofUs, test)
	completeFiles(cmd, "modules")
	f.text(&o.init, "init", "", "the initrd's init is `FILE`, a static instar-init", ofUs, test)
	completeFiles(cmd, "init")
	f.number(&o.memory, "memory", "", "`MIB` of memory; default 1024", ofUs, test)
	f.number(&o.cpus, "cpus", "", "`NUMBER` of processors; default 1", ofUs, test)
	f.number(&o.port, "port", "", "`PORT` on 127.0.0.1 that leads to the machine's sshd; default a free one", ofUs, test)
	f.choice(cmd, &o.arch, []string{"x86_64", "aarch64"}, "machine", "", "`ARCH` of the machine; default this one's", ofUs, test)
	f.choice(cmd, &o.accel, []string{"kvm", "tcg"}, "accel", "", "`KIND` of execution: kvm, or tcg (emulation); default kvm where it works", ofUs, test)
	f.text(&o.append, "append", "", "further kernel `PARAMETERS`", ofUs, test)
	f.yes(&o.console, "console", "", "show all of the machine's console, not only the boot's own lines", ofUs, test)
	f.text(&o.scratch, "scratch", "", "open the bundle into `DIR`; default $TMPDIR or /var/tmp", ofUs, test)
	completeFiles(cmd, "scratch")
	o.download.trust.add(cmd, test)
	o.download.storage.add(a, cmd, ofUs, test, short{true, true, true})
	return cmd
}

// name takes the bundle that is named beside the options: a manifest's file,
// with the parts beside it, or BUCKET/PREFIX/NAME.manifest.xml.
func (o *launchOptions) name(bundle string) error {
	if isFile(bundle, "") == nil {
		o.bundle = bundle
		o.directory = filepath.Dir(bundle)
		return nil
	}
	if !strings.HasSuffix(bundle, ".manifest.xml") {
		_, err := images.ParseRef(bundle)
		if err == nil || catalog.CheckName(bundle) == nil {
			o.image = bundle
			return nil
		}
	}
	return o.nameStored(bundle)
}

// nameStored takes a bundle in a bucket, BUCKET/PREFIX/NAME.manifest.xml, whatever
// files there are here.
func (o *launchOptions) nameStored(bundle string) error {
	bucket, manifest := path.Split(bundle)
	if bucket = strings.TrimSuffix(bucket, "/"); bucket == "" || path.IsAbs(bundle) || !strings.HasSuffix(manifest, ".manifest.xml") {
		return usagef("%q: neither the file of a manifest, BUCKET/PREFIX/NAME.manifest.xml nor an Instar image's NAME", bundle)
	}
	if o.download.bucket != "" || o.download.manifest != "" || o.download.prefix != "" {
		return usagef("bundle %q is named, and another by --bucket, --manifest or --prefix", bundle)
	}
	o.bundle, o.download.bucket, o.download.manifest = bundle, bucket, manifest
	return nil
}

// open opens the bundle into the file disk.
func (o *launchOptions) open(ctx context.Context, a *app, disk string) error {
	if o.directory == "" {
		d := o.download
		d.directory = disk
		return runDownloadAndUnbundle(ctx, a, &d)
	}
	opts, err := a.opening(o.download.key, &o.download.trust)
	if err != nil {
		return err
	}
	m, _, err := a.readManifest(o.bundle, func() (*rsa.PrivateKey, error) { return opts.Key, nil })
	if err != nil {
		return explain(err)
	}
	return a.unbundleTo(ctx, opts, m, dirSource(o.directory), disk)
}

// instance is what the options say of the machine.
func (o *launchOptions) instance() (metadata.Instance, error) {
	in := metadata.Instance{ID: o.id, Hostname: o.hostname, Placement: metadata.Placement{Zone: "local-1a"}}
	if in.ID == "" {
		in.ID = "i-launch"
	}
	if in.Hostname == "" {
		in.Hostname = in.ID
	}
	if err := inject.CheckHostname(in.Hostname); err != nil {
		return in, usagef("--hostname: %w", err)
	}
	if o.user != "" {
		if err := inject.CheckUser(o.user); err != nil {
			return in, usagef("--login: %w", err)
		}
	}
	for i, name := range o.sshKeys {
		data, err := os.ReadFile(name)
		if err != nil {
			return in, failf(exitFile, "reading the SSH key: %w", err)
		}
		line := strings.TrimSpace(string(data))
		if strings.Contains(line, "PRIVATE KEY-----") {
			return in, usagef("--ssh-key %s: this is a private key; the public one is commonly in %s.pub", name, name)
		}
		if err := inject.CheckKey(line, false); err != nil {
			return in, usagef("--ssh-key %s: %w", name, err)
		}
		in.PublicKeys = append(in.PublicKeys, metadata.PublicKey{Name: fmt.Sprintf("key-%d", i), Key: line})
	}
	if o.userData != "" {
		data, err := os.ReadFile(o.userData)
		if err != nil {
			return in, failf(exitFile, "reading the user data: %w", err)
		}
		if len(data) > metadata.MaxUserData {
			return in, usagef("--user-data %s: %d bytes, more than %d: gzip it, or #include it", o.userData, len(data), metadata.MaxUserData)
		}
		in.UserData = data
	}
	if problems := in.Complete(); len(problems) > 0 {
		for _, p := range problems {
			// The caller is not known before the machine is started.
			if !strings.HasPrefix(p.Path, "caller") {
				return in, usagef("%w", p)
			}
		}
	}
	return in, nil
}

func runLaunch(ctx context.Context, a *app, o *launchOptions) (err error) {
	if o.keep && o.disk == "" {
		return usagef("--keep needs --disk: a bundle's image is opened anew each time")
	}
	// With 64 MiB Linux and an initrd neither start nor say why; with 96 they do.
	if o.memory > 0 && o.memory < 96 {
		return usagef("--memory %d: a machine needs 96 MiB to start, and its system more", o.memory)
	}
	if o.bundle+o.image != "" && o.disk != "" && !o.lazy {
		return usagef("both %q and --disk are named", o.bundle+o.image)
	}
	if o.image == "" && (o.lazy || o.store != "" && len(o.keyPairs) == 0) {
		return usagef("--lazy and --store are for an Instar image, which is to be named")
	}
	if err := o.checkRecord(); err != nil {
		return err
	}
	if o.memory < 0 || o.cpus < 0 || o.port < 0 || o.port > 65535 {
		return usagef("--memory, --cpus and --port are positive numbers, a port at most 65535")
	}
	if (o.kernel == "") != (o.modules == "") {
		return usagef("--kernel-file and --modules go together")
	}
	if len(o.sshKeys) == 0 && len(o.keyPairs) == 0 && o.userData == "" {
		a.ui.Warn("neither --ssh-key nor --user-data: the machine will be what it was, without a way in of yours", nil)
	}
	m, err := o.registered(ctx, a)
	if err != nil {
		return err
	}
	in, err := o.instance()
	if err != nil {
		return err
	}
	if in.UserData, err = o.arguments(a, m, in.UserData); err != nil {
		return err
	}
	ancestry(&in, m)
	in.PublicKeys = append(in.PublicKeys, o.pairs...)
	// What is lacking here is said before anything is fetched.
	if err := launch.Check(launch.Options{Arch: o.arch, Accel: o.accel, SSHPort: o.port}); err != nil {
		return err
	}
	scratch := o.scratch
	if scratch == "" {
		scratch = a.tempDir()
	}
	dir, err := os.MkdirTemp(scratch, "instar-launch-*")
	if err != nil {
		return failf(exitFile, "making a scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var l *launchedImage
	if o.image != "" {
		if l, err = o.openImage(ctx, a); err != nil {
			return err
		}
		defer l.store.Close()
	}
	var lazily *launch.Image
	disk := o.disk
	if o.lazy {
		if lazily, err = l.lazily(ctx); err != nil {
			return err
		}
	}
	var rec *recording
	switch {
	case disk != "":
	case o.recordTrace:
		rec, err = o.record(ctx, a, l, dir)
	case o.lazy:
		disk = filepath.Join(dir, "disk")
		err = emptyDisk(disk, l.room())
	case l != nil:
		disk = filepath.Join(dir, "disk")
		err = l.write(ctx, a, chunked.StreamDisk, disk)
	default:
		disk = filepath.Join(dir, "disk")
		err = o.open(ctx, a, disk)
	}
	if err != nil {
		return err
	}
	if rec != nil {
		defer rec.close()
	}
	if o.disk == "" {
		// It was made for this.
	} else if err := isFile(disk, "--disk"); err != nil {
		return err
	}
	if disk, err = o.sized(ctx, disk, dir); err != nil {
		return err
	}
	kernel, modules, release, ramdisk := o.kernel, o.modules, "", ""
	switch {
	case kernel != "":
	case l != nil:
		if kernel, ramdisk, err = l.boots(ctx, a, dir); err != nil {
			return withHint(err, "--kernel-file and --modules name a kernel to boot it with.")
		}
	default:
		if kernel, release, modules, err = launch.KernelOf(ctx, disk, dir); err != nil {
			return withHint(err, "--kernel-file and --modules name a kernel to boot it with.")
		}
		a.ui.Say("the image's kernel is %s", release)
	}
	login := o.user
	if login == "" && (o.lazy || rec != nil) {
		login = "root" // the image is not here
	}
	if login == "" {
		// Only for what is said; an image that debugfs cannot read is root's.
		if login, err = launch.LoginOf(ctx, disk); err != nil || login == "" {
			login = "root"
		}
	}
	if ramdisk == "" {
		ramdisk = filepath.Join(dir, "initrd")
		if err := o.ramdisk(ctx, modules, release, ramdisk); err != nil {
			return err
		}
	}
	shown := &consoleLines{say: func(s string) { a.ui.Say("%s", s) }}
	var console io.Writer = shown
	if o.console {
		console = a.stderr
	}
	lo := launch.Options{
		Kernel: kernel, Initrd: ramdisk, Disk: disk, Keep: o.keep || disk != o.disk, Image: lazily, Instance: in, User: o.user,
		Arch: o.arch, Memory: o.memory, CPUs: o.cpus, Accel: o.accel, SSHPort: o.port, Append: o.append, Console: console,
		Ready: func(m launch.Machine) { o.ready(a, m, login) },
	}
	if rec != nil {
		err = rec.run(ctx, lo)
	} else {
		err = launch.Run(ctx, lo)
	}
	if failed := shown.failed; failed != "" && err == nil {
		return fmt.Errorf("the machine did not boot: %s", failed)
	}
	return err
}

// ramdisk builds an initrd with the modules of a kernel.
func (o *launchOptions) ramdisk(ctx context.Context, modules, release, to string) error {
	init := o.init
	if init == "" {
		found, done, err := findInit()
		if err != nil {
			return err
		}
		defer done()
		init = found
	}
	_, err := writeInitrd(ctx, initrd.Options{
		Init: init, Modules: os.DirFS(modules), Version: release,
		Config: boot.Config{Fail: boot.PowerOff},
	}, to)
	return err
}

// emptyDisk makes a disk that nothing was written to.
func emptyDisk(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return failf(exitFile, "making the machine's disk: %w", err)
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// ready says how to get in, when somebody is there to let one in.
func (o *launchOptions) ready(a *app, m launch.Machine, user string) {
	if !m.SSH {
		a.ui.Say("started (%s); metadata for the machine at %s", m.Accel, m.Metadata)
		if m.NotUsual != nil {
			a.ui.Warn(fmt.Sprintf("not at 169.254.169.254, where the machine finds what this one would: connections cannot be redirected (%v)", m.NotUsual), nil)
		}
		return
	}
	// The host key is new with each instance: nothing to remember.
	line := fmt.Sprintf("ssh -p %d -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no %s%s@127.0.0.1", m.SSHPort, o.identity(), user)
	if err := a.ui.Result("launch", line, ui.Fields{"ssh": line, "port": m.SSHPort, "user": user, "metadata": m.Metadata, "accel": m.Accel}); err != nil {
		a.ui.Say("%s", line)
	}
}

// identity is ssh's option for the private key beside the public one, if it is
// there and its name needs no quoting.
func (o *launchOptions) identity() string {
	for _, name := range o.sshKeys {
		private, ok := strings.CutSuffix(name, ".pub")
		if ok && isFile(private, "") == nil && !strings.ContainsAny(private, " \t\n'\"\\$`&|;<>()*?[]#~!{}") {
			return "-i " + private + " "
		}
	}
	return ""
}

// sized makes the disk as large as is asked for: the image itself if it is
// scratch or to be kept, else a copy of it.
func (o *launchOptions) sized(ctx context.Context, disk, dir string) (string, error) {
	if o.diskSize == 0 {
		return disk, nil
	}
	st, err := os.Stat(disk)
	if err != nil {
		return "", err
	}
	if o.diskSize < st.Size() {
		return "", usagef("--disk-size %d: the image has %d bytes", o.diskSize, st.Size())
	}
	if disk == o.disk && !o.keep {
		copied := filepath.Join(dir, "disk")
		if err := copySparse(ctx, disk, copied); err != nil {
			return "", err
		}
		disk = copied
	}
	return disk, os.Truncate(disk, o.diskSize)
}

// consoleLines picks the lines of the initrd out of a console.
type consoleLines struct {
	say    func(string)
	part   []byte
	failed string
}

func (c *consoleLines) Write(p []byte) (int, error) {
	for _, b := range p {
		if b != '\n' {
			if len(c.part) < 4096 {
				c.part = append(c.part, b)
			}
			continue
		}
		line := strings.TrimSpace(string(c.part))
		c.part = c.part[:0]
		at := strings.Index(line, "instar: [")
		if at < 0 {
			continue
		}
		line = line[at:]
		c.say(line)
		if _, reason, ok := strings.Cut(line, "] FAILED "); ok {
			c.failed = reason
		}
	}
	return len(p), nil
}
