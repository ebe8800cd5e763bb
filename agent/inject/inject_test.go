package inject

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/agent/inject/journal"
)

// systemd makes the place look like an image with systemd and sshd.
func (p place) systemd() Options {
	p.dir("/lib/systemd", 0, 0o755)
	p.file("/lib/systemd/systemd", 0, 0o755, "")
	p.dir("/var/lib/dbus", 0, 0o755)
	p.file("/etc/machine-id", 0, 0o444, "captured\n")
	p.file("/var/lib/dbus/machine-id", 0, 0o444, "captured\n")
	p.file("/etc/ssh/ssh_host_rsa_key", 0, 0o600, "captured")
	p.file("/etc/ssh/ssh_host_ed25519_key.pub", 0, 0o600, "captured")
	program := filepath.Join(p.t.TempDir(), "init")
	must(p.t, os.WriteFile(program, []byte("program"), 0o755))
	return Options{Root: p.root, Run: filepath.Join(p.t.TempDir(), "run"), Program: program}
}

func (p place) read(name string) string {
	data, err := os.ReadFile(p.at(name))
	must(p.t, err)
	return string(data)
}

func TestApply(t *testing.T) {
	p := newPlace(t)
	o := p.systemd()
	var said []string
	o.Report = func(s string, _ bool) { said = append(said, s) }
	in := Instance{
		ID: "i-1", Hostname: "web-1.example.net", User: "alice", Keys: []string{testKey(1, "k")},
		UserData: []byte("#!/bin/sh\necho SECRET\n"), Facts: map[string]string{"ami-id": "ami-7"},
	}
	res, err := Apply(t.Context(), o, in)
	must(t, err)
	if !res.New || res.KeysAdded != 1 || res.CloudInit || len(res.HostKeys) != 2 {
		t.Errorf("result %+v", res)
	}
	if got := p.read("/etc/hostname"); got != "web-1.example.net\n" {
		t.Errorf("hostname %q", got)
	}
	if id := p.read("/etc/machine-id"); len(id) != 33 || id != p.read("/var/lib/dbus/machine-id") || id != res.MachineID+"\n" {
		t.Errorf("machine-id %q", id)
	}
	if _, err := os.Lstat(p.at("/etc/ssh/ssh_host_rsa_key")); err == nil {
		t.Error("the image's host key is still there")
	}
	for _, kind := range []string{"ed25519", "ecdsa"} {
		key, err := ssh.ParsePrivateKey([]byte(p.read("/etc/ssh/ssh_host_" + kind + "_key")))
		must(t, err)
		pub := p.read("/etc/ssh/ssh_host_" + kind + "_key.pub")
		if !strings.HasPrefix(pub, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key.PublicKey())))) {
			t.Errorf("%s: private and public key differ", kind)
		}
	}
	var facts map[string]string
	data, err := os.ReadFile(filepath.Join(o.Run, "instar/instance.json"))
	must(t, err)
	must(t, json.Unmarshal(data, &facts))
	if facts["instance-id"] != "i-1" || facts["ami-id"] != "ami-7" {
		t.Errorf("facts %v", facts)
	}
	unit := filepath.Join(o.Run, "systemd/system/multi-user.target.wants/instar-user-data.service")
	if data, err := os.ReadFile(unit); err != nil || !strings.Contains(string(data), "ExecStart=/run/instar/instar-init user-data\n") {
		t.Errorf("unit: %v", err)
	}
	if st, err := os.Stat(filepath.Join(o.Run, "instar/user-data")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("user data: %v %v", st.Mode(), err)
	}
	if strings.Contains(strings.Join(said, "\n"), "SECRET") {
		t.Error("user data was reported")
	}

	// A second boot of the same instance makes nothing anew.
	id, key := p.read("/etc/machine-id"), p.read("/etc/ssh/ssh_host_ed25519_key")
	res, err = Apply(t.Context(), o, in)
	must(t, err)
	if res.New || res.KeysAdded != 0 || p.read("/etc/machine-id") != id || p.read("/etc/ssh/ssh_host_ed25519_key") != key {
		t.Errorf("second boot: %+v", res)
	}
	// Another instance of it does.
	in.ID = "i-2"
	res, err = Apply(t.Context(), o, in)
	must(t, err)
	if !res.New || p.read("/etc/machine-id") == id || p.read("/etc/ssh/ssh_host_ed25519_key") == key {
		t.Errorf("second instance: %+v", res)
	}
}

func TestApplyAfterInterruption(t *testing.T) {
	p := newPlace(t)
	o := p.systemd()
	j, err := OpenJournal(p.root)
	must(t, err)
	must(t, j.Begin("i-1", identityStep))
	must(t, j.Close())
	res, err := Apply(t.Context(), o, Instance{ID: "i-1"})
	must(t, err)
	if !res.New || p.read("/etc/machine-id") == "captured\n" {
		t.Errorf("identity was not made again: %+v", res)
	}
}

func TestApplyBadParts(t *testing.T) {
	for _, c := range []struct {
		name, want string
		in         Instance
		setup      func(p place)
	}{
		{"no id", "empty", Instance{}, nil},
		{"id is a path", "character", Instance{ID: "../x"}, nil},
		{"hostname with a line break", "host name", Instance{ID: "i-1", Hostname: "a\nb"}, nil},
		{"key with a line break", "line break", Instance{ID: "i-1", Keys: []string{testKey(1, "a\nb")}}, nil},
		{"key with a command", "option", Instance{ID: "i-1", Keys: []string{`command="id" ` + testKey(1, "a")}}, nil},
		{"key that is none", "not an SSH public key", Instance{ID: "i-1", Keys: []string{"ssh-rsa AAAA"}}, nil},
		{"user unknown", "not in /etc/passwd", Instance{ID: "i-1", User: "nobody", Keys: []string{testKey(1, "a")}}, nil},
		{"no systemd", "neither cloud-init nor systemd", Instance{ID: "i-1", UserData: []byte("x")}, func(p place) { os.Remove(p.at("/lib/systemd/systemd")) }},
		{"journal directory of another", "others than root", Instance{ID: "i-1"}, func(p place) { p.dir("/var/lib/instar", bob, 0o755) }},
		{"journal is a link", "too many levels", Instance{ID: "i-1"}, func(p place) {
			p.dir("/var/lib/instar", 0, 0o700)
			p.link("/etc/shadow", "/var/lib/instar/journal", 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			o := p.systemd()
			if c.setup != nil {
				c.setup(p)
			}
			shadow := p.read("/etc/shadow")
			_, err := Apply(t.Context(), o, c.in)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if p.read("/etc/shadow") != shadow {
				t.Error("shadow changed")
			}
		})
	}
}

func TestHostKeysNamedByConfiguration(t *testing.T) {
	p := newPlace(t)
	o := p.systemd()
	p.sshd("HostKey /etc/ssh/ssh_host_ed25519_key\nHostKey /etc/ssh/ssh_host_dsa_key\n")
	res, err := Apply(t.Context(), o, Instance{ID: "i-1"})
	must(t, err)
	if len(res.HostKeys) != 1 || !strings.HasPrefix(res.HostKeys[0], "ssh-ed25519 ") {
		t.Errorf("host keys %q", res.HostKeys)
	}
}

// TestHostKeysThatCannotBeMade leave the image's in place: without any, sshd
// would not start.
func TestHostKeysThatCannotBeMade(t *testing.T) {
	for _, c := range []struct{ name, config string }{
		{"a configuration that includes itself", "Include /etc/ssh/sshd_config\n"},
		{"a directory that is not there", "HostKey /etc/none/ssh_host_ed25519_key\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			o := p.systemd()
			p.sshd(c.config)
			if _, err := Apply(t.Context(), o, Instance{ID: "i-1"}); err == nil {
				t.Error("no error")
			}
			if p.read("/etc/ssh/ssh_host_rsa_key") != "captured" || p.read("/etc/ssh/ssh_host_ed25519_key.pub") != "captured" {
				t.Error("the image's host keys are gone, and there are no others")
			}
			p.sshd("")
			res, err := Apply(t.Context(), o, Instance{ID: "i-1"})
			must(t, err)
			if _, err := os.Lstat(p.at("/etc/ssh/ssh_host_rsa_key")); err == nil || len(res.HostKeys) != 2 {
				t.Errorf("made again, the image's keys are still there, or %q", res.HostKeys)
			}
		})
	}
}

func TestCloudInitStaysInCharge(t *testing.T) {
	p := newPlace(t)
	o := p.systemd()
	p.dir("/usr/bin", 0, 0o755)
	p.dir("/lib/systemd/system", 0, 0o755)
	p.file("/usr/bin/cloud-init", 0, 0o755, "")
	p.file("/lib/systemd/system/cloud-init.service", 0, 0o644, "")
	in := Instance{ID: "i-1", Hostname: "h", User: "admin", Keys: []string{testKey(1, "k")}, UserData: []byte("#cloud-config\n")}
	res, err := Apply(t.Context(), o, in)
	must(t, err)
	if !res.CloudInit || res.KeysAdded != 0 {
		t.Errorf("result %+v", res)
	}
	if _, err := os.Lstat(p.at("/etc/hostname")); err == nil {
		t.Error("the hostname was set beside cloud-init")
	}
	var meta struct {
		ID   string   `yaml:"instance-id"`
		Host string   `yaml:"local-hostname"`
		Keys []string `yaml:"public-keys"`
	}
	for name, v := range map[string]any{"instar/seed/meta-data": &meta, "cloud-init/cloud.cfg": &map[string]any{}} {
		data, err := os.ReadFile(filepath.Join(o.Run, name))
		must(t, err)
		must(t, yaml.Unmarshal(data, v))
	}
	if meta.ID != "i-1" || meta.Host != "h" || len(meta.Keys) != 1 {
		t.Errorf("seed %+v", meta)
	}
	if data, err := os.ReadFile(filepath.Join(o.Run, "instar/seed/user-data")); err != nil || string(data) != "#cloud-config\n" {
		t.Errorf("user data %q %v", data, err)
	}
	view, err := ReadJournal(p.root)
	must(t, err)
	if !slices.ContainsFunc(view.Last("i-1"), func(r journal.Record) bool {
		return r.Step == string(StepUserData) && r.State == journal.Finished && r.Note == CloudInitNote
	}) {
		t.Errorf("the journal does not say that cloud-init had the user data: %+v", view.Last("i-1"))
	}
	// Disabled, it is not in charge.
	p.dir("/etc/cloud", 0, 0o755)
	p.file("/etc/cloud/cloud-init.disabled", 0, 0o644, "")
	res, err = Apply(t.Context(), o, Instance{ID: "i-1"})
	must(t, err)
	if res.CloudInit {
		t.Error("cloud-init is disabled, yet in charge")
	}
}

func TestSettleFstab(t *testing.T) {
	present := func(spec string) bool { return spec == "UUID=here" || spec == "/dev/vda1" }
	for _, c := range []struct{ name, in, root, want string }{
		{"all there", "UUID=here / ext4 defaults 0 1\n/dev/vda1 /boot vfat umask=077 0 1\n", "UUID=r", ""},
		{"home absent", "UUID=gone /home ext4 defaults 0 2\n", "", "UUID=gone /home ext4 defaults,nofail,x-systemd.device-timeout=5s 0 0\n"},
		{"swap absent", "UUID=gone none swap sw 0 0\n", "", "UUID=gone none swap sw,nofail,x-systemd.device-timeout=5s 0 0\n"},
		{"nofail already", "UUID=gone /home ext4 nofail 0 2\n", "", ""},
		{"short line", "LABEL=gone /srv xfs\n", "", "LABEL=gone /srv xfs defaults,nofail,x-systemd.device-timeout=5s 0 0\n"},
		{"root absent", "# x\nUUID=gone / ext4 errors=remount-ro 0 1\n", "UUID=new", "# x\nUUID=new / ext4 errors=remount-ro 0 1\n"},
		{"root absent, nothing to name", "UUID=gone / ext4 defaults 0 1\n", "", ""},
		{"no device needed", "tmpfs /tmp tmpfs size=1g 0 0\nproc /proc proc defaults 0 0\nsrv:/x /x nfs defaults 0 0\n/swapfile none swap sw 0 0\n", "", ""},
		{"comments and rubbish kept", "# UUID=gone /home ext4 defaults 0 2\n\nrubbish\nPARTUUID=g /a ext4 ro 0 2", "", "# UUID=gone /home ext4 defaults 0 2\n\nrubbish\nPARTUUID=g /a ext4 ro,nofail,x-systemd.device-timeout=5s 0 0\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			p.file("/etc/fstab", 0, 0o644, c.in)
			want := c.want
			if want == "" {
				want = c.in
			}
			o := Options{Root: p.root, Present: present, RootSpec: c.root}
			reported := 0
			o.Report = func(s string, warn bool) {
				if warn {
					reported++
				}
			}
			_, err := Apply(t.Context(), o, Instance{ID: "i-1"})
			must(t, err)
			if got := p.read("/etc/fstab"); got != want {
				t.Errorf("fstab is\n%s\nwant\n%s", got, want)
			}
			if (reported > 0) != (c.want != "") {
				t.Errorf("%d changes reported", reported)
			}
		})
	}
}

func TestApplyCancelled(t *testing.T) {
	p := newPlace(t)
	o := p.systemd()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Apply(ctx, o, Instance{ID: "i-1"}); err == nil {
		t.Error("no error")
	}
	if p.read("/etc/machine-id") != "captured\n" {
		t.Error("something was done after cancellation")
	}
}

func FuzzSettle(f *testing.F) {
	f.Add("UUID=gone /home ext4 defaults 0 2\n")
	f.Add("a b c d e f g\nUUID= / \x00")
	f.Fuzz(func(t *testing.T, text string) {
		once, _ := settle(text, func(string) bool { return false }, "UUID=r")
		// Root's entry names UUID=r now, whose device is there.
		twice, changes := settle(once, func(s string) bool { return s == "UUID=r" }, "UUID=r")
		if twice != once {
			t.Errorf("not settled after one pass: %q, then %q (%q)", once, twice, changes)
		}
	})
}

func FuzzCheckKey(f *testing.F) {
	f.Add(testKey(1, "c"))
	f.Add("ssh-ed25519 AAAA\nssh-rsa BBBB")
	f.Fuzz(func(t *testing.T, line string) {
		if CheckKey(line, false) == nil && (strings.ContainsAny(line, "\n\r\x00") || keyOf(line) == "") {
			t.Errorf("accepted %q", line)
		}
	})
}

func FuzzSSHDLine(f *testing.F) {
	f.Add(`AuthorizedKeysFile "a b" c # d`)
	f.Add(`x="`)
	f.Add("=0")
	f.Fuzz(func(t *testing.T, line string) {
		key, args := splitSSHDLine(line)
		if strings.ContainsAny(key, " \t=") || (key == "" && len(args) > 0) {
			t.Errorf("%q gives %q %q", line, key, args)
		}
	})
}
