package retention

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func at(s string) time.Time {
	t, err := time.Parse("2006-01-02 15:04", s)
	if err != nil {
		panic(err)
	}
	return t
}

// kept are the ids that stay, sorted.
func kept(ds []Decision) []string {
	var ids []string
	for _, d := range ds {
		if !d.Removed() {
			ids = append(ids, d.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

func TestPolicy(t *testing.T) {
	var versions []Version
	for i, when := range []string{
		"2023-12-31 23:59", "2024-01-01 00:00", // another year, yet one ISO week apart from its Sunday
		"2024-02-28 10:00", "2024-02-29 10:00", "2024-03-01 10:00",
		"2024-03-01 11:00", "2024-03-01 12:00", "2024-03-02 09:00",
	} {
		versions = append(versions, Version{ID: fmt.Sprintf("v%d", i+1), Sequence: int64(i + 1), Created: at(when), Description: fmt.Sprintf("nr %d", i+1)})
	}
	for _, c := range []struct {
		policy Policy
		want   string
	}{
		{Policy{}, "v1 v2 v3 v4 v5 v6 v7 v8"},
		{Policy{Last: 3}, "v6 v7 v8"},
		{Policy{Daily: 1}, "v8"},
		{Policy{Daily: 3}, "v4 v7 v8"},
		{Policy{Daily: 100}, "v1 v2 v3 v4 v7 v8"},
		{Policy{Weekly: 2}, "v2 v8"},
		{Policy{Weekly: 3}, "v1 v2 v8"},
		{Policy{Monthly: 2}, "v4 v8"},
		{Policy{Monthly: 100}, "v1 v2 v4 v8"},
		{Policy{Yearly: 2}, "v1 v8"},
		{Policy{Last: 2, Daily: 2, Monthly: 2, Yearly: 2}, "v1 v4 v7 v8"},
		{Policy{Last: 1, Keep: []string{"nr 3", "nr [45]"}}, "v3 v4 v5 v8"},
		{Policy{Last: 1, Keep: []string{"nr 8"}}, "v7 v8"}, // what is excepted takes no place
	} {
		if err := c.policy.Check(); err != nil {
			t.Errorf("%v: %v", c.policy, err)
		}
		if got := strings.Join(kept(c.policy.Apply(versions)), " "); got != c.want {
			t.Errorf("%s keeps %s, want %s", c.policy, got, c.want)
		}
	}
	for _, p := range []Policy{{Last: -1}, {Daily: 1 << 30}, {Last: 1, Keep: []string{"["}}, {Last: 1, Keep: []string{""}}, {Keep: []string{"x"}}} {
		if err := p.Check(); !errors.Is(err, ErrPolicy) {
			t.Errorf("%+v: error %v", p, err)
		}
	}
}

// TestKeepAcrossSlashes: a description is no path.
func TestKeepAcrossSlashes(t *testing.T) {
	versions := []Version{{ID: "v1", Sequence: 1, Description: "before upgrade 2024/05/01"}, {ID: "v2", Sequence: 2, Description: "a/b"}, {ID: "v3", Sequence: 3}}
	for _, c := range []struct{ pattern, want string }{
		{"before*", "v1 v3"},
		{"*", "v1 v2 v3"},
		{"a?b", "v2 v3"},
		{"*/05/*", "v1 v3"},
		{"a/c", "v3"},
	} {
		if got := strings.Join(kept(Policy{Last: 1, Keep: []string{c.pattern}}.Apply(versions)), " "); got != c.want {
			t.Errorf("%q keeps %s, want %s", c.pattern, got, c.want)
		}
	}
}

// oracle decides in another way than Apply: each rule groups all versions, and
// keeps the newest of the newest groups.
func oracle(p Policy, versions []Version) []string {
	newer := func(a, b Version) int { return cmp.Compare(a.Sequence, b.Sequence) }
	stays := map[string]bool{}
	if p.Last+p.Daily+p.Weekly+p.Monthly+p.Yearly == 0 {
		for _, v := range versions {
			stays[v.ID] = true
		}
	} else if len(versions) > 0 {
		stays[slices.MaxFunc(versions, newer).ID] = true
	}
	day := func(v Version) int { return int(v.Created.Unix() / 86400) }
	for _, r := range []struct {
		keep  int
		group func(Version) string
	}{
		{p.Last, func(v Version) string { return v.ID }},
		{p.Daily, func(v Version) string { return fmt.Sprint(day(v)) }},
		{p.Weekly, func(v Version) string { return fmt.Sprint((day(v) + 3) / 7) }}, // 1970-01-01 was a Thursday
		{p.Monthly, func(v Version) string { y, m, _ := v.Created.UTC().Date(); return fmt.Sprint(y, m) }},
		{p.Yearly, func(v Version) string { return fmt.Sprint(v.Created.UTC().Year()) }},
	} {
		newest := map[string]Version{}
		for _, v := range versions {
			if v.Pinned != "" {
				stays[v.ID] = true
				continue
			}
			if g := r.group(v); newest[g].ID == "" || newer(newest[g], v) < 0 {
				newest[g] = v
			}
		}
		of := slices.SortedFunc(maps.Values(newest), func(a, b Version) int { return newer(b, a) })
		for _, v := range of[:min(r.keep, len(of))] {
			stays[v.ID] = true
		}
	}
	return slices.Sorted(maps.Keys(stays))
}

func drawVersions(t *rapid.T) []Version {
	n := rapid.IntRange(0, 60).Draw(t, "versions")
	clock := at("2019-12-20 00:00").Add(time.Duration(rapid.IntRange(0, 400*24).Draw(t, "from")) * time.Hour)
	var out []Version
	for i := range n {
		// Mostly forward; sometimes the clock was set back.
		clock = clock.Add(time.Duration(rapid.SampledFrom([]int{1, 5, 13, 24, 24, 25, 100, 800, 9000, -30}).Draw(t, "hours")) * time.Hour)
		v := Version{ID: fmt.Sprintf("v%03d", i), Sequence: int64(i + 1), Created: clock}
		if rapid.IntRange(0, 20).Draw(t, "pin") == 0 {
			v.Pinned = "tagged"
		}
		out = append(out, v)
	}
	return rapid.Permutation(out).Draw(t, "order")
}

func drawPolicy(t *rapid.T) Policy {
	n := func(name string) int { return rapid.SampledFrom([]int{0, 0, 1, 2, 3, 7, 50}).Draw(t, name) }
	return Policy{Last: n("last"), Daily: n("daily"), Weekly: n("weekly"), Monthly: n("monthly"), Yearly: n("yearly")}
}

func TestPolicyAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		versions, p := drawVersions(t), drawPolicy(t)
		before := slices.Clone(versions)
		got := p.Apply(versions)
		if !slices.Equal(before, versions) {
			t.Fatal("the argument was changed")
		}
		if want := oracle(p, versions); !slices.Equal(kept(got), want) {
			t.Fatalf("%s keeps %q, the oracle %q", p, kept(got), want)
		}
		if len(got) != len(versions) || !slices.IsSortedFunc(got, func(a, b Decision) int { return cmp.Compare(b.Sequence, a.Sequence) }) {
			t.Fatalf("decisions are not one a version, newest first: %v", got)
		}
		// What stays once stays when the policy is applied again.
		var rest []Version
		for _, d := range got {
			if !d.Removed() {
				rest = append(rest, d.Version)
			}
		}
		if again := kept(p.Apply(rest)); !slices.Equal(again, kept(got)) {
			t.Fatalf("%s: applied again keeps %q of %q", p, again, kept(got))
		}
		// More is never less, unless it is the first number at all.
		if p.removes() {
			more := p
			more.Daily++
			more.Yearly++
			for _, id := range kept(got) {
				if !slices.Contains(kept(more.Apply(versions)), id) {
					t.Fatalf("%s removes %s, which %s keeps", more, id, p)
				}
			}
		}
	})
}

// TestYears captures twice a day for three years, pruning after each: what is
// promised is there at the end, though each day only saw what the day before
// had left.
func TestYears(t *testing.T) {
	p := Policy{Last: 2, Daily: 7, Weekly: 5, Monthly: 12, Yearly: 10}
	var versions []Version
	clock := at("2022-01-01 02:00")
	seq := int64(0)
	for clock.Before(at("2025-01-01 00:00")) {
		seq++
		versions = append(versions, Version{ID: fmt.Sprintf("v%05d", seq), Sequence: seq, Created: clock})
		versions = slices.DeleteFunc(versions, func(v Version) bool {
			return !slices.Contains(kept(p.Apply(versions)), v.ID)
		})
		clock = clock.Add(12 * time.Hour)
	}
	var days []string
	for _, v := range versions {
		days = append(days, v.Created.Format("2006-01-02T15"))
	}
	want := "2022-12-31T14 2023-12-31T14 2024-01-31T14 2024-02-29T14 2024-03-31T14 2024-04-30T14 2024-05-31T14 2024-06-30T14 " +
		"2024-07-31T14 2024-08-31T14 2024-09-30T14 2024-10-31T14 2024-11-30T14 2024-12-08T14 2024-12-15T14 2024-12-22T14 " +
		"2024-12-25T14 2024-12-26T14 2024-12-27T14 2024-12-28T14 2024-12-29T14 2024-12-30T14 2024-12-31T02 2024-12-31T14"
	if got := strings.Join(days, " "); got != want {
		t.Errorf("after three years there are\n%s\nwant\n%s", got, want)
	}
}
