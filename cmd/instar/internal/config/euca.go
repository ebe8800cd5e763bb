package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// euca2ools' files: the one EUCA_CONFIG_PATH names (a file or a directory), or
// else the machine's and the user's. Sections are [user NAME], [region NAME]
// and [global]; the setting default-region of [global] and user of a region
// choose between them where --region USER@REGION does not.

// section is one [kind name] of an ini file.
type section struct {
	kind, name string
	file       string
	values     map[string]string
}

func (c *Config) euca(s Sources, getenv func(string) string) error {
	var sections []section
	for _, p := range eucaFiles(s, getenv) {
		data, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading euca2ools' configuration: %w", err)
		}
		more, err := parseINI(p, data)
		if err != nil {
			return err
		}
		sections = append(sections, more...)
	}
	if len(sections) == 0 {
		return nil
	}
	user, region := "", ""
	said := s.Region
	if said == "" {
		said = c.values["region"].Text
	}
	if u, r, ok := strings.Cut(said, "@"); ok {
		user, region = u, r
	} else {
		region = said
	}
	for _, sec := range sections {
		if sec.kind == "global" && region == "" {
			region = sec.values["default-region"]
			if u, r, ok := strings.Cut(region, "@"); ok {
				user, region = u, r
			}
			c.keep(c.keys["region"], region, sec.file, "")
		}
	}
	for _, sec := range sections {
		if sec.kind == "region" && matches(sec.name, region) {
			if user == "" {
				user = sec.values["user"]
			}
			for _, k := range c.keys {
				if k.EucaRegion != "" {
					c.keep(k, sec.values[k.EucaRegion], sec.file, s.Home)
				}
			}
		}
	}
	for _, sec := range sections {
		if sec.kind == "user" && matches(sec.name, user) {
			for _, k := range c.keys {
				if k.EucaUser != "" {
					c.keep(k, sec.values[k.EucaUser], sec.file, s.Home)
				}
			}
		}
	}
	return nil
}

// matches reports whether a section's name, which may hold wildcards, is the
// one asked for. A section without a name is everybody's.
func matches(pattern, name string) bool {
	if pattern == "" {
		return true
	}
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}

func eucaFiles(s Sources, getenv func(string) string) []string {
	if p := getenv("EUCA_CONFIG_PATH"); p != "" {
		if st, err := os.Stat(p); err == nil && st.IsDir() {
			return glob(p)
		}
		return []string{p}
	}
	var files []string
	if s.Home != "" {
		files = glob(filepath.Join(s.Home, ".euca"))
	}
	if s.Etc != "" {
		dir := filepath.Join(filepath.Dir(s.Etc), "euca2ools")
		files = append(files, glob(filepath.Join(dir, "conf.d"))...)
		files = append(files, filepath.Join(dir, "euca2ools.ini"))
	}
	return files
}

// glob lists the .ini files of a directory in the order of their names.
func glob(dir string) []string {
	names, err := filepath.Glob(filepath.Join(escape(dir), "*.ini"))
	if err != nil {
		return nil
	}
	return names
}

// escape makes a directory's name match itself in a pattern.
func escape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// parseINI reads sections of name = value lines; "#" and ";" begin comments.
func parseINI(file string, data []byte) ([]section, error) {
	var out []section
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			head, ok := strings.CutSuffix(line[1:], "]")
			if !ok {
				return nil, fmt.Errorf("%s:%d: a section's name is not closed by ]", file, n)
			}
			kind, name, _ := strings.Cut(strings.TrimSpace(head), " ")
			out = append(out, section{kind, strings.TrimSpace(name), file, map[string]string{}})
		default:
			name, value, ok := strings.Cut(line, "=")
			if !ok {
				name, value, ok = strings.Cut(line, ":")
			}
			if !ok || len(out) == 0 {
				return nil, fmt.Errorf("%s:%d: expected [section] or name = value", file, n)
			}
			out[len(out)-1].values[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	return out, nil
}
