package catalog

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/anishathalye/porcupine"
)

// The catalog as one machine would have it that does one thing after the other:
// what histories of several servers are held against.

// step is what a client asks for. Registrations are told apart by their word, a
// description nobody else uses, so that what one of unknown outcome made can be
// found afterwards.
type step struct {
	client, number int // the number tells its access key
	kind           string
	id, name, word string
	account        string // to share with, or not to
	tag, value     string

	server      string // who was asked
	generation  int    // of the server
	unknown     bool   // the answer never came, or says nothing
	did         bool   // though unknown, it is in the record
	mark        int    // on the server's wire, of an unknown one: nothing of it is under way beyond
	code, saw   string // what was answered
	began, over int64  // nanoseconds of the history
}

// record is an image of the model.
type record struct {
	name, state, word string
	accounts          map[string]bool
	tags              map[string]string
}

// registry is a state of the model: records by id. It is not changed once made.
type registry map[string]*record

func sortedList(m map[string]string) string {
	var l []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		l = append(l, k+":"+m[k])
	}
	return strings.Join(l, ",")
}

func (r *record) permissions() string { return strings.Join(slices.Sorted(maps.Keys(r.accounts)), ",") }

// shown is what DescribeImages tells the owner.
func (r *record) shown() string {
	return r.name + "|" + r.word + "|" + r.state + "|" + sortedList(r.tags)
}

// String is all there is to know.
func (g registry) String() string {
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(g)) {
		r := g[id]
		fmt.Fprintf(&b, "%s=%s|%s\n", id, r.shown(), r.permissions())
	}
	return b.String()
}

// listed is what DescribeImages tells the owner of everything.
func (g registry) listed() string {
	var b strings.Builder
	for _, id := range slices.Sorted(maps.Keys(g)) {
		if r := g[id]; r.state != "deregistered" {
			fmt.Fprintf(&b, "%s=%s\n", id, r.shown())
		}
	}
	return b.String()
}

// do is what s makes of a state, and the answer.
func (g registry) do(s *step) (next registry, code, saw string) {
	if s.kind == "register" {
		for _, r := range g {
			if r.name == s.name && r.state != "deregistered" {
				return g, "InvalidAMIName.Duplicate", ""
			}
		}
		next = maps.Clone(g)
		next[s.id] = &record{name: s.name, word: s.word, state: "available"}
		return next, "", ""
	}
	switch s.kind {
	case "list":
		return g, "", g.listed()
	case "all":
		return g, "", g.String()
	}
	r := g[s.id]
	visible := r != nil && r.state != "deregistered"
	switch {
	case s.kind == "look": // as another account
		if visible && r.state == "available" && r.accounts[bob] {
			return g, "", r.name
		}
		return g, "InvalidAMIID.NotFound", ""
	case r == nil:
		return g, "InvalidAMIID.NotFound", ""
	case !visible:
		return g, "InvalidAMIID.Unavailable", ""
	case s.kind == "describe":
		return g, "", r.shown()
	case s.kind == "permissions":
		return g, "", r.permissions()
	}
	n := *r
	n.accounts, n.tags = maps.Clone(r.accounts), maps.Clone(r.tags)
	if n.accounts == nil {
		n.accounts = map[string]bool{}
	}
	if n.tags == nil {
		n.tags = map[string]string{}
	}
	switch s.kind {
	case "deregister":
		n.state, n.accounts = "deregistered", nil
	case "disable":
		if n.state == "available" {
			n.accounts = nil
		}
		n.state = "disabled"
	case "enable":
		n.state = "available"
	case "share":
		n.accounts[s.account] = true
	case "withdraw":
		delete(n.accounts, s.account)
	case "tag":
		n.tags[s.tag] = s.value
	case "untag":
		delete(n.tags, s.tag)
	default:
		return g, "no such step: " + s.kind, ""
	}
	next = maps.Clone(g)
	next[s.id] = &n
	return next, "", ""
}

// reads says whether a step changes nothing.
func (s *step) reads() bool {
	switch s.kind {
	case "list", "all", "look", "describe", "permissions":
		return true
	}
	return false
}

// registryModel is the model as porcupine wants it.
var registryModel = porcupine.Model{
	Init: func() any { return registry{} },
	Step: func(state, input, _ any) (bool, any) {
		s := input.(*step)
		next, code, saw := state.(registry).do(s)
		if s.unknown { // whatever the answer was
			return true, next
		}
		return code == s.code && saw == s.saw, next
	},
	Equal: func(a, b any) bool { return a.(registry).equal(b.(registry)) },
	DescribeOperation: func(input, _ any) string {
		s := input.(*step)
		return fmt.Sprintf("%s %s %s %s%s %s=%s → unknown %v, %q %q", s.kind, s.id, s.name, s.word, s.account, s.tag, s.value, s.unknown, s.code, s.saw)
	},
}

func (g registry) equal(h registry) bool {
	return maps.EqualFunc(g, h, func(a, b *record) bool {
		return a == b || a.name == b.name && a.word == b.word && a.state == b.state && maps.Equal(a.accounts, b.accounts) && maps.Equal(a.tags, b.tags)
	})
}

// TestRegistryRefuses: the model can find a history wrong.
func TestRegistryRefuses(t *testing.T) {
	const a, b = "ami-0000000000000000a", "ami-0000000000000000b"
	made := func(id, name string) *step { return &step{kind: "register", id: id, name: name, word: id} }
	shown := func(r record) string { return r.shown() }
	for _, x := range []struct {
		name  string
		fine  bool
		steps []*step // one after the other, but for those that overlap all that follow
	}{
		{"a name again after it is free", true, []*step{made(a, "n"), {kind: "deregister", id: a}, made(b, "n")}},
		{"a name twice", false, []*step{made(a, "n"), made(b, "n")}},
		{"a name that is free, refused", false, []*step{{kind: "register", name: "n", code: "InvalidAMIName.Duplicate"}}},
		{"a read that misses what was registered", false, []*step{made(a, "n"), {kind: "list"}}},
		{"a read that sees it", true, []*step{made(a, "n"), {kind: "list", saw: a + "=" + shown(record{name: "n", word: a, state: "available"}) + "\n"}}},
		{"a tag that is lost", false, []*step{
			made(a, "n"),
			{kind: "tag", id: a, tag: "k", value: "1"},
			{kind: "tag", id: a, tag: "l", value: "2"},
			{kind: "describe", id: a, saw: shown(record{name: "n", word: a, state: "available", tags: map[string]string{"l": "2"}})},
		}},
		{"both tags", true, []*step{
			made(a, "n"),
			{kind: "tag", id: a, tag: "k", value: "1"},
			{kind: "tag", id: a, tag: "l", value: "2"},
			{kind: "describe", id: a, saw: shown(record{name: "n", word: a, state: "available", tags: map[string]string{"k": "1", "l": "2"}})},
		}},
		{"a permission that comes back", false, []*step{
			made(a, "n"), {kind: "share", id: a, account: bob}, {kind: "withdraw", id: a, account: bob}, {kind: "look", id: a, saw: "n"},
		}},
		{"a permission that ends with disabling", true, []*step{
			made(a, "n"),
			{kind: "share", id: a, account: bob},
			{kind: "look", id: a, saw: "n"},
			{kind: "disable", id: a},
			{kind: "enable", id: a},
			{kind: "look", id: a, code: "InvalidAMIID.NotFound"},
			{kind: "permissions", id: a},
		}},
		{"a change of what is gone", false, []*step{made(a, "n"), {kind: "deregister", id: a}, {kind: "untag", id: a, tag: "k"}}},
		{"an unknown registration that was seen", true, []*step{
			{kind: "register", id: a, name: "n", word: a, unknown: true, did: true},
			{kind: "list"},
			{kind: "list", saw: a + "=" + shown(record{name: "n", word: a, state: "available"}) + "\n"},
		}},
		{"one that was seen, and then not", false, []*step{
			{kind: "register", id: a, name: "n", word: a, unknown: true, did: true},
			{kind: "list", saw: a + "=" + shown(record{name: "n", word: a, state: "available"}) + "\n"},
			{kind: "list"},
		}},
	} {
		var ops []porcupine.Operation
		for i, s := range x.steps {
			o := porcupine.Operation{ClientId: i, Input: s, Call: int64(2 * i), Return: int64(2*i + 1)}
			if s.unknown {
				o.Return = int64(2 * len(x.steps))
			}
			ops = append(ops, o)
		}
		if porcupine.CheckOperations(registryModel, ops) != x.fine {
			t.Errorf("%s: taken is %v", x.name, !x.fine)
		}
	}
}
