package catalog

import (
	"context"
	"slices"
	"strings"
)

// Query is what DescribeImages asks for. Lists that are empty ask for nothing
// in particular.
type Query struct {
	IDs               []string // all must be there, and visible
	Owners            []string // accounts, aliases, self
	ExecutableBy      []string // accounts, self, all: whose launch permission is explicit
	Filters           []Filter
	IncludeDeprecated bool // the owner sees his own in any case
	IncludeDisabled   bool // of one's own; named by id they are seen in any case
}

// Describe gives the images that answer a query in the name of an account, by
// id. An id that is not there, or not to be seen, is InvalidAMIID.NotFound.
func (v *View) Describe(ctx context.Context, account string, q Query) ([]*Image, error) {
	if err := CheckAccount(account); err != nil {
		return nil, err
	}
	filters, err := ParseFilters(q.Filters)
	if err != nil {
		return nil, err
	}
	owners, err := v.owners(ctx, account, q.Owners)
	if err != nil {
		return nil, err
	}
	for _, e := range q.ExecutableBy {
		if e != "self" && e != "all" && !accountID.MatchString(e) {
			return nil, refuse(CodeParameterValue, "Invalid user id: %q", clip(e))
		}
	}
	alias, err := v.aliases(ctx)
	if err != nil {
		return nil, err
	}
	now := v.c.opt.Now()
	fits := func(m *Image, named bool) bool {
		switch {
		case len(owners) > 0 && !owners[m.Owner],
			!named && m.State == Disabled && !q.IncludeDisabled,
			!named && !q.IncludeDeprecated && m.Owner != account && m.IsDeprecated(now),
			len(q.ExecutableBy) > 0 && !slices.ContainsFunc(q.ExecutableBy, func(e string) bool { return m.executableBy(e, account) }):
			return false
		}
		return filters.Match(m, alias, m.Owner == account)
	}
	var found []*Image
	if len(q.IDs) > 0 {
		var missing []string
		for _, id := range q.IDs {
			if err := CheckID(id); err != nil {
				return nil, err
			}
		}
		for _, id := range slices.Compact(slices.Sorted(slices.Values(q.IDs))) {
			m, err := v.Image(ctx, id)
			if err != nil {
				return nil, err
			}
			switch {
			case m != nil && m.State == Deregistered && m.Owner == account && len(q.IDs) == 1:
				return nil, refuse(CodeAMIUnavailable, "The image id '[%s]' is no longer available", id)
			case m == nil || !m.Visible(account):
				missing = append(missing, id)
			case fits(m, true):
				found = append(found, m)
			}
		}
		if len(missing) > 0 {
			word := "The image id '[%s]' does not exist"
			if len(missing) > 1 {
				word = "The image ids '[%s]' do not exist"
			}
			return nil, refuse(CodeAMINotFound, word, strings.Join(missing, ", "))
		}
		return found, nil
	}
	if err := v.Load(ctx); err != nil {
		return nil, err
	}
	for m, err := range v.Images(ctx) {
		if err == nil {
			err = ctx.Err() // what is loaded is gone through without asking it
		}
		if err != nil {
			return nil, err
		}
		if m.Visible(account) && fits(m, false) {
			found = append(found, m)
		}
	}
	return found, nil
}

// executableBy says whether launch permission was given to e, as DescribeImages
// means it: explicitly; all is everybody's. To whom an image is shared, beside
// the caller, is for its owner to know.
func (m *Image) executableBy(e, account string) bool {
	switch e {
	case "self":
		return m.Shared(account)
	case "all":
		return m.Public
	}
	return (e == account || m.Owner == account) && m.Shared(e)
}

// owners makes account ids of owners. An alias nobody has is nobody's.
func (v *View) owners(ctx context.Context, account string, names []string) (map[string]bool, error) {
	ids := map[string]bool{}
	for _, n := range names {
		switch {
		case n == "self":
			ids[account] = true
		case accountID.MatchString(n):
			ids[n] = true
		default:
			a, err := v.AccountByAlias(ctx, n)
			if err != nil {
				return nil, err
			}
			if a != nil {
				ids[a.ID] = true
			} else {
				ids[n] = true
			}
		}
	}
	return ids, nil
}

// All gives the images that answer a query, whoever may see them, by id: for
// who keeps the catalog. IDs and ExecutableBy "self" mean nothing here.
func (v *View) All(ctx context.Context, q Query) ([]*Image, error) {
	filters, err := ParseFilters(q.Filters)
	if err != nil {
		return nil, err
	}
	owners, err := v.owners(ctx, "", q.Owners)
	if err != nil {
		return nil, err
	}
	aliases, err := v.aliases(ctx)
	if err != nil {
		return nil, err
	}
	if err := v.Load(ctx); err != nil {
		return nil, err
	}
	now := v.c.opt.Now()
	var found []*Image
	for m, err := range v.Images(ctx) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		if len(owners) > 0 && !owners[m.Owner] || !q.IncludeDeprecated && m.IsDeprecated(now) || !q.IncludeDisabled && m.State == Disabled ||
			len(q.ExecutableBy) > 0 && !slices.ContainsFunc(q.ExecutableBy, func(e string) bool { return e == "all" && m.Public || m.Shared(e) }) {
			continue
		}
		if filters.Match(m, aliases, true) {
			found = append(found, m)
		}
	}
	return found, nil
}

// aliases gives accounts' aliases.
func (v *View) aliases(ctx context.Context) (func(string) string, error) {
	all := map[string]string{}
	for a, err := range v.Accounts(ctx) {
		if err != nil {
			return nil, err
		}
		if a.Alias != "" {
			all[a.ID] = a.Alias
		}
	}
	return func(id string) string { return all[id] }, nil
}
