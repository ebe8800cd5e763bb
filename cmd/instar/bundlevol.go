package main

import (
	"context"

	"github.com/spf13/cobra"
)

type bundleVolOptions struct {
	identity
	imageOptions
	storage
	volumeOptions
	inherit, noInherit bool
	cloneOnly, replace bool
	fs                 string
}

// volumeOptions say what is captured and what filesystem is made of it.
type volumeOptions struct {
	all, noFilter, dryRun         bool
	exclude, include              []string
	size, volume, fstab           string
	generateFstab, noSnapshot     bool
	grubConfig, partition, script string
	label, uuid, scratch          string
	strays                        []string
	readShare                     int
}

func (o *volumeOptions) add(cmd *cobra.Command, of origin, test string) {
	cmd.Args = func(_ *cobra.Command, args []string) error {
		o.strays = args
		return nil
	}
	f := flagsOf(cmd)
	f.text(&o.volume, "volume", "v", "capture the tree at `DIR`; default /", of, test)
	completeFiles(cmd, "volume")
	f.list(&o.exclude, "exclude", "e", "leave out `PATH,...` (patterns allowed)", of, test)
	f.list(&o.include, "include", "i", "keep `PATH,...` in although a rule leaves it out", of, test)
	f.yes(&o.all, "all", "a", "include filesystems that are not local too", of, test)
	f.yes(&o.noFilter, "no-filter", "", "keep secrets and this machine's identity in the image", of, test)
	f.text(&o.size, "size", "s", "`SIZE` of the filesystem in MiB (or with k, m, g, t), or auto: content and some room; default 10240 if the content fits, else auto", of, test)
	f.choice(cmd, &o.partition, []string{"none", "mbr", "gpt"}, "partition", "P", "put the filesystem into a partition of a `TABLE`: none (default), mbr or gpt", of, test)
	f.text(&o.fstab, "fstab", "", "take `FILE` as the image's /etc/fstab", of, test)
	f.yes(&o.generateFstab, "generate-fstab", "", "write a new /etc/fstab with the root and the usual kernel filesystems", of, test)
	f.text(&o.script, "script", "S", "run `PROGRAM` on a copy-on-write view of the tree before it is captured; its argument is the view's directory", of, test)
	f.text(&o.grubConfig, "grub-config", "", "take `FILE` as boot/grub/menu.lst of the image (with --partition mbr or gpt)", of, test)
	f.text(&o.label, "label", "", "`LABEL` of the filesystem; default the captured one's", ofUs, test)
	f.text(&o.uuid, "uuid", "", "`UUID` of the filesystem, or new; default the captured one's", ofUs, test)
	f.text(&o.scratch, "scratch", "", "make scratch files in `DIR`; default $TMPDIR or /var/tmp", ofUs, test)
	f.yes(&o.noSnapshot, "no-snapshot", "", "read the live tree even where a btrfs snapshot is possible", ofUs, test)
	f.number(&o.readShare, "read-share", "", "spend at most `PERCENT` of the time reading files, so that others get at the disk; default 100", ofUs, test)
	f.yes(&o.dryRun, "dry-run", "", "only tell what would stay out and why, and how big the image would be", ofUs, test)
}

func newBundleVol(a *app) *cobra.Command {
	var o bundleVolOptions
	const test = "bundle-vol"
	cmd := a.command("bundle-vol [EXCLUDE]...", "capture the running machine's root into a bundle", `
Captures a directory tree, by default the live root filesystem, as an ext4
image and bundles it. Each file is read once, straight into the bundle: there
is no image on disk. With -b BUCKET/PREFIX the parts go straight to storage as
well and nothing is written to this machine.

What goes in: the filesystem at --volume and the local filesystems mounted below
it (with --all, remote ones too). What stays out: the contents of /dev /proc
/sys /run /tmp and the like, swap, secrets and what belongs to this one machine
(private keys, host keys, machine-id, histories, credentials, cloud-init's
state), and the -k and -c files. "--dry-run" lists every such path with the
reason. --include FILE keeps one in, --no-filter keeps all secrets in.

Files that change while they are read do not break the image: each is named and
the exit status is 24. fstab entries that would stop another machine's boot are
neutralised and named.

Arguments that are no options are further excludes: they come from a shell that
has expanded -e DIR/*.`, `
  instar bundle-vol --dry-run
  instar bundle-vol -b images/web-1 -k key.pem -c cert.pem -u 111122223333 --url https://minio:9000
  ec2-bundle-vol -k /tmp/key.pem -c /tmp/cert.pem -u 111122223333 -r x86_64 -e /srv/cache -d /mnt -p web-1 --batch`,
		func(ctx context.Context) error { return runBundleVol(ctx, a, &o) })
	o.volumeOptions.add(cmd, ofBoth, test)
	f := flagsOf(cmd)
	f.yes(&o.inherit, "inherit", "", "take kernel, ramdisk, product codes, ancestors and mappings from the instance's metadata, which must answer; without the option it need not", ofBoth, test)
	f.yes(&o.noInherit, "no-inherit", "", "do not ask for metadata", ofBoth, test)
	f.choice(cmd, &o.fs, []string{"ext4", "xfs", "btrfs"}, "fs", "", "`FILESYSTEM` of the image: ext4 (default); xfs and btrfs need scratch space of the image's content", ofUs, test)
	f.yes(&o.cloneOnly, "clone-only", "", "make the image DIR/NAME, no bundle", ofEC2, test)
	o.identity.add(cmd, ofBoth, test)
	o.imageOptions.add(a, cmd, test)
	f.text(&o.destination, "destination", "d", "put the bundle into `DIR`; default /tmp (as euca-bundle-vol: a new directory)", ofBoth, test)
	completeFiles(cmd, "destination")
	f.yes(&o.noSizeChecks, "no-size-checks", "", "say nothing about images over 10 GiB, which old clouds refuse", ofEC2, test)
	f.yes(&o.replace, "replace", "", "with --bucket: replace a bundle of the same name", ofUs, "bundle-vol-upload")
	o.storage.add(a, cmd, ofUs, "bundle-vol-upload", short{token: true})
	o.storage.addACL(cmd, ofUs, "bundle-vol-upload")
	return cmd
}
