package inject

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/inroot"
)

// inside confines a path to what lies below a handle, on its filesystem, with
// no symbolic link on the way: for directories a user may change meanwhile.
const inside = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV

// CheckKey says why line is not a line for authorized_keys: one key of a type
// that OpenSSH knows, on one line. Options before the key are refused unless
// options is set: a key pair's public key has none.
func CheckKey(line string, options bool) error {
	if strings.ContainsAny(line, "\n\r\x00") {
		return errors.New("SSH key has a line break or NUL in it")
	}
	if len(line) > 16<<10 {
		return errors.New("SSH key is longer than 16 KiB")
	}
	_, _, opts, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	switch {
	case err != nil:
		return errors.New("not an SSH public key (type, base64, comment)")
	case len(opts) > 0 && !options:
		return fmt.Errorf("SSH key carries the option %q, which a key pair's public key does not", strings.SplitN(opts[0], "=", 2)[0])
	case len(rest) > 0:
		return errors.New("SSH key is followed by something else")
	}
	return nil
}

// keyEdit is a change to the authorized_keys of a user.
type keyEdit struct {
	user        string
	add, remove []string
	dry         bool // look only; nothing is made
}

// keyEdited is what a keyEdit changed, or with dry would change.
type keyEdited struct {
	added   []string // lines of add that were not there
	removed int      // lines
}

// authorize adds the lines to the authorized_keys of the user, keeping what
// is there. The file is written with that user's rights; it reports how many
// lines were new.
func (h *hierarchy) authorize(user string, lines []string, warn func(string)) (added int, err error) {
	done, err := h.editKeys(keyEdit{user: user, add: lines}, warn)
	return len(done.added), err
}

// editKeys carries out e with the rights of its user; lines that it does not
// name stay as they are.
func (h *hierarchy) editKeys(e keyEdit, warn func(string)) (done keyEdited, err error) {
	a, err := h.lookup(e.user)
	if err != nil {
		return done, err
	}
	conf, err := h.readSSHDConfig()
	if err != nil {
		return done, err
	}
	name, inHome, err := conf.keyFile(a)
	if err != nil {
		return done, err
	}
	if !inHome {
		return h.editCentrally(name, e)
	}
	home, err := h.openHome(a, e.makes())
	if errors.Is(err, fs.ErrNotExist) && !e.makes() {
		return keyEdited{added: e.add}, nil
	}
	if err != nil {
		return done, err
	}
	defer home.Close()
	st, err := home.Stat()
	if err != nil {
		return done, err
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; int(owner) != a.uid && owner != 0 {
		return done, fmt.Errorf("home directory %q belongs to user %d, not to %s (%d) or root", a.home, owner, a.name, a.uid)
	}
	if st.Mode().Perm()&0o022 != 0 && e.makes() {
		warn(fmt.Sprintf("home directory %s is writable by others (%v): sshd refuses its keys unless StrictModes is off", a.home, st.Mode().Perm()))
	}
	full := path.Join(a.home, name)
	fileLabel, dirLabel := h.LabelFor(full, false), h.LabelFor(path.Dir(full), true)
	err = asUser(a.uid, a.gid, func() error {
		dir, err := openKeyDir(home, path.Dir(name), a, dirLabel, e.makes())
		if errors.Is(err, fs.ErrNotExist) && !e.makes() {
			done.added = e.add
			return nil
		}
		if err != nil {
			return err
		}
		defer dir.Close()
		done, err = editLines(dir, path.Base(name), e, a.uid, 0o600, fileLabel)
		return err
	})
	if err != nil {
		return keyEdited{}, fmt.Errorf("writing SSH keys of user %s: %w", e.user, err)
	}
	return done, nil
}

// makes tells whether directories are made that the edit needs.
func (e keyEdit) makes() bool { return len(e.add) > 0 && !e.dry }

// openHome opens the home directory, with make making it if only the last
// element is absent and root alone can write its parent.
func (h *hierarchy) openHome(a account, make bool) (*os.File, error) {
	home, err := h.OpenDir(a.home)
	if !errors.Is(err, fs.ErrNotExist) || !make {
		return home, err
	}
	parent, perr := h.OpenDir(path.Dir(path.Clean(a.home)))
	if perr != nil {
		return nil, fmt.Errorf("home directory of user %s: %w", a.name, perr)
	}
	defer parent.Close()
	if err := ownedByRoot(parent); err != nil {
		return nil, fmt.Errorf("home directory %q of user %s is absent and not made: %w", a.home, a.name, err)
	}
	base := path.Base(path.Clean(a.home))
	// A dangling link answers "not found" above and EEXIST here.
	if err := unix.Mkdirat(int(parent.Fd()), base, 0o700); err != nil {
		return nil, &os.PathError{Op: "mkdir", Path: a.home, Err: err}
	}
	home, err = inroot.Openat2(parent, base, unix.O_RDONLY|unix.O_DIRECTORY, 0, inside)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(home.Chown(a.uid, a.gid), inroot.Label(home, parent, h.LabelFor(a.home, true))); err != nil {
		home.Close()
		return nil, err
	}
	return home, nil
}

func ownedByRoot(dir *os.File) error {
	st, err := dir.Stat()
	if err != nil {
		return err
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; owner != 0 || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %q belongs to user %d with mode %v: others than root may change it", dir.Name(), owner, st.Mode().Perm())
	}
	return nil
}

// openKeyDir opens dir below home as the user, with make making what is
// absent, with the SELinux label given.
func openKeyDir(home *os.File, dir string, a account, label string, make bool) (*os.File, error) {
	at, err := inroot.Openat2(home, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0, inside)
	if err != nil || dir == "." {
		return at, err
	}
	for part := range strings.SplitSeq(dir, "/") {
		made := unix.EEXIST
		if make {
			made, _ = unix.Mkdirat(int(at.Fd()), part, 0o700).(unix.Errno)
		}
		if made != 0 && made != unix.EEXIST {
			at.Close()
			return nil, &os.PathError{Op: "mkdir", Path: path.Join(at.Name(), part), Err: made}
		}
		next, err := inroot.Openat2(at, part, unix.O_RDONLY|unix.O_DIRECTORY, 0, inside)
		if err == nil && made == 0 {
			if err = inroot.Label(next, at, label); err != nil {
				next.Close()
			}
		}
		at.Close()
		if err != nil {
			return nil, explain(err)
		}
		at = next
	}
	st, err := at.Stat()
	if err == nil {
		if owner := int(st.Sys().(*syscall.Stat_t).Uid); owner != a.uid {
			err = fmt.Errorf("directory %q belongs to user %d, not to %s (%d)", at.Name(), owner, a.name, a.uid)
		} else if st.Mode().Perm() != 0o700 && make {
			err = at.Chmod(0o700)
		}
	}
	if err != nil {
		at.Close()
		return nil, err
	}
	return at, nil
}

// explain says what the errors of a confined open mean.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%w: a symbolic link is in the way, which is not followed", err)
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("%w: another filesystem is mounted in the way", err)
	}
	return err
}

// editLines rewrites the key file base of dir by e, if it changes anything.
func editLines(dir *os.File, base string, e keyEdit, owner int, perm uint32, label string) (keyEdited, error) {
	var old []byte
	f, err := inroot.Openat2(dir, base, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0, inside)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return keyEdited{}, explain(err)
	default:
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return keyEdited{}, err
		}
		sys := st.Sys().(*syscall.Stat_t)
		if !st.Mode().IsRegular() {
			return keyEdited{}, fmt.Errorf("%q is not a regular file (%v)", f.Name(), st.Mode().Type())
		}
		if int(sys.Uid) != owner {
			return keyEdited{}, fmt.Errorf("%q belongs to user %d, not to %d", f.Name(), sys.Uid, owner)
		}
		if old, err = inroot.ReadSmall(f); err != nil {
			return keyEdited{}, err
		}
	}
	out, done := e.apply(old)
	if e.dry || len(done.added) == 0 && done.removed == 0 {
		return done, nil
	}
	return done, inroot.ReplaceAt(dir, base, out, perm, label)
}

// apply makes the new content of a key file from the old.
func (e keyEdit) apply(old []byte) ([]byte, keyEdited) {
	var done keyEdited
	remove := make(map[string]bool)
	for _, line := range e.remove {
		remove[keyOf(line)] = true
	}
	have := make(map[string]bool)
	var out bytes.Buffer
	for line := range strings.Lines(string(old)) {
		k := keyOf(line)
		if remove[k] {
			done.removed++
			continue
		}
		have[k] = true
		out.WriteString(line)
	}
	if n := out.Len(); n > 0 && out.Bytes()[n-1] != '\n' {
		out.WriteByte('\n')
	}
	for _, line := range e.add {
		if k := keyOf(line); !have[k] {
			have[k] = true
			line = strings.TrimSpace(line)
			done.added = append(done.added, line)
			out.WriteString(line + "\n")
		}
	}
	return out.Bytes(), done
}

// keyOf is what makes a line the same key as another: type and key without
// options and comment where it is a key, the line itself elsewhere.
func keyOf(line string) string {
	line = strings.TrimSpace(line)
	k, _, opts, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return line
	}
	return strings.Join(opts, ",") + " " + string(k.Marshal())
}

// editCentrally edits a key file outside the home directory, which must be
// root's alone, as sshd demands.
func (h *hierarchy) editCentrally(name string, e keyEdit) (keyEdited, error) {
	dir, err := inroot.Openat2(h.Dir(), strings.TrimPrefix(path.Dir(name), "/"), unix.O_RDONLY|unix.O_DIRECTORY, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return keyEdited{}, fmt.Errorf("key file %q of sshd's AuthorizedKeysFile: %w", name, explain(err))
	}
	defer dir.Close()
	if err := ownedByRoot(dir); err != nil {
		return keyEdited{}, fmt.Errorf("key file %q of sshd's AuthorizedKeysFile: %w", name, err)
	}
	return editLines(dir, path.Base(name), e, 0, 0o644, h.LabelFor(name, false))
}
