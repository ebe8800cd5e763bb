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
	parts    []part
	anywhere bool
}

// part is one component of a pattern. Most have one "*" at most: those are
// matched by their beginning and end, which a walk over millions of names
// does many times.
type part struct {
	text       string
	head, tail string
	kind       partKind
}

type partKind int

const (
	literal   partKind = iota
	headTail           // head, anything, tail
	anyDepth           // "**"
	difficult          // what path.Match has to decide
)

func newPart(s string) part {
	p := part{text: s}
	switch {
	case s == "**":
		p.kind = anyDepth
	case strings.Count(s, "*") == 1 && !strings.ContainsAny(s, `?[\`):
		p.kind = headTail
		p.head, p.tail, _ = strings.Cut(s, "*")
	case wild(s):
		p.kind = difficult
	}
	return p
}

func (p *part) match(name string) bool {
	switch p.kind {
	case literal:
		return p.text == name
	case headTail:
		return len(name) >= len(p.head)+len(p.tail) && strings.HasPrefix(name, p.head) && strings.HasSuffix(name, p.tail)
	case anyDepth:
		return true
	}
	// The error was ruled out when the pattern was parsed.
	ok, _ := path.Match(p.text, name)
	return ok
}

func parsePattern(s string) (pattern, error) {
	p := pattern{text: s, anywhere: !strings.Contains(s, "/")}
	for text := range strings.SplitSeq(strings.Trim(path.Clean("/"+s), "/"), "/") {
		if _, err := path.Match(text, ""); err != nil || text == "" {
			return p, fmt.Errorf("%w: %q", ErrPattern, s)
		}
		p.parts = append(p.parts, newPart(text))
	}
	return p, nil
}

// match tells whether the pattern stands for path, relative to the volume.
func (p *pattern) match(rel string) bool {
	if !p.parts[len(p.parts)-1].match(rel[strings.LastIndexByte(rel, '/')+1:]) {
		return false
	}
	return p.anywhere || matchParts(p.parts, rel)
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
		if parts[0].kind == anyDepth {
			return true
		}
		name, rest, _ := strings.Cut(dir, "/")
		if !parts[0].match(name) {
			return false
		}
		parts, dir = parts[1:], rest
	}
	return len(parts) > 0
}

func matchParts(parts []part, rel string) bool {
	for len(parts) > 0 {
		if parts[0].kind == anyDepth {
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
		if !parts[0].match(name) {
			return false
		}
		parts = parts[1:]
	}
	return rel == ""
}

func wild(s string) bool { return strings.ContainsAny(s, `*?[\`) }

// matchAny tells whether one of the patterns stands for rel.
func matchAny(ps []pattern, rel string) *pattern {
	for i := range ps {
		if ps[i].match(rel) {
			return &ps[i]
		}
	}
	return nil
}
