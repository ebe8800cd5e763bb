// Package sts mints temporary credentials for instances' roles with the
// AssumeRole call of an STS: MinIO's own, or AWS's.
//
// What goes in: a record's [metadata.STS]. What comes out: an access key with
// an end. The package talks to the endpoint the record names, and reads the
// file the record names for the secret.
package sts

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/sts"

	"github.com/instar-image/instar/metadata"
)

// Minter is a [metadata.Minter]. The zero value is ready.
type Minter struct{}

var _ metadata.Minter = Minter{}

// Mint calls AssumeRole. session names the session where the record does not.
func (Minter) Mint(ctx context.Context, s *metadata.STS, session string) (metadata.StaticKeys, error) {
	k, err := mint(ctx, s, session)
	if err != nil {
		return k, fmt.Errorf("minting credentials at %s: %w", s.Endpoint, err)
	}
	return k, nil
}

func mint(ctx context.Context, s *metadata.STS, session string) (metadata.StaticKeys, error) {
	secret := s.SecretAccessKey
	if s.SecretFile != "" {
		b, err := os.ReadFile(s.SecretFile)
		if err != nil {
			return metadata.StaticKeys{}, err
		}
		secret = strings.TrimSpace(string(b))
	}
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.DisableKeepAlives = true // calls are rare: nothing is kept open between
	if s.CACert != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM([]byte(s.CACert)) {
			return metadata.StaticKeys{}, errors.New("ca-cert holds no certificate in PEM")
		}
		tr.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	client := sts.New(sts.Options{
		Region: s.Region, BaseEndpoint: &s.Endpoint, HTTPClient: &http.Client{Transport: tr},
		Credentials: credentials.NewStaticCredentialsProvider(s.AccessKeyID, secret, ""),
	})
	arn := s.RoleARN
	if arn == "" {
		arn = "arn:aws:iam::000000000000:role/instar" // MinIO wants none, the call must have one
	}
	in := &sts.AssumeRoleInput{
		RoleArn: &arn, RoleSessionName: aws.String(sessionName(session)),
		DurationSeconds: aws.Int32(int32(time.Duration(s.Duration).Seconds())),
	}
	if s.Policy != "" {
		in.Policy = &s.Policy
	}
	out, err := client.AssumeRole(ctx, in)
	if err != nil {
		return metadata.StaticKeys{}, err
	}
	c := out.Credentials
	if c == nil || c.AccessKeyId == nil || c.SecretAccessKey == nil || c.SessionToken == nil || c.Expiration == nil {
		return metadata.StaticKeys{}, errors.New("the answer holds no credentials")
	}
	return metadata.StaticKeys{AccessKeyID: *c.AccessKeyId, SecretAccessKey: *c.SecretAccessKey, Token: *c.SessionToken, Expiration: *c.Expiration}, nil
}

// sessionName makes a name that AssumeRole takes: 2 to 64 of the characters
// of a role's name.
func sessionName(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < 128 && (r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || strings.ContainsRune("+=,.@_-", r)) {
			return r
		}
		return '-'
	}, s)
	for len(s) < 2 {
		s += "-"
	}
	return s[:min(len(s), 64)]
}
