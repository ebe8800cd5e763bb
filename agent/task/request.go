package task

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/instar-image/instar/agent/retention"
)

// Request is what a task is to do. What is left out is as the machine's
// configuration says.
type Request struct {
	Kind Kind `json:"kind"`
	// Name is the image's, or that of the bundle's files.
	Name string `json:"name"`
	// Store is where it goes: an image's store, a bundle's BUCKET/PREFIX.
	Store string `json:"store,omitempty"`
	// Endpoint is the URL of the S3 service.
	Endpoint string `json:"endpoint,omitempty"`
	Region   string `json:"region,omitempty"`
	// Volume is the directory that is captured, "/" if empty.
	Volume  string   `json:"volume,omitempty"`
	Exclude []string `json:"exclude,omitempty"`
	Include []string `json:"include,omitempty"`
	// Architecture is x86_64, arm64 or i386.
	Architecture string `json:"architecture,omitempty"`

	// Of images alone.

	Description   string   `json:"description,omitempty"`
	Domain        string   `json:"domain,omitempty"`
	Expires       string   `json:"expires,omitempty"` // "12h", "7d"
	Recipients    []string `json:"recipients,omitempty"`
	Full          bool     `json:"full,omitempty"`
	VerifyContent bool     `json:"verify-content,omitempty"`
	NoKernel      bool     `json:"no-kernel,omitempty"`

	// Retention says which older versions stay when this one is published;
	// without it all do.
	Retention *retention.Policy `json:"retention,omitempty"`

	// Of bundles alone: files with PEM, the account, the manifest's words.

	PrivateKey  string `json:"private-key,omitempty"`
	Certificate string `json:"certificate,omitempty"`
	EC2Cert     string `json:"ec2-cert,omitempty"`
	User        string `json:"user,omitempty"`
	KernelID    string `json:"kernel-id,omitempty"`
	RamdiskID   string `json:"ramdisk-id,omitempty"`
	Replace     bool   `json:"replace,omitempty"`

	// Limits and Quiesce replace the agent's own, each as a whole.
	Limits  *Limits  `json:"limits,omitempty"`
	Quiesce *Quiesce `json:"quiesce,omitempty"`
	// Schedule is the schedule that asks, if one does.
	Schedule string `json:"schedule,omitempty"`
	// ClientToken makes the request safe to repeat: with the same token and
	// words it is the same task.
	ClientToken string `json:"client-token,omitempty"`
}

// Quiesce says what stands still around a capture.
type Quiesce struct {
	// Stop are units that are stopped before and started after.
	Stop []string `json:"stop,omitempty" yaml:"stop"`
	// Freeze are units whose processes stand still meanwhile.
	Freeze []string `json:"freeze,omitempty" yaml:"freeze"`
	// Filesystems are mount points that are frozen, for at most 10 seconds:
	// until a snapshot is there, where the filesystem makes one.
	Filesystems []string `json:"filesystems,omitempty" yaml:"filesystems"`
	// Limit ends all of it however far the capture is; 0 is 10 minutes.
	Limit Span `json:"limit,omitempty" yaml:"limit"`
}

// Zero reports whether nothing is to stand still.
func (q *Quiesce) Zero() bool {
	return q == nil || len(q.Stop)+len(q.Freeze)+len(q.Filesystems) == 0
}

// Span is a length of time, in JSON and YAML as Go writes it: "90s", "5m".
type Span time.Duration

// UnmarshalText reads "90s".
func (s *Span) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil || d < 0 {
		return fmt.Errorf("%q is no span of time: write 90s, 5m or 1h30m", text)
	}
	*s = Span(d)
	return nil
}

// MarshalText writes "1m30s".
func (s Span) MarshalText() ([]byte, error) { return []byte(time.Duration(s).String()), nil }

// Bounds of a request.
const (
	maxText  = 1024 // bytes of any of its strings
	maxItems = 256  // of any of its lists
)

var (
	namePattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	tokenPattern = regexp.MustCompile(`^[!-~]{1,64}$`)
	unitPattern  = regexp.MustCompile(`^[A-Za-z0-9:_.\\-][A-Za-z0-9:_.\\@-]{0,254}\.(service|scope|slice|socket|timer|target|path|mount)$`)
	// indispensable is what ending a standstill needs: systemd, the bus, Instar.
	indispensable = regexp.MustCompile(`^(-\.slice|system\.slice|init\.scope|(dbus|instar)[.@-].*|systemd-.*)$`)
)

// Check reports the first thing that cannot be meant. Its errors wrap [ErrRequest].
func (r *Request) Check() error {
	if err := r.check(); err != nil {
		return fmt.Errorf("%w: %w", ErrRequest, err)
	}
	return nil
}

func (r *Request) check() error {
	switch r.Kind {
	case Bundle, CreateImage:
	default:
		return fmt.Errorf("kind %q is none of %s, %s", r.Kind, Bundle, CreateImage)
	}
	if !namePattern.MatchString(r.Name) {
		return fmt.Errorf("name %q: up to 128 letters, digits and . _ -, a letter or digit first", r.Name)
	}
	if r.ClientToken != "" && !tokenPattern.MatchString(r.ClientToken) {
		return errors.New("client-token: up to 64 printable ASCII characters without spaces")
	}
	if r.Schedule != "" && !namePattern.MatchString(r.Schedule) {
		return fmt.Errorf("schedule %q: up to 128 letters, digits and . _ -", r.Schedule)
	}
	if err := r.checkTexts(); err != nil {
		return err
	}
	for name, p := range map[string]string{"volume": r.Volume, "private-key": r.PrivateKey, "certificate": r.Certificate, "ec2-cert": r.EC2Cert} {
		if p != "" && !filepath.IsAbs(p) {
			return fmt.Errorf("%s %q: the agent has no directory it is relative to: give an absolute path", name, p)
		}
	}
	if r.Retention != nil {
		if err := r.Retention.Check(); err != nil {
			return err
		}
	}
	switch r.Architecture {
	case "", "x86_64", "arm64", "i386":
	default:
		return fmt.Errorf("architecture %q is none of x86_64, arm64, i386", r.Architecture)
	}
	image := r.Description != "" || r.Domain != "" || r.Expires != "" || len(r.Recipients) > 0 || r.Full || r.VerifyContent || r.NoKernel || r.Retention != nil
	bundle := r.PrivateKey != "" || r.Certificate != "" || r.EC2Cert != "" || r.User != "" || r.KernelID != "" || r.RamdiskID != "" || r.Replace
	switch {
	case r.Kind == Bundle && image:
		return errors.New("description, domain, expires, recipients, full, verify-content, no-kernel and retention are of images, not of bundles")
	case r.Kind == CreateImage && bundle:
		return errors.New("private-key, certificate, ec2-cert, user, kernel-id, ramdisk-id and replace are of bundles, not of images")
	}
	if r.Limits != nil {
		if err := r.Limits.Check(); err != nil {
			return err
		}
	}
	return r.Quiesce.Check()
}

func (r *Request) checkTexts() error {
	one := func(what, s string) error {
		if len(s) > maxText || !utf8.ValidString(s) || strings.ContainsAny(s, "\x00\n\r") {
			return fmt.Errorf("%s: up to %d bytes of UTF-8 without line breaks", what, maxText)
		}
		return nil
	}
	var errs []error
	for _, f := range []struct{ what, s string }{
		{"store", r.Store},
		{"endpoint", r.Endpoint},
		{"region", r.Region},
		{"volume", r.Volume},
		{"description", r.Description},
		{"domain", r.Domain},
		{"expires", r.Expires},
		{"private-key", r.PrivateKey},
		{"certificate", r.Certificate},
		{"ec2-cert", r.EC2Cert},
		{"user", r.User},
		{"kernel-id", r.KernelID},
		{"ramdisk-id", r.RamdiskID},
	} {
		errs = append(errs, one(f.what, f.s))
	}
	for _, l := range []struct {
		what string
		all  []string
	}{{"exclude", r.Exclude}, {"include", r.Include}, {"recipients", r.Recipients}} {
		if len(l.all) > maxItems {
			return fmt.Errorf("%s: %d items, at most %d can be", l.what, len(l.all), maxItems)
		}
		for _, s := range l.all {
			if s == "" || strings.Contains(s, ",") { // options split there
				errs = append(errs, fmt.Errorf("%s: %q is empty or has a comma", l.what, s))
			}
			errs = append(errs, one(l.what, s))
		}
	}
	return errors.Join(errs...)
}

// Check reports what cannot be meant; a nil Quiesce is good.
func (q *Quiesce) Check() error {
	if q == nil {
		return nil
	}
	seen := map[string]bool{}
	for _, u := range append(append([]string(nil), q.Stop...), q.Freeze...) {
		if !unitPattern.MatchString(u) {
			return fmt.Errorf("quiesce: %q is no name of a unit: write it whole, as app.service", u)
		}
		if indispensable.MatchString(u) {
			return fmt.Errorf("quiesce: %s cannot stand still: without it nothing could let the others go on", u)
		}
		if seen[u] {
			return fmt.Errorf("quiesce: %s is named twice", u)
		}
		seen[u] = true
	}
	for _, m := range q.Filesystems {
		if !filepath.IsAbs(m) || filepath.Clean(m) != m || seen[m] {
			return fmt.Errorf("quiesce: filesystem %q: give each mount point once, as an absolute path", m)
		}
		seen[m] = true
	}
	if len(seen) > maxItems {
		return fmt.Errorf("quiesce: %d names, at most %d can be", len(seen), maxItems)
	}
	if q.Limit < 0 || time.Duration(q.Limit) > 24*time.Hour {
		return fmt.Errorf("quiesce: limit %s: up to 24h", time.Duration(q.Limit))
	}
	return nil
}

// same reports whether two requests with one token ask for the same.
func (r *Request) same(o *Request) bool { return string(encode(r)) == string(encode(o)) }
