package ec2api

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/upload/catalog/sigv4"
)

// Accounts are who may speak to the catalog, as a file lists them. They do not
// change; a changed file is read anew.
type Accounts struct {
	keys   map[string]credential
	byID   map[string]*account
	secret [32]byte             // of all servers with the same file
	files  map[string]time.Time // that were read, and when they had been changed

	minio  *MinIO
	policy string // what begins the names of policies that stand for accounts
	left   []Left
}

// credential is an access key and what it stands for.
type credential struct {
	key      sigv4.Key
	account  *account
	readOnly bool
	minio    bool   // is of a MinIO's user
	parent   string // whose service account it is there
}

// account is one of the file.
type account struct {
	id        string
	instances []string // patterns of ids
	buckets   []string // patterns of names
	images    []string // patterns of names in the catalog's store
}

// owns says whether the account may have an instance bundled.
func (a *account) owns(instance string) bool { return anyMatch(a.instances, instance) }

// uses says whether the account may have bundles put into a bucket, and
// registered from it.
func (a *account) uses(bucket string) bool { return anyMatch(a.buckets, bucket) }

func anyMatch(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, s)
		return ok && err == nil
	})
}

// accountsFile is the document.
type accountsFile struct {
	Accounts []struct {
		ID        string    `yaml:"id"`
		Instances []string  `yaml:"instances"`
		Buckets   []string  `yaml:"buckets"`
		Images    []string  `yaml:"images"`
		Keys      []keyFile `yaml:"keys"`
	} `yaml:"accounts"`
	MinIO minioFile `yaml:"minio"`
}

type keyFile struct {
	ID       string    `yaml:"access-key-id"`
	Secret   string    `yaml:"secret-access-key"`
	File     string    `yaml:"secret-file"`
	Token    string    `yaml:"session-token"`
	Expires  time.Time `yaml:"expires"`
	ReadOnly bool      `yaml:"read-only"`
}

var (
	accountID   = regexp.MustCompile(`^[0-9]{12}$`)
	accessKeyID = regexp.MustCompile(`^[A-Za-z0-9_.=@+-]{3,128}$`)
)

// maxAccounts is how many bytes of the accounts' file are read.
const maxAccounts = 4 << 20

// ReadAccounts reads the accounts' file. It holds secrets: if others than
// owner and group may read it, it is refused. A MinIO that it names is not asked
// yet: see [Accounts.MinIO].
func ReadAccounts(name string) (*Accounts, error) {
	a, err := readAccounts(name)
	if err != nil {
		return nil, fmt.Errorf("accounts %s: %w", name, err)
	}
	return a, nil
}

func readAccounts(name string) (*Accounts, error) {
	a := &Accounts{keys: make(map[string]credential), byID: make(map[string]*account), files: make(map[string]time.Time)}
	data, err := a.read(name, maxAccounts)
	if err != nil {
		return nil, err
	}
	var f accountsFile
	if len(bytes.TrimSpace(data)) > 0 {
		if err := yaml.Load(data, &f, yaml.WithKnownFields()); err != nil {
			return nil, err
		}
	}
	for _, x := range f.Accounts {
		if !accountID.MatchString(x.ID) {
			return nil, fmt.Errorf("account %q: an id is 12 digits, in quotes", x.ID)
		}
		if a.byID[x.ID] != nil {
			return nil, fmt.Errorf("account %s is there twice", x.ID)
		}
		for _, p := range slices.Concat(x.Instances, x.Buckets, x.Images) {
			if _, err := path.Match(p, ""); err != nil {
				return nil, fmt.Errorf("account %s: pattern %q: %w", x.ID, p, err)
			}
		}
		acc := &account{id: x.ID, instances: x.Instances, buckets: x.Buckets, images: x.Images}
		a.byID[x.ID] = acc
		for _, k := range x.Keys {
			if err := a.add(acc, k, filepath.Dir(name)); err != nil {
				return nil, fmt.Errorf("account %s, key %q: %w", x.ID, k.ID, err)
			}
		}
	}
	if err := a.addMinIO(&f.MinIO, filepath.Dir(name)); err != nil {
		return nil, err
	}
	if len(a.keys) == 0 && a.minio == nil {
		err := errors.New("it names no access key: nobody could ask anything")
		for _, l := range a.left {
			err = fmt.Errorf("%w; %q is not taken: %s", err, l.Key, l.Why)
		}
		return nil, err
	}
	a.derive()
	return a, nil
}

func beside(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}

func (a *Accounts) add(acc *account, k keyFile, dir string) error {
	secret := k.Secret
	if k.File != "" {
		if secret != "" {
			return errors.New("it has a secret-access-key and a secret-file")
		}
		b, err := a.read(beside(dir, k.File), 4096)
		if err != nil {
			return err
		}
		secret = strings.TrimSpace(string(b))
	}
	switch {
	case !accessKeyID.MatchString(k.ID):
		return errors.New("an access-key-id is 3 to 128 letters, digits, '_', '-', '.', '=', '@' and '+'")
	case len(secret) < 8 || len(secret) > 1024:
		return errors.New("a secret has 8 to 1024 characters")
	}
	if _, twice := a.keys[k.ID]; twice {
		return errors.New("it is there twice")
	}
	a.keys[k.ID] = credential{
		key:     sigv4.Key{ID: k.ID, Secret: secret, Token: k.Token, Expires: k.Expires},
		account: acc, readOnly: k.ReadOnly,
	}
	return nil
}

// derive makes the secret that pagination tokens are sealed with: the same for
// all servers that read the same accounts.
func (a *Accounts) derive() {
	h := hmac.New(sha256.New, []byte("instar catalog pagination"))
	ids := make([]string, 0, len(a.keys))
	for id := range a.keys {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		k := a.keys[id].key
		fmt.Fprintf(h, "%d:%s,%d:%s,", len(id), id, len(k.Secret), k.Secret)
	}
	// A MinIO's users come and go, and each server hears of it at another time.
	if m := a.minio; m != nil {
		fmt.Fprintf(h, "minio %d:%s,%d:%s,", len(m.AccessKey), m.AccessKey, len(m.Secret), m.Secret)
	}
	h.Sum(a.secret[:0])
}

// lookup finds a key for the verifier.
func (a *Accounts) lookup(id string) (sigv4.Key, bool) {
	c, ok := a.keys[id]
	return c.key, ok
}

// Len is how many access keys there are.
func (a *Accounts) Len() int { return len(a.keys) }

// Files are the names of the files that the accounts were read from: the file
// itself, those of secrets, and the export; and when each had been changed.
func (a *Accounts) Files() map[string]time.Time { return maps.Clone(a.files) }

// read reads a file that the world must not.
func (a *Accounts) read(name string, limit int64) ([]byte, error) { return a.open(name, limit, 0o007) }

// readPublic reads a file without secrets.
func (a *Accounts) readPublic(name string, limit int64) ([]byte, error) {
	return a.open(name, limit, 0)
}

func (a *Accounts) open(name string, limit int64, forbidden os.FileMode) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	a.files[name] = st.ModTime()
	if st.Mode().Perm()&forbidden != 0 {
		return nil, fmt.Errorf("%s can be read by everybody and holds secrets: chmod o= %[1]s", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return b, nil
}
