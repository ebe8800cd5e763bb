package e2e

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// canary is a line that occurs nowhere else, made of base64's letters.
func canary() string { return "CANARY" + rand.Text() + rand.Text() }

func pem(kind, line string) string {
	return "-----BEGIN " + kind + "-----\n" + line + line + "\n-----END " + kind + "-----\n"
}

// TestSecrets plants secrets and per-machine state all over a root; none may be
// in the image, by byte search. What looks like one but is not must be.
func TestSecrets(t *testing.T) {
	i := instar.New(t)
	root := smallVolume(t)
	plant := func(path, format string) string {
		t.Helper()
		c := canary()
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(strings.ReplaceAll(format, "@", c)), 0o600); err != nil {
			t.Fatal(err)
		}
		return c
	}
	key := func(kind string) string { return pem(kind, "@") }
	secrets := map[string]string{
		"etc/ssh/ssh_host_rsa_key":                     key("OPENSSH PRIVATE KEY"),
		"etc/ssh/ssh_host_ed25519_key":                 key("OPENSSH PRIVATE KEY"),
		"etc/machine-id":                               "@\n",
		"var/lib/dbus/machine-id":                      "@\n",
		"var/lib/systemd/random-seed":                  "@",
		"root/.ssh/authorized_keys":                    "ssh-ed25519 @ who\n",
		"home/user/.ssh/authorized_keys":               "ssh-rsa @ who\n",
		"home/user/.ssh/id_rsa":                        key("RSA PRIVATE KEY"),
		"home/user/.ssh/id_ed25519":                    key("OPENSSH PRIVATE KEY"),
		"home/user/.ssh/id_ecdsa":                      key("EC PRIVATE KEY"),
		"root/.bash_history":                           "mysql -p@\n",
		"home/user/.zsh_history":                       ": 1:0;export TOKEN=@\n",
		"home/user/.python_history":                    "password = '@'\n",
		"root/.aws/credentials":                        "[default]\naws_secret_access_key = @\n",
		"home/user/.netrc":                             "machine x login y password @\n",
		"home/user/.docker/config.json":                `{"auths":{"x":{"auth":"@"}}}`,
		"home/user/.kube/config":                       "users:\n- user:\n    token: @\n",
		"home/user/.git-credentials":                   "https://user:@@example.org\n",
		"home/user/.pgpass":                            "*:*:*:*:@\n",
		"home/user/.gnupg/private-keys-v1.d/ABCD.key":  "(11:private-key @)",
		"home/user/.config/gcloud/credentials.db":      "@",
		"etc/ssl/private/server.key":                   key("PRIVATE KEY"),
		"opt/app/tls.pem":                              pem("CERTIFICATE", "MIIB") + key("PRIVATE KEY"),
		"srv/a name that says nothing":                 "some text\n" + key("RSA PRIVATE KEY"),
		"srv/encrypted":                                key("ENCRYPTED PRIVATE KEY"),
		"var/lib/cloud/instances/i-1234/user-data.txt": "#!/bin/sh\nexport PASSWORD=@\n",
		"var/lib/cloud/seed/nocloud/user-data":         "#cloud-config\npassword: @\n",
		"var/lib/cloud/sem/config_scripts_per_once.x":  "@",
		"etc/udev/rules.d/70-persistent-net.rules":     "ATTR{address}==\"@\"\n",
		"var/lib/instar/identity":                      "@",
		"swapfile":                                     "@",
	}
	planted := map[string]string{}
	for path, format := range secrets {
		planted[path] = plant(path, format)
	}
	// A swap file is one by its signature.
	f, err := os.OpenFile(filepath.Join(root, "swapfile"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(1<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	loopfs.Run(t, "bash", "-ec", `mkswap -q "$1/swapfile"; printf %s "$2" | dd of="$1/swapfile" bs=4096 seek=1 conv=notrunc status=none`,
		"bash", root, planted["swapfile"])
	// The very keys of this command, and its own output of an earlier run, lie
	// within what is captured.
	keys := instar.MakeKeys(t, mkdir(t, root, "root/bundling"))
	line := strings.Split(read(t, keys.UserKey), "\n")[5]
	planted["-k file"] = line
	dest := mkdir(t, root, "mnt/out")
	planted["own output"] = plant("mnt/out/leftover", "@")

	kept := map[string]string{}
	for path, format := range map[string]string{
		"etc/ssl/certs/ca.pem":              pem("CERTIFICATE", "@"),
		"usr/share/keyrings/archive.gpg":    "\x99\x02\x0d@",
		"etc/ssh/ssh_config":                "Host @\n",
		"etc/ssh/moduli.pub":                "ssh-ed25519 @ public\n",
		"usr/share/doc/how-to-make-pem.txt": "A key file begins with -----BEGIN RSA PRIVATE KEY----- and @ follows.\n",
		"opt/app/public.pem":                pem("PUBLIC KEY", "@"),
		"home/user/notes":                   "@\n",
	} {
		kept[path] = plant(path, format)
	}
	if len(planted) < 25 {
		t.Fatalf("%d secrets, want at least 25", len(planted))
	}

	i.Want(t, instar.OK, "bundle-vol", "-v", root, "--no-inherit", "--size", "auto", "--batch", "-p", "clean", "-d", dest,
		"-k", keys.UserKey, "-c", keys.UserCert, "--ec2cert", i.Keys.CloudPK, "-u", instar.Account, "-r", "x86_64")
	back := t.TempDir()
	i.Want(t, instar.OK, "unbundle", "-m", dest+"/clean.manifest.xml", "-s", dest, "-k", keys.UserKey, "-d", back)
	image := filepath.Join(back, "clean")
	fsck(t, image)
	found := search(t, image, planted, kept)
	for path := range planted {
		if found[path] {
			t.Errorf("%s is in the image", path)
		}
	}
	for path := range kept {
		if !found[path] {
			t.Errorf("%s is not in the image, and should be", path)
		}
	}

	// The operator may want them all: --no-filter, and then the search finds them.
	// What the command line names, and its output, stay out even so.
	dest2 := mkdir(t, root, "mnt/out2")
	i.Want(t, instar.OK, "bundle-vol", "-v", root, "--no-inherit", "--no-filter", "--size", "auto", "--batch", "-p", "all", "-d", dest2,
		"-k", keys.UserKey, "-c", keys.UserCert, "--ec2cert", i.Keys.CloudPK, "-u", instar.Account, "-r", "x86_64")
	i.Want(t, instar.OK, "unbundle", "-m", dest2+"/all.manifest.xml", "-s", dest2, "-k", keys.UserKey, "-d", back)
	found = search(t, filepath.Join(back, "all"), planted, kept)
	never := []string{"-k file", "own output", "var/lib/instar/identity"}
	for path := range planted {
		if stays := slices.Contains(never, path); stays == found[path] {
			t.Errorf("with --no-filter %s is in the image: %v", path, found[path])
		}
	}
}

// search looks for lines in all bytes of a file, and returns whose were found.
func search(t testing.TB, file string, sets ...map[string]string) map[string]bool {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	found := map[string]bool{}
	const overlap = 256
	buf := make([]byte, overlap+4<<20)
	for held := 0; ; {
		n, err := io.ReadFull(f, buf[held:])
		for _, set := range sets {
			for name, line := range set {
				if !found[name] && bytes.Contains(buf[:held+n], []byte(line)) {
					found[name] = true
				}
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return found
		} else if err != nil {
			t.Fatal(err)
		}
		held = copy(buf, buf[len(buf)-overlap:])
	}
}

func mkdir(t testing.TB, root, path string) string {
	t.Helper()
	dir := filepath.Join(root, path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func read(t testing.TB, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
