package launch_test

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/test/servers"
)

// image captures a Debian to MinIO as an Instar image and returns what opens
// it, and its environment.
func image(t testing.TB) (args, env []string) {
	t.Helper()
	minio := servers.MinIO(t)
	etc := t.TempDir()
	env = append(minio.Env(), "INSTAR_ETC="+etc, "INSTAR_STATE="+t.TempDir())
	args = []string{"--store", minio.Bucket(t) + "/fleet", "--identity", etc + "/identity.age", "--signers", etc + "/allowed_signers"}
	if out, errs, status := run(t, env, append([]string{"create-image", "-v", debian(t, "plain"), "--all", "-s", "512", "-n", "web", "-r", "x86_64"}, args[:2]...)...); status != 0 && status != 24 {
		t.Fatalf("create-image: exit status %d\n%s%s", status, out, errs)
	}
	return args, env
}

// residents lists the processes of a root's server.
const residents = "grep -la '^@instar-root' /proc/[0-9]*/cmdline 2>/dev/null | wc -l"

// TestLaunchLazy boots a Debian that is fetched from MinIO while it runs, logs
// in, kills the server, reboots half-way, and sees that all of it arrives; for
// "make evidence" with its power cut when 10, 50 and 90 % of it are there.
func TestLaunchLazy(t *testing.T) {
	t.Parallel()
	store, env := image(t)
	signer, pub := sshKey(t)
	disk := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 1<<30))
	args := append([]string{
		"web", "--lazy", "--disk", disk, "--keep", "--ssh-key", pub, "--hostname", "web-1", "--memory", "768", "--accel", "tcg",
		"--scratch", t.TempDir(), "--console", "--limit-rate", "500k",
	}, store...)
	before, data := imageTree(t, env, store)
	left := countStore(t, &env)
	evidence := os.Getenv("INSTAR_EVIDENCE") != ""
	if evidence {
		launch(t, env, args...).cutAt(disk, data, 5) // it is still booting
		g := launch(t, env, args...)
		g.cutAt(disk, data, 10)
		g.wentOn()
	}
	g := launch(t, env, args...)
	port, user := g.ready()
	client := login(t, port, user, signer)
	expect(t, client, "", map[string]string{residents: "^2$"})
	// Killed, it is there again, and nothing waits for long.
	remote(t, client, "kill -9 $(grep -la serve $(grep -la '^@instar-root' /proc/[0-9]*/cmdline) | cut -d/ -f3) && echo once >/root/once && sync")
	remote(t, client, "find /usr/share -type f | head -n 200 | xargs cat | sha256sum")
	t.Logf("half-way:\n%s", remote(t, client, "dmesg | grep -aE 'instar: |nbd|dm-0|I/O error'; cat /proc/uptime"))
	client = reboot(t, client, "", port, user, signer)
	remote(t, client, "systemctl is-system-running --wait")
	lazyChecks(t, client)
	if evidence {
		for _, percent := range []float64{50, 90} {
			remote(t, client, fmt.Sprintf("echo %.0f >>/root/cuts && sync", percent))
			g.cutAt(disk, data, percent)
			g.wentOn()
			g = launch(t, env, args...)
			port, user = g.ready()
			client = login(t, port, user, signer)
			remote(t, client, "systemctl is-system-running --wait")
			lazyChecks(t, client)
		}
		expect(t, client, "", map[string]string{"cat /root/cuts": "^50\n90$"})
	}
	remote(t, client, complete)
	remote(t, client, "echo written by the guest >/root/mine && sync")
	t.Logf("the log:\n%s", remote(t, client, "dmesg | grep -aE 'instar: |nbd|dm-0|I/O error'; cat /proc/uptime"))
	expect(t, client, "", map[string]string{
		"cat /proc/modules | grep -c ^nbd; true":                            "^0$",
		"journalctl --no-pager | grep -ciE 'I/O error|EXT4-fs error'; true": "^0$",
		"cat /root/once":                 "^once$",
		"systemctl --failed --no-legend": "^$",
	})
	g.powerOff(client, "")
	g.wentOn()
	sameTree(t, before, disk)
	bytes := int64(0)
	for _, n := range left() {
		bytes += n
	}
	t.Logf("%.1f MB of packs and index left the store", float64(bytes)/1e6)
}

// complete is a command that ends when all of a root is on its disk.
const complete = "while [ $(" + residents + ") != 0 ]; do sleep 5; done"

// wentOn checks that a machine's last boot went on where the one before ended. It
// has ended.
func (g *guest) wentOn() {
	g.t.Helper()
	if !strings.Contains(g.stderr.String(), "going on where the last boot ended") {
		g.t.Errorf("the boot did not go on where the last one ended:\n%s", tail(g.stderr.String(), 8000))
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// cutAt cuts a machine's power when so much of what the image has is on its disk.
func (g *guest) cutAt(disk string, of sparse.Map, percent float64) {
	g.t.Helper()
	has, since := -1.0, time.Now()
	for has < percent && time.Since(since) < 2*qemutest.Limit {
		time.Sleep(100 * time.Millisecond)
		if now := filled(g.t, disk, of); now > has {
			has, since = now, time.Now()
		}
	}
	g.cmd.Process.Kill() // and the machine with it
	g.end()
	released(g.t, disk)
	f, err := os.Open(disk)
	must(g.t, err)
	defer f.Close()
	st, err := f.Stat()
	must(g.t, err)
	state, err := lazyroot.StateOf(f, st.Size())
	if err != nil || state.State != lazyroot.Filling || state.Instance != "i-launch" || has < percent {
		g.t.Fatalf("%.1f %% of the image are there, wanted %.0f; the disk: %+v, %v\n%s", has, percent, state, err, tail(g.stderr.String(), 8000))
	}
	g.t.Logf("the power was cut when %.1f %% of the image were on the disk", has)
}

// filled is how much of an image's data was brought to a disk that was all hole, in
// percent; what the guest wrote elsewhere does not count.
func filled(t testing.TB, disk string, of sparse.Map) float64 {
	t.Helper()
	here := int64(0)
	m := dataOf(t, disk)
	for i, j := 0, 0; i < len(m) && j < len(of); {
		end, ofEnd := m[i].Off+m[i].Len, of[j].Off+of[j].Len
		here += max(0, min(end, ofEnd)-max(m[i].Off, of[j].Off))
		if end < ofEnd {
			i++
		} else {
			j++
		}
	}
	return 100 * float64(here) / float64(of.Bytes())
}

// dataOf is where a file has data.
func dataOf(t testing.TB, name string) sparse.Map {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	defer f.Close()
	st, err := f.Stat()
	must(t, err)
	m, err := sparse.Scan(int(f.Fd()), st.Size())
	must(t, err)
	return m
}

// lazyChecks are of the running system, whose root is not all there.
func lazyChecks(t testing.TB, client *ssh.Client) {
	t.Helper()
	expect(t, client, "", map[string]string{
		"hostname":                       "^web-1$",
		"findmnt -no SOURCE /":           "^/dev/mapper/instar-root$",
		"systemctl --failed --no-legend": "^$",
		"readlink -f /dev/disk/by-uuid/$(findmnt -no UUID /) /dev/mapper/instar-root | uniq | wc -l": "^1$",
		"ls /dev/disk/by-uuid | wc -l":                   "^1$",
		"networkctl --no-legend --no-pager | grep ether": "ens?p?[0-9]+.* routable +configured",
		"cat /run/instar/instance.json":                  `"instance-id": "i-launch"`,
		imds + "instance-id":                             "^i-launch$",
		"stat -f -c '%b %S' /":                           "^2[45][0-9]{4} 4096$", // grown to the disk
	})
}

// imageTree is what the image in the store has in it, by name, and where it has
// data.
func imageTree(t testing.TB, env, store []string) (map[string]string, sparse.Map) {
	t.Helper()
	restored := filepath.Join(t.TempDir(), "restored")
	if out, errs, status := run(t, env, append([]string{"restore", "web", "--to", restored}, store...)...); status != 0 {
		t.Fatalf("restore: exit status %d\n%s%s", status, out, errs)
	}
	found := tree(t, restored)
	if len(found) < 5000 {
		t.Errorf("the image has %d files", len(found))
	}
	data := dataOf(t, restored)
	must(t, os.Remove(restored))
	return found, data
}

// sameTree compares a disk with the image's tree: the filesystem is sound, and
// every file of the image that the guest has no reason to change is as it was.
func sameTree(t testing.TB, before map[string]string, disk string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", disk).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	after := tree(t, disk)
	changed := 0
	for name, want := range before {
		if got := after[name]; got != want {
			changed++
			own := false
			for _, o := range []string{"/etc/", "/var/", "/root/", "/run/", "/tmp", "/dev", "/boot/efi"} {
				own = own || strings.HasPrefix(name, o)
			}
			if !own {
				t.Errorf("%s is %q, in the image %q", name, got, want)
			}
		}
	}
	if after["/root/mine"] == "" {
		t.Error("what the guest wrote is not there")
	}
	t.Logf("%d files, of which the guest changed %d", len(before), changed)
}

// tree is what a filesystem image has in it, by name.
func tree(t testing.TB, image string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	shell(t, `mount -o ro,loop,noload "$1" "$2"`, image, dir)
	defer shell(t, `umount "$1"`, dir)
	found := make(map[string]string)
	must(t, filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		what := st.Mode().String()
		if st.Mode().IsRegular() {
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %x", sha256.Sum256(data))
		}
		found[strings.TrimPrefix(name, dir)] = what
		return nil
	}))
	return found
}
