// Package rootfs walks a live root filesystem and says what belongs in an
// image of it.
//
// In goes a directory, the volume; out comes a [Root]: a filetree.Tree of
// everything that goes in, a filetree.Source that opens the content, and
// lists of what stays out and why. The walk reads metadata, and of content
// only what it needs to recognise secrets. It never writes to the volume,
// save for the read-only snapshot of a btrfs volume, which it deletes again;
// never waits for a FIFO and never leaves the volume: every name is opened
// relative to the directory it was found in, without following symbolic
// links, and whether the right file was opened is checked afterwards. Needs
// Linux 4.11, and root to see everything.
//
// # What goes in
//
// The volume's own filesystem, whatever it is, and what is mounted beneath
// it from local disks: ext2-4, xfs, btrfs, zfs, jfs, reiserfs, f2fs,
// bcachefs, nilfs2, vfat and exfat (/boot/efi). With Options.All also network
// filesystems, tmpfs, overlay, FUSE and images (squashfs, iso9660); never
// proc, sysfs and the kernel's other ones. A mount that is not captured leaves
// its mount point, with the owner and mode of what it hides where the kernel
// tells. A bind mount of files that are captured elsewhere is not captured
// again, nor a mount that holds the volume itself; subvolumes of btrfs go in
// where they appear, which is as directories.
//
// All types of inodes go in, sockets included: they are harmless. Names are
// decided on in this order, the first that speaks wins: Options.Never, mounts,
// Options.Include, Options.Exclude, the rules of [Rules], the content. RULES.md
// lists the rules. Of the contents of /dev, /proc, /sys, /run, /mnt, /media,
// /tmp and /var/tmp nothing goes in even without the filter; the classic tools
// agree on the first and differ about /run and the temporary directories,
// where an uploaded private key is at home. /var/cache goes in.
//
// Some files stand in the image in place of the volume's: an empty
// etc/machine-id, a handful of device nodes in dev, and etc/fstab and
// etc/crypttab without what would stop the boot of a machine that lacks this
// one's disks. Every changed line is in [Root.Fstab].
//
// # Consistency
//
// A filesystem is never frozen, so no capture can hang a machine. A volume
// that is a btrfs subvolume is read from a snapshot; subvolumes and mounts
// within it are read live. LVM and zfs snapshots are not made: take one and
// give its mount as the volume. Everything else is read live: nothing is
// synced, since reads see what is not on disk yet, and each file that changed
// in between is told apart by its File.Changed.
//
// A capture that is killed leaves at most a snapshot, which the next one
// deletes; a script's view ends with the process.
package rootfs
