package ec2api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/upload/catalog/minioiam"
)

// MinIO's users are accounts' by the names of their policies: one whose policies
// hold PREFIX and 12 digits has that account's rights; one with PREFIX, the
// digits and "-read-only" may only read.
const minioPolicy = "instar-account-"

// How often a MinIO is asked for its users, and for how long its last answer
// holds when it does not answer.
const (
	minioEvery = time.Minute
	minioKeep  = 15 * time.Minute
)

// minioFile is the part of the accounts' file that names a MinIO.
type minioFile struct {
	Export string `yaml:"export"` // a file
	Policy string `yaml:"policy"`

	URL        string        `yaml:"url"` // or where to ask
	PlainHTTP  bool          `yaml:"plain-http"`
	AccessKey  string        `yaml:"access-key-id"`
	Secret     string        `yaml:"secret-access-key"`
	SecretFile string        `yaml:"secret-file"`
	Region     string        `yaml:"region"`
	CACert     string        `yaml:"ca-cert"`
	Every      time.Duration `yaml:"every"`
	Keep       time.Duration `yaml:"keep"`
}

// MinIO is a MinIO whose users are asked for again and again.
type MinIO struct {
	minioiam.Source
	Every time.Duration // between questions
	Keep  time.Duration // for which an answer holds

	policy string
}

// Keys asks for the access keys that policies give to accounts; of the others
// nothing is kept.
func (m *MinIO) Keys(ctx context.Context, now time.Time) ([]minioiam.Key, error) {
	all, err := m.Source.Keys(ctx, now)
	return slices.DeleteFunc(all, func(k minioiam.Key) bool {
		id, _, err := accountOf(k.Policies, m.policy)
		return id == "" && err == nil
	}), err
}

// MinIO is the one that the accounts' file names; nil for none. Its users are
// accounts' once [Accounts.With] adds them.
func (a *Accounts) MinIO() *MinIO { return a.minio }

// read takes what the file says of a MinIO; an export is read.
func (a *Accounts) addMinIO(f *minioFile, dir string) error {
	if a.policy = f.Policy; a.policy == "" {
		a.policy = minioPolicy
	}
	live := *f
	live.Export, live.Policy = "", ""
	switch {
	case *f == minioFile{}:
		return nil
	case f.Export == "" && f.URL == "":
		return errors.New("minio: it needs a url, or an export")
	case f.Export != "" && live != minioFile{}:
		return errors.New("minio: an export goes with policy, and nothing else")
	case f.Export != "":
		data, err := a.read(beside(dir, f.Export), minioiam.MaxExport)
		if err != nil {
			return err
		}
		keys, err := minioiam.Read(data, time.Now())
		if err != nil {
			return fmt.Errorf("minio: %s: %w", f.Export, err)
		}
		a.addUsers(keys, time.Time{})
		return nil
	}
	m := &MinIO{
		Source: minioiam.Source{URL: f.URL, Plain: f.PlainHTTP, AccessKey: f.AccessKey, Secret: f.Secret, Region: f.Region},
		Every:  f.Every, Keep: f.Keep, policy: a.policy,
	}
	if f.SecretFile != "" {
		if f.Secret != "" {
			return errors.New("minio: it has a secret-access-key and a secret-file")
		}
		b, err := a.read(beside(dir, f.SecretFile), 4096)
		if err != nil {
			return err
		}
		m.Secret = strings.TrimSpace(string(b))
	}
	if f.CACert != "" {
		b, err := a.readPublic(beside(dir, f.CACert), 1<<20)
		if err != nil {
			return err
		}
		m.CACert = b
	}
	if m.Every == 0 {
		m.Every = minioEvery
	}
	if m.Keep == 0 {
		m.Keep = max(minioKeep, 3*m.Every)
	}
	if m.Every < time.Second || m.Every > 24*time.Hour || m.Keep < m.Every || m.Keep > 7*24*time.Hour {
		return errors.New("minio: every is 1s to 24h, and keep from that to 168h")
	}
	if err := m.Check(); err != nil {
		return fmt.Errorf("minio: %w", err)
	}
	a.minio = m
	return nil
}

// With gives the accounts with MinIO's users of now added, who are refused from
// until on, unless they are added anew.
func (a *Accounts) With(keys []minioiam.Key, until time.Time) *Accounts {
	b := *a
	b.keys, b.byID, b.left = maps.Clone(a.keys), maps.Clone(a.byID), nil
	b.addUsers(keys, until)
	return &b
}

// addUsers adds those of MinIO's users whose policies name an account. Of one that
// cannot be taken the others do not suffer: it is left out.
func (a *Accounts) addUsers(keys []minioiam.Key, until time.Time) {
	for _, k := range keys {
		id, readOnly, err := accountOf(k.Policies, a.policy)
		if err == nil && id == "" {
			continue
		}
		if err == nil && k.Narrowed {
			err = errors.New("it is a service account with a policy of its own, which narrows its user's and cannot speak of the catalog")
		}
		acc := a.byID[id]
		if acc == nil {
			acc = &account{id: id}
		}
		if !until.IsZero() && (k.Expires.IsZero() || until.Before(k.Expires)) {
			k.Expires = until
		}
		if err == nil {
			err = a.add(acc, keyFile{ID: k.ID, Secret: k.Secret, Expires: k.Expires, ReadOnly: readOnly}, "")
		}
		if err != nil {
			a.left = append(a.left, Left{Key: k.ID, Why: err.Error()})
			continue
		}
		a.byID[id] = acc
		c := a.keys[k.ID]
		c.minio, c.parent = true, k.Parent
		a.keys[k.ID] = c
	}
}

// accountOf finds the account that a user's policies name. Two accounts are a
// mistake.
func accountOf(policies []string, prefix string) (id string, readOnly bool, err error) {
	for _, p := range policies {
		rest, ok := strings.CutPrefix(p, prefix)
		if !ok {
			continue
		}
		digits, only := strings.CutSuffix(rest, "-read-only")
		if !accountID.MatchString(digits) {
			continue
		}
		if id != "" && id != digits {
			return "", false, fmt.Errorf("its policies name the accounts %s and %s", id, digits)
		}
		// Of a policy with and one without, the lesser right holds.
		id, readOnly = digits, readOnly || only
	}
	return id, readOnly, nil
}

// Left is an access key of MinIO's that stands for an account, and is not taken.
type Left struct {
	Key string
	Why string
}

// Left are the keys that are not taken though a policy names an account.
func (a *Accounts) Left() []Left { return a.left }

// Listed is an access key, without its secret.
type Listed struct {
	Key      string    `json:"access_key_id"`
	Account  string    `json:"account"`
	ReadOnly bool      `json:"read_only"`
	Expires  time.Time `json:"expires,omitzero"`
	Token    bool      `json:"session_token"` // must come with it
	MinIO    bool      `json:"minio"`         // is one of MinIO's users
	Parent   string    `json:"parent,omitempty"`
}

// List are the access keys, by id.
func (a *Accounts) List() []Listed {
	var l []Listed
	for _, id := range sortedKeys(a.keys) {
		c := a.keys[id]
		l = append(l, Listed{Key: id, Account: c.account.id, ReadOnly: c.readOnly, Expires: c.key.Expires, Token: c.key.Token != "", MinIO: c.minio, Parent: c.parent})
	}
	return l
}
