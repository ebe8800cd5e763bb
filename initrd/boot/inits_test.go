package boot_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/test/freeport"
)

// guestScript shows what was injected and does what the host says, step by step.
const guestScript = `#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
port=$(sed 's/.*guest.port=\([0-9]*\).*/\1/' /proc/cmdline)
for f in /etc/hostname /root/.ssh/authorized_keys /etc/fstab; do
	sed "s|^|GUEST $f: |" $f
done >/dev/console
for step in 1 2; do
	wget -q -O /run/step http://10.0.2.2:$port/$step || exit
	. /run/step
done
`

// guestWriter is a service that has a file open to write to until it is killed.
const guestWriter = `#!/bin/sh
exec >>/var/log/beat
while :; do echo beat; sleep 1; done
`

// busyBoxRoot is a root with BusyBox's init and the inittab that its sources have,
// for services of this test.
func busyBoxRoot(t testing.TB, writer bool) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "bin", "sbin", "usr/bin", "usr/sbin", "etc/init.d", "etc/ssh", "var/lib", "var/log", "root"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	inittab := "::sysinit:/etc/init.d/rcS\n::once:/etc/init.d/guest\n::restart:/sbin/init\n::ctrlaltdel:/sbin/reboot\n" +
		"::shutdown:/bin/umount -a -r\n::shutdown:/sbin/swapoff -a\n"
	if writer {
		inittab += "::respawn:/etc/init.d/writer\n"
	}
	program, err := exec.LookPath("busybox")
	must(t, err)
	data, err := os.ReadFile(program)
	must(t, err)
	for name, text := range map[string]string{
		"bin/busybox": string(data), "etc/inittab": inittab, "etc/init.d/guest": guestScript, "etc/init.d/writer": guestWriter,
		"etc/init.d/rcS": "#!/bin/sh\n/bin/mount -o remount,rw /\n/bin/hostname -F /etc/hostname\n",
		"etc/passwd":     "root:x:0:0::/root:/bin/sh\n",
		"etc/fstab":      "UUID=dead-beef / ext4 defaults 0 1\n",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755))
	}
	list, err := exec.Command(program, "--list-full").Output()
	must(t, err)
	for name := range strings.Lines(string(list)) {
		if name = strings.TrimSpace(name); name != "bin/busybox" {
			must(t, os.Symlink("/bin/busybox", filepath.Join(dir, name)))
		}
	}
	addBig(t, dir)
	return filesystem(t, dir, 64<<20)
}

// openRCRoot is a Debian with sysvinit and OpenRC. Debian's own scripts spare whom
// /run/sendsigs.omit.d lists; with killAll the system ends as OpenRC's own ones have
// it, by its program that spares nobody.
func openRCRoot(t testing.TB, killAll bool) string {
	t.Helper()
	made := exec.Command("../../test/debian", "openrc")
	made.Stderr = os.Stderr
	archive, err := made.Output()
	must(t, err)
	dir := filepath.Join(t.TempDir(), "root")
	must(t, os.Mkdir(dir, 0o755))
	if out, err := exec.Command("tar", "-C", dir, "-xf", strings.TrimSpace(string(archive))).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	for name, text := range map[string]string{
		"etc/rc.local":     "#!/bin/sh\n/etc/init.d/guest &\n/etc/init.d/writer &\nexit 0\n",
		"etc/init.d/guest": guestScript, "etc/init.d/writer": guestWriter,
		"etc/network/interfaces.d/lan": "auto /e*=lan\niface lan inet dhcp\n",
		"etc/fstab":                    "UUID=dead-beef / ext4 defaults 0 1\n",
		"etc/init.d/end-all":           "#!/sbin/openrc-run\nstart() { /lib/rc/bin/kill_all 15; sleep 1; /lib/rc/bin/kill_all 9; sleep 1; }\n",
		"etc/init.d/root-ro":           "#!/sbin/openrc-run\ndepend() { need end-all; }\nstart() { sync; mount -o remount,ro /; }\n",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755))
	}
	if killAll {
		for _, name := range []string{"sendsigs", "umountfs", "umountnfs.sh", "umountroot"} {
			must(t, os.Remove(filepath.Join(dir, "etc/runlevels/off", name)))
		}
		for _, name := range []string{"end-all", "root-ro"} {
			must(t, os.Symlink("/etc/init.d/"+name, filepath.Join(dir, "etc/runlevels/shutdown", name)))
		}
	}
	addBig(t, dir)
	return filesystem(t, dir, 400<<20)
}

// endingSystem is a system with an init of its own, and how it ends.
type endingSystem struct {
	name   string
	root   func(t testing.TB) string
	target int64 // bytes of the disk
	login  bool  // it has sshd
	clean  bool  // the root is read-only when the server ends
	late   bool  // what was written before the end, and not flushed, is there
	ends   []end
}

type end struct {
	how  string
	dead bool // the store
}

// TestBootInits ends systems with real inits while their root comes, from a store
// that is there and from one that is not, with a process that waits for it: none
// hangs, each leaves a sound filesystem, and the next boot goes on.
func TestBootInits(t *testing.T) {
	kernel, file := lazyInitrd(t)
	systems := []endingSystem{{
		name: "BusyBox", root: func(t testing.TB) string { return busyBoxRoot(t, true) }, target: 96 << 20, late: true,
		ends: []end{{"reboot", false}, {"poweroff", true}},
	}}
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		all := []end{{"poweroff", true}, {"reboot", false}, {"poweroff", false}, {"reboot", true}}
		systems[0].ends = all
		systems = append(
			systems,
			endingSystem{
				name: "BusyBox and no writer", root: func(t testing.TB) string { return busyBoxRoot(t, false) }, target: 96 << 20, clean: true, late: true, ends: all,
			},
			endingSystem{
				name: "OpenRC and sysvinit", root: func(t testing.TB) string { return openRCRoot(t, false) }, target: 448 << 20, login: true, clean: true, late: true, ends: all,
			},
			endingSystem{
				name: "OpenRC that kills all", root: func(t testing.TB) string { return openRCRoot(t, true) }, target: 448 << 20, login: true, ends: all[:2],
			},
		)
	}
	for _, s := range systems {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			s.run(t, kernel, file)
		})
	}
}

func (s *endingSystem) run(t *testing.T, kernel, file string) {
	c := lazyCloudOf(t, disk.None, s.root(t))
	target := dirty(t)
	must(t, os.Truncate(target, s.target))
	_, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	signer, err := ssh.NewSignerFromKey(private)
	must(t, err)
	key := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	for n, e := range s.ends {
		g := &endingGuest{c: c, n: n, end: e, t: t}
		net := qemutest.UserNet()
		if s.login {
			g.address, g.signer = freeport.Address(freeport.Port(t)), signer
			net[1] += ",hostfwd=tcp:" + g.address + "-:22"
		}
		c.pace(0)
		params := c.serve(t, "i-1", metadata.PublicKey{Name: "laptop", Key: key}) + fmt.Sprintf("guest.port=%d ", port(t, "127.0.0.1:0", g))
		out := qemutest.Run(t, qemutest.Guest{Kernel: kernel, Initrd: file, Args: append(net, qemutest.Disk(target)...), Append: params}, nil)
		took := time.Since(g.ended)
		if g.revive != nil {
			g.revive()
		}
		c.pace(0)
		before := t.Failed()
		if n > 0 {
			inOrder(t, out, `going on where the last boot ended`)
		}
		inOrder(t, out, `GUEST ends`)
		if host, got := guestLines(out, "/etc/hostname"), guestLines(out, "/root/.ssh/authorized_keys"); host != "booted" || got != key {
			t.Errorf("the host is %q, its key %q", host, got)
		}
		if want := "UUID=11111111-2222-3333-4444-555555555555 / ext4 defaults 0 1"; guestLines(out, "/etc/fstab") != want {
			t.Errorf("its fstab: %s", guestLines(out, "/etc/fstab"))
		}
		s.left(t, c, target, n)
		t.Logf("%s, store dead %v: it took %v", e.how, e.dead, took.Round(time.Second))
		if t.Failed() && !before {
			t.Logf("%s, store dead %v:\n%s", e.how, e.dead, out)
		}
	}
}

// left checks what the n-th end of a system left on the disk.
func (s *endingSystem) left(t *testing.T, c *lazyCloud, target string, n int) {
	t.Helper()
	f, err := os.Open(target)
	must(t, err)
	st, err := lazyroot.StateOf(f, s.target)
	f.Close()
	if err != nil || st.State != lazyroot.Filling {
		t.Errorf("the disk is not being filled: %+v, %v", st, err)
		return
	}
	c.mu.Lock()
	tk, err := c.ticket("i-1", "127.0.0.1")
	c.mu.Unlock()
	must(t, err)
	seen := boot.Seen(t, tk, target)
	defer os.Remove(seen)
	head, err := exec.Command("dumpe2fs", "-h", seen).CombinedOutput()
	must(t, err)
	if dirty := bytes.Contains(head, []byte("needs_recovery")); dirty && s.clean {
		t.Error("the root was not read-only at the end")
	}
	exec.Command("e2fsck", "-E", "journal_only", "-y", seen).Run() // what it comes to is seen next
	if out, err := exec.Command("e2fsck", "-fn", seen).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	for i := range n + 1 {
		for name, want := range map[string]bool{"kept": true, "late": s.late} {
			text, err := exec.Command("debugfs", "-R", fmt.Sprintf("cat /var/lib/%s%d", name, i), seen).Output()
			if must(t, err); string(text) != name+"\n" && want {
				t.Errorf("%s%d is %q", name, i, text)
			}
		}
	}
}

// endingGuest tells a guest what to do.
type endingGuest struct {
	t       *testing.T
	c       *lazyCloud
	n       int
	end     end
	address string // of sshd
	signer  ssh.Signer

	revive func()
	ended  time.Time
}

func (g *endingGuest) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/1":
		if g.address != "" {
			g.login()
		}
		if g.end.dead {
			// What a system runs to its end has to have come, for nothing stands in for it.
			io.WriteString(w, "find /bin/ /sbin/ /etc/ /lib/rc/ /lib/init/ /lib/lsb/ -type f -exec cat {} + >/dev/null 2>&1\n")
		}
		fmt.Fprintf(w, "echo kept >/var/lib/kept%d; sync\n", g.n)
	case "/2":
		g.c.pace(300 << 10)
		waits := ""
		if g.end.dead {
			g.revive = g.c.die()
			waits = "cat /big >/dev/null & sleep 1; "
		}
		g.ended = time.Now()
		fmt.Fprintf(w, "echo late >/var/lib/late%d; %secho GUEST ends >/dev/console; %s\n", g.n, waits, g.end.how)
	}
}

// login logs in with the key that was injected.
func (g *endingGuest) login() {
	client, err := ssh.Dial("tcp", g.address, &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(g.signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		g.t.Errorf("SSH: %v", err)
		return
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		g.t.Errorf("SSH: %v", err)
		return
	}
	if out, err := session.Output("cat /proc/1/comm"); err != nil || string(out) != "init\n" {
		g.t.Errorf("over SSH: process 1 is %q, %v", out, err)
	}
}
