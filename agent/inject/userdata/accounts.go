package userdata

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/agent/inject"
)

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// groups takes names, or maps of a name to its members.
func (c *config) groups(node *yaml.Node) error {
	var list []yaml.Node
	if err := decode(node, &list); err != nil {
		return err
	}
	var errs []error
	for i := range list {
		members := map[string][]string{}
		if list[i].Kind == yaml.ScalarNode {
			members[list[i].Value] = nil
		} else if err := decode(&list[i], &members); err != nil {
			errs = append(errs, err)
			continue
		}
		for name, users := range members {
			if !accountName(name) {
				errs = append(errs, errors.New("not a group name"))
				continue
			}
			if !c.known("/etc/group", name) {
				if err := c.o.run(c.ctx, []string{"groupadd", name}, nil); err != nil {
					errs = append(errs, err)
				}
			}
			for _, u := range users {
				if !accountName(u) {
					errs = append(errs, errors.New("not a user name"))
				} else if err := c.o.run(c.ctx, []string{"usermod", "-a", "-G", name, u}, nil); err != nil {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

func accountName(s string) bool {
	return s != "" && len(s) <= 32 && !strings.ContainsAny(s, ":,/ \t\n\x00") && s[0] != '-'
}

// known tells whether a line of passwd or group begins with the name.
func (c *config) known(file, name string) bool {
	data, err := c.root.ReadFile(file)
	return err == nil && strings.Contains("\n"+string(data), "\n"+name+":")
}

// words takes a list or one string with commas.
type words []string

func (w *words) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind == yaml.ScalarNode {
		for s := range strings.SplitSeq(node.Value, ",") {
			if s = strings.TrimSpace(s); s != "" {
				*w = append(*w, s)
			}
		}
		return nil
	}
	return node.Decode((*[]string)(w))
}

type user struct {
	Name         string    `yaml:"name"`
	Gecos        string    `yaml:"gecos"`
	HomeDir      string    `yaml:"homedir"`
	Shell        string    `yaml:"shell"`
	UID          string    `yaml:"uid"`
	PrimaryGroup string    `yaml:"primary_group"`
	Groups       words     `yaml:"groups"`
	NoCreateHome bool      `yaml:"no_create_home"`
	System       bool      `yaml:"system"`
	LockPasswd   *bool     `yaml:"lock_passwd"`
	Passwd       string    `yaml:"passwd"`
	HashedPasswd string    `yaml:"hashed_passwd"`
	Sudo         yaml.Node `yaml:"sudo"`
	Keys         []string  `yaml:"ssh_authorized_keys"`
}

// userKeys are the keys of a user that are understood.
var userKeys = []string{
	"name", "gecos", "homedir", "shell", "uid", "primary_group", "groups", "no_create_home", "system",
	"lock_passwd", "passwd", "hashed_passwd", "sudo", "ssh_authorized_keys",
}

func (c *config) users(node *yaml.Node) error {
	var list []yaml.Node
	if err := decode(node, &list); err != nil {
		return err
	}
	var errs []error
	for i := range list {
		// "default" is the image's own login user, which is there.
		if list[i].Kind == yaml.ScalarNode {
			if list[i].Value != "default" {
				errs = append(errs, fmt.Errorf("user %d: %w: a bare name", i+1, ErrUnsupported))
			}
			continue
		}
		if err := c.user(&list[i]); err != nil {
			errs = append(errs, fmt.Errorf("user %d: %w", i+1, err))
		}
	}
	return errors.Join(errs...)
}

func (c *config) user(node *yaml.Node) error {
	var u user
	if err := decode(node, &u); err != nil {
		return err
	}
	var unknown []string
	for i := 0; i+1 < len(node.Content); i += 2 {
		if k := node.Content[i].Value; !slices.Contains(userKeys, k) {
			unknown = append(unknown, k)
		}
	}
	var errs []error
	if len(unknown) > 0 {
		errs = append(errs, fmt.Errorf("%w: keys %s", ErrUnsupported, strings.Join(unknown, ", ")))
	}
	if !accountName(u.Name) {
		return errors.Join(append(errs, errors.New("it has no usable name"))...)
	}
	if !c.known("/etc/passwd", u.Name) {
		if err := c.o.run(c.ctx, userAdd(u), nil); err != nil {
			return errors.Join(append(errs, err)...)
		}
	} else if len(u.Groups) > 0 {
		if err := c.o.run(c.ctx, []string{"usermod", "-a", "-G", strings.Join(u.Groups, ","), u.Name}, nil); err != nil {
			errs = append(errs, err)
		}
	}
	if hash := max(u.Passwd, u.HashedPasswd); hash != "" {
		if strings.ContainsAny(hash, "\n:") || !strings.HasPrefix(hash, "$") {
			errs = append(errs, errors.New("passwd is not a crypt(5) hash"))
		} else if err := c.o.run(c.ctx, []string{"chpasswd", "-e"}, strings.NewReader(u.Name+":"+hash+"\n")); err != nil {
			errs = append(errs, err)
		}
	}
	// As in cloud-init a password is locked unless that is declined.
	if u.LockPasswd == nil || *u.LockPasswd {
		if err := c.o.run(c.ctx, []string{"usermod", "-L", u.Name}, nil); err != nil {
			errs = append(errs, err)
		}
	}
	if err := c.sudo(u); err != nil {
		errs = append(errs, err)
	}
	if err := c.keys(u.Name, u.Keys); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func userAdd(u user) []string {
	argv := []string{"useradd"}
	for _, f := range []struct{ flag, value string }{
		{"--comment", u.Gecos},
		{"--home-dir", u.HomeDir},
		{"--shell", u.Shell},
		{"--uid", u.UID},
		{"--gid", u.PrimaryGroup},
		{"--groups", strings.Join(u.Groups, ",")},
	} {
		if f.value != "" {
			argv = append(argv, f.flag, f.value)
		}
	}
	if u.System {
		argv = append(argv, "--system")
	}
	if u.NoCreateHome || u.System {
		argv = append(argv, "--no-create-home")
	} else {
		argv = append(argv, "--create-home")
	}
	return append(argv, "--", u.Name)
}

// sudo writes the user's rules to a file of its own in /etc/sudoers.d.
func (c *config) sudo(u user) error {
	var rules []string
	switch {
	case u.Sudo.Kind == 0 || u.Sudo.Tag == "!!null" || u.Sudo.Tag == "!!bool":
		return nil
	case u.Sudo.Kind == yaml.ScalarNode:
		rules = []string{u.Sudo.Value}
	default:
		if err := decode(&u.Sudo, &rules); err != nil {
			return fmt.Errorf("sudo: %w", err)
		}
	}
	var text strings.Builder
	for _, r := range rules {
		if strings.ContainsAny(r, "\n\r\x00") {
			return errors.New("sudo: a rule has a line break in it")
		}
		fmt.Fprintf(&text, "%s %s\n", u.Name, r)
	}
	if err := c.root.Mkdir("/etc/sudoers.d", 0o750); err != nil {
		return err
	}
	// sudo passes over names with a dot.
	name := "instar-" + strings.ReplaceAll(u.Name, ".", "_")
	return c.root.WriteFile(path.Join("/etc/sudoers.d", name), []byte(text.String()), 0o440)
}

func (c *config) keys(user string, keys []string) error {
	if len(keys) == 0 {
		return nil
	}
	_, err := inject.Authorize(c.o.Root, user, keys, c.o.Report)
	return err
}

func (c *config) rootKeys(node *yaml.Node) error {
	var keys []string
	if err := decode(node, &keys); err != nil {
		return err
	}
	return c.keys(c.o.loginUser(), keys)
}

// packageTools are the package managers looked for, in order, with the
// command to refresh their lists and the one to install.
var packageTools = []struct {
	program          string
	refresh, install []string
}{
	{"/usr/bin/apt-get", []string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "update"}, []string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "-o", "Dpkg::Options::=--force-confold", "install", "--"}},
	{"/usr/bin/dnf", nil, []string{"dnf", "-y", "install", "--"}},
	{"/usr/bin/yum", nil, []string{"yum", "-y", "install", "--"}},
	{"/usr/bin/zypper", nil, []string{"zypper", "--non-interactive", "install", "--"}},
	{"/sbin/apk", nil, []string{"apk", "add", "--no-cache", "--"}},
	{"/usr/bin/pacman", nil, []string{"pacman", "-Sy", "--noconfirm", "--needed", "--"}},
}

func (c *config) packages(node *yaml.Node) error {
	var list []yaml.Node
	if err := decode(node, &list); err != nil {
		return err
	}
	var names []string
	for i := range list {
		if list[i].Kind != yaml.ScalarNode || list[i].Value == "" || list[i].Value[0] == '-' {
			return fmt.Errorf("%w: package %d is not a plain name", ErrUnsupported, i+1)
		}
		names = append(names, list[i].Value)
	}
	for _, t := range packageTools {
		if !c.root.Exists(t.program) {
			continue
		}
		if t.refresh != nil {
			if err := c.o.run(c.ctx, t.refresh, nil); err != nil {
				return err
			}
		}
		return c.o.run(c.ctx, append(slices.Clone(t.install), names...), nil)
	}
	return fmt.Errorf("%w: no package manager found (apt, dnf, yum, zypper, apk, pacman)", ErrUnsupported)
}

// mounts adds lines to fstab for what is not in it, and mounts them.
func (c *config) mounts(node *yaml.Node) error {
	var list [][]string
	if err := decode(node, &list); err != nil {
		return err
	}
	old, err := c.root.ReadFile("/etc/fstab")
	if err != nil && !isNotExist(err) {
		return err
	}
	text := string(old)
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	var points []string
	for i, m := range list {
		defaults := []string{"", "", "auto", "defaults,nofail", "0", "2"}
		if len(m) < 2 || len(m) > 6 {
			return fmt.Errorf("entry %d has %d fields, not 2 to 6", i+1, len(m))
		}
		copy(defaults, m)
		if strings.ContainsAny(strings.Join(defaults, ""), " \t\n") || defaults[0] == "" || (!path.IsAbs(defaults[1]) && defaults[1] != "none" && defaults[1] != "swap") {
			return fmt.Errorf("entry %d has an unusable field", i+1)
		}
		if !strings.HasPrefix(defaults[0], "/") && !strings.ContainsAny(defaults[0], "=:") {
			defaults[0] = "/dev/" + defaults[0]
		}
		if path.IsAbs(defaults[1]) {
			if err := c.root.Mkdir(defaults[1], 0o755); err != nil {
				return err
			}
			points = append(points, defaults[1])
		}
		text += strings.Join(defaults, "\t") + "\n"
	}
	if err := c.root.WriteFile("/etc/fstab", []byte(text), 0o644); err != nil {
		return err
	}
	var errs []error
	for _, p := range points {
		if err := c.o.run(c.ctx, []string{"mount", "--", p}, nil); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
