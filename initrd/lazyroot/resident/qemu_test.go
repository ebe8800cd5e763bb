package resident_test

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/instar-image/instar/initrd"
	"github.com/instar-image/instar/initrd/internal/qemutest"
)

// TestResident runs a guest that writes to a root whose server is killed three
// times, and stopped, and killed once more while the disk is to take its place, and then replaced by it:
// by a kernel of either way to set up block devices.
func TestResident(t *testing.T) {
	guest := qemutest.BuildProgram(t, "./testdata/guest")
	for _, r := range []qemutest.Release{qemutest.Stable, qemutest.Newer} {
		t.Run(string(r), func(t *testing.T) {
			t.Parallel()
			kernel, root := qemutest.KernelFor(t, r, "amd64")
			resident(t, guest, kernel, root)
		})
	}
}

func resident(t *testing.T, guest, kernel, root string) {
	dir := t.TempDir()
	file := filepath.Join(dir, "initrd")
	f, err := os.Create(file)
	must(t, err)
	defer f.Close()
	_, err = initrd.Build(t.Context(), initrd.Options{
		Init: guest, Modules: os.DirFS(root),
		ModuleNames: []string{"virtio_pci", "virtio_blk", "dm_mod", "nbd"},
	}, f)
	must(t, err)
	disk := filepath.Join(dir, "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 16<<20))
	out := qemutest.Run(t, qemutest.Guest{Kernel: kernel, Initrd: file, Args: qemutest.Disk(disk)}, nil)
	for _, want := range []string{
		`(GUEST killed: 50 writes later(?s:.*)){3}`, `(GUEST stopped: 50 writes later(?s:.*)){2}`, `GUEST spared true EOF`, `GUEST hand-over begun`, `the root is on the local disk, which took its place in [0-9.µm]+s`, `GUEST pids \[\] bytes of those spared 0 <nil>`, `GUEST table \[\{0 16711680 25[0-9]:0 0\}\] <nil>`,
		`GUEST nbd is loaded: false`, `GUEST checked true(?s:.*)GUEST done`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the guest does not say %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
