package inroot

import (
	"errors"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// labelName is the attribute in which SELinux keeps a file's label.
const labelName = "security.selinux"

// maxLabel bounds a label, in bytes: the kernel's own bound is a page.
const maxLabel = 4096

// label is the SELinux label of an open file, "" if it has none.
func label(f *os.File) (string, error) {
	b := make([]byte, maxLabel)
	n, err := unix.Fgetxattr(int(f.Fd()), labelName, b)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP):
		return "", nil
	case err != nil:
		return "", &os.PathError{Op: "reading the SELinux label of", Path: f.Name(), Err: err}
	}
	return strings.TrimRight(string(b[:n]), "\x00"), nil
}

// Label gives f, made in the directory parent, an SELinux label if the parent
// has one: want, or the parent's where want is empty. Without it a system that
// enforces its policy would keep its services from the file. A file that is
// labelled already, as by a kernel that has the policy loaded, is left alone.
func Label(f, parent *os.File, want string) error {
	above, err := label(parent)
	if err != nil || above == "" {
		return err
	}
	if now, err := label(f); err != nil || now != "" {
		return err
	}
	if want == "" {
		want = above
	}
	// The terminating zero is stored, as SELinux's own tools do it.
	if err := unix.Fsetxattr(int(f.Fd()), labelName, append([]byte(want), 0), 0); err != nil {
		return &os.PathError{Op: "labelling for SELinux", Path: f.Name(), Err: err}
	}
	return nil
}

// labelThere is the label of the regular file base of dir, "" if there is none.
func labelThere(dir *os.File, base string) string {
	f, err := Openat2(dir, base, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return ""
	}
	l, err := label(f)
	if err != nil {
		return ""
	}
	return l
}

// LabelFor is the label that the root's own SELinux policy has for a file or
// directory of that name, "" if it has none or SELinux is disabled there.
func (r *Root) LabelFor(name string, dir bool) string {
	if r.contexts == nil {
		c := r.readContexts()
		r.contexts = &c
	}
	return r.contexts.find(path.Clean("/"+name), dir)
}

// readContexts reads the policy's file contexts. What cannot be read counts as
// absent: a new file then takes after its directory.
func (r *Root) readContexts() fileContexts {
	config, err := r.ReadFile("/etc/selinux/config")
	if err != nil {
		return nil
	}
	kind := "targeted"
	for line := range strings.Lines(string(config)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.TrimSpace(value)
		switch {
		case !ok:
		case key == "SELINUX" && strings.EqualFold(value, "disabled"):
			return nil
		case key == "SELINUXTYPE" && value != "" && !strings.Contains(value, "/"):
			kind = value
		}
	}
	var all fileContexts
	// What comes later counts more.
	for _, suffix := range []string{"", ".homedirs", ".local"} {
		if text, err := r.ReadFile("/etc/selinux/" + kind + "/contexts/files/file_contexts" + suffix); err == nil {
			all = append(all, parseContexts(string(text))...)
		}
	}
	return all
}
