package ec2api

import (
	"slices"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

// matcher is a set of filters for what is no image: all must hold, each by one
// of its values.
type matcher []filter

// newMatcher checks that the filters' names are among those known; a known name
// that ends in ':' is the beginning of many.
func newMatcher(l []filter, known ...string) (matcher, error) {
	for _, f := range l {
		if !slices.ContainsFunc(known, func(k string) bool {
			return f.Name == k || strings.HasSuffix(k, ":") && strings.HasPrefix(f.Name, k) && len(f.Name) > len(k)
		}) {
			return nil, refuse(catalog.CodeParameterValue, "The filter '%.255s' is invalid", f.Name)
		}
		if len(f.Value) > 200 {
			return nil, refuse(catalog.CodeParameterValue, "The filter '%.255s' has more than 200 values", f.Name)
		}
	}
	return l, nil
}

// all says whether every filter holds; field gives a name's values.
func (m matcher) all(field func(name string) []string) bool {
	return !slices.ContainsFunc(m, func(f filter) bool {
		return !slices.ContainsFunc(field(f.Name), func(is string) bool {
			return slices.ContainsFunc(f.Value, func(pattern string) bool { return catalog.Glob(pattern, is) })
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
