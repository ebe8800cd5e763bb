// Package config answers what a setting is and who said so: an option, the
// environment, the user's file, the machine's file, euca2ools' files, or the
// default, the first of these that says anything.
//
// In go the environment and the places of the files; out comes one [Value] a
// setting. The package reads these files and writes nothing.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Key describes one setting.
type Key struct {
	Name       string   // in config.yaml
	Env        []string // variables, the first that is set wins
	EucaEnv    []string // the same when invoked as euca-*; nil: as Env
	EucaUser   string   // name in a [user] section of euca2ools' files
	EucaRegion string   // name in a [region] section
	Path       bool     // a path: ~ is expanded
	Secret     bool     // never shown, never in config.yaml
	What       string   // one line for the manual
}

// Keys are all settings, in the order of the manual.
func Keys() []Key {
	return []Key{
		{Name: "endpoint", Env: []string{"S3_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"}, EucaRegion: "s3-url", What: "URL of the S3 service; a path or file URL keeps buckets in a directory"},
		{Name: "region", Env: []string{"AWS_REGION", "AWS_DEFAULT_REGION", "EUCA_DEFAULT_REGION"}, EucaEnv: []string{"EUCA_DEFAULT_REGION", "AWS_DEFAULT_REGION", "AWS_REGION"}, What: "region requests are signed for"},
		{Name: "location", EucaRegion: "s3-location-constraint", What: "where a bucket that does not exist yet is made"},
		{Name: "ca_cert", Env: []string{"AWS_CA_BUNDLE"}, Path: true, What: "PEM file with the authorities that may vouch for the endpoint, beside the system's"},
		{Name: "store", Env: []string{"INSTAR_STORE"}, What: "bucket, or bucket/prefix, used when -b is not given; for images also a URL or a directory"},
		{Name: "catalog", Env: []string{"INSTAR_CATALOG"}, What: "store whose catalog delete-bundle asks too, beside those in the bundle's own bucket"},
		{Name: "domain", Env: []string{"INSTAR_DOMAIN"}, What: "domain of images that share chunks; default default"},
		{Name: "signing_key", Env: []string{"INSTAR_SIGNING_KEY"}, Path: true, What: "SSH key that signs images: a private key's file, a public one's whose other half the SSH agent has, or agent"},
		{Name: "signers", Env: []string{"INSTAR_SIGNERS"}, Path: true, What: "allowed_signers file: whose images are accepted"},
		{Name: "identity", Env: []string{"INSTAR_IDENTITY"}, Path: true, What: "file with the age identity or SSH private key that opens images"},
		{Name: "recipients", Env: []string{"INSTAR_RECIPIENTS"}, What: "who else can open images: age or SSH public keys, or files of them, between commas"},
		{Name: "certificate", Env: []string{"EC2_CERT", "EUCA_CERT"}, EucaEnv: []string{"EUCA_CERT", "EC2_CERT"}, EucaUser: "certificate", Path: true, What: "the user's certificate, PEM"},
		{Name: "private_key", Env: []string{"EC2_PRIVATE_KEY", "EUCA_PRIVATE_KEY"}, EucaEnv: []string{"EUCA_PRIVATE_KEY", "EC2_PRIVATE_KEY"}, EucaUser: "private-key", Path: true, What: "the user's RSA private key, PEM"},
		{Name: "account_id", Env: []string{"EC2_USER_ID"}, EucaUser: "account-id", What: "the user's account, 12 digits; hyphens are dropped"},
		{Name: "ec2_cert", Env: []string{"EUCALYPTUS_CERT"}, EucaRegion: "certificate", Path: true, What: "certificate of the cloud that is to open the bundles, PEM"},
		{Name: "trust", Env: []string{"INSTAR_TRUST"}, Path: true, What: "PEM file with the certificates whose signatures are accepted"},
		{Name: "secret_key_file", Env: []string{"INSTAR_SECRET_KEY_FILE"}, Path: true, What: "file that holds the S3 secret key"},
		{Name: "access_key_id", Env: []string{"AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY"}, EucaUser: "key-id", What: "S3 access key"},
		{Name: "secret_key", Env: []string{"AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY"}, EucaUser: "secret-key", Secret: true, What: "S3 secret key"},
		{Name: "session_token", Env: []string{"AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"}, Secret: true, What: "token of temporary credentials"},
	}
}

// Sources are the places settings come from. The zero value reads nothing.
type Sources struct {
	Getenv func(string) string
	Home   string // for ~/.config/instar/config.yaml and ~/.euca; "" for none
	Etc    string // directory of the machine's config.yaml; "" for none
	User   string // the user's file, instead of the one in Home; must exist
	Euca   bool   // invoked as euca-*: EUCA_* variables come first
	Region string // USER@REGION or REGION of --region
}

// Value is a setting and where it came from.
type Value struct {
	Text string
	From string // "--url", "$S3_URL", "/etc/instar/config.yaml:3", "default"; "" if nobody said anything
}

// Config holds the answers. It is not for concurrent use while [Config.Set] is called.
type Config struct {
	values map[string]Value
	keys   map[string]Key
	// Ignored names what was read and has no effect, one line each.
	Ignored []string
}

// Get returns a setting; its Text is "" if nobody said anything. An unknown
// name is a mistake of the program and answers like one.
func (c *Config) Get(name string) Value { return c.values[name] }

// Set gives a setting a value that wins over all others: an option's.
func (c *Config) Set(name, value, from string) {
	c.values[name] = Value{value, from}
}

// Clone is a copy that is set apart from the original.
func (c *Config) Clone() *Config {
	n := *c
	n.values = maps.Clone(c.values)
	return &n
}

// Load reads all sources. Files that do not exist are as empty; one that
// cannot be read or holds an unknown key is an error naming file and line.
func Load(s Sources) (*Config, error) {
	c := &Config{values: map[string]Value{}, keys: map[string]Key{}}
	getenv := s.Getenv
	if getenv == nil {
		getenv = func(string) string { return "" }
	}
	keys := Keys()
	for _, k := range keys {
		c.keys[k.Name] = k
		names := k.Env
		if s.Euca && k.EucaEnv != nil {
			names = k.EucaEnv
		}
		for _, n := range names {
			if v := getenv(n); v != "" {
				c.keep(k, v, "$"+n, s.Home)
				break
			}
		}
	}
	for _, f := range []struct {
		path      string
		mustExist bool
	}{{s.userFile(), s.User != ""}, {etcFile(s.Etc), false}} {
		if f.path == "" {
			continue
		}
		data, err := os.ReadFile(f.path)
		if errors.Is(err, fs.ErrNotExist) && !f.mustExist {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the configuration: %w", err)
		}
		if err := c.yaml(f.path, data, s.Home); err != nil {
			return nil, err
		}
	}
	if err := c.euca(s, getenv); err != nil {
		return nil, err
	}
	if err := c.credentialFile(getenv("AWS_CREDENTIAL_FILE")); err != nil {
		return nil, err
	}
	c.region()
	return c, nil
}

// region drops the user of USER@REGION: the rest is what requests are signed for.
func (c *Config) region() {
	v, ok := c.values["region"]
	if !ok {
		return
	}
	if _, r, ok := strings.Cut(v.Text, "@"); ok {
		v.Text = r
		c.values["region"] = v
	}
}

func (s Sources) userFile() string {
	switch {
	case s.User != "":
		return s.User
	case s.Home == "":
		return ""
	}
	return filepath.Join(s.Home, ".config", "instar", "config.yaml")
}

func etcFile(dir string) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(dir, "config.yaml")
}

// keep notes a value unless a stronger source has spoken.
func (c *Config) keep(k Key, v, from, home string) {
	if _, ok := c.values[k.Name]; ok || v == "" {
		return
	}
	if rest, ok := strings.CutPrefix(v, "~/"); ok && k.Path && home != "" {
		v = filepath.Join(home, rest)
	}
	c.values[k.Name] = Value{v, from}
}

// yaml reads one config.yaml: a mapping of known keys to plain values.
func (c *Config) yaml(path string, data []byte, home string) error {
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if doc.Kind == 0 || len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return nil
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: expected lines of the form name: value", path, root.Line)
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		name, value := root.Content[i], root.Content[i+1]
		k, known := c.keys[name.Value]
		switch {
		case !known:
			return fmt.Errorf("%s:%d: unknown setting %q; known are %s", path, name.Line, name.Value, strings.Join(settable(), ", "))
		case k.Secret:
			return fmt.Errorf("%s:%d: %s does not belong in this file: use secret_key_file, or the environment", path, name.Line, name.Value)
		case value.Kind != yaml.ScalarNode || value.Tag == "!!null":
			return fmt.Errorf("%s:%d: %s takes one plain value", path, value.Line, name.Value)
		case seen[name.Value] != 0:
			return fmt.Errorf("%s:%d: %s is given twice, first in line %d", path, name.Line, name.Value, seen[name.Value])
		}
		seen[name.Value] = name.Line
		c.keep(k, value.Value, fmt.Sprintf("%s:%d", path, name.Line), home)
	}
	return nil
}

// settable are the names a config.yaml may hold.
func settable() []string {
	var names []string
	for _, k := range Keys() {
		if !k.Secret {
			names = append(names, k.Name)
		}
	}
	return names
}

// credentialFile reads the file named by AWS_CREDENTIAL_FILE: lines
// AWSAccessKeyId=… and AWSSecretKey=…, as the AWS Java tools and euca2ools have it.
func (c *Config) credentialFile(path string) error {
	if path == "" {
		return nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("reading the file named by AWS_CREDENTIAL_FILE: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch strings.TrimSpace(name) {
		case "AWSAccessKeyId":
			c.keep(c.keys["access_key_id"], strings.TrimSpace(value), path, "")
		case "AWSSecretKey":
			c.keep(c.keys["secret_key"], strings.TrimSpace(value), path, "")
		}
	}
	return nil
}
