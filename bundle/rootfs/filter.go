package rootfs

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// scope is what is known of a directory's contents before they are looked at.
type scope struct {
	included bool     // Options.Include has asked for the directory or one above it
	only     *verdict // nothing but what is included goes in, for that reason
}

type action int

const (
	keep     action = iota
	omit            // the name and all beneath it
	contents        // a directory stays, empty
	empty           // a file stays, empty
)

// verdict is what the filter says of one name.
type verdict struct {
	action  action
	class   Class
	rule    string
	why     string
	descend bool // an include may stand for something beneath
	check   bool // the content is to be looked at
	scope   scope
}

func (v *verdict) omission(rel string) Omission {
	return Omission{Path: rel, Class: v.class, Rule: v.rule, Why: v.why}
}

// filter decides by names what stays out.
type filter struct {
	rules    ruleSet
	include  []userPattern
	exclude  []userPattern
	never    map[[2]uint64]string
	search   *searcher
	neverPat []pattern
	swaps    map[string]bool // swap files in use or named by fstab, relative to the volume
}

// userPattern is a pattern of the options.
type userPattern struct {
	text string
	alts []pattern // it stands for what any of these does
	must bool      // it has to stand for something
	hit  bool
}

func newFilter(o *Options, volume string) (*filter, error) {
	f := &filter{never: map[[2]uint64]string{}, search: newSearcher(), swaps: map[string]bool{}}
	var err error
	if f.rules, err = newRuleSet(Rules(), o.NoFilter); err != nil {
		return nil, err
	}
	for _, x := range []struct {
		from []string
		to   *[]userPattern
		must bool
	}{{o.Include, &f.include, true}, {o.Exclude, &f.exclude, true}, {o.ExcludeLoose, &f.exclude, false}} {
		for _, s := range x.from {
			p, err := newUserPattern(s, volume, x.must)
			if err != nil {
				return nil, err
			}
			*x.to = append(*x.to, p)
		}
	}
	return f, f.addNever(o.Never, volume)
}

func newUserPattern(s, volume string, must bool) (userPattern, error) {
	u := userPattern{text: s, must: must}
	forms := []string{s}
	if rel, ok := beneath(volume, filepath.Clean(s)); ok && volume != "/" {
		forms = append(forms, "/"+rel)
	}
	if !strings.Contains(s, "/") {
		forms = []string{"/" + s}
	}
	for _, form := range forms {
		p, err := parsePattern(form)
		if err != nil {
			return u, err
		}
		u.alts = append(u.alts, p)
		// Only whether anything is there: what the walk decides, it decides
		// by the names it finds itself.
		if found, err := filepath.Glob(filepath.Join(volume, form)); err == nil && len(found) > 0 {
			u.hit = true
		}
	}
	if !strings.Contains(s, "/") && !u.hit {
		p, err := parsePattern(s)
		if err != nil {
			return u, err
		}
		u.alts = []pattern{p}
	}
	return u, nil
}

// addNever notes the files to be left out under all circumstances, and what
// inodes they are.
func (f *filter) addNever(paths []string, volume string) error {
	for _, p := range paths {
		abs, err := filepath.Abs(p)
		if err != nil {
			return fmt.Errorf("finding %s: %w", p, err)
		}
		dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
		if err != nil {
			continue // what is not there cannot be captured
		}
		abs = filepath.Join(dir, filepath.Base(abs))
		found, err := filepath.Glob(abs)
		if err != nil {
			return fmt.Errorf("%w: %q", ErrPattern, p)
		}
		for _, name := range found {
			var st unix.Statx_t
			if err := unix.Statx(unix.AT_FDCWD, name, 0, statxMask, &st); err == nil {
				f.never[[2]uint64{device(&st), st.Ino}] = p
			}
		}
		if rel, ok := beneath(volume, abs); ok && rel != "." {
			pat, err := parsePattern("/" + rel)
			if err != nil {
				return err
			}
			f.neverPat = append(f.neverPat, pat)
		}
	}
	return nil
}

// neverIn lets the files to be left out be recognised in a snapshot, where
// they have another device number.
func (f *filter) neverIn(dev uint64, snapshot int) {
	var st unix.Statx_t
	if statFD(snapshot, &st) != nil {
		return
	}
	for key, p := range maps.Clone(f.never) {
		if key[0] == dev {
			f.never[[2]uint64{device(&st), key[1]}] = p
		}
	}
}

// judge decides on the name rel in a directory of the given scope.
func (f *filter) judge(in scope, rel string, a *filetree.Attr) verdict {
	dir := a.Type() == unix.S_IFDIR
	if p, ok := f.never[[2]uint64{a.Dev, a.Ino}]; ok && a.Ino != 0 {
		return verdict{action: omit, class: Own, rule: p, why: "belongs to this capture"}
	}
	if p := matchAny(f.neverPat, rel); p != nil {
		return verdict{action: omit, class: Own, rule: p.text, why: "belongs to this capture"}
	}
	if in.included || matchUser(f.include, rel) != nil {
		return verdict{scope: scope{included: true}}
	}
	if in.only != nil {
		if dir && f.leads(rel) {
			return verdict{descend: true, scope: in}
		}
		v := *in.only
		v.action = omit
		return v
	}
	if u := matchUser(f.exclude, rel); u != nil {
		v := verdict{action: omit, class: Excluded, rule: u.text, why: "excluded by request"}
		return f.towards(v, rel, dir)
	}
	if f.swaps[rel] {
		return verdict{action: omit, class: Swap, rule: "swap file", why: "swap space holds memory"}
	}
	r := f.rules.find(rel, a.Type())
	if r != nil && (r.Class == Secret || r.Class == Leftover) && isPublished(rel) {
		r = nil
	}
	if r == nil {
		return verdict{check: true}
	}
	v := verdict{action: omit, class: r.Class, rule: r.Pattern, why: r.Why}
	switch {
	case r.Keep == KeepDirectory:
		v.action = contents
	case r.Keep == KeepEmpty:
		v.action = empty
	}
	return f.towards(v, rel, dir)
}

// addSwaps notes swap files by their absolute paths in the volume. They stay
// out without the filter, too: no image has a use for them.
func (f *filter) addSwaps(paths []string) {
	for _, p := range paths {
		f.swaps[strings.TrimPrefix(p, "/")] = true
	}
}

// towards lets the walk enter a directory that stays out where something in
// it is to go in.
func (f *filter) towards(v verdict, rel string, dir bool) verdict {
	if dir && f.leads(rel) {
		only := v
		v.action, v.descend = contents, true
		v.scope.only = &only
	}
	return v
}

// leads tells whether an include may stand for something beneath dir.
func (f *filter) leads(dir string) bool {
	for i := range f.include {
		for j := range f.include[i].alts {
			if p := &f.include[i].alts[j]; !p.anywhere && p.leads(dir) {
				return true
			}
		}
	}
	return false
}

// leavesOut tells whether the names alone keep a directory out of the image,
// or one above it.
func (f *filter) leavesOut(rel string) bool {
	if rel == "." {
		return false
	}
	var s scope
	for i := 0; i <= len(rel); i++ {
		if i < len(rel) && rel[i] != '/' {
			continue
		}
		v := f.judge(s, rel[:i], &filetree.Attr{Mode: unix.S_IFDIR})
		if v.action == omit || v.action == contents && !v.descend && i < len(rel) {
			return true
		}
		s = v.scope
	}
	return false
}

// linkable tells whether one more name of a captured file goes in.
func (f *filter) linkable(in scope, rel string) bool {
	v := f.judge(in, rel, &filetree.Attr{Mode: unix.S_IFREG})
	return v.action == keep
}

// unmatched is the error for user patterns that stood for nothing.
func (f *filter) unmatched() error {
	var errs []error
	for _, x := range []struct {
		what string
		ps   []userPattern
	}{{"include", f.include}, {"exclude", f.exclude}} {
		for i := range x.ps {
			if u := &x.ps[i]; u.must && !u.hit {
				errs = append(errs, fmt.Errorf("%s pattern %q %w in the volume", x.what, u.text, ErrNoMatch))
			}
		}
	}
	return errors.Join(errs...)
}

func matchUser(us []userPattern, rel string) *userPattern {
	for i := range us {
		if matchAny(us[i].alts, rel) != nil {
			us[i].hit = true
			return &us[i]
		}
	}
	return nil
}
