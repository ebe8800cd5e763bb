package upload

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// probePrefix begins the keys CheckWritable uses.
const probePrefix = "instar-write-test-"

// Writable is what CheckWritable found out.
type Writable struct {
	Server string        // what it calls itself ("MinIO", "AmazonS3", …), may be empty
	Offset time.Duration // the server's clock minus ours, to the second; 0 if unknown

	// ACLIgnored: the server takes the ACL asked for and does nothing with
	// it. Who may read is up to a bucket policy.
	ACLIgnored bool

	// NotDeleted is why the test object could not be removed again, or nil.
	// Storing works all the same.
	NotDeleted error
	Key        string // of the test object
}

// CheckWritable stores a small object of a new name, with the ACL that later
// objects will have, and deletes it: the only proof, before an hour of work,
// that its results can be stored. The error is the one that the first real Put
// would have met. In a versioned bucket the version goes too, if the
// credentials allow.
func CheckWritable(ctx context.Context, s Store, o PutOptions) (Writable, error) {
	var b [12]byte
	rand.Read(b[:])
	w := Writable{Key: probePrefix + hex.EncodeToString(b[:])}
	o.IfNoneMatch, o.IfMatch, o.MD5, o.SHA256 = false, "", nil, nil
	content := []byte("Instar checks that it can store here. This may be deleted.\n")
	o.ContentType = "text/plain"
	if _, err := PutBytes(ctx, s, w.Key, content, o); err != nil {
		var e *Error
		if errors.As(err, &e) {
			e.Op = "check that it is writable:"
			e.Key = ""
			if e.Kind == ErrAccess && e.Advice == "" {
				e.Advice = "the credentials may not put objects there: a policy must allow s3:PutObject" + aclPermission(s, o)
			}
			if e.Kind == ErrNoBucket && e.Advice == "" {
				e.Advice = "create it first, or check the name and endpoint"
			}
		}
		return w, err
	}
	w.NotDeleted = s.Delete(ctx, w.Key)
	if s3s, ok := s.(*s3Store); ok {
		s3s.forgetProbe(ctx, w.Key)
		server, date, seen := s3s.server.get()
		w.Server = server
		if !date.IsZero() {
			if w.Offset = date.Sub(seen).Round(time.Second); w.Offset.Abs() <= time.Second {
				w.Offset = 0
			}
		}
		acl := s3s.acl(o)
		w.ACLIgnored = acl != "" && acl != "private" && strings.HasPrefix(server, "MinIO")
	}
	return w, nil
}

func aclPermission(s Store, o PutOptions) string {
	if s3s, ok := s.(*s3Store); ok && s3s.acl(o) != "" {
		return " and, for the ACL, s3:PutObjectAcl"
	}
	return ""
}

// forgetProbe removes the versions a versioned bucket keeps of the test object.
func (s *s3Store) forgetProbe(ctx context.Context, key string) {
	// One attempt: this is tidiness, and often not permitted.
	out, err := s.client.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{Bucket: &s.bucket, Prefix: s.full(key)})
	if err != nil {
		return
	}
	for _, v := range s.versionPage(out) {
		if v.Key == key {
			s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: s.full(key), VersionId: aws.String(v.ID)})
		}
	}
}

// EnsureBucket makes sure that a store's bucket exists, in the given location if
// that is not "" ("US" and "EU" are names of us-east-1 and eu-west-1). created
// tells whether it had to be made. A bucket that is elsewhere is
// [ErrBucketElsewhere], with both locations named. For a directory it does
// nothing.
func EnsureBucket(ctx context.Context, s Store, location string) (created bool, err error) {
	err = FindBucket(ctx, s, location)
	if m, ok := s.(BucketManager); ok && errors.Is(err, ErrNoBucket) {
		err = m.CreateBucket(ctx, location)
		return err == nil, err
	}
	return false, err
}

// FindBucket is EnsureBucket for a bucket that is not to be made: it is
// [ErrNoBucket] if it does not exist.
func FindBucket(ctx context.Context, s Store, location string) error {
	m, ok := s.(BucketManager)
	if !ok {
		return nil
	}
	have, err := m.Location(ctx)
	if err != nil {
		return err
	}
	if location == "" || canonicalLocation(location) == have {
		return nil
	}
	e := newError("locate bucket", s.String(), "", ErrBucketElsewhere, nil)
	e.Location = have
	if have == "" {
		e.Location = "us-east-1"
	}
	e.Advice = fmt.Sprintf("%q was asked for: leave the location out or choose another bucket", location)
	return e
}

// copyBuffer is how large an object Copy takes into memory to put it with its
// length known; larger ones go as streams.
const copyBuffer = 16 << 20

// Copy copies an object between stores: by the server itself if both are
// buckets of one, reached by the same credentials; else through here. What
// passes through here is checked against the source's MD5, where known.
func Copy(ctx context.Context, dst Store, dstKey string, src Store, srcKey string, o PutOptions) (Object, error) {
	d, ok1 := dst.(*s3Store)
	f, ok2 := src.(*s3Store)
	if ok1 && ok2 && d.endpoint == f.endpoint && sameCredentials(d.opt, f.opt) && !o.IfNoneMatch && o.IfMatch == "" && len(o.Tags) == 0 {
		return d.copyFrom(ctx, dstKey, f, srcKey, o)
	}
	r, obj, err := src.Get(ctx, srcKey, GetOptions{})
	if err != nil {
		return Object{}, err
	}
	defer r.Close()
	if obj.Size > copyBuffer {
		return dst.PutStream(ctx, dstKey, r, o)
	}
	buf := make([]byte, obj.Size)
	if _, err := io.ReadFull(r, buf); err != nil {
		return Object{}, newError("copy", src.String(), srcKey, nil, err)
	}
	o.MD5, o.SHA256 = obj.MD5, obj.SHA256
	return dst.Put(ctx, dstKey, bytes.NewReader(buf), obj.Size, o)
}

func sameCredentials(a, b Options) bool {
	if a.Anonymous || b.Anonymous || a.Profile != b.Profile {
		return false
	}
	if a.Credentials == nil || b.Credentials == nil {
		return a.Credentials == b.Credentials
	}
	return *a.Credentials == *b.Credentials
}

// CheckConditional makes sure that a store refuses a Put whose condition does
// not hold. Servers that take the header and write all the same are
// [ErrUnsupported]: with them a compare-and-swap loses what others wrote. It
// stores a small object of a new name that begins with prefix, and deletes it.
func CheckConditional(ctx context.Context, s Store, prefix string) error {
	var b [12]byte
	rand.Read(b[:])
	key := prefix + hex.EncodeToString(b[:])
	first, err := PutBytes(ctx, s, key, []byte("Instar checks that conditions of writes are kept. This may be deleted.\n"), PutOptions{IfNoneMatch: true})
	if err != nil {
		return err
	}
	tries := []struct {
		what string
		o    PutOptions
	}{
		{"If-None-Match: * (only if there is nothing)", PutOptions{IfNoneMatch: true}},
		{"If-Match (only if nothing changed)", PutOptions{IfMatch: "00000000000000000000000000000000"}},
	}
	for i, t := range tries {
		_, err := PutBytes(ctx, s, key, fmt.Appendf(nil, "condition %d\n", i), t.o)
		if errors.Is(err, ErrExist) {
			continue
		}
		if err == nil {
			err = newError("put", s.String(), key, ErrUnsupported, fmt.Errorf("the server takes %s and writes all the same", t.what))
		}
		return errors.Join(err, s.Delete(context.WithoutCancel(ctx), key))
	}
	// The right condition must hold.
	if _, err := PutBytes(ctx, s, key, []byte("conditions are kept\n"), PutOptions{IfMatch: first.ETag}); err != nil {
		return errors.Join(err, s.Delete(context.WithoutCancel(ctx), key))
	}
	if err := s.Delete(ctx, key); err != nil && !errors.Is(err, ErrAccess) {
		return err
	}
	return nil
}
