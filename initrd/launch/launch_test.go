package launch_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/initrd/internal/qemutest"
)

// programs is where instar and instar-init lie beside each other, built once.
var (
	programs string
	building sync.Once
)

func TestMain(m *testing.M) {
	if os.Getenv(withoutRedirection) != "" {
		fmt.Fprintln(os.Stderr, becomeUnredirected(os.Args[1:]))
		os.Exit(125)
	}
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
	building.Do(func() {
		for _, p := range []struct{ from, to string }{
			{qemutest.Init(t), filepath.Join(programs, "instar-init")},
			{qemutest.BuildProgram(t, "github.com/instar-image/instar/cmd/instar"), name},
		} {
			data, err := os.ReadFile(p.from)
			must(t, err)
			must(t, os.WriteFile(p.to, data, 0o755))
		}
	})
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
// its own would have it: of the flavour that test/debian makes.
func debian(t testing.TB, flavour string) string {
	t.Helper()
	out, err := exec.Command("../../test/debian", flavour).Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Logf("%s", exit.Stderr)
		}
		t.Fatalf("making a Debian: %v", err)
	}
	kernel, modules := qemutest.Kernel(t)
	release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	root := filepath.Join(t.TempDir(), "debian")
	shell(t, `set -eu
mkdir "$2"
tar -C "$2" -xf "$1"
cp "$3" "$2/boot/"
mkdir -p "$2/usr/lib/modules/$5"
cd "$4/lib/modules/$5"
cp -r --parents modules.builtin kernel/drivers/virtio kernel/drivers/net/virtio_net.ko* kernel/drivers/net/net_failover.ko* \
	kernel/net/core kernel/drivers/block/virtio_blk.ko* kernel/drivers/block/nbd.ko* kernel/drivers/md/dm-mod.ko* kernel/drivers/char/hw_random "$2/usr/lib/modules/$5/"
printf 'UUID=aaaa / ext4 defaults 0 1\nUUID=bbbb /home ext4 defaults 0 2\nUUID=cccc none swap sw 0 0\n' >"$2/etc/fstab"`,
		strings.TrimSpace(string(out)), root, kernel, modules, release)
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
	ended  chan struct{} // closed when it has
	err    error         // how it ended
}

func launch(t testing.TB, env []string, args ...string) *guest {
	t.Helper()
	limit := 3 * qemutest.Limit / 2 // it fetches something first, and boots twice
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		limit = 8 * qemutest.Limit // many at a time
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, errors.New("the machine had its time"))
	g := &guest{t: t, cmd: exec.CommandContext(ctx, instar(t), append([]string{"launch"}, args...)...), lines: make(chan string, 64), stderr: new(bytes.Buffer), ended: make(chan struct{})}
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
		g.err = errors.Join(g.cmd.Wait(), context.Cause(ctx))
		close(g.ended)
	}()
	t.Cleanup(func() {
		late := context.Cause(ctx)
		cancel()
		if err := g.end(); t.Failed() {
			t.Logf("%v: instar launch ended: %v: %v\n%s", g.cmd.Args, late, err, tail(g.stderr.String(), 8000))
		}
	})
	return g
}

// ready waits until the machine says how to log in: to what port, as whom.
func (g *guest) ready() (port, user string) {
	g.t.Helper()
	for line := range g.lines {
		if m := regexp.MustCompile(`^ssh -p (\d+) .* (\w+)@127\.0\.0\.1$`).FindStringSubmatch(line); m != nil {
			return m[1], m[2]
		}
	}
	g.t.Fatalf("instar launch ended without a login: %v\n%s", g.end(), g.stderr)
	return "", ""
}

// end waits for the end of instar launch.
func (g *guest) end() error {
	for range g.lines {
	}
	<-g.ended
	return g.err
}

func login(t testing.TB, port, user string, key ssh.Signer) *ssh.Client {
	t.Helper()
	// A slow machine answers late; there is a limit to the guest as a whole.
	c, err := dial(port, user, key)
	if err != nil {
		t.Fatalf("logging in: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func dial(port, user string, key ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", "127.0.0.1:"+port, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: 2 * time.Minute,
	})
}

// remote runs a command in the machine and returns what it printed, without
// its errors.
func remote(t testing.TB, c *ssh.Client, command string) string {
	t.Helper()
	s, err := c.NewSession()
	must(t, err)
	defer s.Close()
	var errs bytes.Buffer
	s.Stderr = &errs
	out, err := s.Output(command)
	if err != nil {
		t.Errorf("%s: %v\n%s%s", command, err, out, errs.String())
	}
	return strings.TrimSpace(string(out))
}

func TestLaunchRefusals(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 16<<20))
	shell(t, `/sbin/mkfs.ext4 -q -F "$1"`, disk)
	text := filepath.Join(dir, "text")
	must(t, os.WriteFile(text, []byte("text\n"), 0o600))
	private := filepath.Join(dir, "private")
	must(t, os.WriteFile(private, []byte("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"), 0o600))
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	port := strconv.Itoa(taken.Addr().(*net.TCPAddr).Port)
	big := filepath.Join(dir, "big")
	must(t, os.WriteFile(big, bytes.Repeat([]byte("#"), 20000), 0o600))
	key, cert := keyFiles(t, "user")
	other, cloudCert := keyFiles(t, "other")
	bundled := t.TempDir()
	if _, errs, status := run(t, nil, "bundle-image", "-i", disk, "-p", "x", "-d", bundled, "-k", key, "-c", cert, "--ec2cert", cloudCert, "-u", "111122223333", "-r", "x86_64"); status != 0 {
		t.Fatalf("bundle-image: exit status %d\n%s", status, errs)
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{"this is a private key; the public one is commonly in .*private.pub", []string{"--disk", disk, "--ssh-key", private}},
		{"port " + port + " for the machine's sshd: .*address already in use", []string{"--disk", disk, "--port", port}},
		{"--login: user name \"a b\" is not one", []string{"--disk", disk, "--login", "a b"}},
		{"positive numbers", []string{"--disk", disk, "--port", "70000"}},
		{"needs 96 MiB", []string{"--disk", disk, "--memory", "64"}},
		{"positive numbers|invalid", []string{"--disk", disk, "--memory=-5"}},
		{"launch takes one bundle", []string{"a", "b"}},
		{"missing option --store", []string{"bucket"}},
		{"neither the file of a manifest, BUCKET", []string{dir + "/none.manifest.xml"}},
		{"both .*text.* and --disk", []string{text, "--disk", disk}},
		{"another by --bucket", []string{"-b", "x", "y/z.manifest.xml"}},
		{"reading private key .* not an RSA key", []string{text, "-k", private}},
		{"reading the manifest|no manifest|manifest", []string{text, "-k", key}},
		{"no /boot/vmlinuz-RELEASE", []string{bundled + "/x.manifest.xml", "-k", key}},
		{"signature|decrypt|key", []string{bundled + "/x.manifest.xml", "-k", other}},
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
	_, errs, status := run(t, []string{"PATH=/nowhere"}, "launch", "--disk", disk)
	if status == 0 || !strings.Contains(errs, "install QEMU (on Debian: qemu-system-x86") {
		t.Errorf("without QEMU: exit status %d, %q", status, errs)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "instar-launch-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
