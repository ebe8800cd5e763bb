package upload

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// Credentials sign requests. They are never printed.
type Credentials struct {
	AccessKeyID     string
	SecretAccessKey string
	SessionToken    string // of temporary credentials, else ""
}

// String shows the access key's first characters only.
func (c Credentials) String() string {
	return fmt.Sprintf("credentials %.4s…", c.AccessKeyID)
}

// GoString is String: %#v shows no secret either.
func (c Credentials) GoString() string { return c.String() }

// Options says how to reach a store. The zero value takes everything from the
// environment and files the AWS tools know: AWS_ACCESS_KEY_ID, AWS_PROFILE,
// ~/.aws, AWS_REGION, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3,
// AWS_CA_BUNDLE, HTTPS_PROXY, NO_PROXY and, last, the instance profile (IMDSv2
// only). Directories use ACL, OnRetry and so on as little as they can.
type Options struct {
	Endpoint string // URL of an S3-compatible server, "https://minio.example:9000"; "" means Amazon's
	Region   string // any name is accepted; default from the environment, else us-east-1

	// CACertFile is a PEM file of the certificate authorities to trust, and
	// none else, when talking to the store. It goes before AWS_CA_BUNDLE.
	CACertFile string

	Credentials *Credentials // nil: the SDK's chain
	Anonymous   bool         // sign nothing
	Profile     string       // of ~/.aws/config; default AWS_PROFILE

	// PathStyle forces http://host/bucket/key (true) or http://bucket.host/key
	// (false). nil: path style wherever an endpoint is configured.
	PathStyle *bool

	ACL ACL // of objects put without one of their own; "" sends none

	Retry    Retry
	Timeouts Timeouts
	Limit    *rate.Limiter // bytes a second of bodies, both directions together; nil: no limit

	OnRetry func(RetryEvent) // told of every repetition; may be called concurrently

	CreateDir bool // make a directory store's directory
}

// Timeouts bound single attempts; the zero value takes the defaults. There is
// no limit on how long a transfer that keeps moving may take.
type Timeouts struct {
	Connect time.Duration // TCP and TLS together; default 15 s
	Stall   time.Duration // a body must move at least MinBytes in this much waiting; default 30 s
	Reply   time.Duration // from the request's last byte (a bodyless one's beginning) to the reply's first; default 2 min
	// MinBytes per Stall period; default 4096, so that a transfer that only
	// trickles is begun anew. At least 1.
	MinBytes int64
}

func (t Timeouts) withDefaults() Timeouts {
	if t.Connect <= 0 {
		t.Connect = 15 * time.Second
	}
	if t.Stall <= 0 {
		t.Stall = 30 * time.Second
	}
	if t.Reply <= 0 {
		t.Reply = 2 * time.Minute
	}
	if t.MinBytes <= 0 {
		t.MinBytes = 4096
	}
	return t
}

// Open opens the store a URL names: "s3://bucket/prefix", "file:///directory",
// or a directory's path. S3 is not contacted yet.
func Open(ctx context.Context, rawURL string, o Options) (Store, error) {
	if name, ok := strings.CutPrefix(rawURL, "file://"); ok {
		u, err := url.Parse(rawURL)
		if err != nil || u.Host != "" || u.Path == "" {
			return nil, fmt.Errorf("store %q: want file:///directory", name)
		}
		return OpenDir(u.Path, o.CreateDir)
	}
	if rest, ok := strings.CutPrefix(rawURL, "s3://"); ok {
		bucket, prefix, err := SplitLocation(rest)
		if strings.HasPrefix(rest, "/") {
			err = fmt.Errorf("store %q: want s3://BUCKET/PREFIX", rawURL)
		}
		if err != nil {
			return nil, err
		}
		return openS3(ctx, bucket, prefix, o)
	}
	if strings.Contains(rawURL, "://") {
		return nil, fmt.Errorf("store %q: unknown scheme; known are s3://BUCKET/PREFIX, file:///DIRECTORY and a directory's path", rawURL)
	}
	if rawURL == "" {
		return nil, errors.New("store: no URL given")
	}
	return OpenDir(rawURL, o.CreateDir)
}

// SplitLocation takes "bucket/prefix" apart as the bundle tools' -b does:
// leading and trailing slashes are dropped, the prefix may be empty.
func SplitLocation(s string) (bucket, prefix string, err error) {
	trimmed := strings.Trim(s, "/")
	bucket, prefix, _ = strings.Cut(trimmed, "/")
	prefix = strings.Trim(prefix, "/")
	if bucket == "" {
		return "", "", fmt.Errorf("bucket %q: no name given; want BUCKET or BUCKET/PREFIX", s)
	}
	if strings.ContainsAny(bucket, " \t\r\n:?#%&\\<>\"'{}|^`*,;@") {
		return "", "", fmt.Errorf("bucket %q: the name has characters a bucket's cannot have; want BUCKET or BUCKET/PREFIX", bucket)
	}
	if prefix != "" {
		if err := CheckKey(prefix); err != nil {
			return "", "", fmt.Errorf("prefix %q: %w", prefix, err)
		}
	}
	return bucket, prefix, nil
}

// S3URL is the URL of "bucket/prefix" for Open.
func S3URL(location string) (string, error) {
	bucket, prefix, err := SplitLocation(location)
	if err != nil {
		return "", err
	}
	if prefix == "" {
		return "s3://" + bucket, nil
	}
	return "s3://" + bucket + "/" + prefix, nil
}
