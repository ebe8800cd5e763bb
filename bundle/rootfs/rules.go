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

// spares tells whether a name is one that a rule's exception stands for.
func spares(except, name string) bool {
	p := newPart(except)
	return p.match(name)
}

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
	last         map[string][]compiledRule // by their last component, where that has no wildcard
	dirs         map[string][]compiledRule // by their directory, where only the last component has one
	globs        []compiledRule            // the others
	filtering    bool
}

type compiledRule struct {
	pattern pattern
	rule    *Rule
}

func newRuleSet(rules []Rule, noFilter bool) (ruleSet, error) {
	s := ruleSet{
		paths: map[string][]*Rule{}, names: map[string][]*Rule{},
		last: map[string][]compiledRule{}, dirs: map[string][]compiledRule{}, filtering: !noFilter,
	}
	for i := range rules {
		r := &rules[i]
		if noFilter && !r.Always {
			continue
		}
		switch {
		case wild(r.Pattern):
			p, err := parsePattern(r.Pattern)
			if err != nil {
				return s, fmt.Errorf("rule of the filter: %w", err)
			}
			c := compiledRule{p, r}
			n := len(p.parts) - 1
			last, dir := p.parts[n], path.Dir(strings.TrimPrefix(r.Pattern, "/"))
			switch {
			case last.kind == literal:
				s.last[last.text] = append(s.last[last.text], c)
			case !p.anywhere && !wild(dir):
				s.dirs[dir] = append(s.dirs[dir], c)
			default:
				s.globs = append(s.globs, c)
			}
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
		case r.Except != "" && spares(r.Except, name):
			return false
		}
		return true
	}
	for _, list := range [][]*Rule{s.paths[rel], s.names[name]} {
		if i := slices.IndexFunc(list, fits); i >= 0 {
			return list[i]
		}
	}
	for _, list := range [][]compiledRule{s.last[name], s.dirs[path.Dir(rel)], s.globs} {
		for i := range list {
			if c := &list[i]; c.pattern.match(rel) && fits(c.rule) {
				return c.rule
			}
		}
	}
	return nil
}
