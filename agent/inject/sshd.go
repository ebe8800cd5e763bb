package inject

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// sshdConfig is what injection needs of a root's sshd configuration.
type sshdConfig struct {
	keyFiles []string // AuthorizedKeysFile
	hostKeys []string // HostKey
}

const maxInclude = 64

// readSSHDConfig reads /etc/ssh/sshd_config and what it includes. As in sshd
// the first value counts; what stands in a Match block is left aside.
func (h *hierarchy) readSSHDConfig() (sshdConfig, error) {
	c := sshdConfig{}
	budget := maxInclude
	if err := h.readSSHDFile(&c, "/etc/ssh/sshd_config", &budget, new(bool)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("reading sshd's configuration: %w", err)
	}
	if c.keyFiles == nil {
		c.keyFiles = []string{".ssh/authorized_keys", ".ssh/authorized_keys2"}
	}
	return c, nil
}

func (h *hierarchy) readSSHDFile(c *sshdConfig, name string, budget *int, inMatch *bool) error {
	if *budget--; *budget < 0 {
		return fmt.Errorf("more than %d files included", maxInclude)
	}
	data, err := h.ReadFile(name)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		key, args := splitSSHDLine(line)
		switch key {
		case "match":
			*inMatch = !(len(args) == 1 && strings.EqualFold(args[0], "all"))
		case "authorizedkeysfile":
			if !*inMatch && c.keyFiles == nil {
				c.keyFiles = args
			}
		case "hostkey":
			if len(args) == 1 && !*inMatch && !slices.Contains(c.hostKeys, args[0]) {
				c.hostKeys = append(c.hostKeys, args[0])
			}
		case "include":
			for _, pattern := range args {
				names, err := h.glob(pattern)
				if err != nil {
					return err
				}
				for _, n := range names {
					inner := *inMatch
					if err := h.readSSHDFile(c, n, budget, &inner); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// splitSSHDLine gives the keyword in lower case and the arguments of a line,
// "" for an empty line or a comment.
func splitSSHDLine(line string) (string, []string) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return "", nil
	}
	i := strings.IndexAny(line, " \t=")
	switch {
	case i < 0:
		return strings.ToLower(line), nil
	case i == 0: // "=…" has no keyword: sshd refuses it
		return "", nil
	}
	key, rest := strings.ToLower(line[:i]), strings.TrimLeft(line[i:], " \t=")
	var args []string
	for rest != "" {
		var arg string
		if rest[0] == '"' {
			end := strings.IndexByte(rest[1:], '"')
			if end < 0 {
				return key, args
			}
			arg, rest = rest[1:1+end], rest[end+2:]
		} else if end := strings.IndexAny(rest, " \t"); end >= 0 {
			arg, rest = rest[:end], rest[end:]
		} else {
			arg, rest = rest, ""
		}
		if strings.HasPrefix(arg, "#") {
			break
		}
		args = append(args, arg)
		rest = strings.TrimLeft(rest, " \t")
	}
	return key, args
}

// glob expands a pattern whose last element may hold wildcards; names are
// sorted. A relative pattern is relative to /etc/ssh, as in sshd.
func (h *hierarchy) glob(pattern string) ([]string, error) {
	if !path.IsAbs(pattern) {
		pattern = path.Join("/etc/ssh", pattern)
	}
	dir, err := h.OpenDir(path.Dir(pattern))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, n := range names {
		if ok, err := path.Match(path.Base(pattern), n); err == nil && ok {
			found = append(found, path.Join(path.Dir(pattern), n))
		}
	}
	slices.Sort(found)
	return found, nil
}

// keyFile is the file sshd would look for the keys of a in: relative to the
// home directory if inHome, else an absolute path.
func (c sshdConfig) keyFile(a account) (name string, inHome bool, err error) {
	if len(c.keyFiles) == 0 {
		return "", false, errors.New("sshd is configured with an empty AuthorizedKeysFile")
	}
	if strings.EqualFold(c.keyFiles[0], "none") {
		return "", false, errors.New("sshd is configured with AuthorizedKeysFile none: no key file would be read")
	}
	if name, err = expandKeyFile(c.keyFiles[0], a); err != nil {
		return "", false, err
	}
	if !path.IsAbs(name) {
		name = path.Join(a.home, name)
	}
	name = path.Clean(name)
	if rel, ok := strings.CutPrefix(name, path.Clean(a.home)+"/"); ok {
		return rel, true, nil
	}
	return name, false, nil
}

func expandKeyFile(pattern string, a account) (string, error) {
	var b strings.Builder
	for i := 0; i < len(pattern); i++ {
		if pattern[i] != '%' {
			b.WriteByte(pattern[i])
			continue
		}
		i++
		switch {
		case i < len(pattern) && pattern[i] == '%':
			b.WriteByte('%')
		case i < len(pattern) && pattern[i] == 'h':
			b.WriteString(a.home)
		case i < len(pattern) && pattern[i] == 'u':
			b.WriteString(a.name)
		case i < len(pattern) && pattern[i] == 'U':
			b.WriteString(strconv.Itoa(a.uid))
		default:
			return "", fmt.Errorf("AuthorizedKeysFile %q of sshd's configuration has an unknown %%-sequence", pattern)
		}
	}
	return b.String(), nil
}
