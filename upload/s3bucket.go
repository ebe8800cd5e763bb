package upload

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// Location implements BucketManager.
func (s *s3Store) Location(ctx context.Context) (string, error) {
	var loc string
	err := s.do(ctx, "locate bucket", "", func(ctx context.Context) error {
		out, err := s.client.GetBucketLocation(ctx, &s3.GetBucketLocationInput{Bucket: &s.bucket})
		if err == nil {
			loc = string(out.LocationConstraint)
			return nil
		}
		e := s.classify(ctx, "locate bucket", "", err)
		if e.Kind != ErrAccess && e.Kind != ErrUnsupported {
			return e
		}
		// Policies often allow objects only; a HEAD tells the region too.
		head, err := s.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &s.bucket})
		if err != nil {
			if h := s.classify(ctx, "locate bucket", "", err); h.Kind == ErrNoBucket || h.retry {
				return h
			}
			return e
		}
		loc = aws.ToString(head.BucketRegion)
		return nil
	})
	return canonicalLocation(loc), err
}

// canonicalLocation gives each location one name.
func canonicalLocation(l string) string {
	switch l {
	case "US", "us-east-1":
		return ""
	case "EU":
		return "eu-west-1"
	}
	return l
}

// CreateBucket implements BucketManager. An empty location means Amazon's
// region in use, or whatever another server does by default.
func (s *s3Store) CreateBucket(ctx context.Context, location string) error {
	in := &s3.CreateBucketInput{Bucket: &s.bucket}
	want := canonicalLocation(location)
	if location == "" && s.endpoint == "" {
		want = canonicalLocation(s.region)
	}
	if want != "" {
		in.CreateBucketConfiguration = &types.CreateBucketConfiguration{LocationConstraint: types.BucketLocationConstraint(want)}
	}
	return s.attempts(ctx, "create bucket", "", func(ctx context.Context, last *Error) error {
		_, err := s.client.CreateBucket(ctx, in)
		if err == nil {
			return nil
		}
		e := s.classify(ctx, "create bucket", "", err)
		switch e.Code {
		case "BucketAlreadyOwnedByYou":
			return nil
		case "BucketAlreadyExists":
			if last != nil && last.unclear {
				return nil // made by the attempt whose reply was lost
			}
			e.Advice = "the name belongs to somebody else: choose another"
		}
		return e
	})
}

// DeleteBucket implements BucketManager.
func (s *s3Store) DeleteBucket(ctx context.Context) error {
	return s.attempts(ctx, "delete bucket", "", func(ctx context.Context, last *Error) error {
		_, err := s.client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: &s.bucket})
		if err == nil {
			return nil
		}
		e := s.classify(ctx, "delete bucket", "", err)
		if e.Kind == ErrNoBucket && last != nil && last.unclear {
			return nil // the lost reply's attempt did it
		}
		return e
	})
}

// ServerTime implements Clock. Any reply has the time, a refusal too.
func (s *s3Store) ServerTime(ctx context.Context) (time.Time, error) {
	begin := time.Now()
	err := s.do(ctx, "server time", "", func(ctx context.Context) error {
		_, err := s.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &s.bucket})
		if _, date, seen := s.server.get(); !date.IsZero() && seen.After(begin) {
			return nil
		}
		if err != nil {
			return s.classify(ctx, "server time", "", err)
		}
		return newError("server time", s.String(), "", ErrUnsupported, errors.New("the reply has no date"))
	})
	_, date, seen := s.server.get()
	return date.Add(time.Since(seen)), err
}

// lockOf tells what protects a version from deletion, and until when if that
// is a retention period; why is empty when nothing does or nobody says.
func (s *s3Store) lockOf(ctx context.Context, fullKey, id string) (until time.Time, why string) {
	r, err := s.client.GetObjectRetention(ctx, &s3.GetObjectRetentionInput{Bucket: &s.bucket, Key: &fullKey, VersionId: nonEmpty(id)})
	if err == nil && r.Retention != nil && r.Retention.RetainUntilDate != nil && r.Retention.RetainUntilDate.After(time.Now()) {
		return *r.Retention.RetainUntilDate, strings.ToLower(string(r.Retention.Mode)) + " retention"
	}
	h, err := s.client.GetObjectLegalHold(ctx, &s3.GetObjectLegalHoldInput{Bucket: &s.bucket, Key: &fullKey, VersionId: nonEmpty(id)})
	if err == nil && h.LegalHold != nil && h.LegalHold.Status == types.ObjectLockLegalHoldStatusOn {
		return time.Time{}, "legal hold"
	}
	return time.Time{}, ""
}

func nonEmpty(v string) *string {
	if v == "" {
		return nil
	}
	return &v
}
