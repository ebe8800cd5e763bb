// Package settings reads how an agent is to work: /etc/instar/agent.yaml.
//
// In goes the file's text; out come values that can be meant, or the line of
// the first that cannot. The package reads the one file and writes nothing.
package settings

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/agent/orders"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// File is the name of the settings in the directory of the machine's configuration.
const File = "agent.yaml"

// maxFile bounds the file, in bytes.
const maxFile = 1 << 20

// Settings are all there is to set. What is left out has the default that is
// named; stores, keys and endpoints are config.yaml's.
type Settings struct {
	// AdminGroup is the group whose members may start and end tasks beside
	// root; ViewGroup is that of those who may look.
	AdminGroup string `yaml:"admin-group"`
	ViewGroup  string `yaml:"view-group"`
	// Running is how many tasks run at once, default 1; Keep how many that have
	// ended are remembered, default 100.
	Running int `yaml:"running"`
	Keep    int `yaml:"keep"`
	// Limits hold for tasks that do not bring their own.
	Limits task.Limits `yaml:"limits"`
	// Quiesce likewise.
	Quiesce *task.Quiesce `yaml:"quiesce"`
	// SecretKeyFile holds the S3 secret key. Systemd reads it for the worker
	// (LoadCredential=), and with Encrypted decrypts it
	// (LoadCredentialEncrypted=, systemd-creds(1)).
	SecretKeyFile string `yaml:"secret-key-file"`
	Encrypted     bool   `yaml:"secret-key-encrypted"`
	// MetricsListen is an address for /metrics and /healthz beside the socket,
	// on loopback.
	MetricsListen string `yaml:"metrics-listen"`
	// MaxAge is how old the last complete capture of a name may be before
	// /healthz says that something is wrong; 0: any age is well.
	MaxAge task.Span `yaml:"max-age"`
	// Hooks are executables that are told how captures end.
	Hooks Hooks `yaml:"hooks"`
	// Notices are metadata's of an interruption, for "instar agent notices".
	Notices Notices `yaml:"notices"`
	// TasksFrom is the catalog whose requests the agent takes; nil: none, and the
	// agent asks nobody.
	TasksFrom *TasksFrom `yaml:"tasks-from"`
}

// TasksFrom says whose requests are taken, and what they may be.
type TasksFrom struct {
	Store    string    `yaml:"store"`    // the catalog's
	Instance string    `yaml:"instance"` // whose requests; "": metadata's instance-id
	Metadata string    `yaml:"metadata"` // URL of the metadata service, default http://169.254.169.254
	Interval task.Span `yaml:"interval"` // between two looks, a fifth more or less; default 30s
	Signers  string    `yaml:"signers"`  // the allowed_signers file with the catalog's server; default the machine's own

	Accounts    []string `yaml:"accounts"`     // who may ask; default whomever the server lets
	BundleTo    []string `yaml:"bundle-to"`    // patterns of BUCKET/PREFIX; default none
	CreateImage bool     `yaml:"create-image"` // default false

	Volume     string   `yaml:"volume"`     // what is captured, default /
	Exclude    []string `yaml:"exclude"`    // and what of it is not
	Recipients []string `yaml:"recipients"` // who can open images, beside this machine; default config.yaml's
	NoKernel   bool     `yaml:"no-kernel"`  // images without kernel and initrd
}

// Rules are what requests may be.
func (f *TasksFrom) Rules() orders.Rules {
	return orders.Rules{
		Accounts: f.Accounts, BundleTo: f.BundleTo, CreateImage: f.CreateImage,
		Store: f.Store, Volume: f.Volume, Exclude: f.Exclude, Recipients: f.Recipients, NoKernel: f.NoKernel,
	}
}

func (f *TasksFrom) check() error {
	rules := f.Rules()
	switch every := time.Duration(f.Interval); {
	case f.Store == "":
		return errors.New("store: give the catalog's, as s3://images/fleet")
	case every != 0 && (every < orders.MinInterval || every > orders.MaxInterval):
		return fmt.Errorf("interval: %s to %s", orders.MinInterval, orders.MaxInterval)
	case f.Instance != "" && !tasks.ValidInstance(f.Instance):
		return fmt.Errorf("instance: %q is no instance's id", f.Instance)
	case f.Instance != "" && f.Metadata != "":
		return errors.New("instance and metadata: give one of them")
	case f.Signers != "" && !filepath.IsAbs(f.Signers):
		return fmt.Errorf("signers %q: give an absolute path", f.Signers)
	}
	if err := rules.Check(); err != nil {
		return err
	}
	// What is captured, and for whom, is held to what any request is.
	r := task.Request{Kind: task.CreateImage, Name: "i", Store: f.Store, Volume: f.Volume, Exclude: f.Exclude, Recipients: f.Recipients}
	return r.Check()
}

// Hooks say where hooks are and how long one may take.
type Hooks struct {
	Dir     string    `yaml:"dir"`     // default /etc/instar/hooks.d
	Timeout task.Span `yaml:"timeout"` // of each, default 1m
}

// Notices say which notices are looked for and what they bring about.
type Notices struct {
	Metadata string    `yaml:"metadata"` // URL of the metadata service, default http://169.254.169.254
	Interval task.Span `yaml:"interval"` // between two looks, default 5s
	Kinds    []string  `yaml:"kinds"`    // spot, rebalance, maintenance; default spot and maintenance
	// Schedule is the schedule whose capture is made once more then; "": none.
	Schedule string `yaml:"schedule"`
}

// Read reads the settings; a file that is not there is as an empty one.
func Read(path string) (*Settings, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Settings{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the agent's settings: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading the agent's settings: %w", err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: longer than %d bytes", path, maxFile)
	}
	s, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// Parse reads settings from YAML. A name that is not known is an error.
func Parse(data []byte) (*Settings, error) {
	var s Settings
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	if doc.Kind != 0 && len(doc.Content) > 0 && doc.Content[0].Tag != "!!null" { // else there are only comments
		if err := yaml.Load(data, &s, yaml.WithKnownFields()); err != nil {
			return nil, err
		}
	}
	return &s, s.check()
}

func (s *Settings) check() error {
	if s.Running < 0 || s.Running > 64 || s.Keep < 0 || s.Keep > 100000 {
		return errors.New("running: 1 to 64 tasks, keep: up to 100000")
	}
	if err := s.Limits.Check(); err != nil {
		return err
	}
	if err := s.Quiesce.Check(); err != nil {
		return err
	}
	if s.SecretKeyFile != "" && !filepath.IsAbs(s.SecretKeyFile) {
		return fmt.Errorf("secret-key-file %q: give an absolute path", s.SecretKeyFile)
	}
	if s.Encrypted && s.SecretKeyFile == "" {
		return errors.New("secret-key-encrypted is about secret-key-file, which is not given")
	}
	if s.Hooks.Dir != "" && !filepath.IsAbs(s.Hooks.Dir) {
		return fmt.Errorf("hooks: dir %q: give an absolute path", s.Hooks.Dir)
	}
	if s.Notices.Interval != 0 && s.Notices.Interval < task.Span(time.Second) {
		return errors.New("notices: interval: at least 1s")
	}
	if s.TasksFrom != nil {
		if err := s.TasksFrom.check(); err != nil {
			return fmt.Errorf("tasks-from: %w", err)
		}
	}
	if s.MetricsListen != "" {
		host, _, err := net.SplitHostPort(s.MetricsListen)
		if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
			return fmt.Errorf("metrics-listen %q: give a loopback address and a port, as 127.0.0.1:9256", s.MetricsListen)
		}
	}
	return nil
}
