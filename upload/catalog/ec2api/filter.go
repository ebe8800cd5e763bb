package ec2api

import (
	"slices"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

// matcher is a set of filters for what is no image: all must hold, each by one
// of its values.
type matcher []compiled

type compiled struct {
	name   string
	values []catalog.Pattern
}

// newMatcher checks that the filters' names are among those known; a known name
// that ends in ':' is the beginning of many.
func newMatcher(l []filter, known ...string) (matcher, error) {
	var m matcher
	values, size := 0, 0
	for _, f := range l {
		if !slices.ContainsFunc(known, func(k string) bool {
			return f.Name == k || strings.HasSuffix(k, ":") && strings.HasPrefix(f.Name, k) && len(f.Name) > len(k)
		}) {
			return nil, refuse(catalog.CodeParameterValue, "The filter '%.255s' is invalid", f.Name)
		}
		c := compiled{name: f.Name}
		for _, v := range f.Value {
			values, size = values+1, size+len(v)
			if values > catalog.MaxFilterValues || size > catalog.MaxFilterBytes {
				return nil, refuse(codeFilterLimit, "The request's filters have more than %d values, or these more than %d bytes", catalog.MaxFilterValues, catalog.MaxFilterBytes)
			}
			c.values = append(c.values, catalog.NewPattern(v))
		}
		m = append(m, c)
	}
	return m, nil
}

// all says whether every filter holds; field gives a name's values.
func (m matcher) all(field func(name string) []string) bool {
	return !slices.ContainsFunc(m, func(c compiled) bool {
		return !slices.ContainsFunc(field(c.name), func(is string) bool {
			return slices.ContainsFunc(c.values, func(p catalog.Pattern) bool { return p.Match(is) })
		})
	})
}

// tagField are the values that the names of filters about tags have.
func tagField(tags catalog.Tags, name string) []string {
	switch name {
	case "tag-key":
		return tags.Sorted()
	case "tag-value":
		var out []string
		for _, k := range tags.Sorted() {
			out = append(out, tags[k])
		}
		return out
	}
	if key, ok := strings.CutPrefix(name, "tag:"); ok {
		if v, there := tags[key]; there {
			return []string{v}
		}
	}
	return nil
}
