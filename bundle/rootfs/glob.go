package rootfs

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// ErrPattern is wrapped by errors about patterns that cannot be read.
var ErrPattern = errors.New("invalid pattern")

// pattern is a path with wildcards: "*", "?" and "[a-z]" within a component,
// "**" for any number of components. One that contains a slash stands for
// paths from the volume's root; one without stands for a name anywhere.
type pattern struct {
	text     string
	parts    []string
	anywhere bool
}

func parsePattern(s string) (pattern, error) {
	p := pattern{text: s, anywhere: !strings.Contains(s, "/")}
	for part := range strings.SplitSeq(strings.Trim(path.Clean("/"+s), "/"), "/") {
		if _, err := path.Match(part, ""); err != nil || part == "" {
			return p, fmt.Errorf("%w: %q", ErrPattern, s)
		}
		p.parts = append(p.parts, part)
	}
	return p, nil
}

// match tells whether the pattern stands for path, relative to the volume.
func (p *pattern) match(rel string) bool {
	if p.anywhere {
		return matchPart(p.parts[0], path.Base(rel))
	}
	return matchParts(p.parts, rel)
}

// leads tells whether the pattern may stand for something beneath directory dir.
func (p *pattern) leads(dir string) bool {
	if p.anywhere {
		return true
	}
	parts := p.parts
	for dir != "" {
		if len(parts) == 0 {
			return false
		}
		if parts[0] == "**" {
			return true
		}
		name, rest, _ := strings.Cut(dir, "/")
		if !matchPart(parts[0], name) {
			return false
		}
		parts, dir = parts[1:], rest
	}
	return len(parts) > 0
}

func matchParts(parts []string, rel string) bool {
	for len(parts) > 0 {
		if parts[0] == "**" {
			for {
				if matchParts(parts[1:], rel) {
					return true
				}
				if rel == "" {
					return false
				}
				_, rel, _ = strings.Cut(rel, "/")
			}
		}
		if rel == "" {
			return false
		}
		var name string
		name, rel, _ = strings.Cut(rel, "/")
		if !matchPart(parts[0], name) {
			return false
		}
		parts = parts[1:]
	}
	return rel == ""
}

func matchPart(part, name string) bool {
	if !wild(part) {
		return part == name
	}
	// The error was ruled out when the pattern was parsed.
	ok, _ := path.Match(part, name)
	return ok
}

// matchAny tells whether one of the patterns stands for rel.
func matchAny(ps []pattern, rel string) *pattern {
	for i := range ps {
		if ps[i].match(rel) {
			return &ps[i]
		}
	}
	return nil
}
