package rootfs

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Keep says what stands in the image in place of what a [Rule] takes out.
type Keep string

// The values of [Rule.Keep].
const (
	KeepNothing   Keep = ""
	KeepDirectory Keep = "empty directory" // the rule is for directories only
	KeepEmpty     Keep = "empty file"      // the rule is for regular files only
)

// Rule takes something out of the image by its name. A rule never applies to
// a symbolic link unless it says so: a link holds no secret.
type Rule struct {
	Pattern string // with a slash: a path in the volume; without: a name anywhere
	Except  string // a name pattern that the rule spares, "" for none
	Class   Class
	Keep    Keep
	Always  bool // holds with Options.NoFilter, too
	Links   bool // takes symbolic links as well
	Why     string
}

// ruleSet finds the rule for a path quickly: most rules have no wildcards.
type ruleSet struct {
	paths, names map[string][]*Rule
	globs        []compiledRule
	filtering    bool
}

type compiledRule struct {
	pattern pattern
	rule    *Rule
}

func newRuleSet(rules []Rule, noFilter bool) (ruleSet, error) {
	s := ruleSet{paths: map[string][]*Rule{}, names: map[string][]*Rule{}, filtering: !noFilter}
	for i := range rules {
		r := &rules[i]
		if noFilter && !r.Always {
			continue
		}
		switch {
		case strings.ContainsAny(r.Pattern, `*?[\`):
			p, err := parsePattern(r.Pattern)
			if err != nil {
				return s, fmt.Errorf("rule of the filter: %w", err)
			}
			s.globs = append(s.globs, compiledRule{p, r})
		case strings.Contains(r.Pattern, "/"):
			key := strings.TrimPrefix(r.Pattern, "/")
			s.paths[key] = append(s.paths[key], r)
		default:
			s.names[r.Pattern] = append(s.names[r.Pattern], r)
		}
	}
	return s, nil
}

// find returns the first rule for a path of the given type (unix.S_IFMT), or nil.
func (s *ruleSet) find(rel string, typ uint32) *Rule {
	name := path.Base(rel)
	fits := func(r *Rule) bool {
		switch {
		case r.Keep == KeepDirectory && typ != unix.S_IFDIR, r.Keep == KeepEmpty && typ != unix.S_IFREG:
			return false
		case typ == unix.S_IFLNK && !r.Links:
			return false
		case r.Except != "" && matchPart(r.Except, name):
			return false
		}
		return true
	}
	for _, list := range [][]*Rule{s.paths[rel], s.names[name]} {
		if i := slices.IndexFunc(list, fits); i >= 0 {
			return list[i]
		}
	}
	for i := range s.globs {
		if c := &s.globs[i]; c.pattern.match(rel) && fits(c.rule) {
			return c.rule
		}
	}
	return nil
}

// contentWanted tells whether the content of a file is to be searched.
func (s *ruleSet) contentWanted(string) bool { return s.filtering }

// Rules are the rules by which names stay out of an image, in the order in
// which they are tried: whole paths, whole names, patterns.
func Rules() []Rule {
	fixed := func(dir, why string) Rule {
		return Rule{Pattern: dir, Class: Fixed, Keep: KeepDirectory, Always: true, Why: why}
	}
	return []Rule{
		fixed("/dev", "the kernel fills it; a few classic nodes stand in"),
		fixed("/proc", "the kernel fills it"),
		fixed("/sys", "the kernel fills it"),
		fixed("/run", "holds the state of this boot"),
		fixed("/var/run", "holds the state of this boot"),
		fixed("/mnt", "for mounts of other disks"),
		fixed("/media", "for mounts of other media"),
		fixed("/tmp", "temporary files"),
		fixed("/var/tmp", "temporary files"),
	}
}
