// Package retention says which versions of an image are kept, and removes the
// others.
//
// In go a policy and the versions there are; out comes a decision about each,
// with its reasons. The policy is a function of these alone; [Prune] carries
// it out on a store and deletes versions of the image it is told, no others.
package retention

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"
)

// Policy says which versions of an image are kept. Each number keeps that many:
// the last versions, or the newest version of each of the newest days, weeks
// (ISO 8601, from Monday), months and years, in UTC, that have one. What any
// rule keeps is kept; the newest version always is. The zero value keeps all.
type Policy struct {
	Last    int `json:"last,omitempty" yaml:"last,omitempty"`
	Daily   int `json:"daily,omitempty" yaml:"daily,omitempty"`
	Weekly  int `json:"weekly,omitempty" yaml:"weekly,omitempty"`
	Monthly int `json:"monthly,omitempty" yaml:"monthly,omitempty"`
	Yearly  int `json:"yearly,omitempty" yaml:"yearly,omitempty"`
	// Keep are patterns of the descriptions of versions that are never removed
	// and take no place of the others: as of path.Match, but * and ? match '/' too.
	Keep []string `json:"keep,omitempty" yaml:"keep,omitempty"`
}

// ErrPolicy is wrapped by errors about a policy that cannot be meant.
var ErrPolicy = errors.New("invalid retention")

// maxKept bounds a policy's numbers: ten thousand days are 27 years.
const maxKept = 10000

// Check says why p cannot be meant.
func (p Policy) Check() error {
	for _, r := range p.rules() {
		if r.keep < 0 || r.keep > maxKept {
			return fmt.Errorf("%w: %s: %d is not between 0 and %d", ErrPolicy, r.name, r.keep, maxKept)
		}
	}
	for _, k := range p.Keep {
		if _, err := path.Match(k, ""); err != nil || k == "" || len(k) > 255 || strings.ContainsAny(k, ",\n\x00") {
			return fmt.Errorf("%w: %q is no pattern of descriptions (for a comma write ?)", ErrPolicy, k)
		}
	}
	if len(p.Keep) > 0 && !p.removes() {
		return fmt.Errorf("%w: without a number of versions to keep nothing is removed, and there is nothing to except", ErrPolicy)
	}
	return nil
}

// Zero tells whether p keeps everything.
func (p Policy) Zero() bool { return !p.removes() && len(p.Keep) == 0 }

// removes tells whether p can remove anything.
func (p Policy) removes() bool {
	return slices.ContainsFunc(p.rules(), func(r rule) bool { return r.keep != 0 })
}

// String is p in the words of the command line's options.
func (p Policy) String() string {
	var words []string
	for _, r := range p.rules() {
		if r.keep != 0 {
			words = append(words, fmt.Sprintf("%s %d", r.name, r.keep))
		}
	}
	for _, k := range p.Keep {
		words = append(words, fmt.Sprintf("described as %q", k))
	}
	if len(words) == 0 {
		return "everything"
	}
	return strings.Join(words, ", ")
}

// matches reports whether a description is one of a pattern's. A description is
// no path: a '/' in it, as of a date, is a character like the others.
func matches(pattern, description string) bool {
	plain := strings.NewReplacer("/", "\x01")
	ok, err := path.Match(plain.Replace(pattern), plain.Replace(description))
	return ok && err == nil
}

// rule keeps the newest version of each of the first keep periods.
type rule struct {
	name   string
	keep   int
	period func(v Version) string
}

func (p Policy) rules() []rule {
	return []rule{
		{"last", p.Last, func(v Version) string { return v.ID }},
		{"daily", p.Daily, func(v Version) string { return v.Created.UTC().Format("2006-01-02") }},
		{"weekly", p.Weekly, func(v Version) string {
			year, week := v.Created.UTC().ISOWeek()
			return fmt.Sprintf("%d-W%02d", year, week)
		}},
		{"monthly", p.Monthly, func(v Version) string { return v.Created.UTC().Format("2006-01") }},
		{"yearly", p.Yearly, func(v Version) string { return v.Created.UTC().Format("2006") }},
	}
}

// Version is what a policy looks at of a version of an image.
type Version struct {
	ID          string
	Sequence    int64 // the order in which versions were published
	Created     time.Time
	Description string
	Pinned      string // why it is kept whatever the policy says; "" if it is not
}

// Decision is what becomes of a version.
type Decision struct {
	Version
	Reasons []string // by which it is kept; none: it is removed
}

// Removed tells whether the version goes.
func (d Decision) Removed() bool { return len(d.Reasons) == 0 }

// Apply decides about the versions of one image, newest first. It is a
// function of its arguments alone: no clock takes part, so that a machine
// which captured nothing for a year loses nothing.
func (p Policy) Apply(versions []Version) []Decision {
	out := make([]Decision, len(versions))
	for i, v := range versions {
		out[i].Version = v
	}
	// By sequence: it is the store's, where times are by the clock of whoever captured.
	slices.SortFunc(out, func(a, b Decision) int {
		return cmp.Or(cmp.Compare(b.Sequence, a.Sequence), b.Created.Compare(a.Created), strings.Compare(a.ID, b.ID))
	})
	all := !p.removes()
	for i := range out {
		v := &out[i]
		switch {
		case v.Pinned != "":
			v.Reasons = append(v.Reasons, v.Pinned)
		case all:
			v.Reasons = append(v.Reasons, "no retention")
		default:
			for _, k := range p.Keep {
				if matches(k, v.Description) {
					v.Reasons = append(v.Reasons, fmt.Sprintf("described as %q", k))
				}
			}
		}
	}
	if all {
		return out
	}
	exempt := make([]bool, len(out))
	for i := range out {
		exempt[i] = !out[i].Removed()
	}
	for _, r := range p.rules() {
		seen := make(map[string]bool)
		for i := range out {
			if len(seen) == r.keep {
				break
			}
			if exempt[i] {
				continue
			}
			if at := r.period(out[i].Version); !seen[at] {
				seen[at] = true
				reason := r.name
				if r.name != "last" {
					reason += " " + at
				}
				out[i].Reasons = append(out[i].Reasons, reason)
			}
		}
	}
	if len(out) > 0 && out[0].Removed() {
		out[0].Reasons = append(out[0].Reasons, "newest")
	}
	return out
}
