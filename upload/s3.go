package upload

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"
)

// s3Store is a Store in a bucket. Its methods are in the files s3*.go.
type s3Store struct {
	client   *s3.Client
	http     *http.Transport
	creds    aws.CredentialsProvider
	bucket   string
	prefix   string // "" or "a/b/"
	endpoint string // "" for Amazon's
	region   string
	opt      Options
	server   serverNote
}

// openS3 settles where the server is, how to sign and whom to trust.
func openS3(ctx context.Context, bucket, prefix string, o Options) (Store, error) {
	o.Retry = o.Retry.withDefaults()
	o.Timeouts = o.Timeouts.withDefaults()
	name := "s3://" + bucket
	fail := func(kind, err error) (Store, error) { return nil, newError("open", name, "", kind, err) }

	load := []func(*config.LoadOptions) error{
		config.WithLogger(logging.Nop{}),
		config.WithEC2RoleCredentialOptions(func(r *ec2rolecreds.Options) {
			r.Client = metadataClient()
		}),
	}
	if o.Region != "" {
		load = append(load, config.WithRegion(o.Region))
	}
	if o.Profile != "" {
		load = append(load, config.WithSharedConfigProfile(o.Profile))
	}
	if o.CACertFile != "" {
		pem, err := os.ReadFile(o.CACertFile)
		if err != nil {
			return nil, fmt.Errorf("certificate authorities (--ca-cert): %w", err)
		}
		load = append(load, config.WithCustomCABundle(bytes.NewReader(pem)))
	}
	switch {
	case o.Anonymous:
		load = append(load, config.WithCredentialsProvider(aws.AnonymousCredentials{}))
	case o.Credentials != nil:
		if o.Credentials.AccessKeyID == "" || o.Credentials.SecretAccessKey == "" {
			return fail(ErrCredentials, fmt.Errorf("access key or secret key is empty"))
		}
		load = append(load, config.WithCredentialsProvider(staticCredentials(*o.Credentials)))
	}
	if bundle := os.Getenv("AWS_CA_BUNDLE"); bundle != "" && o.CACertFile == "" {
		if _, err := os.Stat(bundle); err != nil {
			return nil, fmt.Errorf("certificate authorities (AWS_CA_BUNDLE): %w", err)
		}
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return fail(nil, fmt.Errorf("configuration: %w", err))
	}
	if cfg.Region == "" {
		cfg.Region = "us-east-1"
	}
	// The SDK has put the CA bundle, whatever named it, into its own client.
	sdkHTTP, ok := cfg.HTTPClient.(*awshttp.BuildableClient)
	if !ok {
		sdkHTTP = awshttp.NewBuildableClient()
	}
	transport := newTransport(sdkHTTP.GetTransport(), o.Timeouts)

	s := &s3Store{http: transport, bucket: bucket, region: cfg.Region, opt: o, creds: cfg.Credentials}
	if prefix != "" {
		s.prefix = prefix + "/"
	}
	cfg.HTTPClient = &http.Client{
		Transport: &guard{next: transport, limits: o.Timeouts, rate: o.Limit, note: &s.server},
		// The SDK computes where to send a request; a redirect would carry
		// the signature, perhaps a session token, to a host of the server's
		// choosing. It becomes an error that says where it pointed.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	s.client = s3.NewFromConfig(cfg, func(so *s3.Options) {
		if o.Endpoint != "" {
			so.BaseEndpoint = aws.String(o.Endpoint)
		}
		custom := so.BaseEndpoint != nil
		so.UsePathStyle = custom
		if o.PathStyle != nil {
			so.UsePathStyle = *o.PathStyle
		}
		// The SDK's default is a trailing CRC-32 in an aws-chunked body, which
		// many servers do not understand; we send Content-MD5, or SHA-256, in
		// the header.
		so.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		so.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
		so.Retryer = aws.NopRetryer{}
		so.AppID = "instar"
		so.DisableLogOutputChecksumValidationSkipped = true
		if o.PathStyle == nil && !custom && strings.Contains(bucket, ".") {
			so.UsePathStyle = true // its certificate would not match bucket.host
		}
		if custom {
			s.endpoint = *so.BaseEndpoint
		}
	})
	if err := checkEndpoint(s.endpoint); err != nil {
		return fail(nil, err)
	}
	return s, nil
}

// metadataClient asks the instance's metadata service, version 2 only, never by
// a proxy, and gives up soon where there is none.
func metadataClient() *imds.Client {
	return imds.New(imds.Options{
		EnableFallback: aws.FalseTernary,
		HTTPClient: awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
			t.Proxy = nil
			t.DisableKeepAlives = true
		}),
		DisableDefaultMaxBackoff: true,
		Retryer:                  retry.AddWithMaxBackoffDelay(retry.NewStandard(), 100*time.Millisecond),
	})
}

func staticCredentials(c Credentials) aws.CredentialsProvider {
	return aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{
			AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: c.SessionToken,
			Source: "Options.Credentials",
		}, nil
	})
}

// Place tells this store from others of the same name at other services.
func (s *s3Store) Place() string { return strings.TrimRight(s.endpoint, "/") + " " + s.String() }

func (s *s3Store) String() string {
	return strings.TrimSuffix("s3://"+s.bucket+"/"+s.prefix, "/")
}

// Bucket implements BucketManager.
func (s *s3Store) Bucket() string { return s.bucket }

func (s *s3Store) Close() error {
	s.http.CloseIdleConnections()
	return nil
}

// full is a key as the server knows it.
func (s *s3Store) full(key string) *string { return aws.String(s.prefix + key) }

// do runs one request under the retry policy.
func (s *s3Store) do(ctx context.Context, op, key string, f func(ctx context.Context) error) error {
	return s.attempts(ctx, op, key, func(ctx context.Context, _ *Error) error { return f(ctx) })
}

// attempts is do for operations that must know how the last attempt failed.
func (s *s3Store) attempts(ctx context.Context, op, key string, f func(ctx context.Context, last *Error) error) error {
	var last *Error
	expired := false
	err := s.opt.Retry.do(ctx, s.opt.OnRetry, func(ctx context.Context, _ int) error {
		actx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		err := s.haveCredentials(actx, op, key)
		if err == nil {
			err = f(actx, last)
		}
		if err == nil {
			return nil
		}
		e := s.classify(actx, op, key, err)
		// Credentials that ended early are asked for anew, once. A HEAD's
		// refusal has no code: it may be this, or the clock, which the SDK
		// has now learnt.
		if (e.Code == "ExpiredToken" || e.Status == http.StatusForbidden && e.Code == "") && !expired {
			if c, ok := s.creds.(interface{ Invalidate() }); ok {
				c.Invalidate()
			}
			e.retry, expired = true, true
		}
		if last != nil {
			e.unclear = e.unclear || last.unclear
		}
		last = e
		return e
	})
	if err == nil {
		return nil
	}
	if e, ok := err.(*Error); ok {
		return e
	}
	return newError(op, s.String(), key, nil, err)
}

// haveCredentials asks the chain for credentials, which it caches, so that
// their lack is told from a refused request.
func (s *s3Store) haveCredentials(ctx context.Context, op, key string) error {
	if s.opt.Anonymous {
		return nil
	}
	_, err := s.creds.Retrieve(ctx)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return newError(op, s.String(), key, nil, context.Cause(ctx))
	}
	e := newError(op, s.String(), key, ErrCredentials, fmt.Errorf("none found (the last source asked: %w)", innermost(err)))
	e.Advice = "give an access key and secret key (-a, -s, or the configuration file), set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or run on an instance with a role"
	return e
}
