package launch_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/test/servers"
)

// bundle captures a Debian of that flavour to MinIO and returns the arguments
// and the environment to launch it with.
func bundle(t testing.TB, flavour string) (args, env []string) {
	t.Helper()
	root := debian(t, flavour)
	key, cert := keyFiles(t, "user")
	_, cloudCert := keyFiles(t, "cloud")
	minio := servers.MinIO(t)
	bucket := minio.Bucket(t)
	env = minio.Env()
	if out, errs, status := run(t, env, "bundle-vol", "-v", root, "--all", "-s", "1024", "-b", bucket+"/web", "-k", key, "-c", cert,
		"--ec2cert", cloudCert, "-u", "111122223333", "-r", "x86_64", "--no-inherit", "-p", "web"); status != 0 && status != 24 {
		t.Fatalf("bundle-vol: exit status %d\n%s%s", status, out, errs)
	}
	return []string{
		bucket + "/web/web.manifest.xml", "-k", key, "--hostname", "web-1",
		"--memory", "768", "--accel", "tcg", "--scratch", t.TempDir(),
	}, env
}

// expect compares what commands print in the machine with regular expressions.
func expect(t testing.TB, c *ssh.Client, sudo string, commands map[string]string) {
	t.Helper()
	for command, want := range commands {
		if got := remote(t, c, sudo+command); !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("%s says %q, want %q", command, got, want)
		}
	}
}

// once is what a second boot must find as the first left it.
const once = `sha256sum /etc/machine-id /etc/ssh/ssh_host_*_key /etc/hostname /etc/fstab /root/.ssh/authorized_keys /root/ran`

// reboot reboots the machine and logs in again.
func reboot(t testing.TB, c *ssh.Client, sudo, port, user string, key ssh.Signer) *ssh.Client {
	t.Helper()
	const bootID = "cat /proc/sys/kernel/random/boot_id"
	before := remote(t, c, bootID)
	if s, err := c.NewSession(); err == nil {
		s.Run(sudo + "systemctl reboot") // the connection ends before the answer
		s.Close()
	}
	for end := time.Now().Add(qemutest.Limit); time.Now().Before(end); time.Sleep(time.Second) {
		again, err := dial(port, user, key)
		if err != nil {
			continue // it is going down, or coming up
		}
		t.Cleanup(func() { again.Close() })
		if s, err := again.NewSession(); err == nil {
			out, err := s.Output(bootID)
			s.Close()
			if err == nil && strings.TrimSpace(string(out)) != before {
				return again
			}
		}
		again.Close()
	}
	t.Fatal("the machine did not come back from its reboot")
	return nil
}

// powerOff ends the machine, and instar launch with it.
func (g *guest) powerOff(c *ssh.Client, sudo string) {
	g.t.Helper()
	if s, err := c.NewSession(); err == nil {
		s.Run(sudo + "systemctl poweroff") // the connection ends before the answer
		s.Close()
	}
	if err := g.end(); err != nil {
		g.t.Errorf("instar launch: %v\n%s", err, g.stderr)
	}
}

// leaks lists files that all may read and that hold a piece of the user data.
const leaks = "find / /run -xdev -newer /etc/machine-id -type f -perm -o=r -exec grep -l 'echo ran' {} + 2>/dev/null; true"

// imds asks for metadata as on EC2, with a token.
const imds = `token=$(curl -sf -m 60 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" http://169.254.169.254/latest/api/token) &&
	curl -sf -m 60 -H "X-aws-ec2-metadata-token: $token" http://169.254.169.254/latest/meta-data/`

// TestLaunch captures a Debian to MinIO, boots the bundle, logs in, and boots
// it again.
func TestLaunch(t *testing.T) {
	t.Parallel()
	args, env := bundle(t, "plain")
	signer, pub := sshKey(t)
	userData := filepath.Join(t.TempDir(), "user-data")
	must(t, os.WriteFile(userData, []byte("#cloud-config\nwrite_files: [ { path: /etc/from-user-data, content: hello } ]\nruncmd: [ 'echo ran >> /root/ran' ]\n"), 0o600))
	g := launch(t, env, append(args, "--ssh-key", pub, "--user-data", userData, "--disk-size", "2g")...)
	port, user := g.ready()
	client := login(t, port, user, signer)
	remote(t, client, "systemctl is-system-running --wait")
	expect(t, client, "", map[string]string{
		"hostname":                         "^web-1$",
		"id -un":                           "^root$",
		"cat /root/ran":                    "^ran$",
		"cat /etc/from-user-data":          "^hello$",
		"systemctl --failed --no-legend":   "^$",
		"stat -f -c '%b %S' /":             "^[45][0-9]{5} 4096$", // grown to the disk of 2 GiB
		"cat /run/instar/instance.json":    `"instance-id": "i-launch"`,
		"cat /etc/machine-id":              "^[0-9a-f]{32}$",
		"tail -n1 /var/lib/instar/journal": `"step":"user-data","state":"finished"`,
		// Metadata is where it is on EC2.
		imds + "instance-id": "^i-launch$",
		"curl -sfg -m 60 'http://[fd00:ec2::254]/latest/meta-data/instance-id'": "^i-launch$",
		// User data is nobody's to read.
		"grep -c hello /proc/cmdline; true":                "^0$",
		"journalctl -b --no-pager | grep from-user-; true": "^$",
		leaks: "^$",
	})
	before, journal := remote(t, client, once), remote(t, client, "cat /var/lib/instar/journal")
	client = reboot(t, client, "", port, user, signer)
	remote(t, client, "systemctl is-system-running --wait")
	if after := remote(t, client, once); after != before {
		t.Errorf("the second boot changed\n%s\nto\n%s", before, after)
	}
	if after := remote(t, client, "cat /var/lib/instar/journal"); after != journal {
		t.Errorf("the second boot changed the journal\n%s\nto\n%s", journal, after)
	}
	expect(t, client, "", map[string]string{
		"systemctl --failed --no-legend":           "^$",
		"journalctl -b -u instar-user-data -o cat": "ran before \\(finished\\)",
		imds + "local-hostname":                    "^web-1$",
	})
	g.powerOff(client, "")
}

// TestLaunchCloudInit boots a Debian with cloud-init in it: it, not Instar,
// does what is to be done, from Instar's seed.
func TestLaunchCloudInit(t *testing.T) {
	t.Parallel()
	args, env := bundle(t, "cloud-init")
	signer, pub := sshKey(t)
	userData := filepath.Join(t.TempDir(), "user-data")
	must(t, os.WriteFile(userData, []byte(`Content-Type: multipart/mixed; boundary="=b="
MIME-Version: 1.0

--=b=
Content-Type: text/cloud-config

#cloud-config
write_files: [ { path: /etc/from-user-data, content: hello } ]
runcmd: [ 'echo ran >> /root/ran' ]
--=b=
Content-Type: text/x-shellscript

#!/bin/sh
echo script >> /root/ran
--=b=--
`), 0o600))
	g := launch(t, env, append(args, "--ssh-key", pub, "--user-data", userData)...)
	port, user := g.ready()
	if user != "debian" {
		t.Errorf("the login user is said to be %q, not cloud-init's", user)
	}
	const sudo = "sudo "
	client := login(t, port, user, signer)
	remote(t, client, sudo+"cloud-init status --wait; "+sudo+"systemctl is-system-running --wait")
	commands := map[string]string{
		"hostname":                       "^web-1$",
		"cat /root/ran":                  "^(ran\nscript|script\nran)$",
		"cat /etc/from-user-data":        "^hello$",
		"systemctl --failed --no-legend": "^$",
		"cloud-init query instance_id":   "^i-launch$",
		"cloud-init query platform":      "^nocloud$",
		"cloud-init status":              "^status: done$",
		"systemctl show -P LoadState instar-user-data.service":                "^not-found$",
		"grep -c '" + keyBlob(signer) + "' /home/debian/.ssh/authorized_keys": "^1$",
		// For root cloud-init leaves the key with a message who to log in as.
		"cat /root/.ssh/authorized_keys":                                        "^no-port-forwarding[^\n]*$",
		"grep -c 'user-data.*left to cloud-init' /var/lib/instar/journal; true": "^1$",
		imds + "instance-id":                                                    "^i-launch$",
	}
	expect(t, client, sudo+"sh -c ", quoted(commands))
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		before := remote(t, client, sudo+"sh -c '"+once+"'")
		client = reboot(t, client, sudo, port, user, signer)
		remote(t, client, sudo+"cloud-init status --wait; "+sudo+"systemctl is-system-running --wait")
		if after := remote(t, client, sudo+"sh -c '"+once+"'"); after != before {
			t.Errorf("the second boot changed\n%s\nto\n%s", before, after)
		}
		expect(t, client, sudo+"sh -c ", quoted(commands))
	}
	g.powerOff(client, sudo)
}

func keyBlob(s ssh.Signer) string {
	return strings.Fields(string(ssh.MarshalAuthorizedKey(s.PublicKey())))[1]
}

// quoted makes each command one word of the shell.
func quoted(commands map[string]string) map[string]string {
	out := make(map[string]string)
	for c, want := range commands {
		out["'"+strings.ReplaceAll(c, "'", `'\''`)+"'"] = want
	}
	return out
}

// TestTwoInstances makes two instances of one root; with $INSTAR_EVIDENCE also
// by booting one image as many machines and logging in.
func TestTwoInstances(t *testing.T) {
	root := debian(t, "plain")
	second := root + "-2"
	shell(t, `cp -a --reflink=auto "$1" "$2"`, root, second)
	identity := func(root, id string) map[string]string {
		res, err := inject.Apply(t.Context(), inject.Options{Root: root, Run: t.TempDir()}, inject.Instance{ID: id, Hostname: id})
		must(t, err)
		if !res.New || res.CloudInit {
			t.Errorf("instance %s: %+v", id, res)
		}
		files := make(map[string]string)
		for _, name := range []string{
			"etc/machine-id", "etc/hostname", "etc/ssh/ssh_host_ed25519_key", "etc/ssh/ssh_host_ecdsa_key",
			"etc/ssh/ssh_host_ed25519_key.pub", "etc/ssh/ssh_host_ecdsa_key.pub",
		} {
			data, err := os.ReadFile(filepath.Join(root, name))
			must(t, err)
			files[name] = string(data)
		}
		return files
	}
	a, b := identity(root, "i-1"), identity(second, "i-2")
	for name := range a {
		if a[name] == b[name] || a[name] == "" {
			t.Errorf("two instances share %s: %q", name, a[name])
		}
	}
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		twentyMachines(t)
	}
}

// twentyMachines boots one image as ten pairs of instances.
func twentyMachines(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	shell(t, `/sbin/mke2fs -q -t ext4 -d "$1" "$2" 700M && rm -rf "$1"`, debian(t, "plain"), image)
	signer, pub := sshKey(t)
	machines := 2 * min(10, boots(t))
	seen := make(map[string]string)
	for n := range machines {
		id := fmt.Sprintf("i-%d", n)
		g := launch(t, nil, "--disk", image, "--ssh-key", pub, "--instance-id", id, "--accel", "tcg", "--memory", "768", "--scratch", t.TempDir())
		port, user := g.ready()
		c := login(t, port, user, signer)
		for _, command := range []string{"hostname", "cat /etc/machine-id", "cat /etc/ssh/ssh_host_ed25519_key.pub", "cat /etc/ssh/ssh_host_ecdsa_key.pub"} {
			got := remote(t, c, command)
			if before, ok := seen[got]; ok || got == "" {
				t.Errorf("%s of %s is that of %s: %q", command, id, before, got)
			}
			seen[got] = id
		}
		g.powerOff(c, "")
	}
	t.Logf("%d machines of one image: %d different names, machine-ids and host keys", machines, len(seen))
}
