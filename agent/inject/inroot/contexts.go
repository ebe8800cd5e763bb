package inroot

import (
	"regexp"
	"strings"
)

// fileContexts are the entries of an SELinux policy's file_contexts(5), in
// their order.
type fileContexts []fileContext

type fileContext struct {
	pattern string // regular expression for the whole path
	prefix  string // what every path that matches begins with
	exact   bool   // the pattern is the path itself, which is prefix
	kind    string // "" any, "--" file, "-d" directory, others
	label   string
}

// none is the label that stands for: leave alone.
const none = "<<none>>"

// parseContexts reads a file_contexts file; lines that are none are passed over.
func parseContexts(text string) fileContexts {
	var all fileContexts
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || len(f) > 3 || f[0][0] != '/' || len(line) > maxLabel {
			continue
		}
		c := fileContext{pattern: f[0], label: f[len(f)-1]}
		if len(f) == 3 {
			c.kind = f[1]
		}
		if c.label != none && !isLabel(c.label) {
			continue
		}
		c.prefix, c.exact = literal(c.pattern)
		all = append(all, c)
	}
	return all
}

// isLabel tells whether s is user:role:type, with or without a level.
func isLabel(s string) bool {
	parts := strings.SplitN(s, ":", 4)
	if len(parts) < 3 || len(s) >= maxLabel {
		return false
	}
	for _, p := range parts[:3] {
		if p == "" || strings.IndexFunc(p, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-' || r == '.')
		}) >= 0 {
			return false
		}
	}
	return true
}

// literal is the fixed beginning of what a pattern matches, and whether that
// is all of it.
func literal(pattern string) (prefix string, exact bool) {
	if alternatives(pattern) {
		return "", false
	}
	var b []byte
	for i := 0; i < len(pattern); i++ {
		switch c := pattern[i]; c {
		case '?', '*', '{':
			// The character before may be absent.
			if len(b) > 0 {
				b = b[:len(b)-1]
			}
			return string(b), false
		case '.', '+', '[', ']', '(', ')', '}', '^', '$':
			return string(b), false
		case '\\':
			i++
			if i == len(pattern) || !strings.ContainsRune(`.+[]()?*{}^$|\-`, rune(pattern[i])) {
				return string(b), false
			}
			b = append(b, pattern[i])
		default:
			b = append(b, c)
		}
	}
	return string(b), true
}

// alternatives tells whether a pattern is one of several ("/a|/b").
func alternatives(pattern string) bool {
	depth := 0
	for i := 0; i < len(pattern); i++ {
		switch pattern[i] {
		case '\\':
			i++
		case '(':
			depth++
		case ')':
			depth--
		case '|':
			if depth <= 0 {
				return true
			}
		}
	}
	return false
}

// find is the label for a path: of the last entry that matches, entries that
// are a path and no pattern first.
func (all fileContexts) find(name string, dir bool) string {
	kind := "--"
	if dir {
		kind = "-d"
	}
	best := ""
	for i := len(all) - 1; i >= 0; i-- {
		c := all[i]
		if c.kind != "" && c.kind != kind || !strings.HasPrefix(name, c.prefix) || !c.exact && best != "" {
			continue
		}
		if c.exact {
			if c.prefix == name {
				best = c.label
				break
			}
			continue
		}
		// What Go's syntax lacks of the policy's matches nothing.
		if re, err := regexp.Compile("^(?:" + c.pattern + ")$"); err == nil && re.MatchString(name) {
			best = c.label
		}
	}
	if best == none {
		return ""
	}
	return best
}
