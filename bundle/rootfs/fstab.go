package rootfs

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// FstabKind says what becomes of etc/fstab.
type FstabKind string

// The kinds of etc/fstab in an image.
const (
	FstabKeep   FstabKind = ""       // the volume's, what would stop a boot neutralised
	FstabModern FstabKind = "modern" // generated
	FstabLegacy FstabKind = "legacy" // generated, with the disks of the first 32 bit instances
)

// FstabChange is a line of etc/fstab or etc/crypttab that reads differently
// in the image.
type FstabChange struct {
	File          string // "etc/fstab"
	Line          int    // counted from 1
	Before, After string
	Why           string
}

// marker begins the lines that an image has in place of those left out.
const marker = "# instar: not in this image: "

// fstabPlan is what decides about an fstab line.
type fstabPlan struct {
	root     string                   // what the root line's first field shall be; "" to keep it
	rootType string                   // type of the image's filesystem
	label    string                   // label that the image keeps
	captured func(target string) bool // the mount at target went into the image
}

var (
	networkTypes = []string{
		"nfs", "nfs4", "cifs", "smb3", "smbfs", "glusterfs", "fuse.glusterfs", "ceph", "fuse.ceph", "9p", "virtiofs", "fuse.sshfs", "sshfs",
		"fuse.s3fs", "s3fs", "davfs", "afs", "lustre", "beegfs", "efs", "ocfs2", "gfs2", "fuse.rclone", "rclone", "fuse.gcsfuse", "gcsfuse",
	}
	// No device has to be there for these.
	deviceless = []string{
		"proc", "sysfs", "tmpfs", "ramfs", "devpts", "devtmpfs", "debugfs", "tracefs", "securityfs", "efivarfs", "cgroup", "cgroup2", "hugetlbfs",
		"mqueue", "binfmt_misc", "configfs", "fusectl", "pstore", "bpf", "overlay", "aufs", "autofs", "rpc_pipefs", "nfsd", "none", "bind",
	}
	// Options that mean the same on every filesystem: the ones kept when the
	// root was on another one than the image's.
	genericOptions = []string{
		"defaults", "rw", "ro", "atime", "noatime", "relatime", "norelatime", "strictatime", "nodiratime", "diratime", "lazytime", "nolazytime", "auto",
		"noauto", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "async", "dirsync", "iversion", "noiversion", "mand", "nomand", "user",
		"nouser", "users", "owner", "group", "nofail", "discard", "nodiscard", "acl", "noacl", "errors=remount-ro",
	}
)

// rewriteFstab neutralises what would stop a machine made from the image.
func rewriteFstab(text string, p fstabPlan) (string, []FstabChange) {
	return rewriteLines("etc/fstab", text, func(line string) (string, string) {
		f := strings.Fields(line)
		if len(f) < 2 {
			return line, ""
		}
		for len(f) < 4 {
			f = append(f, map[int]string{2: "auto", 3: "defaults"}[len(f)])
		}
		spec, target, typ, opts := unescape(f[0]), path.Clean(unescape(f[1])), f[2], strings.Split(f[3], ",")
		has := func(o ...string) bool {
			return slices.ContainsFunc(opts, func(s string) bool { return slices.Contains(o, s) })
		}
		switch {
		case target == "/":
			return p.rootLine(line, f, opts)
		case p.captured(strings.TrimPrefix(target, "/")):
			return marker + line, "its files are part of the image's root"
		case has("noauto", "nofail"):
			return line, ""
		case typ == "swap" || f[1] == "swap" || f[1] == "none" && typ == "swap":
			return marker + line, "swap space is not captured"
		case slices.Contains(deviceless, typ), has("bind", "rbind"), spec == "none", spec == "tmpfs", spec == "proc":
			return line, ""
		case slices.Contains(networkTypes, typ), has("_netdev"):
			f[3] += ",nofail"
			return strings.Join(f, "\t"), "a server that does not answer must not stop the boot"
		}
		return marker + line, "the device will not be there"
	})
}

// rootLine makes the root's line fit the image's filesystem.
func (p *fstabPlan) rootLine(line string, f, opts []string) (string, string) {
	var why []string
	spec := unescape(f[0])
	same := strings.EqualFold(spec, p.root) || p.label != "" && (spec == "LABEL="+p.label || spec == `LABEL="`+p.label+`"`)
	if p.root != "" && !same {
		f[0] = escape(p.root)
		why = append(why, "names the image's filesystem")
	}
	ext := strings.HasPrefix(p.rootType, "ext")
	foreign := f[2] != p.rootType && !(ext && strings.HasPrefix(f[2], "ext"))
	kept := slices.DeleteFunc(slices.Clone(opts), func(o string) bool {
		if foreign {
			return !slices.Contains(genericOptions, o) && !strings.HasPrefix(o, "x-") && !strings.HasPrefix(o, "comment=")
		}
		// A mount fails where the filesystem was made without the feature.
		return o == "prjquota" || o == "pquota" || o == "usrjquota" || strings.HasPrefix(o, "usrjquota=") || strings.HasPrefix(o, "journal_")
	})
	if len(kept) != len(opts) {
		if len(kept) == 0 {
			kept = []string{"defaults"}
		}
		f[3] = strings.Join(kept, ",")
		why = append(why, "drops options that "+p.rootType+" does not have")
	}
	if f[2] != p.rootType && f[2] != "auto" {
		why = append(why, fmt.Sprintf("%s becomes %s", f[2], p.rootType))
		f[2] = p.rootType
		if len(f) == 6 && f[5] == "0" && ext {
			f[5] = "1"
		}
	}
	if len(why) == 0 {
		return line, ""
	}
	return strings.Join(f, "\t"), strings.Join(why, "; ")
}

// rewriteCrypttab takes out the devices that will not be there: the image is
// not encrypted.
func rewriteCrypttab(text string) (string, []FstabChange) {
	return rewriteLines("etc/crypttab", text, func(line string) (string, string) {
		f := strings.Fields(line)
		if len(f) < 2 || len(f) > 3 && slices.ContainsFunc(strings.Split(f[3], ","), func(o string) bool { return o == "noauto" || o == "nofail" }) {
			return line, ""
		}
		return marker + line, "the device will not be there"
	})
}

// rewriteLines applies f to every line that is neither empty nor a comment.
func rewriteLines(file, text string, f func(string) (string, string)) (string, []FstabChange) {
	var out strings.Builder
	var changes []FstabChange
	n := 0
	for line := range strings.Lines(text) {
		n++
		body, end := strings.TrimRight(line, "\r\n"), ""
		end = line[len(body):]
		if t := strings.TrimSpace(body); t != "" && t[0] != '#' {
			if after, why := f(body); why != "" {
				changes = append(changes, FstabChange{File: file, Line: n, Before: body, After: after, Why: why})
				body = after
			}
		}
		out.WriteString(body + end)
	}
	return out.String(), changes
}

// swapFiles are the swap files an fstab names.
func swapFiles(text string) []string {
	var files []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 2 && f[2] == "swap" && strings.HasPrefix(f[0], "/") && !strings.HasPrefix(f[0], "/dev/") {
			files = append(files, path.Clean(unescape(f[0])))
		}
	}
	return files
}

// generateFstab makes the fstab the classic tools generate: the same disks,
// but none that the boot would wait for.
func generateFstab(kind FstabKind, p fstabPlan) string {
	root := p.root
	if root == "" {
		root = "/dev/sda1"
	}
	lines := [][]string{{escape(root), "/", p.rootType, "defaults", "1 1"}}
	const ephemeral = "defaults,nofail,x-systemd.device-timeout=10"
	if kind == FstabLegacy {
		lines = append(lines, []string{"/dev/sda2", "/mnt", "auto", ephemeral, "0 0"}, []string{"/dev/sda3", "swap", "swap", ephemeral, "0 0"})
	} else {
		lines = append(lines, []string{"/dev/sdb", "/mnt", "auto", ephemeral, "0 0"})
	}
	lines = append(lines, []string{"none", "/dev/pts", "devpts", "gid=5,mode=620", "0 0"},
		[]string{"none", "/proc", "proc", "defaults", "0 0"}, []string{"none", "/sys", "sysfs", "defaults", "0 0"})
	var b strings.Builder
	for _, l := range lines {
		b.WriteString(strings.Join(l, "\t") + "\n")
	}
	return b.String()
}

// unescape reads the octal escapes of fstab(5) and /proc/swaps.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) {
			b = append(b, (s[i+1]-'0')<<6|(s[i+2]-'0')<<3|(s[i+3]-'0'))
			i += 3
			continue
		}
		b = append(b, s[i])
	}
	return string(b)
}

func isOctal(s string) bool {
	return s[0] >= '0' && s[0] <= '3' && s[1] >= '0' && s[1] <= '7' && s[2] >= '0' && s[2] <= '7'
}

func escape(s string) string {
	return strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(s)
}
