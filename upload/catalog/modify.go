package catalog

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// change makes a change to an image that the caller owns.
func (c *Catalog) change(ctx context.Context, call Call, id, action, detail string, f func(t *Tx, n *Image) error) (*Image, error) {
	var made *Image
	err := c.run(ctx, call, func(t *Tx) error {
		made = nil
		m, err := t.Own(ctx, call.Account, id)
		if err != nil {
			return err
		}
		made, err = t.Change(ctx, m, call, action, detail, func(n *Image) error { return f(t, n) })
		return err
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// Modify changes an image by f, for attributes that have no operation of their
// own. f must not change ID, Owner, Revision or History.
func (c *Catalog) Modify(ctx context.Context, call Call, id, action, detail string, f func(*Image) error) (*Image, error) {
	return c.change(ctx, call, id, action, detail, func(_ *Tx, n *Image) error { return f(n) })
}

// SetDescription changes what an image is said to be; at most 255 bytes.
func (c *Catalog) SetDescription(ctx context.Context, call Call, id, text string) error {
	if err := checkText("description", text, 0, maxDescription); err != nil {
		return &Error{Code: CodeParameterValue, Message: "The description is not one", Err: err}
	}
	_, err := c.change(ctx, call, id, "ModifyImageAttribute", "description", func(_ *Tx, n *Image) error {
		n.Description = text
		return nil
	})
	return err
}

// AddProductCodes adds product codes; they are never taken off again.
func (c *Catalog) AddProductCodes(ctx context.Context, call Call, id string, codes []ProductCode) error {
	_, err := c.change(ctx, call, id, "ModifyImageAttribute", "productCodes", func(_ *Tx, n *Image) error {
		for _, p := range codes {
			if !slices.Contains(n.ProductCodes, p) {
				n.ProductCodes = append(n.ProductCodes, p)
			}
		}
		return nil
	})
	return err
}

// SetIMDSSupport says which metadata the image needs: v2.0, and never less again.
func (c *Catalog) SetIMDSSupport(ctx context.Context, call Call, id, value string) error {
	if value != "v2.0" {
		return refuse(CodeParameterValue, "Invalid value '%s' for imdsSupport: only v2.0 can be set", clip(value))
	}
	_, err := c.change(ctx, call, id, "ModifyImageAttribute", "imdsSupport", func(_ *Tx, n *Image) error {
		n.ImdsSupport = value
		return nil
	})
	return err
}

// Permissions are those to launch an image: everybody's, accounts',
// organizations' and organizational units'.
type Permissions struct {
	Public   bool
	Accounts []string
	Orgs     []string // ARNs
	OrgUnits []string // ARNs
}

func (p Permissions) empty() bool {
	return !p.Public && len(p.Accounts) == 0 && len(p.Orgs) == 0 && len(p.OrgUnits) == 0
}

func (p Permissions) check() error {
	for _, a := range p.Accounts {
		if err := CheckAccount(a); err != nil {
			return err
		}
	}
	for _, l := range [][]string{p.Orgs, p.OrgUnits} {
		for _, a := range l {
			if !arnIs.MatchString(a) {
				return refuse(CodeAMIAttribute, "Invalid ARN %q", clip(a))
			}
		}
	}
	return nil
}

func (p Permissions) String() string {
	var s []string
	if p.Public {
		s = append(s, "all")
	}
	return strings.Join(slices.Concat(s, p.Accounts, p.Orgs, p.OrgUnits), " ")
}

// ModifyLaunchPermissions gives permissions and takes others away. A permission
// is the catalog's word; for the key to an Instar image see [Catalog.Share].
func (c *Catalog) ModifyLaunchPermissions(ctx context.Context, call Call, id string, add, remove Permissions) (*Image, error) {
	for _, p := range []Permissions{add, remove} {
		if err := p.check(); err != nil {
			return nil, err
		}
	}
	if add.empty() && remove.empty() {
		return nil, refuse(CodeMissing, "The request must contain a launch permission to add or remove")
	}
	detail := ""
	if !add.empty() {
		detail = "+ " + add.String()
	}
	if !remove.empty() {
		detail = strings.TrimSpace(detail + " - " + remove.String())
	}
	return c.change(ctx, call, id, "ModifyImageAttribute", "launchPermission "+detail, func(_ *Tx, n *Image) error {
		n.Public = (n.Public || add.Public) && !remove.Public
		n.LaunchAccounts = edit(n.LaunchAccounts, add.Accounts, remove.Accounts)
		n.LaunchOrgs = edit(n.LaunchOrgs, add.Orgs, remove.Orgs)
		n.LaunchOrgUnits = edit(n.LaunchOrgUnits, add.OrgUnits, remove.OrgUnits)
		for _, l := range [][]string{n.LaunchAccounts, n.LaunchOrgs, n.LaunchOrgUnits} {
			if len(l) > maxShares {
				return refuse(CodeTooMany, "An image is shared with at most %d", maxShares)
			}
		}
		return nil
	})
}

// edit adds to a sorted set and removes from it.
func edit(l, add, remove []string) []string {
	l = sortedSet(slices.Concat(l, add))
	l = slices.DeleteFunc(l, func(s string) bool { return slices.Contains(remove, s) })
	if len(l) == 0 {
		return nil
	}
	return l
}

// ResetLaunchPermissions leaves the image to its owner alone.
func (c *Catalog) ResetLaunchPermissions(ctx context.Context, call Call, id string) error {
	_, err := c.change(ctx, call, id, "ResetImageAttribute", "launchPermission", func(_ *Tx, n *Image) error {
		n.Public, n.LaunchAccounts, n.LaunchOrgs, n.LaunchOrgUnits = false, nil, nil, nil
		return nil
	})
	return err
}

// CancelLaunchPermission gives back the permission that the caller was given.
func (c *Catalog) CancelLaunchPermission(ctx context.Context, call Call, id string) error {
	return c.run(ctx, call, func(t *Tx) error {
		m, err := t.See(ctx, call.Account, id)
		if err != nil {
			return err
		}
		if !m.Shared(call.Account) {
			return refuse(CodeAuthFailure, "The image '%s' is not shared with account %s", id, call.Account)
		}
		_, err = t.Change(ctx, m, call, "CancelImageLaunchPermission", call.Account, func(n *Image) error {
			n.LaunchAccounts = edit(n.LaunchAccounts, nil, []string{call.Account})
			return nil
		})
		return err
	})
}

// SetTags puts tags on images and key pairs (ids), all or none; those of the
// same key get the new value.
func (c *Catalog) SetTags(ctx context.Context, call Call, ids []string, tags Tags) error {
	for k := range tags {
		if strings.HasPrefix(strings.ToLower(k), "aws:") {
			return refuse(CodeParameterValue, "Tag keys beginning with aws: are reserved: %q", clip(k))
		}
	}
	if err := tags.check(); err != nil {
		return &Error{Code: CodeParameterValue, Message: "These tags are not allowed", Err: err}
	}
	return c.tag(ctx, call, ids, "CreateTags", strings.Join(tags.Sorted(), " "), func(have Tags) (Tags, error) {
		n := mergeTags(have, tags)
		if len(n) > maxTags {
			return nil, refuse(CodeTagLimit, "The resource would have %d tags, more than %d", len(n), maxTags)
		}
		return n, nil
	})
}

// TagMatch says which tags are deleted: of that key, and of that value if Value
// is not nil.
type TagMatch struct {
	Key   string
	Value *string
}

// DeleteTags takes tags off images and key pairs; all of them if which is empty.
func (c *Catalog) DeleteTags(ctx context.Context, call Call, ids []string, which []TagMatch) error {
	var names []string
	for _, w := range which {
		names = append(names, w.Key)
	}
	return c.tag(ctx, call, ids, "DeleteTags", strings.Join(names, " "), func(have Tags) (Tags, error) {
		if len(which) == 0 {
			return nil, nil
		}
		n := mergeTags(have, nil)
		for _, w := range which {
			if v, ok := n[w.Key]; ok && (w.Value == nil || *w.Value == v) {
				delete(n, w.Key)
			}
		}
		return n, nil
	})
}

func (c *Catalog) tag(ctx context.Context, call Call, ids []string, action, detail string, f func(Tags) (Tags, error)) error {
	if len(ids) == 0 || len(ids) > 1000 {
		return refuse(CodeParameterValue, "1 to 1000 resources are tagged at once, not %d", len(ids))
	}
	return c.run(ctx, call, func(t *Tx) error {
		for _, id := range sortedSet(ids) {
			if strings.HasPrefix(id, "key-") {
				k, err := t.KeyPairByID(ctx, id)
				if err != nil {
					return err
				}
				if k == nil || k.Owner != call.Account {
					return refuse(CodeKeyNotFound, "The key pair ID '%s' does not exist", clip(id))
				}
				n := *k
				if n.Tags, err = f(k.Tags); err != nil {
					return err
				}
				if err := t.PutKeyPair(ctx, &n); err != nil {
					return err
				}
				continue
			}
			if !slices.ContainsFunc([]string{"ami-", "aki-", "ari-"}, func(p string) bool { return strings.HasPrefix(id, p) }) {
				return refuse(CodeID, "The ID '%s' is not valid", clip(id))
			}
			m, err := t.Own(ctx, call.Account, id)
			if err != nil {
				return err
			}
			_, err = t.Change(ctx, m, call, action, detail, func(n *Image) (err error) {
				n.Tags, err = f(n.Tags)
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// SetDeprecation says from when on others do not see the image in lists any
// more; the zero time takes that back. Deprecated images can be launched.
func (c *Catalog) SetDeprecation(ctx context.Context, call Call, id string, at time.Time) error {
	at = at.UTC().Truncate(time.Minute) // EC2 rounds down to the minute
	action, detail := "DisableImageDeprecation", ""
	if !at.IsZero() {
		action, detail = "EnableImageDeprecation", at.Format(time.RFC3339)
		if err := checkTime("deprecation", at); err != nil || at.After(c.opt.Now().AddDate(10, 0, 1)) || at.Before(c.opt.Now().Add(-time.Minute)) {
			return refuse(CodeParameterValue, "The deprecation time %s is not within the next ten years", at.Format(time.RFC3339))
		}
	}
	_, err := c.change(ctx, call, id, action, detail, func(_ *Tx, n *Image) error {
		n.Deprecated = at
		return nil
	})
	return err
}

// Cooldown is how long an image stays protected after the protection was
// disabled, if it was enabled with a cooldown.
const Cooldown = 24 * time.Hour

// SetProtection protects an image against being deregistered, with a cooldown
// or without, or ends that. From a protection with a cooldown, or a cooldown that
// runs, nothing but time leads to an image without protection: what ends the
// cooldown's protection otherwise, or takes its cooldown away, begins the cooldown,
// and protecting the image again does not end one. It answers what EC2 does: the
// new value of the attribute deregistrationProtection.
func (c *Catalog) SetProtection(ctx context.Context, call Call, id string, on, cooldown bool) (string, error) {
	action := "DisableImageDeregistrationProtection"
	if on {
		action = "EnableImageDeregistrationProtection"
	}
	m, err := c.change(ctx, call, id, action, "", func(t *Tx, n *Image) error {
		cooled := n.Protection == "enabled-with-cooldown"
		switch {
		case on && cooldown:
			n.Protection, cooled = "enabled-with-cooldown", false
		case on:
			n.Protection = "enabled-without-cooldown"
		default:
			n.Protection = ""
		}
		switch {
		case cooled:
			n.ProtectedUntil = t.at.Add(Cooldown)
		case !t.at.Before(n.ProtectedUntil):
			n.ProtectedUntil = time.Time{}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return m.ProtectionText(c.opt.Now()), nil
}

// ProtectionText is the attribute deregistrationProtection.
func (m *Image) ProtectionText(now time.Time) string {
	switch {
	case m.Protection != "":
		return m.Protection
	case now.Before(m.ProtectedUntil):
		return fmt.Sprintf("disabled-after-cooldown %s", m.ProtectedUntil.Format(time.RFC3339))
	}
	return "disabled"
}

// SetEnabled disables an image, which nobody launches any more and only its
// owner sees, whose other permissions end, or enables it again.
func (c *Catalog) SetEnabled(ctx context.Context, call Call, id string, on bool) error {
	action, from, to := "DisableImage", Available, Disabled
	if on {
		action, from, to = "EnableImage", Disabled, Available
	}
	_, err := c.change(ctx, call, id, action, "", func(_ *Tx, n *Image) error {
		if n.State == to {
			return nil
		}
		if n.State != from {
			return refuse(CodeState, "The image '%s' is %s, not %s", id, n.State, from)
		}
		n.State = to
		if !on {
			n.Public, n.LaunchAccounts, n.LaunchOrgs, n.LaunchOrgUnits = false, nil, nil, nil
		}
		return nil
	})
	return err
}

// Launched notes that an instance was started from an image, for
// lastLaunchedTime; within an hour of the last note it does nothing.
func (c *Catalog) Launched(ctx context.Context, call Call, id string) error {
	return c.run(ctx, call, func(t *Tx) error {
		m, err := t.See(ctx, call.Account, id)
		if err != nil {
			return err
		}
		if !m.Launchable(call.Account) {
			return refuse(CodeAMIUnavailable, "The image id '[%s]' is not available", id)
		}
		if t.at.Sub(m.LastLaunched) < time.Hour {
			return nil
		}
		n := m.Clone()
		n.LastLaunched = t.at
		n.Revision++
		return t.PutImage(ctx, n)
	})
}
