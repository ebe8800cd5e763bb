package metadata

import (
	"context"
	"slices"
	"sort"
	"strings"
	"time"
)

// versions are what GET / lists, oldest first. All of them serve; a version
// hides what came later. They compare as strings, "latest" after every date.
var versions = []string{
	"1.0", "2007-01-19", "2007-03-01", "2007-08-29", "2007-10-10", "2007-12-15", "2008-02-01", "2008-09-01",
	"2009-04-04", "2011-01-01", "2011-05-01", "2012-01-12", "2014-02-25", "2014-11-05", "2015-10-20",
	"2016-04-19", "2016-06-30", "2016-09-02", "2018-03-28", "2018-08-17", "2018-09-24", "2019-10-01",
	"2020-10-27", "2021-01-03", "2021-03-23", "2021-07-15", "2022-09-24", "2024-04-11", "latest",
}

// node is a place in the tree. It is one of: a leaf (leaf, raw, or fetch for
// one that costs something to find out), a directory with the entries of dir, or a
// directory whose entries' names depend on the record: names gives them as
// they are listed, and each is what every one of them is. Listings are made of
// the same functions that answer, so what is listed is there.
type node struct {
	name  string
	since string // first version that has it

	leaf  func(*view) (value string, ok bool)
	raw   func(*view) []byte // a leaf of any bytes; nil: absent
	fetch func(context.Context, *view) (string, error)
	when  func(*view) bool // whether fetch has something; nil: yes

	dir []node

	names func(*view) []string
	enter func(v *view, name string) bool // sets the view on the entry of that name
	each  *node
}

func (n *node) isDir() bool { return n.leaf == nil && n.raw == nil && n.fetch == nil }

// view is what leaf functions see: the instance, and where below it they are.
type view struct {
	h       *Handler
	in      *Instance
	live    Live
	version string
	now     time.Time

	nic  *Interface // below network/interfaces/macs/MAC
	key  *PublicKey // below public-keys/N
	name string     // the last dynamic name entered
}

func (v *view) events() *Events {
	if v.live.Events != nil {
		return v.live.Events
	}
	return &v.in.Events
}

// present reports whether the node is there for this instance and version.
func (n *node) present(v *view) bool {
	switch {
	case n.since > v.version:
		return false
	case n.leaf != nil:
		_, ok := n.leaf(v)
		return ok
	case n.raw != nil:
		return n.raw(v) != nil
	case n.fetch != nil:
		return n.when == nil || n.when(v)
	case n.names != nil:
		return len(n.names(v)) > 0
	}
	for i := range n.dir {
		if n.dir[i].present(v) {
			return true
		}
	}
	return false
}

// list makes a directory's body: names joined by newlines, none at the end,
// sub-directories with a slash, sorted by name.
func (n *node) list(v *view) string {
	var b strings.Builder
	add := func(name string, dir bool) {
		if b.Len() > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(name)
		if dir {
			b.WriteByte('/')
		}
	}
	if n.names != nil {
		for _, name := range n.names(v) {
			// A key's entry is a directory, but EC2 lists it as N=name alone.
			add(name, n.each.isDir() && !strings.Contains(name, "="))
		}
		return b.String()
	}
	for i := range n.dir {
		if c := &n.dir[i]; c.present(v) {
			add(c.name, c.isDir())
		}
	}
	return b.String()
}

// walk finds the node of a path whose segments are separated by
// slashes, setting the view on the way; nil if there is none. A leaf asked
// with a trailing slash is the leaf.
func (n *node) walk(v *view, path string) *node {
	for {
		path = strings.TrimLeft(path, "/")
		if path == "" {
			return n
		}
		if !n.isDir() {
			return nil
		}
		var seg string
		seg, path, _ = strings.Cut(path, "/")
		if n.names != nil {
			if !n.enter(v, seg) {
				return nil
			}
			n = n.each
			continue
		}
		i := sort.Search(len(n.dir), func(i int) bool { return n.dir[i].name >= seg })
		if i == len(n.dir) || n.dir[i].name != seg || n.dir[i].since > v.version {
			return nil
		}
		n = &n.dir[i]
	}
}

// dir makes a directory, its entries sorted by name.
func dir(name, since string, entries ...node) node {
	slices.SortFunc(entries, func(a, b node) int { return strings.Compare(a.name, b.name) })
	return node{name: name, since: since, dir: entries}
}

// text makes a leaf that is absent when empty.
func text(name, since string, f func(*view) string) node {
	return node{name: name, since: since, leaf: func(v *view) (string, bool) {
		s := f(v)
		return s, s != ""
	}}
}

// lines makes a leaf of one value a line, absent when there are none.
func lines[T any](name, since string, f func(*view) []T, format func(T) string) node {
	return node{name: name, since: since, leaf: func(v *view) (string, bool) {
		values := f(v)
		if len(values) == 1 {
			return format(values[0]), true
		}
		out := make([]string, len(values))
		for i, x := range values {
			out[i] = format(x)
		}
		return strings.Join(out, "\n"), len(values) > 0
	}}
}

func same(s string) string { return s }
