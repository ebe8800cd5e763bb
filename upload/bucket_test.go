package upload_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
)

// sdk is a client of its own, to prepare what a Store has no business with.
func sdk(o upload.Options) *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &o.Endpoint, Region: o.Region, UsePathStyle: true,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{AccessKeyID: o.Credentials.AccessKeyID, SecretAccessKey: o.Credentials.SecretAccessKey}, nil
		}),
	})
}

func TestEnsureBucket(t *testing.T) {
	for name, o := range map[string]upload.Options{
		"fake": fakeOptions(fakeS3(t)), "minio": serverOptions(servers.MinIO(t)), "versitygw": serverOptions(servers.Versity(t)),
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, fmt.Sprintf("s3://ensure-%d", bucketNumber.Add(1)), o)
			m := s.(upload.BucketManager)
			if _, err := m.Location(t.Context()); !errors.Is(err, upload.ErrNoBucket) {
				t.Errorf("location before: %v", err)
			}
			for i, want := range []bool{true, false} {
				if made, err := upload.EnsureBucket(t.Context(), s, ""); err != nil || made != want {
					t.Errorf("call %d: %v, %v", i, made, err)
				}
			}
			// gofakes3 takes us for somebody else.
			if err := m.CreateBucket(t.Context(), ""); err != nil && (name != "fake" || !errors.Is(err, upload.ErrAccess)) {
				t.Errorf("creating our own again: %v", err)
			}
			loc, err := m.Location(t.Context())
			if err != nil || loc != "" {
				t.Errorf("location %q, %v", loc, err)
			}
			for _, same := range []string{"US", "us-east-1"} {
				if made, err := upload.EnsureBucket(t.Context(), s, same); err != nil || made {
					t.Errorf("%s: %v, %v", same, made, err)
				}
			}
			_, err = upload.EnsureBucket(t.Context(), s, "EU")
			if !errors.Is(err, upload.ErrBucketElsewhere) || !strings.Contains(err.Error(), "us-east-1") || !strings.Contains(err.Error(), `"EU"`) {
				t.Errorf("elsewhere: %v", err)
			}
			w, err := upload.CheckWritable(t.Context(), s, upload.PutOptions{ACL: upload.ACLAWSExecRead})
			if name == "versitygw" {
				// Its buckets take no ACLs unless told to.
				if err != nil && !errors.Is(err, upload.ErrACL) {
					t.Errorf("writable with an ACL: %v", err)
				}
			} else if err != nil || w.ACLIgnored != (name == "minio") {
				t.Errorf("writable with an ACL: %+v, %v", w, err)
			}
			if w, err := upload.CheckWritable(t.Context(), s, upload.PutOptions{}); err != nil || w.NotDeleted != nil || w.Offset.Abs() > time.Minute {
				t.Errorf("writable: %+v, %v", w, err)
			}
			if l := keysOf(t, s); len(l) != 0 {
				t.Errorf("the check left %q", l)
			}
			if _, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := m.DeleteBucket(t.Context()); !errors.Is(err, upload.ErrNotEmpty) {
				t.Errorf("deleting a full bucket: %v", err)
			}
			if err := s.Delete(t.Context(), "k"); err != nil {
				t.Fatal(err)
			}
			if err := m.DeleteBucket(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := m.Location(t.Context()); !errors.Is(err, upload.ErrNoBucket) {
				t.Errorf("location after: %v", err)
			}
		})
	}
	if made, err := upload.EnsureBucket(t.Context(), open(t, t.TempDir(), upload.Options{}), "EU"); made || err != nil {
		t.Errorf("a directory: %v, %v", made, err)
	}
}

// TestReadOnly: who may read only learns it before the work.
func TestReadOnly(t *testing.T) {
	o := serverOptions(servers.MinIO(t))
	s := bucket(t, o)
	name := s.(upload.BucketManager).Bucket()
	policy := fmt.Sprintf(`{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"AWS":["*"]},"Action":["s3:GetObject","s3:ListBucket"],"Resource":["arn:aws:s3:::%[1]s","arn:aws:s3:::%[1]s/*"]}]}`, name)
	if _, err := sdk(o).PutBucketPolicy(t.Context(), &s3.PutBucketPolicyInput{Bucket: &name, Policy: &policy}); err != nil {
		t.Fatal(err)
	}
	if _, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	o.Credentials, o.Anonymous = nil, true
	reader := open(t, s.String(), o)
	if b, _, err := upload.GetBytes(t.Context(), reader, "k", 10); err != nil || string(b) != "x" {
		t.Errorf("reading: %q, %v", b, err)
	}
	_, err := upload.CheckWritable(t.Context(), reader, upload.PutOptions{})
	if !errors.Is(err, upload.ErrAccess) || !strings.Contains(err.Error(), "s3:PutObject") || !strings.Contains(err.Error(), name) {
		t.Errorf("check: %v", err)
	}
	dir := open(t, t.TempDir(), upload.Options{})
	if _, err := upload.CheckWritable(t.Context(), dir, upload.PutOptions{}); err != nil {
		t.Errorf("a directory: %v", err)
	}
}

// TestVersionsAndLocks deletes in a bucket that keeps versions and locks some.
func TestVersionsAndLocks(t *testing.T) {
	o := serverOptions(servers.MinIO(t))
	c := sdk(o)
	ctx := t.Context()
	name := fmt.Sprintf("locked-%d", bucketNumber.Add(1))
	if _, err := c.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &name, ObjectLockEnabledForBucket: aws.Bool(true)}); err != nil {
		t.Fatal(err)
	}
	s := open(t, "s3://"+name+"/p", o)
	v := s.(upload.Versioner)
	for i := range 3 {
		for _, k := range []string{"free", "kept", "held"} {
			if _, err := upload.PutBytes(ctx, s, k, fmt.Appendf(nil, "%s %d", k, i), upload.PutOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	until := time.Now().Add(time.Hour).Truncate(time.Second)
	lock := func(key string) {
		t.Helper()
		full := "p/" + key
		var err error
		if key == "kept" {
			_, err = c.PutObjectRetention(ctx, &s3.PutObjectRetentionInput{
				Bucket: &name, Key: &full,
				Retention: &types.ObjectLockRetention{Mode: types.ObjectLockRetentionModeCompliance, RetainUntilDate: &until},
			})
		} else {
			_, err = c.PutObjectLegalHold(ctx, &s3.PutObjectLegalHoldInput{
				Bucket: &name, Key: &full,
				LegalHold: &types.ObjectLockLegalHold{Status: types.ObjectLockLegalHoldStatusOn},
			})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	lock("kept")
	lock("held")
	if _, err := upload.CheckWritable(ctx, s, upload.PutOptions{}); err != nil {
		t.Error(err)
	}
	if err := s.Delete(ctx, "free", "kept", "held"); err != nil {
		t.Fatalf("delete markers: %v", err)
	}
	if l := keysOf(t, s); len(l) != 0 {
		t.Errorf("listed: %q", l)
	}
	all := versionsOf(t, v)
	if len(all) != 12 || !all[0].Marker || !all[0].Latest || all[0].Key != "free" {
		t.Fatalf("versions: %+v", all)
	}
	asked := 0
	o.OnRetry = func(upload.RetryEvent) { asked++ }
	err := open(t, s.String(), o).(upload.Versioner).DeleteVersions(ctx, all...)
	var de *upload.DeleteError
	if !errors.As(err, &de) || len(de.Failed) != 2 || !errors.Is(err, upload.ErrLocked) {
		t.Fatalf("got %v", err)
	}
	if asked != 0 {
		t.Errorf("locked versions were tried again %d times", asked)
	}
	for _, f := range de.Failed {
		if f.Kind != upload.ErrLocked || f.Key != "kept" && f.Key != "held" {
			t.Errorf("failed: %v", f)
		}
		if f.Key == "kept" && !f.Until.Equal(until) {
			t.Errorf("locked until %v, want %v", f.Until, until)
		}
	}
	if !strings.Contains(err.Error(), "legal hold") || !strings.Contains(err.Error(), "retention") {
		t.Errorf("the message %q does not say why", err)
	}
	if left := versionsOf(t, v); len(left) != 2 {
		t.Errorf("left: %+v", left)
	}
}

func versionsOf(t *testing.T, v upload.Versioner) (all []upload.Version) {
	t.Helper()
	for x, err := range v.Versions(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, x)
	}
	return all
}

// TestManyVersions crosses the page size of a list of versions and of a delete.
func TestManyVersions(t *testing.T) {
	o := serverOptions(servers.MinIO(t))
	s := bucket(t, o)
	name := s.(upload.BucketManager).Bucket()
	_, err := sdk(o).PutBucketVersioning(t.Context(), &s3.PutBucketVersioningInput{
		Bucket:                  &name,
		VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled},
	})
	if err != nil {
		t.Fatal(err)
	}
	const n = 521
	keys := make([]string, n)
	for i := range keys {
		keys[i] = fmt.Sprintf("k%03d", i)
		if _, err := upload.PutBytes(t.Context(), s, keys[i], nil, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete(t.Context(), keys...); err != nil {
		t.Fatal(err)
	}
	all := versionsOf(t, s.(upload.Versioner))
	if len(all) != 2*n {
		t.Errorf("%d versions and markers, want %d", len(all), 2*n)
	}
	if err := s.(upload.Versioner).DeleteVersions(t.Context(), all...); err != nil {
		t.Fatal(err)
	}
	if left := versionsOf(t, s.(upload.Versioner)); len(left) != 0 {
		t.Errorf("%d are left", len(left))
	}
}
