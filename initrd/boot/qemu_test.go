package boot_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/initrd"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	qemutest.Remove()
	os.Exit(code)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// buildInitrd makes an initrd with the test kernel's modules.
func buildInitrd(t testing.TB, c boot.Config) (kernel, file string) {
	t.Helper()
	kernel, root := qemutest.Kernel(t)
	return kernel, buildInitrdFor(t, root, c)
}

// buildInitrdFor is buildInitrd with the modules in a root directory.
func buildInitrdFor(t testing.TB, root string, c boot.Config) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "initrd")
	f, err := os.Create(file)
	must(t, err)
	defer f.Close()
	_, err = initrd.Build(t.Context(), initrd.Options{
		Init: qemutest.Init(t), Modules: os.DirFS(root), Config: c,
		ModuleNames: []string{"virtio_pci", "virtio_blk", "virtio_net"},
		Compression: initrd.None, // packed ones boot in the tests of launch
	}, f)
	must(t, err)
	return file
}

// cloud is a metadata server that can be made to misbehave.
type cloud struct {
	mu    sync.Mutex
	tree  map[string]string
	wrong func(w http.ResponseWriter, r *http.Request) bool // answers instead
	paths []string
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paths = append(c.paths, r.Method+" "+r.URL.Path)
	if c.wrong != nil && c.wrong(w, r) {
		return
	}
	switch {
	case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
		fmt.Fprint(w, "the-token")
	case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "the-token":
		http.Error(w, "no", http.StatusUnauthorized)
	default:
		v, ok := c.tree[strings.TrimPrefix(r.URL.Path, "/latest/")]
		if !ok {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, v)
	}
}

func newCloud(id string) *cloud {
	return &cloud{tree: map[string]string{
		"meta-data/instance-id": id, "meta-data/local-hostname": "host-" + id, "meta-data/ami-id": "ami-1",
		"meta-data/placement/availability-zone": "here-1a",
	}}
}

// port serves h on the address for the test and returns its port, which the
// guest reaches at its router's address.
func port(t testing.TB, address string, h http.Handler) int {
	t.Helper()
	l, err := net.Listen("tcp", address)
	must(t, err)
	s := httptest.NewUnstartedServer(h)
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return l.Addr().(*net.TCPAddr).Port
}

func (c *cloud) param(t testing.TB) string {
	return fmt.Sprintf("instar.metadata=http://10.0.2.2:%d ", port(t, "127.0.0.1:0", c))
}

// TestBootWithoutRoot boots the initrd alone. Each case ends with its reason
// on the console, and the machine powers itself off.
func TestBootWithoutRoot(t *testing.T) {
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5})
	for _, c := range []struct {
		name  string
		setup func(t *testing.T) (params string, args []string)
		want  []string // regular expressions, in order
	}{
		{
			"no network card", func(*testing.T) (string, []string) { return "instar.wait=3", nil },
			[]string{`FAILED network: no network interface: is its driver`},
		},
		{"no DHCP server", func(*testing.T) (string, []string) {
			return "instar.wait=6", []string{"-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-pci,netdev=n0,romfile="}
		}, []string{`FAILED network: eth0: no DHCP server answers`}},
		{
			"DHCP refuses", func(t *testing.T) (string, []string) { return "instar.wait=15", dhcpNet(t, refuse) },
			[]string{`FAILED network: eth0: the DHCP server 192\.0\.2\.1 refused \(NAK\): go away`},
		},
		{
			"DHCP with everything", func(t *testing.T) (string, []string) {
				return "instar.wait=60 instar.stop=network", dhcpNet(t, everything)
			},
			[]string{`network: eth0 192\.0\.2\.9/24, gateway 192\.0\.2\.1 \(DHCP from 192\.0\.2\.1\)`, `stopped after network`},
		},
		{"static address", func(t *testing.T) (string, []string) {
			return newCloud("i-1").param(t) + "instar.net=static instar.address=10.0.2.77/24 instar.gateway=10.0.2.2 instar.stop=metadata", qemutest.UserNet()
		}, []string{`network: eth0 10\.0\.2\.77/24, gateway 10\.0\.2\.2 \(as configured\)`, `metadata: instance i-1`, `stopped after metadata`}},
		{"static IPv6 address", func(t *testing.T) (string, []string) {
			return fmt.Sprintf("instar.net=static instar.address=fec0::77/64 instar.gateway=fec0::2 instar.metadata=http://[fec0::2]:%d instar.stop=metadata",
				port(t, "[::1]:0", newCloud("i-66"))), qemutest.UserNet()
		}, []string{`network: eth0 fec0::77/64, gateway fec0::2 \(as configured\)`, `metadata: instance i-66`, `stopped after metadata`}},
		{"IPv6 router advertisement", func(t *testing.T) (string, []string) {
			return fmt.Sprintf("instar.net=ra instar.metadata=http://[fec0::2]:%d instar.stop=metadata", port(t, "[::1]:0", newCloud("i-6"))), qemutest.UserNet()
		}, []string{`network: eth0 fec0:.*/64 \(router advertisement\)`, `metadata: instance i-6`}},
		{
			"interface that is not there", func(t *testing.T) (string, []string) {
				return "instar.wait=8 instar.interface=eth7", qemutest.UserNet()
			},
			[]string{`FAILED network: no network interface eth7: there are eth0 \(52:`},
		},
		{"no metadata", func(t *testing.T) (string, []string) {
			return "instar.metadata=http://10.0.2.2:1 instar.wait=10", qemutest.UserNet()
		}, []string{`network: eth0 10\.0\.2\.15/24, gateway 10\.0\.2\.2 \(DHCP from 10\.0\.2\.2\)`, `FAILED metadata: .*(refused|reset|timeout)`}},
		{
			"misspelt parameter", func(t *testing.T) (string, []string) { return "instar.metdata=http://x/", qemutest.UserNet() },
			[]string{`FAILED config: kernel parameter instar\.metdata is unknown`, `powering off`},
		},
		{
			"shell not allowed", func(t *testing.T) (string, []string) { return "instar.fail=shell instar.stop=config", nil },
			[]string{`FAILED config: instar\.fail: the initrd was not built to allow a shell`, `halted`},
		},
		{"root device absent", func(t *testing.T) (string, []string) {
			return newCloud("i-1").param(t) + "instar.root=UUID=1234 instar.patience=1", append(qemutest.UserNet(), qemutest.Disk(blank(t))...)
		}, []string{`waiting for the root: no device UUID=1234: there are /dev/vda`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			params, args := c.setup(t)
			last := regexp.MustCompile(c.want[len(c.want)-1])
			// A case that does not end with power off ends with its last line.
			out := qemutest.Run(t, qemutest.Guest{Kernel: kernel, Initrd: file, Append: params, Args: args}, func(console []byte) bool {
				return last.Match(console) && strings.Contains(string(console[last.FindIndex(console)[1]:]), "\n")
			})
			rest := out
			for _, w := range c.want {
				at := regexp.MustCompile(w).FindStringIndex(rest)
				if at == nil {
					t.Fatalf("the console lacks, in its order, %q:\n%s", w, out)
				}
				rest = rest[at[1]:]
			}
		})
	}
}

// stage is a reason to fail that a guest is given until it has said so; then it is
// given the next one.
type stage struct {
	want string // a regular expression, of the console
	set  func()
}

// stages gives a guest, which tries again whenever it failed, one reason after the
// other. What the last one wants ends it.
func stages(t testing.TB, g qemutest.Guest, list []stage) string {
	t.Helper()
	at, from := 0, 0
	list[0].set()
	out := qemutest.Run(t, g, func(console []byte) bool {
		// Of whole lines, so that they are seen as inOrder sees them.
		lines := console[from : bytes.LastIndexByte(console, '\n')+1]
		found := regexp.MustCompile(list[at].want).FindIndex(lines)
		if found == nil {
			return false
		}
		from += found[1]
		if at++; at < len(list) {
			list[at].set()
		}
		return at == len(list)
	})
	var want []string
	for _, s := range list {
		want = append(want, s.want)
	}
	inOrder(t, out, want...)
	return out
}

// TestBootMetadata boots with a metadata server that fails in one way after the
// other, each of which is said and tried again; and a clock that is ten years off.
func TestBootMetadata(t *testing.T) {
	t.Parallel()
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.Retry, Pause: 1, Patience: 5})
	c := newCloud("i-late")
	answer := func(status, times int) func() {
		return func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.wrong = func(w http.ResponseWriter, r *http.Request) bool {
				if times == 0 {
					return false
				}
				times--
				w.WriteHeader(status)
				return true
			}
		}
	}
	id := func(known bool) func() {
		return func() {
			answer(0, 0)()
			c.mu.Lock()
			defer c.mu.Unlock()
			if delete(c.tree, "meta-data/instance-id"); known {
				c.tree["meta-data/instance-id"] = "i-late"
			}
		}
	}
	stages(t, qemutest.Guest{
		Kernel: kernel, Initrd: file, Append: c.param(t) + "instar.wait=10 instar.stop=metadata",
		Args: append(qemutest.UserNet(), "-rtc", "base=2010-01-01T00:00:00"),
	}, []stage{
		{`clock set to 20[2-9].* by the metadata server`, answer(401, -1)},
		{`FAILED metadata: PUT http://.*/latest/api/token answers 401 Unauthorized`, func() {}},
		{`trying again from network in 1s`, func() {}},
		{`FAILED metadata: .*403 Forbidden: metadata is switched off`, answer(403, -1)},
		{`waiting: .*500(?s:.*)FAILED metadata: .*answers 500 Internal Server Error`, answer(500, -1)},
		{`FAILED metadata: the metadata server knows no instance-id`, id(false)},
		{`waiting: .*503`, func() { id(true)(); answer(503, 3)() }},
		{`metadata: instance i-late, 0 SSH keys`, func() {}},
		{`stopped after metadata`, func() {}},
	})
}

// blank is an empty disk of 64 MiB.
func blank(t testing.TB) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(name, nil, 0o600))
	must(t, os.Truncate(name, 64<<20))
	return name
}

// smallRoot is a disk with a root whose system is guestinit. more adds to it.
func smallRoot(t testing.TB, more ...func(dir string)) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "sbin", "lib/systemd", "etc/ssh", "var/lib", "root", "home/alice"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	must(t, os.Chown(filepath.Join(dir, "home/alice"), 1000, 1000))
	program, err := os.ReadFile(qemutest.Program(t, "./testdata/guestinit"))
	must(t, err)
	for name, data := range map[string]string{
		"lib/systemd/systemd": string(program),
		"etc/passwd":          "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
		"etc/fstab":           "UUID=dead-beef / ext4 defaults 0 1\nUUID=1111-2222 /home ext4 defaults 0 2\nLABEL=swap none swap sw 0 0\n",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(data), 0o755))
	}
	must(t, os.Symlink("/lib/systemd/systemd", filepath.Join(dir, "sbin/init")))
	for _, add := range more {
		add(dir)
	}
	return filesystem(t, dir, 64<<20)
}

// filesystem is a disk of so many bytes with a directory's files.
func filesystem(t testing.TB, dir string, size int64) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, size))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-U", "11111111-2222-3333-4444-555555555555", "-d", dir, disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return disk
}

func sshKey(t testing.TB) string {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	k, err := ssh.NewPublicKey(pub)
	must(t, err)
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k)))
}

// guestLines are what guestinit printed of a file.
func guestLines(out, name string) string {
	var lines []string
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "GUEST "+name+": "); ok {
			lines = append(lines, strings.TrimSpace(rest))
		}
	}
	return strings.Join(lines, "\n")
}

// TestBootLocalRoot boots a root that is on the disk: its instance's, its
// second time, and as another instance.
func TestBootLocalRoot(t *testing.T) {
	t.Parallel()
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5, User: "alice", Root: "LABEL=none"})
	disk := smallRoot(t)
	key := sshKey(t)
	run := func(id string) string {
		c := newCloud(id)
		c.tree["meta-data/public-keys/"] = "0=laptop"
		c.tree["meta-data/public-keys/0/openssh-key"] = key
		c.tree["user-data"] = "#cloud-config\nwrite_files: [ { path: /etc/ran, content: \"x\\n\", append: true } ]\n"
		out := qemutest.Run(t, qemutest.Guest{
			Kernel: kernel, Initrd: file, Args: append(qemutest.UserNet(), qemutest.Disk(disk)...),
			Append: c.param(t) + "instar.root=UUID=11111111-2222-3333-4444-555555555555",
		}, nil)
		if !strings.Contains(out, "GUEST done") {
			t.Fatalf("the image's system did not run:\n%s", out)
		}
		return out
	}
	first := run("i-1")
	for name, want := range map[string]string{
		"/etc/hostname":                    "host-i-1",
		"/home/alice/.ssh/authorized_keys": key,
		"/etc/fstab": "UUID=11111111-2222-3333-4444-555555555555 / ext4 defaults 0 1\n" +
			"UUID=1111-2222 /home ext4 defaults,nofail,x-systemd.device-timeout=5s 0 0\n" +
			"LABEL=swap none swap sw,nofail,x-systemd.device-timeout=5s 0 0",
	} {
		if got := guestLines(first, name); got != want {
			t.Errorf("%s is\n%s\nwant\n%s", name, got, want)
		}
	}
	if !strings.Contains(first, "GUEST user data: instar: running part 1") {
		t.Errorf("user data did not run:\n%s", first)
	}
	if strings.Contains(first, "still here") || strings.Contains(guestLines(first, "/proc/net/route"), "eth0") {
		t.Errorf("the initrd left itself or its network behind:\n%s", first)
	}

	again := run("i-1")
	for _, name := range []string{"/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key.pub", "/etc/fstab", "/home/alice/.ssh/authorized_keys"} {
		if a, b := guestLines(first, name), guestLines(again, name); a != b {
			t.Errorf("second boot: %s was\n%s\nis\n%s", name, a, b)
		}
	}
	if !strings.Contains(again, "ran before (finished)") {
		t.Errorf("second boot: user data\n%s", again)
	}

	// What is included from a dead server is missed, by name, in good time.
	include := newCloud("i-3")
	include.tree["user-data"] = "#include\nhttp://10.0.2.2:1/more?secret=x\n"
	out := qemutest.Run(t, qemutest.Guest{
		Kernel: kernel, Initrd: file, Args: append(qemutest.UserNet(), qemutest.Disk(disk)...),
		Append: include.param(t) + "instar.root=UUID=11111111-2222-3333-4444-555555555555 instar.keepnet",
	}, nil)
	inOrder(t, out, `user data of \d+ bytes handed to`, `GUEST user data: .*#include of http://10\.0\.2\.2:1/more.*, tried 4 times: .*(refused|reset|timeout)`, `GUEST done`)
	if strings.Contains(out, "secret") {
		t.Error("the console shows an included URL's query")
	}

	other := run("i-2")
	for _, name := range []string{"/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key.pub", "/etc/hostname"} {
		if a, b := guestLines(first, name), guestLines(other, name); a == b || b == "" {
			t.Errorf("another instance has the first one's %s: %q", name, b)
		}
	}
	if !strings.Contains(other, "GUEST user data: instar: running part 1") {
		t.Errorf("another instance: user data\n%s", other)
	}
}
