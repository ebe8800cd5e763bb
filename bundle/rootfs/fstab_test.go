package rootfs

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func plan() fstabPlan {
	return fstabPlan{root: "UUID=1111", rootType: "ext4", label: "cloudimg-rootfs", captured: func(t string) bool { return t == "home" || t == "boot/efi" || t == "a b" }}
}

func TestRewriteFstab(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"comments stay":         {"# a\n\n   # b\n", ""},
		"root as it should be":  {"UUID=1111 / ext4 defaults,noatime 0 1\n", ""},
		"root upper case":       {"uuid=1111 / ext4 defaults 0 1\n", ""},
		"root by label":         {"LABEL=cloudimg-rootfs / ext4 discard,errors=remount-ro 0 1\n", ""},
		"root by device":        {"/dev/vda1 / ext4 defaults 0 1\n", "UUID=1111\t/\text4\tdefaults\t0\t1\n"},
		"root by other label":   {"LABEL=x / ext4 defaults 0 1\n", "UUID=1111\t/\text4\tdefaults\t0\t1\n"},
		"root on ext3":          {"UUID=1111 / ext3 defaults,data=ordered 0 1\n", "UUID=1111\t/\text4\tdefaults,data=ordered\t0\t1\n"},
		"root on xfs":           {"UUID=1111 / xfs rw,noatime,inode64,logbufs=8,prjquota,x-systemd.growfs 0 0\n", "UUID=1111\t/\text4\trw,noatime,x-systemd.growfs\t0\t1\n"},
		"root on btrfs":         {"UUID=1111 / btrfs subvol=/@,compress=zstd:1 0 0\n", "UUID=1111\t/\text4\tdefaults\t0\t1\n"},
		"root, type auto":       {"UUID=1111 / auto defaults 0 1\n", ""},
		"root, short":           {"/dev/sda1 /\n", "UUID=1111\t/\tauto\tdefaults\n"},
		"captured mount":        {"UUID=2222 /home ext4 defaults 0 2\n", marker + "UUID=2222 /home ext4 defaults 0 2\n"},
		"captured, nofail":      {"UUID=2222 /home ext4 nofail 0 2\n", marker + "UUID=2222 /home ext4 nofail 0 2\n"},
		"captured, escaped":     {"UUID=2222 /a\\040b ext4 nofail 0 2\n", marker + "UUID=2222 /a\\040b ext4 nofail 0 2\n"},
		"captured subvolume":    {"UUID=1111 /home btrfs subvol=@home 0 0\n", marker + "UUID=1111 /home btrfs subvol=@home 0 0\n"},
		"efi":                   {"LABEL=UEFI /boot/efi vfat umask=0077 0 1\n", marker + "LABEL=UEFI /boot/efi vfat umask=0077 0 1\n"},
		"other disk":            {"/dev/sdb1 /data xfs defaults 0 2\n", marker + "/dev/sdb1 /data xfs defaults 0 2\n"},
		"other disk, nofail":    {"/dev/sdb1 /data xfs defaults,nofail 0 2\n", ""},
		"noauto":                {"/dev/cdrom /cd iso9660 ro,noauto 0 0\n", ""},
		"swap":                  {"/dev/sda3 none swap sw 0 0\n", marker + "/dev/sda3 none swap sw 0 0\n"},
		"swap file":             {"/swapfile swap swap defaults 0 0", marker + "/swapfile swap swap defaults 0 0"},
		"nfs":                   {"srv:/x /net/x nfs4 rw,hard 0 0\n", "srv:/x\t/net/x\tnfs4\trw,hard,nofail\t0\t0\n"},
		"netdev":                {"/dev/sdz /net/y ext4 _netdev 0 0\n", "/dev/sdz\t/net/y\text4\t_netdev,nofail\t0\t0\n"},
		"pseudo":                {"proc /proc proc defaults 0 0\ntmpfs /tmp tmpfs size=1g 0 0\n/srv/a /srv/b none bind 0 0\n", ""},
		"last line, no newline": {"# x\n/dev/sdb1 /data xfs defaults 0 2", "# x\n" + marker + "/dev/sdb1 /data xfs defaults 0 2"},
		"windows line end":      {"/dev/sdb1 /data xfs defaults 0 2\r\n", marker + "/dev/sdb1 /data xfs defaults 0 2\r\n"},
		"nonsense stays":        {"nonsense\n", ""},
	} {
		want := c.want
		if want == "" {
			want = c.in
		}
		got, changes := rewriteFstab(c.in, plan())
		if got != want {
			t.Errorf("%s: %s", name, cmp.Diff(want, got))
		}
		if (len(changes) > 0) != (got != c.in) {
			t.Errorf("%s: %d changes reported", name, len(changes))
		}
		if again, changes := rewriteFstab(got, plan()); again != got || len(changes) != 0 {
			t.Errorf("%s: rewriting twice gives %q", name, again)
		}
	}
}

func TestRewriteCrypttab(t *testing.T) {
	got, changes := rewriteCrypttab("# c\nroot UUID=1 none luks\nold UUID=2 none luks,nofail\n")
	if want := "# c\n" + marker + "root UUID=1 none luks\nold UUID=2 none luks,nofail\n"; got != want || len(changes) != 1 || changes[0].Line != 2 {
		t.Errorf("%q, %+v", got, changes)
	}
}

func TestGenerateFstab(t *testing.T) {
	for kind, want := range map[FstabKind]string{FstabModern: "/dev/sdb\t/mnt", FstabLegacy: "/dev/sda3\tswap\tswap"} {
		got := generateFstab(kind, plan())
		if !strings.HasPrefix(got, "UUID=1111\t/\text4\tdefaults\t1 1\n") || !strings.Contains(got, want) {
			t.Errorf("%s: %s", kind, got)
		}
		for line := range strings.Lines(got) {
			if strings.HasPrefix(line, "/dev/") && !strings.Contains(line, "nofail") {
				t.Errorf("%s: %q stops a boot without the device", kind, line)
			}
		}
	}
}

func FuzzFstab(f *testing.F) {
	for _, s := range []string{"UUID=1 / ext4 defaults 0 1\n", "a\\040b /x\\134 nfs", "\\", "\x00 / \xff", "/dev/sda1 / xfs ,,, 0 0\r\n", "x / btrfs subvol=@ 0 0 0 0 0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, changes := rewriteFstab(s, plan())
		if strings.Count(got, "\n") != strings.Count(s, "\n") {
			t.Errorf("%q became %q: another number of lines", s, got)
		}
		if len(changes) == 0 && got != s {
			t.Errorf("%q became %q unreported", s, got)
		}
		if again, _ := rewriteFstab(got, plan()); again != got {
			t.Errorf("%q, then %q", got, again)
		}
		if u := unescape(escape(s)); u != unescape(s) && !strings.Contains(s, `\`) {
			t.Errorf("escaping %q and back gives %q", s, u)
		}
		rewriteCrypttab(s)
		swapFiles(s)
	})
}

func FuzzSuperblock(f *testing.F) {
	for off, magic := range map[int]string{0: "XFSB", 0x10040: "_BHRfS_M", 0x438: "\x53\xef", 0x400: "\x10\x20\xf5\xf2"} {
		b := make([]byte, superblockHead)
		copy(b[off:], magic)
		f.Add(b)
		f.Add(b[:off+len(magic)])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		typ, label, uuid := parseSuperblock(b)
		if typ == "" && (label != "" || uuid != [16]byte{}) || strings.Contains(label, "\x00") {
			t.Errorf("%q %q %x", typ, label, uuid)
		}
	})
}

func FuzzPattern(f *testing.F) {
	for _, s := range [][2]string{{"/a/*/b", "a/x/b"}, {"**/x", "a/b/x"}, {"*.log", "a/b.log"}, {"/a/**/b/**", "a/b"}, {"[", "["}, {"/a\\*", "a*"}, {"a//b/", "a/b"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pat, rel string) {
		p, err := parsePattern(pat)
		if err != nil || rel == "" || strings.Count(pat, "**") > 5 || len(rel) > 1000 {
			return
		}
		// What a pattern stands for it also leads to, from every directory above.
		if !p.anywhere && p.match(rel) {
			for i := range rel {
				if rel[i] == '/' && i > 0 && !p.leads(rel[:i]) {
					t.Errorf("%q matches %q but does not lead there from %q", pat, rel, rel[:i])
				}
			}
		}
	})
}

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		pat, rel string
		want     bool
	}{
		{"/a/b", "a/b", true},
		{"a/b", "a/b", true},
		{"a/b/", "a/b", true},
		{"/a", "x/a", false},
		{"a", "x/a", true},
		{"*.x", "d/e.x", true},
		{"/*.x", "d/e.x", false},
		{"/a/*", "a/b/c", false},
		{"/a/**", "a/b/c", true},
		{"/a/**/c", "a/c", true},
		{"/a/**/c", "a/b/b/c", true},
		{"**/.ssh/id_*", "root/.ssh/id_x", true},
		{"**/.ssh/id_*", ".ssh/id_x", true},
		{"/a/[bc]?", "a/bx", true},
		{"/a/[bc]?", "a/dx", false},
		{`/a\*`, "a*", true},
		{`/a\*`, "ab", false},
	} {
		p, err := parsePattern(c.pat)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.match(c.rel); got != c.want {
			t.Errorf("%q matches %q: %v", c.pat, c.rel, got)
		}
	}
}
