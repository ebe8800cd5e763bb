// Package minioiam reads the user store of a MinIO: which access keys its users
// and service accounts have, with their secrets, and which policies hold for
// them.
//
// What goes in: the export of that store that an administrator is given, a zip
// (mc admin cluster iam export), or where to ask for it ([Source]). What comes
// out: the access keys. It touches nothing but the one address it is told.
//
// There is no other way to a secret: MinIO answers no question for a user's or a
// service account's, and checks signatures for its own services alone. Those of
// temporary credentials (STS) it does not even export: they are in no answer of
// this package.
package minioiam

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// MaxExport is how many bytes of an export, and of a file in it, are read.
const MaxExport = 64 << 20

// ErrExport is that of what is no export of MinIO's users.
var ErrExport = errors.New("not an export of MinIO's users (mc admin cluster iam export)")

// Key is an access key that can be used at MinIO now.
type Key struct {
	ID       string
	Secret   string
	Policies []string  // that hold for it, sorted: its user's and those of the user's groups
	Expires  time.Time // of a service account; zero for never
	Parent   string    // whose service account it is; "" for a user
	Narrowed bool      // a policy of its own takes from what Policies allow
}

// String shows no secret.
func (k Key) String() string { return "key " + k.ID }

// GoString is String: %#v shows no secret either.
func (k Key) GoString() string { return k.String() }

// The files of an export, as far as they are read. MinIO writes them in
// cmd/admin-handlers-users.go, ExportIAM.
type (
	user struct {
		Secret string `json:"secretKey"`
		Status string `json:"status"` // enabled, disabled
	}
	group struct {
		Status  string   `json:"status"` // enabled, disabled
		Members []string `json:"members"`
	}
	mapping struct {
		Policy string `json:"policy"` // names, with commas between them
	}
	serviceAccount struct {
		Parent  string          `json:"parent"`
		Secret  string          `json:"secretKey"`
		Groups  []string        `json:"groups"` // of a parent that MinIO has from elsewhere (LDAP, OpenID)
		Status  string          `json:"status"` // on, off
		Session json.RawMessage `json:"sessionPolicy"`
		Expires *time.Time      `json:"expiration"`
		Claims  map[string]any  `json:"claims"`
	}
	export struct {
		policies        map[string]json.RawMessage
		users           map[string]user
		groups          map[string]group
		serviceAccounts map[string]serviceAccount
		ofUsers         map[string]mapping
		ofGroups        map[string]mapping
		ofSTS           map[string]mapping // of users that MinIO has from elsewhere
	}
)

// Read reads an export. What cannot be used at MinIO is left out: what is
// disabled or has ended, and the service accounts of users who are gone. Keys are
// sorted by id. now decides what has ended.
func Read(data []byte, now time.Time) ([]Key, error) {
	z, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrExport, err)
	}
	var e export
	for _, f := range []struct {
		name string
		into any
	}{
		{"policies.json", &e.policies},
		{"users.json", &e.users},
		{"groups.json", &e.groups},
		{"svcaccts.json", &e.serviceAccounts},
		{"user_mappings.json", &e.ofUsers},
		{"group_mappings.json", &e.ofGroups},
		{"stsuser_mappings.json", &e.ofSTS},
	} {
		if err := readJSON(z, "iam-assets/"+f.name, f.into); err != nil {
			return nil, err
		}
	}
	var keys []Key
	for id, u := range e.users {
		if u.Status == "enabled" {
			keys = append(keys, Key{ID: id, Secret: u.Secret, Policies: e.held(id, nil)})
		}
	}
	for id, s := range e.serviceAccounts {
		k := Key{ID: id, Secret: s.Secret, Parent: s.Parent, Narrowed: s.narrowed()}
		if s.Expires != nil && s.Expires.Unix() > 0 { // 1970 is MinIO's word for never
			k.Expires = *s.Expires
		}
		if s.Status != "on" || !k.Expires.IsZero() && !now.Before(k.Expires) {
			continue
		}
		if u, ok := e.users[s.Parent]; ok && u.Status != "enabled" {
			continue
		}
		k.Policies = e.held(s.Parent, s.Groups)
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b Key) int { return strings.Compare(a.ID, b.ID) })
	return keys, nil
}

// held are the policies that hold for a user, as MinIO finds them: its own and
// its groups', of those that there are. Of a user in a group that is disabled,
// none.
func (e *export) held(name string, elsewhere []string) []string {
	own, ok := e.ofUsers[name]
	if !ok {
		own = e.ofSTS[name]
	}
	lists := []string{own.Policy}
	groups := slices.Clone(elsewhere)
	for g, is := range e.groups {
		if slices.Contains(is.Members, name) {
			groups = append(groups, g)
		}
	}
	for _, g := range groups {
		if is, ok := e.groups[g]; ok && is.Status != "enabled" {
			return nil
		}
		lists = append(lists, e.ofGroups[g].Policy)
	}
	held := map[string]bool{}
	for p := range strings.SplitSeq(strings.Join(lists, ","), ",") {
		p = strings.TrimSpace(p)
		if _, ok := e.policies[p]; ok {
			held[p] = true
		}
	}
	return slices.Sorted(maps.Keys(held))
}

// narrowed says whether a service account has a policy of its own. One without
// any content is none: MinIO's console sends such.
func (s *serviceAccount) narrowed() bool {
	if kind, ok := s.Claims["sa-policy"].(string); ok && kind == "inherited-policy" {
		return false
	}
	var p struct {
		Version   string
		ID        string
		Statement []json.RawMessage
	}
	if len(s.Session) == 0 {
		return false
	}
	// What cannot be read narrows.
	return json.Unmarshal(s.Session, &p) != nil || p.Version != "" || p.ID != "" || p.Statement != nil
}

func readJSON(z *zip.Reader, name string, into any) error {
	f, err := z.Open(name)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrExport, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxExport+1))
	switch {
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrExport, name, err)
	case len(b) > MaxExport:
		return fmt.Errorf("%w: %s has more than %d bytes", ErrExport, name, MaxExport)
	}
	if err := json.Unmarshal(b, into); err != nil {
		// Not the error's own text: it may quote what it could not read.
		return fmt.Errorf("%w: %s is not what MinIO writes there", ErrExport, name)
	}
	return nil
}
