package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// diskImage is an image file with a filesystem and holes.
func diskImage(t testing.TB, size int64) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	loopfs.Run(t, "mkfs.ext4", "-q", "-F", image)
	dir := loopfs.Mount(t, image)
	populate(t, dir)
	loopfs.Unmount(t, dir)
	return image
}

func sameFile(t testing.TB, a, b string) {
	t.Helper()
	loopfs.Run(t, "cmp", a, b)
}

// TestOpensslOpensOurs opens our bundles with openssl, gzip and tar alone.
func TestOpensslOpensOurs(t *testing.T) {
	i := instar.New(t)
	image := diskImage(t, 32<<20)
	plain := filepath.Join(t.TempDir(), "plain")
	data := bytes.Repeat([]byte("no holes here "), 100_000)
	if err := os.WriteFile(plain, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, image string
		args        []string
	}{
		{"defaults", image, nil},
		{"many parts", image, []string{"--part-size", "16384"}},
		{"no holes", plain, nil},
		{"all options", image, []string{
			"--kernel", "aki-12345678", "--ramdisk", "ari-12345678", "--productcodes", "A&B,<C>",
			"-B", "ami=sda1,root=/dev/sda1,ephemeral0=sdb", "--part-size", "65536",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, back := t.TempDir(), t.TempDir()
			args := append([]string{"bundle-image", "-i", c.image, "-p", "our bundle", "-d", out}, i.Bundling()...)
			i.Want(t, instar.OK, append(args, c.args...)...)
			loopfs.Run(t, "../peer-unbundle", out+"/our bundle.manifest.xml", i.Keys.UserKey, back, i.Keys.UserCert)
			sameFile(t, c.image, filepath.Join(back, "our bundle"))
		})
	}
}

// TestWeOpenOpensslOnes opens bundles made by tar, a compressor, openssl and split.
func TestWeOpenOpensslOnes(t *testing.T) {
	i := instar.New(t)
	image := diskImage(t, 32<<20)
	for _, c := range []struct{ name, pack, part string }{
		{"gzip -9", "gzip -9", "10485760"},
		{"gzip -1", "gzip -1", "65536"},
		{"pigz", "pigz -c", "65536"},
		{"pigz independent blocks", "pigz -i -c", "100000"},
		{"stored", "pigz -0 -c", "10485760"},
		{"zopfli-like", "pigz -9 -b 2048 -c", "16384"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, back := t.TempDir(), t.TempDir()
			cmd := exec.Command("../peer-bundle", image, "theirs", out, i.Keys.UserKey, i.Keys.UserCert, i.Keys.CloudPK)
			cmd.Env = append(os.Environ(), "PACK="+c.pack, "PART="+c.part)
			if msg, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("peer-bundle: %v\n%s", err, msg)
			}
			i.Want(t, instar.OK, "verify", "-m", out+"/theirs.manifest.xml", "-c", i.Keys.UserCert)
			i.Want(t, instar.OK, "unbundle", "-m", out+"/theirs.manifest.xml", "-s", out, "-k", i.Keys.UserKey, "-d", back)
			sameFile(t, image, filepath.Join(back, "theirs"))
			// The cloud's side, which knows whose signature to expect.
			cloud := t.TempDir()
			i.Want(t, instar.OK, "unbundle", "-m", out+"/theirs.manifest.xml", "-s", out, "-k", i.Keys.CloudKey,
				"-c", i.Keys.UserCert, "-d", cloud)
			sameFile(t, image, filepath.Join(cloud, "theirs"))
		})
	}
}
