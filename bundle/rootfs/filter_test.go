package rootfs_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/rootfs"
)

var update = flag.Bool("update", false, "rewrite golden files")

// canary stands in every file that must not be captured.
const canary = "CANARY-4c8f31"

// privateKey is a fresh PEM key, so that none stands in this file.
func privateKey(t *testing.T) string {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func certificate() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bytes.Repeat([]byte("cert"), 200)}))
}

func leftOut(r *rootfs.Root, path string) *rootfs.Omission {
	i := slices.IndexFunc(r.LeftOut, func(o rootfs.Omission) bool { return o.Path == path })
	if i < 0 {
		return nil
	}
	return &r.LeftOut[i]
}

// unchanged demands of every captured file that it opens, ends where the tree
// says, and counts as what it was when it was scanned.
func unchanged(t *testing.T, r *rootfs.Root) {
	t.Helper()
	for id := range filetree.ID(r.Tree.Len()) {
		if r.Tree.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		f, err := r.Source().Open(t.Context(), id)
		if err != nil {
			t.Errorf("%s: %v", r.Tree.Path(id), err)
			continue
		}
		if n, err := f.ReadAt(make([]byte, 1), r.Tree.Size(id)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("%s does not end at byte %d: %v", r.Tree.Path(id), r.Tree.Size(id), err)
		}
		if changed, err := f.Changed(); changed || err != nil {
			t.Errorf("%s has changed, or %v", r.Tree.Path(id), err)
		}
		must(t, f.Close())
	}
}

// holds tells in which captured files a text stands.
func holds(t *testing.T, r *rootfs.Root, text string) []string {
	t.Helper()
	var in []string
	for i := range r.Tree.Len() {
		id := filetree.ID(i)
		if r.Tree.Mode(id)&unix.S_IFMT != unix.S_IFREG || r.Tree.Size(id) == 0 {
			continue
		}
		if path := r.Tree.Path(id); strings.Contains(read(t, r, path), text) {
			in = append(in, path)
		}
	}
	return in
}

func TestSecretsStayOut(t *testing.T) {
	key := canary + "\n" + privateKey(t)
	secret40 := strings.Repeat("aB3/", 10)
	swap := make([]byte, 64<<10)
	copy(swap[100:], canary)
	copy(swap[4096-10:], "SWAPSPACE2")
	byName := []string{
		"etc/ssh/ssh_host_rsa_key", "etc/ssh/ssh_host_ed25519_key", "etc/ssh/ssh_host_ecdsa_key.pub", "var/lib/dbus/machine-id",
		"var/lib/systemd/random-seed", "var/lib/systemd/credential.secret", "root/.ssh/authorized_keys", "home/u/.ssh/authorized_keys2", "root/.ssh/id_rsa",
		"home/u/.ssh/id_ed25519", "home/u/.ssh/id_work", "home/u/backup_id_ecdsa", "root/.aws/credentials", "root/.netrc", "root/.git-credentials",
		"root/.docker/config.json", "root/.kube/config", "root/.config/gcloud/x.db", "home/u/.pgpass", "home/u/.my.cnf", "root/.bash_history", "root/.zsh_history",
		"root/.python_history", "root/.mysql_history", "root/.psql_history", "root/.lesshst", "root/.viminfo", "home/u/.gnupg/private-keys-v1.d/A.key", "swapfile",
		"etc/.hosts.swp", "etc/fstab~", "etc/#passwd#", "etc/udev/rules.d/70-persistent-net.rules", "var/lib/cloud/instances/i-1/user-data.txt", "var/lib/cloud/data/x",
		"var/lib/cloud/seed/nocloud/user-data", "var/lib/cloud/sem/x", "var/lib/dhcp/dhclient.eth0.leases", "var/lib/dhclient/dhclient.leases",
		"etc/NetworkManager/system-connections/w.nmconnection", "var/lib/instar/journal", "var/cache/instar/c", "root/.cache/instar/x", "etc/instar/sign.key", "etc/instar/identity.age",
		"etc/ssl/private/ssl-cert-snakeoil.key", "etc/krb5.keytab", "opt/app/store.jks", "etc/wireguard/wg0.conf", "tmp/x", "var/tmp/x", "run/x", "proc/x", "mnt/x",
		"media/x", "dev/x", "etc/apt/auth.conf.d/x.conf", "var/lib/systemd/coredump/core.x", "root/.local/share/keyrings/login.keyring", "root/.wget-hsts",
	}
	byContent := map[string]string{
		"opt/app/conf/server.conf":          "listen 443\n" + key,
		"srv/www/notes":                     "hidden\n\n   " + strings.ReplaceAll(key, "\n", "\n   "), // as in YAML
		"etc/app/account.json":              `{"private_key": "` + strings.ReplaceAll(key, "\n", `\n`) + `"}`,
		"usr/local/etc/x":                   key,
		"usr/share/app/tls.key":             key,
		"etc/letsencrypt/archive/privkey1":  key,
		"var/backups/odd":                   key,
		"home/u/putty":                      "PuTTY-User-Key-File-3: x\n" + canary,
		"home/u/age.txt":                    canary + "AGE-SECRET-KEY-1" + strings.Repeat("Q", 58),
		"opt/app/.env":                      canary + "\nAWS_SECRET_ACCESS_KEY=" + secret40 + "\n",
		"home/u/.npmrc":                     "//r/:_authToken=" + canary,
		"home/u/forge":                      canary + " ghp_" + strings.Repeat("a1B2", 9),
		"etc/instar/ec2-pk.pem":             key,
		"home/u/bundle/both.pem":            certificate() + key,
		"opt/pgp":                           canary + "\n-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: x\n\n" + strings.Repeat("lQOY", 20),
		"opt/legacy":                        canary + "\n-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n" + strings.Repeat("MIIE", 20),
		"srv/" + strings.Repeat("x", 100):   key,
		"var/spool/swap":                    string(swap),
		"usr/lib/app/private-key-of-x.data": key,
	}
	staying := map[string]string{
		"etc/ssl/certs/ca-certificates.crt": certificate(), "etc/ssl/certs/x.pem": certificate(), "usr/share/keyrings/debian.gpg": "keyring",
		"etc/apt/trusted.gpg.d/x.gpg": "keyring", "etc/apt/keyrings/docker.asc": "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQINBFit2ioBEADhWpZ8", "root/.ssh/id_rsa.pub": "ssh-rsa x",
		"root/.ssh/known_hosts": "x", "etc/passwd": "x", "etc/shadow": "x", "etc/hostname": "h", "opt/src/keys.go": `const begin = "-----BEGIN PRIVATE KEY-----"`,
		"usr/lib/python3/dist-packages/t.py": "aws_secret_access_key = '" + secret40 + "'", "root/.bashrc": "x", "root/.aws/config": "x", "var/log/syslog": "x",
		"root/go/pkg/mod/x/testdata/id_rsa": "published", "etc/ssh/sshd_config": "x", "etc/openvpn/ca.crt": certificate(), "var/cache/x": "y", "boot/vmlinuz": "k",
	}
	dir := t.TempDir()
	for _, name := range byName {
		write(t, dir, map[string]string{name: canary})
	}
	write(t, dir, byContent)
	write(t, dir, staying)
	write(t, dir, map[string]string{"etc/machine-id": canary})
	must(t, os.Chmod(filepath.Join(dir, "var/spool/swap"), 0o600))
	must(t, os.Symlink("/dev/null", filepath.Join(dir, "home/u/.bash_history")))
	must(t, os.Symlink("instances/i-1", filepath.Join(dir, "var/lib/cloud/instance")))

	r := scan(t, rootfs.Options{Volume: dir})
	if in := holds(t, r, canary); len(in) != 0 {
		t.Errorf("secrets are captured in %q", in)
	}
	unchanged(t, r)
	if n := len(byName) + len(byContent); n < 60 {
		t.Errorf("only %d secrets were planted", n)
	}
	for path, content := range staying {
		if got := read(t, r, path); got != content {
			t.Errorf("%s reads %q", path, got)
		}
	}
	for path := range byContent {
		if o := leftOut(r, path); o == nil || !strings.HasPrefix(o.Rule, "content: ") || o.Why == "" || o.Bytes <= 0 {
			t.Errorf("%s: %+v", path, o)
		}
	}
	if id := r.Tree.Find("etc/machine-id"); id == filetree.None || r.Tree.Size(id) != 0 {
		t.Errorf("etc/machine-id is not an empty file")
	}
	if o := leftOut(r, "etc/machine-id"); o == nil || o.Kept != "empty file" || o.Class != rootfs.Machine {
		t.Errorf("etc/machine-id: %+v", o)
	}
	for _, path := range []string{"etc/ssl/private", "var/lib/cloud/instances", "home/u/.bash_history"} {
		if r.Tree.Find(path) == filetree.None {
			t.Errorf("%s is gone", path)
		}
	}
	if r.Tree.Find("var/lib/cloud/instance") != filetree.None {
		t.Errorf("the link to cloud-init's instance is captured")
	}

	all := scan(t, rootfs.Options{Volume: dir, NoFilter: true})
	for _, path := range []string{"root/.ssh/id_rsa", "opt/app/conf/server.conf", "etc/machine-id", "swapfile", "var/spool/swap"} {
		if got := read(t, all, path); !strings.Contains(got, canary) {
			t.Errorf("without the filter, %s reads %q", path, got)
		}
	}
	for _, path := range []string{"var/lib/instar/journal", "etc/instar/sign.key", "etc/instar/ec2-pk.pem", "tmp/x", "dev/x"} {
		if all.Tree.Find(path) != filetree.None {
			t.Errorf("%s is captured without the filter", path)
		}
	}
}

func TestPatterns(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{}
	for _, name := range []string{"data/a/1", "data/b/2", "srv/x.log", "srv/deep/er/y.log", "tmp/keep/me", "tmp/other", "root/.ssh/id_rsa", "etc/ssl/private/one.key", "etc/ssl/private/two.key", "etc/x"} {
		files[name] = name
	}
	write(t, dir, files)
	for name, c := range map[string]struct {
		o       rootfs.Options
		in, out string
		err     string
	}{
		"default":                 {out: "tmp/keep root/.ssh/id_rsa etc/ssl/private/one.key", in: "data/a/1 srv/x.log tmp etc/ssl/private"},
		"exclude":                 {o: rootfs.Options{Exclude: []string{"/data"}}, out: "data", in: "srv/x.log"},
		"exclude host path":       {o: rootfs.Options{Exclude: []string{dir + "/data/*"}}, out: "data/a data/b", in: "data"},
		"exclude relative":        {o: rootfs.Options{Exclude: []string{"data/b"}}, out: "data/b", in: "data/a/1"},
		"exclude name at root":    {o: rootfs.Options{Exclude: []string{"data"}}, out: "data", in: "srv"},
		"exclude name anywhere":   {o: rootfs.Options{Exclude: []string{"*.log"}}, out: "srv/x.log srv/deep/er/y.log", in: "srv/deep/er"},
		"exclude any depth":       {o: rootfs.Options{Exclude: []string{"/srv/**/*.log"}}, out: "srv/x.log srv/deep/er/y.log", in: "srv/deep"},
		"include beats fixed":     {o: rootfs.Options{Include: []string{"/tmp/keep"}}, in: "tmp/keep/me", out: "tmp/other"},
		"include beats filter":    {o: rootfs.Options{Include: []string{"/etc/ssl/private/one.key"}}, in: "etc/ssl/private/one.key", out: "etc/ssl/private/two.key"},
		"include beats exclude":   {o: rootfs.Options{Exclude: []string{"/data"}, Include: []string{"/data/*/2"}}, in: "data/b/2", out: "data/a/1"},
		"include name":            {o: rootfs.Options{Include: []string{"id_rsa"}}, in: "root/.ssh/id_rsa"},
		"packer":                  {o: rootfs.Options{Exclude: []string{"/tmp/keep"}, ExcludeLoose: []string{"/tmp/other", "/tmp/nothing"}, NoFilter: true}, in: "root/.ssh/id_rsa tmp", out: "tmp/other tmp/keep"},
		"exclude of nothing":      {o: rootfs.Options{Exclude: []string{"/nowhere"}}, err: `exclude pattern "/nowhere" matches nothing`},
		"exclude of no name":      {o: rootfs.Options{Exclude: []string{"*.nix"}}, err: `exclude pattern "*.nix" matches nothing`},
		"include of nothing":      {o: rootfs.Options{Include: []string{"/nowhere/*"}}, err: `include pattern "/nowhere/*" matches nothing`},
		"never":                   {o: rootfs.Options{Never: []string{dir + "/etc/x", dir + "/srv/x.*"}, Include: []string{"/etc/x", "/srv"}, NoFilter: true}, out: "etc/x srv/x.log", in: "srv/deep/er/y.log"},
		"never, elsewhere":        {o: rootfs.Options{Never: []string{"/nowhere/key.pem"}}, in: "etc/x"},
		"exclude, trailing slash": {o: rootfs.Options{Exclude: []string{"data/"}}, out: "data"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Volume = dir
			r, err := rootfs.Scan(t.Context(), c.o)
			if c.err != "" {
				if !errors.Is(err, rootfs.ErrNoMatch) || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			must(t, err)
			defer r.Close()
			for path := range strings.FieldsSeq(c.in) {
				if r.Tree.Find(path) == filetree.None {
					t.Errorf("%s is missing", path)
				}
			}
			for path := range strings.FieldsSeq(c.out) {
				if r.Tree.Find(path) != filetree.None {
					t.Errorf("%s is captured", path)
				}
			}
		})
	}
	for _, o := range []rootfs.Options{{Exclude: []string{"/[x"}}, {Include: []string{"a["}}, {Exclude: []string{""}}, {Volume: dir + "/etc/x"}, {Volume: dir + "/none"}, {Volume: "/proc"}, {FstabKind: "ancient"}} {
		if o.Volume == "" {
			o.Volume = dir
		}
		if r, err := rootfs.Scan(t.Context(), o); err == nil {
			t.Errorf("%+v is accepted", o)
			r.Close()
		}
	}
}

// TestNeverByInode: another name of the key file is a way into the image, too.
func TestNeverByInode(t *testing.T) {
	dir, keys := t.TempDir(), t.TempDir()
	write(t, keys, map[string]string{"pk": canary})
	write(t, dir, map[string]string{"etc/x": "x"})
	must(t, os.Link(filepath.Join(keys, "pk"), filepath.Join(dir, "etc/other-name")))
	must(t, os.Symlink(filepath.Join(keys, "pk"), filepath.Join(keys, "link")))
	r := scan(t, rootfs.Options{Volume: dir, Never: []string{filepath.Join(keys, "link")}, Include: []string{"/etc"}, NoFilter: true})
	if in := holds(t, r, canary); len(in) != 0 {
		t.Errorf("the key is captured as %q", in)
	}
	if o := leftOut(r, "etc/other-name"); o == nil || o.Class != rootfs.Own {
		t.Errorf("%+v", o)
	}
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"tmp/a/b": strings.Repeat("x", 10000), "tmp/c": strings.Repeat("x", 5000), "root/.netrc": "12345"})
	r := scan(t, rootfs.Options{Volume: dir, Measure: true})
	if o := leftOut(r, "tmp"); o == nil || o.Bytes < 15000 || o.Bytes > 40000 || o.Files != 4 {
		t.Errorf("tmp: %+v", o)
	}
	if o := leftOut(r, "root/.netrc"); o == nil || o.Bytes != 5 || o.Files != 1 {
		t.Errorf(".netrc: %+v", o)
	}
	if o := leftOut(scan(t, rootfs.Options{Volume: dir}), "tmp"); o == nil || o.Bytes != -1 || o.Files != -1 {
		t.Errorf("unmeasured tmp: %+v", o)
	}
}

// TestRulesAreDocumented keeps RULES.md the table that is in force.
func TestRulesAreDocumented(t *testing.T) {
	var b bytes.Buffer
	must(t, rootfs.WriteRules(&b))
	if *update {
		must(t, os.WriteFile("RULES.md", b.Bytes(), 0o644))
	}
	if d := cmp.Diff(string(mustRead(os.ReadFile("RULES.md"))), b.String()); d != "" {
		t.Errorf("RULES.md is out of date (go test -update):\n%s", d)
	}
	for _, r := range rootfs.Rules() {
		if r.Why == "" || r.Class == "" || r.Pattern == "" {
			t.Errorf("incomplete rule %+v", r)
		}
	}
}

// TestEachRule plants a file for each rule; what the rule names is not captured.
func TestEachRule(t *testing.T) {
	for i, r := range rootfs.Rules() {
		p := strings.NewReplacer("**/", fmt.Sprintf("home/u%d/", i), "*", "star", "?", "q").Replace(strings.TrimPrefix(r.Pattern, "/"))
		dir := t.TempDir()
		if r.Keep == rootfs.KeepDirectory {
			p += "/canary"
		}
		write(t, dir, map[string]string{p: canary})
		got, err := rootfs.Scan(t.Context(), rootfs.Options{Volume: dir})
		must(t, err)
		if in := holds(t, got, canary); len(in) != 0 {
			t.Errorf("rule %q lets %s in", r.Pattern, p)
		}
		must(t, got.Close())
	}
}
