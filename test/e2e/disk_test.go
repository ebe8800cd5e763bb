package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// TestPartitioned captures into partitioned images: their tables must satisfy
// Debian's tools, their first partition be the filesystem.
func TestPartitioned(t *testing.T) {
	i := instar.New(t)
	root := smallVolume(t)
	for _, table := range []string{"gpt", "mbr"} {
		t.Run(table, func(t *testing.T) {
			store, image := "file://"+t.TempDir(), filepath.Join(t.TempDir(), "disk")
			i.Want(t, instar.OK, vol(i, root, "-p", "disk", "-b", store, "-P", table)...)
			i.Want(t, instar.OK, "download-and-unbundle", "-b", store, "-p", "disk", "-k", i.Keys.UserKey, "-d", image)
			if table == "gpt" {
				if out := loopfs.Run(t, "sgdisk", "-v", image); !strings.Contains(out, "No problems found") {
					t.Errorf("sgdisk -v: %s", out)
				}
			}
			if out := loopfs.Run(t, "sfdisk", "--verify", image); !strings.Contains(out, "No errors detected") {
				t.Errorf("sfdisk --verify: %s", out)
			}
			loopfs.Run(t, "parted", "--script", image, "align-check", "optimal", "1", "print")
			dev := loopfs.Partitions(t, image)
			fsck(t, dev+"p1")
			equal(t, root, loopfs.MountDevice(t, dev+"p1", "ro"))
		})
	}
}

// TestOtherFilesystems captures into xfs and btrfs by the scratch path.
func TestOtherFilesystems(t *testing.T) {
	i := instar.New(t)
	root := smallVolume(t)
	for fstype, check := range map[string][]string{"xfs": {"xfs_repair", "-n", "-f"}, "btrfs": {"btrfs", "check", "--readonly"}} {
		t.Run(fstype, func(t *testing.T) {
			store, image := "file://"+t.TempDir(), filepath.Join(t.TempDir(), "image")
			i.Want(t, instar.OK, vol(i, root, "-p", "fs", "-b", store, "--fs", fstype)...)
			i.Want(t, instar.OK, "download-and-unbundle", "-b", store, "-p", "fs", "-k", i.Keys.UserKey, "-d", image)
			loopfs.Run(t, check[0], append(check[1:], image)...)
			equal(t, root, loopfs.Mount(t, image, "ro"))
		})
	}
}
