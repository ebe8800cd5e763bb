package qemutest

import (
	"cmp"
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/instar-image/instar/initrd/kernels"
)

// Release is a kernel of Debian's that guests run: its cloud flavour.
type Release string

// The kernels there are.
const (
	Stable Release = "stable" // Debian 12's: Linux 6.1
	Newer  Release = "newer"  // of Debian 12's backports, or Debian 13's: Linux 6.12
)

// newest is what Newer has to be at least: block devices are set up otherwise from 6.11 on.
const newest = "6.12"

// Kernel is the kernel of the guests of tests, for amd64, and the root directory
// with its modules: $INSTAR_TEST_KERNEL says which, else it is Stable.
func Kernel(t testing.TB) (kernel, root string) {
	t.Helper()
	return KernelFor(t, cmp.Or(Release(os.Getenv("INSTAR_TEST_KERNEL")), Stable), "amd64")
}

// KernelFor is a kernel for an architecture, as Go and Debian name
// it, and the root directory with its modules. The package is downloaded once a
// user and unpacked, not installed. Newer there is for amd64.
func KernelFor(t testing.TB, r Release, arch string) (kernel, root string) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	dir := filepath.Join(cache, "instar", "kernel")
	switch {
	case r == Newer && arch == "amd64":
		dir += "-newer"
	case r != Stable:
		t.Fatalf("there is no kernel %q for %s: there are %q, and %q for amd64", r, arch, Stable, Newer)
	case arch != "amd64":
		dir += "-" + arch
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	root = filepath.Join(dir, "root")
	if _, err := os.Stat(root); err != nil {
		if out, err := exec.Command("sh", "-c", download, "sh", string(r), arch, dir).CombinedOutput(); err != nil {
			t.Fatalf("downloading Debian's cloud kernel, %s, for %s: %v\n%s", r, arch, err, out)
		}
	}
	found, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("kernels in %s: %q %v", root, found, err)
	}
	release := strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	if r == Newer && kernels.CompareReleases(release, newest) < 0 {
		t.Fatalf("%s is older than %s", found[0], newest)
	}
	return found[0], root
}

// download unpacks a kernel's package to dir/root, as its usage says.
//
//go:embed kernel.sh
var download string
