package inject

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// account is a line of /etc/passwd.
type account struct {
	name     string
	uid, gid int
	home     string
}

// errNoUser says that the root knows no such user.
var errNoUser = errors.New("no such user")

// lookup finds the user name in the root's own /etc/passwd, never the host's.
func (h *hierarchy) lookup(name string) (account, error) {
	if err := CheckUser(name); err != nil {
		return account{}, err
	}
	data, err := h.ReadFile("/etc/passwd")
	if err != nil {
		return account{}, fmt.Errorf("looking up user %q: %w", name, err)
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if f[0] != name {
			continue
		}
		if len(f) != 7 {
			return account{}, fmt.Errorf("looking up user %q: its line in /etc/passwd has %d fields, not 7", name, len(f))
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		// 2^32-1 means "no change" to the kernel.
		if err1 != nil || err2 != nil || uid == 1<<32-1 || gid == 1<<32-1 {
			return account{}, fmt.Errorf("looking up user %q: ids %q and %q in /etc/passwd are not usable", name, f[2], f[3])
		}
		a := account{name: name, uid: int(uid), gid: int(gid), home: f[5]}
		if !path.IsAbs(a.home) || strings.Contains(a.home, "/../") || strings.HasSuffix(a.home, "/..") || path.Clean(a.home) == "/" {
			return account{}, fmt.Errorf("looking up user %q: home directory %q in /etc/passwd is not usable", name, a.home)
		}
		return a, nil
	}
	return account{}, fmt.Errorf("%w: user %q is not in /etc/passwd: name the image's login user in the instance's record or by instar.user=", errNoUser, name)
}

// CheckUser says why name is no user name.
func CheckUser(name string) error {
	if !validUser(name) {
		return fmt.Errorf("user name %q is not one: letters, digits, '.', '_' and '-' only, not beginning with '-' or '.'", name)
	}
	return nil
}

func validUser(name string) bool {
	if name == "" || len(name) > 256 || name[0] == '-' || name[0] == '.' {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}
