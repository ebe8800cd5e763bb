package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// TestARM64 runs the program built for arm64 under qemu's user emulation: it
// bundles and opens an image, and each machine opens the other's.
func TestARM64(t *testing.T) {
	native := instar.New(t)
	arm := *native
	program := instar.Build(t, "arm64")
	if kind := loopfs.Run(t, "file", "-b", program); !strings.Contains(kind, "aarch64") || !strings.Contains(kind, "statically") {
		t.Fatalf("not a static arm64 program: %s", kind)
	}
	arm.Program = filepath.Join(t.TempDir(), "instar-arm64")
	wrapper := "#!/bin/sh\nexec qemu-aarch64-static " + program + ` "$@"` + "\n"
	if err := os.WriteFile(arm.Program, []byte(wrapper), 0o700); err != nil {
		t.Fatal(err)
	}
	if r := arm.Want(t, instar.OK, "version"); !strings.Contains(r.Stdout, "instar") {
		t.Errorf("version says %q", r.Stdout)
	}
	image := diskImage(t, 16<<20)
	for name, pair := range map[string][2]*instar.Instar{"arm64 to amd64": {&arm, native}, "amd64 to arm64": {native, &arm}} {
		t.Run(name, func(t *testing.T) {
			out, back := t.TempDir(), t.TempDir()
			pair[0].Want(t, instar.OK, append([]string{"bundle-image", "-i", image, "-p", "x", "-d", out}, native.Bundling()...)...)
			pair[1].Want(t, instar.OK, "unbundle", "-m", out+"/x.manifest.xml", "-s", out, "-k", native.Keys.UserKey, "-d", back)
			sameFile(t, image, filepath.Join(back, "x"))
		})
	}
}
