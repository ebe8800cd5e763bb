package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	neturl "net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload"
)

// storeURL is the URL of the bucket, and the directory it is if it is one.
func (a *app) storeURL(o *storage, bucket string) (url, dir string, err error) {
	endpoint := a.setting("endpoint", "--url", o.url)
	if strings.Contains(bucket, "://") {
		if rest, ok := strings.CutPrefix(bucket, "file://"); ok {
			return bucket, rest, nil
		}
		return bucket, "", nil
	}
	name, prefix, err := upload.SplitLocation(bucket)
	if err != nil {
		return "", "", usagef("--bucket: %w", err)
	}
	local, isFile := strings.CutPrefix(endpoint, "file://")
	if isFile || strings.HasPrefix(endpoint, "/") {
		dir = filepath.Join(local, name, filepath.FromSlash(prefix))
		return "file://" + dir, dir, nil
	}
	if u, err := neturl.Parse(endpoint); endpoint != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		return "", "", usagef("endpoint %q (from %s): want http://HOST[:PORT], https://HOST[:PORT] or file:///DIRECTORY", endpoint, a.conf.Get("endpoint").From)
	}
	return "s3://" + path.Join(name, prefix), "", nil
}

// openStore opens the bucket the options and the configuration name.
func (a *app) openStore(ctx context.Context, o *storage) (upload.Store, error) {
	bucket := a.setting("store", "--bucket", o.bucket)
	if err := need(bucket, "--bucket"); err != nil {
		return nil, err
	}
	return a.openBucket(ctx, o, bucket, false)
}

func (a *app) openBucket(ctx context.Context, o *storage, bucket string, create bool) (upload.Store, error) {
	url, dir, err := a.storeURL(o, bucket)
	if err != nil {
		return nil, err
	}
	opts := upload.Options{
		Endpoint: a.conf.Get("endpoint").Text, Region: a.storeRegion(), CACertFile: a.setting("ca_cert", "--ca-cert", o.caCert),
		ACL: upload.ACL(o.acl), CreateDir: create, OnRetry: a.showRetry,
	}
	if a.conf.Get("ca_cert").From == "$AWS_CA_BUNDLE" {
		opts.CACertFile = "" // the SDK reads it by itself
	}
	if dir != "" && o.rate > 0 {
		return nil, usagef("--limit-rate goes with a bucket: %s is a directory", dir)
	}
	if dir != "" {
		s, err := upload.Open(ctx, url, opts)
		if err != nil {
			return nil, withHint(asS3(err), "The store is a directory: %s.", dir)
		}
		return s, nil
	}
	if o.rate > 0 {
		opts.Limit = rate.NewLimiter(rate.Limit(o.rate), int(max(o.rate, 1<<20)))
	}
	if o.retry {
		opts.Retry.Attempts = 15
	}
	if opts.Credentials, err = a.credentials(o); err != nil {
		return nil, err
	}
	s, err := upload.Open(ctx, url, opts)
	if err != nil {
		return nil, asS3(err)
	}
	return s, nil
}

// asS3 gives an error that has no better exit code that of storage.
func asS3(err error) error {
	if code := libraryCode(err); code != 0 && code != exitFile {
		return err
	}
	return &exitError{code: exitS3, err: err}
}

func (a *app) storeRegion() string {
	region := a.region
	if _, r, ok := strings.Cut(region, "@"); ok {
		region = r
	}
	return a.setting("region", "--region", region)
}

// credentials are those of the options or of the configuration; nil leaves the
// AWS tools' own chain, the instance profile last.
func (a *app) credentials(o *storage) (*upload.Credentials, error) {
	id := a.setting("access_key_id", "--access-key", o.accessKey)
	token := a.setting("session_token", "--delegation-token", o.token)
	secret := ""
	file := a.setting("secret_key_file", "--secret-key-file", o.secretKeyFile)
	switch {
	case o.secretKey != "" && o.secretKeyFile != "":
		return nil, usagef("--secret-key and --secret-key-file exclude each other")
	case o.secretKey != "":
		secret = a.setting("secret_key", "--secret-key", o.secretKey)
	case o.secretKeyFile == "" && strings.HasPrefix(a.conf.Get("secret_key").From, "$"):
		secret = a.conf.Get("secret_key").Text // the environment goes before a configured file
	case file != "":
		s, err := a.readSecret(file)
		if err != nil {
			return nil, err
		}
		secret = s
	default:
		secret = a.conf.Get("secret_key").Text
	}
	switch {
	case id == "" && secret == "" && token == "":
		return nil, nil
	case id == "":
		return nil, withHint(usagef("missing option --access-key"), "The secret key comes from %s.", a.conf.Get("secret_key").From)
	case secret == "":
		return nil, withHint(usagef("missing option --secret-key"), "Give it by --secret-key-file FILE or AWS_SECRET_ACCESS_KEY: others can see options in ps(1).")
	}
	if strings.HasPrefix(a.conf.Get("access_key_id").From, "$") {
		if err := checkExpiry(a.getenv("AWS_CREDENTIAL_EXPIRATION"), time.Now()); err != nil {
			return nil, err
		}
	} else if strings.HasPrefix(a.conf.Get("session_token").From, "$") {
		token = "" // the environment's token belongs to the environment's keys
	}
	return &upload.Credentials{AccessKeyID: id, SecretAccessKey: secret, SessionToken: token}, nil
}

func checkExpiry(s string, now time.Time) error {
	if s == "" {
		return nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return usagef("AWS_CREDENTIAL_EXPIRATION=%q is no time like 2006-01-02T15:04:05Z", s)
	}
	if now.After(t) {
		return failf(exitS3, "the credentials of the environment expired at %s", s)
	}
	return nil
}

// readSecret reads the first line of a file.
func (a *app) readSecret(file string) (string, error) {
	var in io.Reader = a.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", failf(exitFile, "reading the secret key: %w", err)
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, keys.MaxFile))
	if err != nil {
		return "", fmt.Errorf("reading the secret key: %w", err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	if line = strings.TrimSpace(line); line == "" {
		return "", failf(exitUsage, "reading the secret key: %s is empty", file)
	}
	return line, nil
}

func (a *app) showRetry(e upload.RetryEvent) {
	a.ui.Debug("again", ui.Fields{"operation": e.Op, "object": e.Key, "attempt": e.Attempt, "wait": e.Wait.String(), "error": e.Err.Error()})
}

// storeSource reads a bundle's parts from a store.
type storeSource struct{ store upload.Store }

// OpenPart opens a part.
func (s storeSource) OpenPart(ctx context.Context, name string) (io.ReadCloser, error) {
	r, _, err := s.store.Get(ctx, name, upload.GetOptions{})
	return r, err
}

// dirSource reads them from a directory. Their names were checked to be plain.
type dirSource string

// OpenPart opens a part.
func (d dirSource) OpenPart(_ context.Context, name string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(d), name))
}

// maxManifest bounds what is read as a manifest, in bytes.
const maxManifest = 64 << 20

// storedManifest fetches a manifest.
func storedManifest(ctx context.Context, s upload.Store, name string) ([]byte, error) {
	data, _, err := upload.GetBytes(ctx, s, name, maxManifest)
	if errors.Is(err, upload.ErrNotExist) {
		return nil, withHint(asS3(err), "Is the bucket's prefix part of -b (BUCKET/PREFIX)?")
	}
	return data, err
}
