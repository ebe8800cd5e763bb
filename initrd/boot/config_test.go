package boot

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

func TestParameters(t *testing.T) {
	for _, c := range []struct{ name, cmdline, want string }{
		{"foreign ones are left aside", "root=/dev/sda quiet ro xinstar.net=foo -- instar.foo", ""},
		{"quoted", `"instar.rootflags=a b" instar.keepnet`, ""},
		{"unknown", "instar.foo=1", "instar.foo is unknown"},
		{"no number", "instar.wait=soon", "not of its form"},
		{"net", "instar.net=token-ring", "not one of dhcp"},
		{"static without address", "instar.net=static", "instar.address"},
		{"address without length", "instar.net=static instar.address=10.0.0.1", "prefix length"},
		{"gateway", "instar.gateway=home", "instar.gateway"},
		{"dns", "instar.dns=1.1.1.1,x", "instar.dns"},
		{"metadata", "instar.metadata=file:///etc", "http or https URL"},
		{"init", "instar.init=init", "absolute path"},
		{"policy", "instar.fail=pray", "one of retry"},
		{"shell", "instar.fail=shell", "not built to allow"},
		{"step", "instar.stop=lunch", "not a step"},
		{"lazy", "instar.lazy", ""},
		{"lazy or not", "instar.lazy=lazy-or-eager", ""},
		{"lazy somehow", "instar.lazy=perhaps", "instar.lazy"},
		{"trace", "instar.trace=record", ""},
		{"trace somehow", "instar.trace=1", "not record"},
		{"patience", "instar.patience=0.5", "not of its form"},
		{"pause", "instar.pause=-1", "0 to 3600"},
	} {
		config, err := readConfig("/nonexistent", c.cmdline)
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			if c.name == "quoted" && (config.RootFlags != "a b" || !config.KeepNet) {
				t.Errorf("%s: %+v", c.name, config)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

func TestConfigFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "boot.json")
	for text, want := range map[string]string{
		`{"net":"ra","allowShell":true}`: "",
		`{"nett":"ra"}`:                  "unknown field",
		`{`:                              "unexpected EOF",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := readConfig(name, "instar.fail=shell instar.dns=9.9.9.9")
		if want == "" {
			if err != nil {
				t.Error(err)
			}
			wanted := Config{Net: "ra", AllowShell: true, Fail: Shell, DNS: "9.9.9.9"}.withDefaults()
			if diff := cmp.Diff(wanted, c); diff != "" {
				t.Error(diff)
			}
		} else if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestProbe makes filesystems with their own tools and recognises them.
func TestProbe(t *testing.T) {
	const id = "11111111-2222-3333-4444-555555555555"
	for _, c := range []struct {
		kind string
		argv []string
		size int64
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F", "-U", id, "-L", "lab"}, 16 << 20},
		{"ext3", []string{"mkfs.ext3", "-q", "-F", "-U", id, "-L", "lab"}, 16 << 20},
		{"ext2", []string{"mkfs.ext2", "-q", "-F", "-U", id, "-L", "lab"}, 16 << 20},
		{"xfs", []string{"mkfs.xfs", "-q", "-f", "-m", "uuid=" + id, "-L", "lab"}, 320 << 20},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f", "-U", id, "-L", "lab"}, 128 << 20},
		{"swap", []string{"mkswap", "-q", "-U", id, "-L", "lab"}, 16 << 20},
	} {
		disk := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(disk, c.size); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(c.argv[0], append(c.argv[1:], disk)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c.argv, err, out)
		}
		f, err := os.Open(disk)
		if err != nil {
			t.Fatal(err)
		}
		got, err := probe(f)
		f.Close()
		if want := (filesystem{c.kind, id, "lab"}); err != nil || got != want {
			t.Errorf("%s: %+v %v", c.kind, got, err)
		}
	}
}

func TestFindDevice(t *testing.T) {
	list := []device{
		{Name: "vda", Disk: true},
		{Name: "vda1", PartUUID: "ab-01", PartLabel: "boot", filesystem: filesystem{"ext4", "u-1", "root"}},
	}
	for spec, want := range map[string]string{
		"/dev/vda": "vda", "UUID=U-1": "vda1", "UUID=\"u-1\"": "vda1", "LABEL=root": "vda1", "PARTUUID=AB-01": "vda1", "PARTLABEL=boot": "vda1",
		"UUID=": "", "LABEL=": "", "LABEL=ROOT": "", "/dev/vdb": "", "ID=x": "", "": "",
	} {
		if d, ok := findDevice(list, spec); ok != (want != "") || d.Name != want {
			t.Errorf("%q: %q %v, want %q", spec, d.Name, ok, want)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[2Jb\nc\u009bd é"); got != "a?[2Jb?c?d é" {
		t.Errorf("%q", got)
	}
}

func FuzzParameters(f *testing.F) {
	f.Add("instar.net=dhcp quiet \"instar.rootflags=a b\"")
	f.Add("instar.")
	f.Fuzz(func(t *testing.T, s string) {
		var c Config
		if c.Parameters(s) == nil && c.AllowShell {
			t.Error("a kernel parameter allowed the shell")
		}
	})
}

func FuzzProbe(f *testing.F) {
	f.Add([]byte("XFSB"))
	f.Add(bytes.Repeat([]byte{0x53, 0xef}, 0x500))
	f.Fuzz(func(t *testing.T, b []byte) {
		fs, err := probe(bytes.NewReader(b))
		if err != nil || (fs.Kind == "" && fs.UUID != "") {
			t.Errorf("%+v %v", fs, err)
		}
	})
}

func FuzzReadLease(f *testing.F) {
	m, err := dhcpv4.New()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m.ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		if l, err := readLease(m); err == nil && (l.address.IP.IsUnspecified() || l.mtu != 0 && l.mtu < 576) {
			t.Errorf("lease %+v", l)
		}
	})
}

func TestNextCmdline(t *testing.T) {
	got := nextCmdline(`BOOT_IMAGE=/x console=ttyS0 root=/dev/nfs ro "dyndbg=file a +p" instar.root=ticket initrd=y init=/z quiet -- single instar.x`, "UUID=1", "net.ifnames=0 debug")
	if want := `console=ttyS0 ro "dyndbg=file a +p" quiet root=UUID=1 net.ifnames=0 debug`; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

func TestModuleOrder(t *testing.T) {
	dep := "kernel/a.ko.xz: kernel/b-c.ko.xz kernel/d.ko.xz\nkernel/b-c.ko.xz: kernel/d.ko.xz\nkernel/d.ko.xz:\nkernel/self.ko: kernel/self.ko\n/etc/passwd: \nkernel/lost.ko: kernel/gone.ko\n"
	got := strings.Join(moduleOrder(dep, []string{"a", "b_c", "none", "self", "passwd", "lost"}), " ")
	if want := "kernel/d.ko.xz kernel/b-c.ko.xz kernel/a.ko.xz kernel/self.ko kernel/lost.ko"; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

// TestUdevName finds an interface's name in what udevadm says.
func TestUdevName(t *testing.T) {
	const out = "This program is for debugging only\nACTION=add\nINTERFACE=eth0\nID_NET_NAME_PATH=enp0s2\nID_NET_NAME=ens2\nUSEC_INITIALIZED=1\n"
	for text, want := range map[string]string{out: "ens2", "": "", "ID_NET_NAME_SLOT=ens3\n": "", "  ID_NET_NAME=lan0": "lan0"} {
		if got := udevName(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// TestKeepConfiguration has a drop-in for every network file of a root.
func TestKeepConfiguration(t *testing.T) {
	root, run := t.TempDir(), t.TempDir()
	for _, name := range []string{"etc/systemd/network/10-all.network", "etc/systemd/network/10-all.link", "usr/lib/systemd/network/80-vm.network"} {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
		check(t, os.WriteFile(filepath.Join(root, name), nil, 0o644))
	}
	check(t, os.Symlink("/usr/lib", filepath.Join(root, "lib")))
	check(t, keepConfiguration(root, run))
	found, err := filepath.Glob(filepath.Join(run, "systemd/network/*.d/*.conf"))
	check(t, err)
	want := []string{filepath.Join(run, "systemd/network/10-all.network.d/50-instar.conf"), filepath.Join(run, "systemd/network/80-vm.network.d/50-instar.conf")}
	if !cmp.Equal(found, want) {
		t.Errorf("%q, want %q", found, want)
	}
	check(t, keepConfiguration(t.TempDir(), run)) // without networkd
}
