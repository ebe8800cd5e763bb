package agent

import (
	"context"
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
	"time"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/livelog"
)

func shell(t testing.TB, script string, args ...string) string {
	t.Helper()
	out, err := exec.Command("bash", append([]string{"-euc", script, "bash"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return strings.TrimSpace(string(out))
}

const secret = "the secret is hunter2"

// cloud is the guest's metadata; the guest asks it to change its mind.
type cloud struct {
	mu   sync.Mutex
	tree map[string]string
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/latest/")
	v, ok := c.tree[path]
	switch {
	case r.URL.Path == "/test/withdraw":
		delete(c.tree, "meta-data/public-keys/")
	case r.URL.Path == "/test/spot":
		c.tree["meta-data/spot/instance-action"] = `{"action":"terminate","time":"2027-03-02T10:02:00Z"}`
	case r.Method == http.MethodPut && path == "api/token":
		fmt.Fprint(w, "the-token")
	case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "the-token":
		w.WriteHeader(http.StatusUnauthorized)
	case !ok:
		http.NotFound(w, r)
	default:
		fmt.Fprint(w, v)
	}
}

// console is what the guest shows. The machine is stopped when it hangs.
type console struct{ livelog.Log }

func (c *console) String() string { return strings.ReplaceAll(c.Log.String(), "\r", "") }

// boot runs the machine until it powers off or reboots, with the clock at the
// given time, and returns its console.
func boot(t *testing.T, kernel, initrd, disk, clock string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	var out console
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1024", "-nographic", "-no-reboot", "-nodefaults",
		"-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-rtc", "base="+clock,
		"-append", "console=ttyS0 no_timer_check quiet panic=-1 root=/dev/vda rw systemd.show_status=no systemd.mask=serial-getty@ttyS0.service",
		"-drive", "file="+disk+",format=raw,if=virtio,cache=unsafe", "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("qemu: %v\n%s", err, &out)
	}
	return out.String()
}

// TestInstalledAgent installs the agent into a Debian's root directory and
// boots it twice. The guest's own script (testdata/check.sh) says what it saw.
func TestInstalledAgent(t *testing.T) {
	program := os.Getenv("INSTAR_BIN")
	if program == "" {
		program = instar.Build(t, "amd64")
	}
	archive, err := exec.Command("../debian", "kernel").Output()
	must(t, err)
	c := &cloud{tree: map[string]string{
		"meta-data/instance-id": "i-0123456789abcdef0", "meta-data/local-hostname": "web-1", "meta-data/public-keys/": "0=laptop",
		"meta-data/public-keys/0/openssh-key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsRzjGSDtaHDh1hAOzEvS1ZQPULGRWdtKYcVIDDpG7c laptop",
		"user-data":                           "#!/bin/sh\necho x >>/var/lib/ran\necho '" + secret + "' >/root/secret; chmod 600 /root/secret\n",
	}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := httptest.NewUnstartedServer(c)
	server.Listener.Close()
	server.Listener = l
	server.Start()
	defer server.Close()
	metadata := fmt.Sprintf("http://10.0.2.2:%d", l.Addr().(*net.TCPAddr).Port)

	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	shell(t, `mkdir "$1"; tar -C "$1" -xf "$2"; cp "$3" "$1/usr/local/bin/instar"; cp testdata/check.sh "$1/usr/local/bin/check"
cd "$1"; rm -f etc/ssh/ssh_host_*; chmod 755 usr/local/bin/*
chroot . useradd -m -s /bin/bash admin
mkdir -p opt/data etc/instar/hooks.d etc/systemd/system/{instar-agent.service.d,multi-user.target.wants}
head -c 40000000 /dev/urandom >opt/data/random
echo "METADATA=$4" >etc/check.conf
printf 'notices: {metadata: %s, interval: 2s, schedule: nightly}\nmax-age: 48h\n' "$4" >etc/instar/agent.yaml
printf '[Service]\nWatchdogSec=20\n' >etc/systemd/system/instar-agent.service.d/test.conf
cat >etc/instar/hooks.d/10-note <<'E'
#!/bin/sh
case $1 in
notice) echo notice $INSTAR_NOTICE $INSTAR_NOTICE_ACTION ;;
*) echo $1 $INSTAR_KIND $INSTAR_NAME $INSTAR_STATE $INSTAR_SCHEDULE ;;
esac >>/var/log/events
E
chmod 755 etc/instar/hooks.d/10-note
printf '[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n' >etc/systemd/system/check-dummy.service
printf '[Unit]\nAfter=instar-boot-final.service instar-agent.service\n[Service]\nExecStart=/usr/local/bin/check\n[Install]\nWantedBy=multi-user.target\n' >etc/systemd/system/check.service
for u in check check-dummy; do ln -s ../$u.service etc/systemd/system/multi-user.target.wants/; done`,
		root, strings.TrimSpace(string(archive)), program, metadata)
	run := func(args ...string) {
		t.Helper()
		cmd := exec.Command(program, args...)
		cmd.Env = append(os.Environ(), "INSTAR_ROOT="+root)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("instar %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	run("agent", "install", "--root", root, "--program", "/usr/local/bin/instar", "--boot", "--metadata", metadata, "--user", "admin", "--notices")
	run("agent", "schedule", "add", "create-image", "nightly", "--program", "/usr/local/bin/instar", "--on", "*-*-* 03:00", "--name", "etc",
		"--store", "/srv/nightly", "--volume", "/etc/systemd", "--no-kernel", "--keep-last", "1")
	disk := filepath.Join(dir, "disk")
	shell(t, `truncate -s 1500M "$2"; mkfs.ext4 -q -F -d "$1" "$2"; cp "$1"/boot/vmlinuz-* "$3/kernel"; cp "$1"/boot/initrd.img-* "$3/initrd"; rm -rf "$1"`, root, disk, dir)

	checks := regexp.MustCompile(`(?m)^CHECK ok (\S+)$`)
	for _, b := range []struct{ name, clock string }{{"first", "2027-03-01T02:00:00"}, {"second", "2027-03-02T10:00:00"}} {
		begin := time.Now()
		out := boot(t, filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd"), disk, b.clock)
		t.Logf("%s boot: %d checks in %v", b.name, len(checks.FindAllString(out, -1)), time.Since(begin).Round(time.Second))
		if strings.Contains(out, "CHECK FAIL") || !strings.Contains(out, "CHECK end "+b.name) {
			t.Fatalf("%s boot:\n%s", b.name, out)
		}
		if strings.Contains(out, "hunter2") {
			t.Errorf("the console shows the user data's secret")
		}
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "IDLE") || strings.Contains(line, "Overall exposure") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
	// Byte by byte, what was deleted included; the file that the script itself wrote
	// held the secret, and its blocks still may.
	if n := shell(t, `grep -abo "$1" "$2" | wc -l`, secret, disk); n != "0" && n != "1" {
		t.Errorf("the secret is %s times on the disk", n)
	}
}
