package rootfs

import (
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
)

// machines are mount tables as machines have them.
var machines = map[string]string{
	"cloud": `25 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard
26 25 0:22 / /proc rw shared:2 - proc proc rw
27 25 0:23 / /sys rw shared:3 - sysfs sysfs rw
28 25 254:15 / /boot/efi rw shared:4 - vfat /dev/vda15 rw
29 25 7:1 / /snap/core/1 ro shared:5 - squashfs /dev/loop1 ro
30 25 0:40 / /home rw shared:6 - nfs4 srv:/home rw
31 25 254:1 /var/lib/docker /data/docker rw shared:1 - ext4 /dev/vda1 rw
32 25 0:50 / /var/lib/docker/overlay2/x/merged rw - overlay overlay rw
33 25 254:1 /tmp/stage /srv/stage rw shared:1 - ext4 /dev/vda1 rw
`,
	"opensuse": `40 1 0:30 /@/.snapshots/1/snapshot / rw - btrfs /dev/sda2 rw,subvol=/@/.snapshots/1/snapshot
41 40 0:30 /@/.snapshots /.snapshots rw - btrfs /dev/sda2 rw,subvol=/@/.snapshots
42 40 0:30 /@/home /home rw - btrfs /dev/sda2 rw,subvol=/@/home
43 40 0:30 /@/var /var rw - btrfs /dev/sda2 rw,subvol=/@/var
44 40 0:30 / /srv/top rw - btrfs /dev/sda2 rw,subvol=/
45 40 0:31 /@/x /srv/x rw - btrfs /dev/sdb rw,subvol=/@/x
46 40 0:31 / /srv/pool rw - btrfs /dev/sdb rw,subvol=/
`,
	"zfs": `50 1 0:60 / / rw - zfs rpool/ROOT rw
51 50 0:61 / /home rw - zfs rpool/home rw
52 50 0:62 / /scratch rw - tmpfs tmpfs rw
53 50 8:17 / /home rw - ext4 /dev/sdb1 rw
54 50 0:60 /opt/app /opt/app rw - zfs rpool/ROOT rw
55 50 0:60 /srv/a /srv/b rw - zfs rpool/ROOT rw
56 50 8:18 / /srv/a rw - ext4 /dev/sdb2 rw
`,
}

func table(t testing.TB, text, volume string, all bool, out ...string) *mountTable {
	infos, err := mountinfo.GetMountsFromReader(strings.NewReader(text), nil)
	if err != nil {
		return nil // not a mount table
	}
	m, err := newMountTable(infos, volume, 0, all, func(p string) bool {
		for _, o := range out {
			if _, ok := beneath(o, p); ok {
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil
	}
	return m
}

func TestMountTables(t *testing.T) {
	for _, c := range []struct {
		machine, volume string
		all             bool
		out             []string
		used, unused    string
	}{
		{machine: "cloud", volume: "/", out: []string{"tmp"}, used: ". boot/efi srv/stage", unused: "proc sys snap/core/1 home data/docker var/lib/docker/overlay2/x/merged"},
		{machine: "cloud", volume: "/", all: true, out: []string{"tmp"}, used: ". boot/efi srv/stage snap/core/1 home var/lib/docker/overlay2/x/merged", unused: "proc sys data/docker"},
		{machine: "cloud", volume: "/", out: []string{"var/lib/docker"}, used: ". data/docker", unused: "srv/stage"},
		{machine: "cloud", volume: "/data", used: ". docker"},
		{machine: "opensuse", volume: "/", used: ". home var srv/x srv/pool", unused: ".snapshots srv/top"},
		{machine: "zfs", volume: "/", used: ". home opt/app srv/a srv/b", unused: "scratch"},
	} {
		m := table(t, machines[c.machine], c.volume, c.all, c.out...)
		for _, x := range []struct {
			paths string
			use   bool
		}{{c.used, true}, {c.unused, false}} {
			for p := range strings.FieldsSeq(x.paths) {
				if got := m.byPath[p]; got == nil || got.use != x.use || !got.use && (got.class == "" || got.why == "") {
					t.Errorf("%s %s %v: %s is %+v", c.machine, c.volume, c.all, p, got)
				}
			}
		}
	}
	if table(t, machines["cloud"], "/proc", false) != nil {
		t.Errorf("/proc is accepted as a volume")
	}
	if table(t, "", "/", false) != nil {
		t.Errorf("an empty mount table is accepted")
	}
}

func FuzzMountTable(f *testing.F) {
	for _, text := range machines {
		f.Add(text, "/")
		f.Add(text, "/home")
	}
	f.Add("1 1 0:1 /../x / rw - ext4 a rw\n2 1 0:1 //deleted /a\\040b rw - ext4 a rw\n", "/a b")
	f.Fuzz(func(t *testing.T, text, volume string) {
		if !strings.HasPrefix(volume, "/") {
			return
		}
		m := table(t, text, volume, true)
		if m == nil {
			return
		}
		for _, x := range m.all {
			if x.use == (x.why != "") || x.path == "" || strings.HasPrefix(x.path, "/") {
				t.Errorf("%q in %q: %+v", x.path, volume, x)
			}
		}
	})
}
