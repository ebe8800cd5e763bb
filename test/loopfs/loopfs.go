// Package loopfs makes filesystems in files and mounts them for tests, as root,
// through the kernel's loop devices. Everything is unmounted when the test ends.
package loopfs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Types are the filesystems a root commonly is on, and tmpfs.
var types = []string{"ext4", "xfs", "btrfs", "tmpfs"}

// Types returns the filesystems [Make] knows.
func Types() []string { return append([]string(nil), types...) }

// Make makes an empty filesystem of the given type and size in bytes and returns
// where it is mounted.
func Make(t testing.TB, fstype string, size int64) string {
	t.Helper()
	if fstype == "tmpfs" {
		return Tmpfs(t, size)
	}
	image := filepath.Join(t.TempDir(), fstype+".img")
	mkfs := map[string][]string{
		// ea_inode holds attributes over 4 KiB; the reserve is nobody's here.
		"ext4":  {"mkfs.ext4", "-q", "-F", "-m", "0", "-O", "ea_inode", image},
		"xfs":   {"mkfs.xfs", "-q", "-f", image},
		"btrfs": {"mkfs.btrfs", "-q", "-f", image},
	}[fstype]
	if mkfs == nil {
		t.Fatalf("no filesystem type %q", fstype)
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	Run(t, mkfs[0], mkfs[1:]...)
	return Mount(t, image)
}

// Tmpfs mounts a tmpfs of the given size in bytes.
func Tmpfs(t testing.TB, size int64) string {
	t.Helper()
	dir := mountPoint(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,nr_inodes=0", size)); err != nil {
		t.Fatalf("mounting a tmpfs: %v", err)
	}
	unmountLater(t, dir)
	return dir
}

// Mount mounts an image file, with mount(8)'s options, and returns where.
func Mount(t testing.TB, image string, options ...string) string {
	t.Helper()
	return MountDevice(t, image, append(options, "loop")...)
}

// MountDevice mounts a block device, with mount(8)'s options, and returns where.
func MountDevice(t testing.TB, device string, options ...string) string {
	t.Helper()
	dir := mountPoint(t)
	var out []byte
	err := patiently(func() (err error) {
		out, err = exec.Command("mount", "-o", strings.Join(options, ","), device, dir).CombinedOutput()
		return err
	}, func() bool { return bytes.Contains(out, []byte("loop device")) })
	if err != nil {
		t.Fatalf("mount %s: %v\n%s", device, err, out)
	}
	unmountLater(t, dir)
	return dir
}

// Unmount unmounts what [Mount], [Make] or [Tmpfs] mounted, before the test ends.
func Unmount(t testing.TB, dir string) {
	t.Helper()
	if err := unmount(dir); err != nil {
		t.Fatalf("umount %s: %v", dir, err)
	}
}

// unmount unmounts, once nobody holds anything open there any more: whoever was
// killed or told to end may need a moment for it.
func unmount(dir string) error {
	var err error
	return patiently(func() error {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		return err
	}, func() bool { return err == unix.EBUSY })
}

// patiently does something again as long as it fails for a reason that passes,
// for half a minute.
func patiently(do func() error, passes func() bool) error {
	for limit := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err := do(); err == nil || !passes() || time.Now().After(limit) {
			return err
		}
	}
}

// Partitions attaches an image with a partition table to a loop device and
// returns the device: its partitions are DEVICEp1 and so on.
func Partitions(t testing.TB, image string) string {
	t.Helper()
	dev := strings.TrimSpace(Run(t, "losetup", "--find", "--show", "--partscan", image))
	t.Cleanup(func() {
		// partx removes what --partscan cannot where the kernel reads no tables.
		_ = exec.Command("partx", "--delete", dev).Run()
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detaching %s: %v\n%s", dev, err, out)
		}
	})
	// Some kernels are built without partition tables: partx reads them itself.
	Run(t, "partx", "--update", dev)
	return dev
}

// Run runs a program of the system, whose failure is the test's, and returns
// what it printed.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func mountPoint(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "fs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func unmountLater(t testing.TB, dir string) {
	t.Cleanup(func() {
		// Already unmounted is what Unmount leaves.
		if err := unmount(dir); err != nil && err != unix.EINVAL {
			t.Errorf("unmounting %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	})
}
