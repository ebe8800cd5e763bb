package userdata

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-image/instar/agent/inject/journal"
)

func TestConfig(t *testing.T) {
	o, ran := newOptions(t)
	err := Run(t.Context(), o, []byte(`#cloud-config
runcmd:
  - echo hello
  - [ touch, "a b", "it's" ]
bootcmd: [ "true" ]
hostname: web-1
timezone: Europe/Rome
write_files:
  - { path: /etc/new/file, content: aGVsbG8=, encoding: b64, permissions: '0600', owner: 'www:www' }
  - { path: /etc/new/file, content: " world", append: true, permissions: '0600' }
groups: [ staff2, { ops: [ root ] } ]
users:
  - default
  - { name: eve, groups: "wheel, adm", shell: /bin/bash, sudo: "ALL=(ALL) NOPASSWD:ALL", passwd: $6$x$y }
ssh_authorized_keys: [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c k" ]
packages: [ nginx ]
mounts:
  - [ sdb, /data, ext4 ]
`))
	must(t, err)
	want := []string{
		"/bin/sh -s <<true\n",
		"chown -h -- www:www /etc/new/file",
		"hostname web-1",
		"mount -- /data",
		"groupadd staff2", "groupadd ops", "usermod -a -G ops root",
		"useradd --shell /bin/bash --groups wheel,adm --create-home -- eve",
		"chpasswd -e <<eve:$6$x$y\n", "usermod -L eve",
		"env DEBIAN_FRONTEND=noninteractive apt-get -q update",
		"env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Options::=--force-confold install -- nginx",
		"/bin/sh -s <<echo hello\n'touch' 'a b' 'it'\\''s'\n",
	}
	if diff := cmp.Diff(want, *ran); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]string{
		"etc/new/file": "hello world", "etc/hostname": "web-1\n", "etc/sudoers.d/instar-eve": "eve ALL=(ALL) NOPASSWD:ALL\n",
		"etc/fstab":                 "/dev/sdb\t/data\text4\tdefaults,nofail\t0\t2\n",
		"root/.ssh/authorized_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c k\n",
	} {
		got, err := os.ReadFile(filepath.Join(o.Root, name))
		if err != nil || string(got) != want {
			t.Errorf("%s is %q (%v), want %q", name, got, err, want)
		}
	}
	if target, _ := os.Readlink(filepath.Join(o.Root, "etc/localtime")); target != "/usr/share/zoneinfo/Europe/Rome" {
		t.Errorf("localtime leads to %q", target)
	}
}

func TestConfigRefusals(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"unknown keys", "ntp: {}\napt: {}\nruncmd: [ SECRET ]", "keys that need cloud-init in the image: apt, ntp"},
		{"not YAML", "a: [ SECRET", "not valid YAML"},
		{"not a map", "- SECRET", "not a map"},
		{"key twice", "runcmd: []\nruncmd: [ SECRET ]", "twice"},
		{"runcmd is no list", "runcmd: { SECRET: x }", "not of the form"},
		{"hostname is no name", "hostname: 'a b'", "host name"},
		{"time zone is a path", "timezone: ../../../etc/passwd", "no such time zone"},
		{"time zone absent", "timezone: Mars/Olympus", "no such time zone"},
		{"file relative", "write_files: [ { path: etc/x, content: SECRET } ]", "not absolute"},
		{"file encoding", "write_files: [ { path: /etc/x, content: SECRET, encoding: rot13 } ]", "rot13"},
		{"file permissions", "write_files: [ { path: /etc/x, content: SECRET, permissions: rw } ]", "octal"},
		{"file not base64", "write_files: [ { path: /etc/x, content: SECRET!, encoding: b64 } ]", "not base64"},
		{"user key unknown", "users: [ { name: eve, doas: SECRET } ]", "keys doas"},
		{"user without name", "users: [ { gecos: x } ]", "no usable name"},
		{"user with colon", "users: [ { name: 'a:0:0' } ]", "no usable name"},
		{"user with clear password", "users: [ { name: eve, passwd: SECRET } ]", "crypt(5)"},
		{"sudo with line break", "users: [ { name: eve, sudo: \"a\\nb\" } ]", "line break"},
		{"package is an option", "packages: [ --allow-downgrades ]", "plain name"},
		{"mount with blanks", "mounts: [ [ 'a b', /x ] ]", "unusable field"},
		{"key is none", "ssh_authorized_keys: [ SECRET ]", "not an SSH public key"},
		{"alias bomb", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\nruncmd: [*f,*f,*f]", "form"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o, _ := newOptions(t)
			var said []string
			o.Report = func(s string) { said = append(said, s) }
			err := Run(t.Context(), o, []byte("#cloud-config\n"+c.in+"\n"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
			lines, err2 := os.ReadFile(filepath.Join(o.Root, "var/lib/instar/journal"))
			must(t, err2)
			if all := err.Error() + strings.Join(said, "") + string(lines); strings.Contains(all, "SECRET") {
				t.Errorf("told: %s", all)
			}
			if o.Journal.State("i-1", Step) != journal.Failed {
				t.Errorf("journal says %q", o.Journal.State("i-1", Step))
			}
		})
	}
}

func FuzzConfigMap(f *testing.F) {
	f.Add([]byte("#cloud-config\nruncmd: [a]\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, err := configMap(data)
		if err == nil && slices.Contains(slices.Collect(func(y func(bool) bool) {
			for _, v := range keys {
				if !y(v == nil) {
					return
				}
			}
		}), true) {
			t.Error("a key without a value")
		}
	})
}
