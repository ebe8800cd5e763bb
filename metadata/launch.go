package metadata

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"
)

// Launch is what a launch ticket gives the instance's initrd; see TICKET.md.
type Launch struct {
	Format string `yaml:"format"` // ec2 or instar
	Store  string `yaml:"store"`  // where the image is: s3://bucket/prefix
	// Mode is eager, lazy or lazy-or-eager: how the image comes to the disk.
	// "" leaves it to the initrd.
	Mode string `yaml:"mode"`
	// Endpoint, Region and CACert (PEM) say how the instance reaches the store.
	Endpoint string `yaml:"endpoint"`
	Region   string `yaml:"region"`
	CACert   string `yaml:"ca-cert"`
	// Cache is a cache of packs and index objects beside the instance's host,
	// http://HOST:PORT as the instance reaches it; asked before the store.
	Cache string `yaml:"cache"`
	// Manifest is the manifest's name below Store. ManifestSHA256 pins its
	// bytes, 64 hexadecimal digits; required for the instar format.
	Manifest       string `yaml:"manifest"`
	ManifestSHA256 string `yaml:"manifest-sha256"`
	// Certificate (PEM) is the bundler's: an EC2 bundle's key is unwrapped
	// only if the manifest's signature verifies against it.
	Certificate string `yaml:"certificate"`
	// Signers is an allowed_signers file: whom the instance may trust.
	Signers string `yaml:"signers"`
	// IndexKey is what opens an Instar image's index: an age identity.
	IndexKey string `yaml:"index-key"`
	// Credentials are the S3 credentials the ticket carries.
	Credentials Credentials `yaml:"credentials"`
	// Reclaims is how often a ticket may be claimed again before it is
	// completed, renewals not counted; default 16.
	Reclaims int `yaml:"reclaims"`
}

// LaunchID tells one launch of the instance from another: it changes with the
// image and with launch-time. It is "" without a launch.
func (in *Instance) LaunchID() string {
	l := in.Launch
	if l == nil {
		return ""
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{
		l.Format, l.Store, l.Endpoint, l.Manifest, l.ManifestSHA256, l.Certificate, in.LaunchTime.UTC().Format(time.RFC3339Nano),
	}, "\x00")))
	return hex.EncodeToString(sum[:16])
}

// Launcher serves the launch tickets' endpoint. Package launch has the one
// that serves use; the handler has checked the method, the token and the
// source port before it asks.
type Launcher interface {
	// Claim answers a request for a ticket with the sealed reply. A refusal
	// is a *[Refusal]; any other error is the server's own trouble (503).
	Claim(ctx context.Context, in *Instance, body []byte) ([]byte, error)
	// Complete withdraws the instance's ticket for good. It may be repeated.
	Complete(ctx context.Context, in *Instance, body []byte) error
}

// Refusal is an answer of 400-499 with its reason. The reason goes to the
// report, and to the client as the reply's text: it must hold no secret.
type Refusal struct {
	Status int
	Reason string
}

func (r *Refusal) Error() string { return r.Reason }
