package inject

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// settleFstab rewrites /etc/fstab so that no entry whose device is absent can
// stop the boot: the root's own entry names rootSpec instead, any other gets
// nofail and a short wait. present tells whether a device is there, by the
// words of fstab ("UUID=…", "/dev/vdb1"). Each change is reported.
func (h *hierarchy) settleFstab(present func(string) bool, rootSpec string, report func(string)) error {
	data, err := h.ReadFile("/etc/fstab")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	out, changes := settle(string(data), present, rootSpec)
	if len(changes) == 0 {
		return nil
	}
	if err := h.WriteFile("/etc/fstab", []byte(out), 0o644); err != nil {
		return err
	}
	for _, c := range changes {
		report(c)
	}
	return nil
}

func settle(text string, present func(string) bool, rootSpec string) (string, []string) {
	var out strings.Builder
	var changes []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 3 || strings.HasPrefix(f[0], "#") || !needsDevice(f[0], f[2]) || present(f[0]) {
			out.WriteString(line)
			continue
		}
		for len(f) < 6 {
			f = append(f, []string{"defaults", "0", "0"}[len(f)-3])
		}
		what, where := f[0], f[1]
		switch {
		case where == "/" && rootSpec == "":
			out.WriteString(line)
			continue
		case where == "/":
			f[0] = rootSpec
			changes = append(changes, fmt.Sprintf("fstab: / was on %s, which is absent; it names %s now", what, rootSpec))
		case hasOption(f[3], "nofail"):
			out.WriteString(line)
			continue
		default:
			f[3] += ",nofail,x-systemd.device-timeout=5s"
			f[5] = "0" // fsck would wait for the device
			changes = append(changes, fmt.Sprintf("fstab: %s on %s is absent; its entry got nofail", what, where))
		}
		out.WriteString(strings.Join(f, " ") + "\n")
	}
	return out.String(), changes
}

// needsDevice tells whether an entry waits for a block device.
func needsDevice(spec, fstype string) bool {
	switch fstype {
	case "tmpfs", "proc", "sysfs", "devpts", "devtmpfs", "overlay", "nfs", "nfs4", "cifs", "9p", "virtiofs", "none", "bind", "cgroup", "cgroup2":
		return false
	}
	for _, p := range []string{"UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=", "ID=", "/dev/"} {
		if strings.HasPrefix(spec, p) {
			return true
		}
	}
	return false
}

func hasOption(options, name string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == name {
			return true
		}
	}
	return false
}
