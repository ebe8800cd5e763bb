package launch_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/test/servers"
)

// programs is where instar and instar-init lie beside each other.
var programs string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "instar-launch-test-*")
	if err != nil {
		panic(err)
	}
	programs = dir
	code := m.Run()
	qemutest.Remove()
	os.RemoveAll(dir)
	os.Exit(code)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// instar is the path of the program, built on first use.
func instar(t testing.TB) string {
	t.Helper()
	name := filepath.Join(programs, "instar")
	if _, err := os.Stat(name); err == nil {
		return name
	}
	data, err := os.ReadFile(qemutest.Init(t))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(programs, "instar-init"), data, 0o755))
	data, err = os.ReadFile(qemutest.BuildProgram(t, "github.com/instar-image/instar/cmd/instar"))
	must(t, err)
	must(t, os.WriteFile(name, data, 0o755))
	return name
}

// run runs instar to its end.
func run(t testing.TB, env []string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), instar(t), args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestInitrdBuild(t *testing.T) {
	_, root := qemutest.Kernel(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "initrd")
	out, errs, status := run(t, nil, "initrd", "build", "-o", file, "--modules", root, "--module", "virtio_net", "--module", "virtio_blk",
		"--param", "net=ra", "--param", "rootflags=a b", "--compression", "gzip", "--json")
	if status != 0 {
		t.Fatalf("exit status %d: %s", status, errs)
	}
	var result struct {
		Bytes   int64
		Modules []string
		Release string
		File    string
	}
	must(t, json.Unmarshal([]byte(out), &result))
	st, err := os.Stat(file)
	must(t, err)
	if st.Size() != result.Bytes || result.File != file || !strings.Contains(strings.Join(result.Modules, " "), "net_failover virtio_net") || result.Release == "" {
		t.Errorf("result %+v of a file of %d bytes", result, st.Size())
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{"missing option --output", nil},
		{"instar.foo is unknown", []string{"-o", file, "--param", "foo=1"}},
		{"one of dhcp", []string{"-o", file, "--param", "net=x"}},
		{"neither a file nor built in", []string{"-o", file, "--modules", root, "--module", "flux_capacitor"}},
		{"excludes", []string{"-o", file, "--no-modules", "--modules", root}},
		{"no such file", []string{"-o", file, "--no-modules", "--init", filepath.Join(dir, "none")}},
		{"linked dynamically", []string{"-o", file, "--no-modules", "--shell", "/bin/sh"}},
		{"not PEM", []string{"-o", file, "--no-modules", "--ca-cert", "/etc/passwd"}},
		{"several kernels|in lib/modules", []string{"-o", file, "--modules", root, "--release", "1.2.3"}},
	} {
		_, errs, status := run(t, nil, append([]string{"initrd", "build"}, c.args...)...)
		if status == 0 || !regexp.MustCompile(c.want).MatchString(errs) {
			t.Errorf("%q: exit status %d, %q, want %q", c.args, status, errs, c.want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*part*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// sshKey makes a key pair; the public half is in the file.
func sshKey(t testing.TB) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	signer, err := ssh.NewSignerFromKey(private)
	must(t, err)
	file := filepath.Join(t.TempDir(), "key.pub")
	must(t, os.WriteFile(file, ssh.MarshalAuthorizedKey(signer.PublicKey()), 0o644))
	return signer, file
}

// debian is a Debian with systemd, sshd and the test kernel, as a machine of
// its own would have it: bootstrapped once a user, and copied.
func debian(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	must(t, err)
	cache = filepath.Join(cache, "instar", "debian")
	must(t, os.MkdirAll(cache, 0o755))
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	must(t, err)
	defer lock.Close()
	must(t, syscall.Flock(int(lock.Fd()), syscall.LOCK_EX))
	kernel, modules := qemutest.Kernel(t)
	release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	root := filepath.Join(t.TempDir(), "debian")
	shell(t, `set -eu
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
if [ ! -e "$1/bookworm.tar" ]; then
	rm -rf "$1/new"
	debootstrap --variant=minbase --include=systemd-sysv,openssh-server,udev,dbus,iproute2 bookworm "$1/new" >"$1/log" 2>&1 || { tail -20 "$1/log"; exit 1; }
	rm -rf "$1/new/var/lib/apt/lists" "$1"/new/var/cache/apt/archives/*.deb "$1"/new/usr/share/doc "$1"/new/usr/share/man "$1"/new/usr/share/locale
	printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' >"$1/new/etc/systemd/network/10-all.network"
	chroot "$1/new" systemctl -q enable systemd-networkd
	tar -C "$1/new" -cf "$1/part" .
	mv "$1/part" "$1/bookworm.tar"
	rm -rf "$1/new"
fi
mkdir "$2"
tar -C "$2" -xf "$1/bookworm.tar"
cp "$3" "$2/boot/"
mkdir -p "$2/usr/lib/modules/$5"
cd "$4/lib/modules/$5"
cp -r --parents modules.builtin kernel/drivers/virtio kernel/drivers/net/virtio_net.ko kernel/drivers/net/net_failover.ko \
	kernel/net/core kernel/drivers/block/virtio_blk.ko kernel/drivers/char/hw_random "$2/usr/lib/modules/$5/"
printf 'UUID=aaaa / ext4 defaults 0 1\nUUID=bbbb /home ext4 defaults 0 2\nUUID=cccc none swap sw 0 0\n' >"$2/etc/fstab"`,
		cache, root, kernel, modules, release)
	return root
}

func shell(t testing.TB, script string, args ...string) {
	t.Helper()
	if out, err := exec.Command("bash", append([]string{"-c", script, "bash"}, args...)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// keyFiles makes a private key and its certificate.
func keyFiles(t testing.TB, name string) (key, cert string) {
	t.Helper()
	dir := t.TempDir()
	key, cert = filepath.Join(dir, name+".key"), filepath.Join(dir, name+".cert")
	shell(t, `openssl req -x509 -newkey rsa:2048 -nodes -keyout "$1" -out "$2" -days 365 -subj /CN=test 2>&1`, key, cert)
	data, err := os.ReadFile(key)
	must(t, err)
	if block, _ := pem.Decode(data); block == nil {
		t.Fatal("openssl made no key")
	}
	return key, cert
}

// guest is a running instar launch.
type guest struct {
	t      testing.TB
	cmd    *exec.Cmd
	lines  chan string // of standard output
	stderr *bytes.Buffer
	done   chan error
}

func launch(t testing.TB, env []string, args ...string) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), qemutest.Limit)
	t.Cleanup(cancel)
	g := &guest{t: t, cmd: exec.CommandContext(ctx, instar(t), append([]string{"launch"}, args...)...), lines: make(chan string, 64), stderr: new(bytes.Buffer), done: make(chan error, 1)}
	g.cmd.Env = append(os.Environ(), env...)
	// instar ends its machine when it is told to end.
	g.cmd.Cancel = func() error { return g.cmd.Process.Signal(syscall.SIGTERM) }
	g.cmd.WaitDelay = 30 * time.Second
	g.cmd.Stderr = g.stderr
	out, err := g.cmd.StdoutPipe()
	must(t, err)
	must(t, g.cmd.Start())
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			g.lines <- s.Text()
		}
		close(g.lines)
		g.done <- g.cmd.Wait()
	}()
	return g
}

// port waits until the machine says how to log in.
func (g *guest) port() string {
	g.t.Helper()
	for line := range g.lines {
		if m := regexp.MustCompile(`^ssh -p (\d+) `).FindStringSubmatch(line); m != nil {
			return m[1]
		}
	}
	g.t.Fatalf("instar launch ended without a login: %v\n%s", <-g.done, g.stderr)
	return ""
}

// end waits for the end of instar launch.
func (g *guest) end() error {
	for range g.lines {
	}
	return <-g.done
}

func login(t testing.TB, port, user string, key ssh.Signer) *ssh.Client {
	t.Helper()
	// A slow machine answers late; there is a limit to the guest as a whole.
	c, err := ssh.Dial("tcp", "127.0.0.1:"+port, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 2 * time.Minute,
	})
	if err != nil {
		t.Fatalf("logging in: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func remote(t testing.TB, c *ssh.Client, command string) string {
	t.Helper()
	s, err := c.NewSession()
	must(t, err)
	defer s.Close()
	out, err := s.CombinedOutput(command)
	if err != nil {
		t.Errorf("%s: %v\n%s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}

// leaks lists files that all may read and that hold a piece of the user data.
const leaks = "find / /run -xdev -newer /etc/machine-id -type f -perm -o=r -exec grep -l 'echo ran' {} + 2>/dev/null; true"

// TestLaunch captures a Debian to MinIO, boots the bundle and logs in.
func TestLaunch(t *testing.T) {
	root := debian(t)
	key, cert := keyFiles(t, "user")
	_, cloudCert := keyFiles(t, "cloud")
	minio := servers.MinIO(t)
	bucket := minio.Bucket(t)
	env := minio.Env()
	if out, errs, status := run(t, env, "bundle-vol", "-v", root, "--all", "-s", "1024", "-b", bucket+"/web", "-k", key, "-c", cert,
		"--ec2cert", cloudCert, "-u", "111122223333", "-r", "x86_64", "--no-inherit", "-p", "web"); status != 0 && status != 24 {
		t.Fatalf("bundle-vol: exit status %d\n%s%s", status, out, errs)
	}
	signer, pub := sshKey(t)
	userData := filepath.Join(t.TempDir(), "user-data")
	must(t, os.WriteFile(userData, []byte("#cloud-config\nwrite_files: [ { path: /etc/from-user-data, content: hello } ]\nruncmd: [ 'echo ran >> /root/ran' ]\n"), 0o600))
	g := launch(t, env, "-b", bucket+"/web", "-m", "web.manifest.xml", "-k", key, "--ssh-key", pub, "--user-data", userData,
		"--hostname", "web-1", "--disk-size", "2g", "--memory", "768", "--accel", "tcg", "--scratch", t.TempDir())
	client := login(t, g.port(), "root", signer)
	remote(t, client, "systemctl is-system-running --wait")
	for command, want := range map[string]string{
		"hostname":                         "^web-1$",
		"cat /root/ran":                    "^ran$",
		"cat /etc/from-user-data":          "^hello$",
		"systemctl --failed --no-legend":   "^$",
		"stat -f -c '%b %S' /":             "^[45][0-9]{5} 4096$", // grown to the disk of 2 GiB
		"cat /run/instar/instance.json":    `"instance-id": "i-launch"`,
		"cat /etc/machine-id":              "^[0-9a-f]{32}$",
		"tail -n1 /var/lib/instar/journal": `"step":"user-data","state":"finished"`,
		// User data is nobody's to read.
		"grep -c hello /proc/cmdline; true":                "^0$",
		"journalctl -b --no-pager | grep from-user-; true": "^$",
		leaks: "^$",
	} {
		if got := remote(t, client, command); !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("%s says %q, want %q", command, got, want)
		}
	}
	if s, err := client.NewSession(); err == nil {
		s.Run("systemctl poweroff") // the connection ends before the answer
		s.Close()
	}
	if err := g.end(); err != nil {
		t.Errorf("instar launch: %v\n%s", err, g.stderr)
	}
}

func TestLaunchRefusals(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 16<<20))
	shell(t, `/sbin/mkfs.ext4 -q -F "$1"`, disk)
	text := filepath.Join(dir, "text")
	must(t, os.WriteFile(text, []byte("text\n"), 0o600))
	big := filepath.Join(dir, "big")
	must(t, os.WriteFile(big, bytes.Repeat([]byte("#"), 20000), 0o600))
	for _, c := range []struct {
		want string
		args []string
	}{
		{"--keep needs --disk", []string{"--keep"}},
		{"missing option --(bucket|privatekey)", nil},
		{"go together", []string{"--disk", disk, "--kernel-file", "/x"}},
		{"not an SSH public key", []string{"--disk", disk, "--ssh-key", text}},
		{"no such file", []string{"--disk", disk, "--ssh-key", filepath.Join(dir, "none")}},
		{"more than 16384", []string{"--disk", disk, "--user-data", big}},
		{"host name", []string{"--disk", disk, "--hostname", "a_b"}},
		{"instance-id", []string{"--disk", disk, "--hostname", "h", "--instance-id", "a/b"}},
		{"the image has 16777216 bytes", []string{"--disk", disk, "--disk-size", "1m"}},
		{"no /boot/vmlinuz-RELEASE", []string{"--disk", disk}},
		{"no kernel of its own|looking into", []string{"--disk", text}},
	} {
		_, errs, status := run(t, []string{"TMPDIR=" + dir}, append([]string{"launch"}, c.args...)...)
		if status == 0 || !regexp.MustCompile(c.want).MatchString(errs) {
			t.Errorf("%q: exit status %d, %q, want %q", c.args, status, errs, c.want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "instar-launch-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
