package upload

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
)

const (
	maxSingle       = 5 << 30 // bytes one PUT or server-side copy may have
	minPart         = 5 << 20
	defaultPart     = 16 << 20
	maxParts        = 10000
	defaultParallel = 4
)

// digests are what a request's payload is checked by.
type digests struct {
	md5    []byte // goes as Content-MD5, and is what the ETag must be
	sha256 []byte // signed as payload hash; nil: unsigned payload (TLS)
	stored bool   // sha256 also goes as x-amz-checksum-sha256, to be kept with the object
}

// digest reads body once for the digests that are needed and not yet known.
// Over plain HTTP the payload is signed; over TLS that would only cost time.
func (s *s3Store) digest(body io.ReaderAt, size int64, o PutOptions) (digests, error) {
	d := digests{md5: o.MD5, sha256: o.SHA256, stored: o.SHA256 != nil}
	m, h := md5.New(), sha256.New()
	var w []io.Writer
	if d.md5 == nil {
		w = append(w, m)
	}
	needSHA := d.sha256 == nil && strings.HasPrefix(s.endpoint, "http:")
	if needSHA {
		w = append(w, h)
	}
	if len(w) == 0 {
		return d, nil
	}
	n, err := io.Copy(io.MultiWriter(w...), io.NewSectionReader(body, 0, size))
	if err == nil && n != size {
		err = fmt.Errorf("body has %d bytes, %d were announced: %w", n, size, io.ErrUnexpectedEOF)
	}
	if err != nil {
		return d, err
	}
	if d.md5 == nil {
		d.md5 = m.Sum(nil)
	}
	if needSHA {
		d.sha256 = h.Sum(nil)
	}
	return d, nil
}

// withPayloadHash makes the SDK sign this payload hash instead of reading the
// body for it.
func (d digests) withPayloadHash(so *s3.Options) {
	if d.sha256 == nil {
		return
	}
	sum := hex.EncodeToString(d.sha256)
	so.APIOptions = append(so.APIOptions, func(st *middleware.Stack) error {
		return st.Initialize.Add(middleware.InitializeMiddlewareFunc("instar:PayloadHash",
			func(ctx context.Context, in middleware.InitializeInput, next middleware.InitializeHandler) (middleware.InitializeOutput, middleware.Metadata, error) {
				return next.HandleInitialize(v4.SetPayloadHash(ctx, sum), in)
			}), middleware.Before)
	})
}

func (d digests) contentMD5() *string {
	return aws.String(base64.StdEncoding.EncodeToString(d.md5))
}

func (d digests) checksum() *string {
	if !d.stored {
		return nil
	}
	return aws.String(base64.StdEncoding.EncodeToString(d.sha256))
}

func quoted(etag string) *string {
	if etag == "" {
		return nil
	}
	return aws.String(`"` + etag + `"`)
}

func star(b bool) *string {
	if !b {
		return nil
	}
	return aws.String("*")
}

func (s *s3Store) acl(o PutOptions) types.ObjectCannedACL {
	if o.ACL != ACLDefault {
		return types.ObjectCannedACL(o.ACL)
	}
	return types.ObjectCannedACL(s.opt.ACL)
}

func contentType(o PutOptions) *string {
	if o.ContentType != "" {
		return aws.String(o.ContentType)
	}
	return aws.String("application/octet-stream")
}

// tagging is the object's tags as their header has them: a query.
func tagging(o PutOptions) *string {
	if len(o.Tags) == 0 {
		return nil
	}
	q := url.Values{}
	for k, v := range o.Tags {
		q.Set(k, v)
	}
	return aws.String(strings.ReplaceAll(q.Encode(), "+", "%20"))
}

// sender reads a request body for one attempt and reports what leaves.
type sender struct {
	*io.SectionReader
	progress func(int64)
	sent     int64
}

func (r *sender) Read(p []byte) (int, error) {
	n, err := r.SectionReader.Read(p)
	r.add(int64(n))
	return n, err
}

func (r *sender) add(n int64) {
	r.sent += n
	if r.progress != nil && n != 0 {
		r.progress(n)
	}
}

// Seek to the start takes back what was reported.
func (r *sender) Seek(off int64, whence int) (int64, error) {
	n, err := r.SectionReader.Seek(off, whence)
	if err == nil && n == 0 && whence == io.SeekStart {
		r.add(-r.sent)
	}
	return n, err
}

func (s *s3Store) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o PutOptions) (Object, error) {
	if err := keyErr("put", s.String(), key); err != nil {
		return Object{}, err
	}
	if size > maxSingle {
		return s.putParts(ctx, key, io.NewSectionReader(body, 0, size), size, o)
	}
	d, err := s.digest(body, size, o)
	if err != nil {
		return Object{}, newError("put", s.String(), key, nil, err)
	}
	obj := Object{Key: key, Size: size, MD5: d.md5, SHA256: o.SHA256}
	err = s.attempts(ctx, "put", key, func(ctx context.Context, last *Error) error {
		b := &sender{SectionReader: io.NewSectionReader(body, 0, size), progress: o.Progress}
		out, err := s.client.PutObject(ctx, &s3.PutObjectInput{
			Bucket: &s.bucket, Key: s.full(key), Body: b, ContentLength: &size,
			ContentMD5: d.contentMD5(), ChecksumSHA256: d.checksum(), ContentType: contentType(o),
			ACL: s.acl(o), IfNoneMatch: star(o.IfNoneMatch), IfMatch: quoted(o.IfMatch),
			Tagging: tagging(o), Metadata: o.Metadata,
		}, d.withPayloadHash)
		if err != nil {
			b.add(-b.sent)
			e := s.classify(ctx, "put", key, err)
			s.aclRefused(e, o)
			if e.Kind == ErrExist && last != nil && last.unclear {
				if have, herr := s.Stat(ctx, key); herr == nil && have.Size == size && bytes.Equal(have.MD5, d.md5) {
					obj.ETag, obj.Modified = have.ETag, have.Modified
					return nil // ours: the reply had been lost
				}
			}
			return e
		}
		obj.ETag = plainETag(out.ETag)
		if out.ServerSideEncryption != "" || bytes.Equal(etagMD5(obj.ETag), d.md5) {
			return nil
		}
		return s.confirm(ctx, key, &obj, d)
	})
	if err != nil {
		return Object{}, err
	}
	return obj, nil
}

// confirm decides about a PUT that was acknowledged with an ETag other than the
// content's MD5: asks what is stored. A server whose ETags simply are no MD5s
// says the same again (it has checked Content-MD5).
func (s *s3Store) confirm(ctx context.Context, key string, obj *Object, d digests) error {
	have, err := s.headOnce(ctx, "put", key)
	if err != nil {
		if errors.Is(err, ErrNotExist) {
			e := newError("put", s.String(), key, ErrCorrupt, errors.New("acknowledged, but not stored"))
			e.retry, e.unclear = true, true
			return e
		}
		return err
	}
	if have.Size != obj.Size || !bytes.Equal(have.MD5, d.md5) && (obj.ETag == "" || have.ETag != obj.ETag) {
		e := newError("put", s.String(), key, ErrCorrupt,
			fmt.Errorf("acknowledged with ETag %q, stored as %q with %d bytes, sent %d bytes with MD5 %x", obj.ETag, have.ETag, have.Size, obj.Size, d.md5))
		e.retry, e.unclear = true, true
		return e
	}
	obj.ETag, obj.Modified = have.ETag, have.Modified
	return nil
}

// aclRefused recognises a refusal that is about the ACL: there is no one code.
func (s *s3Store) aclRefused(e *Error, o PutOptions) {
	acl := s.acl(o)
	if acl == "" {
		return
	}
	m := strings.ToLower(e.Message)
	aboutACL := strings.Contains(m, "acl") || strings.Contains(m, "access control list")
	switch {
	case e.Kind == ErrACL, e.Kind == ErrUnsupported, aboutACL && (e.Status == 400 || e.Status == 403):
		e.Kind, e.retry = ErrACL, false
		e.Advice = fmt.Sprintf("the ACL %q was asked for: put with --acl private or none and let a bucket policy say who may read", acl)
	}
}

func (s *s3Store) Copy(ctx context.Context, dst, src string, o PutOptions) (Object, error) {
	if err := keyErr("copy", s.String(), src); err != nil {
		return Object{}, err
	}
	return s.copyFrom(ctx, dst, s, src, o)
}

// copyFrom lets the server copy from another of its buckets.
func (s *s3Store) copyFrom(ctx context.Context, dst string, from *s3Store, src string, o PutOptions) (Object, error) {
	if err := keyErr("copy", s.String(), dst); err != nil {
		return Object{}, err
	}
	if o.IfNoneMatch || o.IfMatch != "" || len(o.Tags) > 0 {
		return Object{}, newError("copy", s.String(), dst, ErrUnsupported, errors.New("servers do not agree on conditional copies, and tags are the source's"))
	}
	for try := 1; ; try++ {
		obj, err := s.copyNow(ctx, dst, from, src, o)
		if !errors.Is(err, ErrChanged) || try == corruptTries || ctx.Err() != nil {
			return obj, err
		}
	}
}

// copyNow copies what the source is now: ErrChanged if it is replaced meanwhile.
func (s *s3Store) copyNow(ctx context.Context, dst string, from *s3Store, src string, o PutOptions) (Object, error) {
	have, err := from.Stat(ctx, src)
	if err != nil {
		return Object{}, err
	}
	if have.Size > maxSingle {
		return s.copyParts(ctx, dst, from, have, o)
	}
	obj := have
	obj.Key = dst
	err = s.do(ctx, "copy", dst, func(ctx context.Context) error {
		out, err := s.client.CopyObject(ctx, &s3.CopyObjectInput{
			Bucket: &s.bucket, Key: s.full(dst), CopySource: from.copySource(src),
			CopySourceIfMatch: quoted(have.ETag), ACL: s.acl(o),
		})
		if err != nil {
			e := s.classify(ctx, "copy", dst, err)
			s.aclRefused(e, o)
			if e.Kind == ErrExist {
				e.Kind = ErrChanged // the source's precondition
			}
			return e
		}
		if out.CopyObjectResult == nil || plainETag(out.CopyObjectResult.ETag) == "" {
			return retryable(newError("copy", s.String(), dst, nil, errors.New("the reply has no result")))
		}
		obj.ETag = plainETag(out.CopyObjectResult.ETag)
		obj.Modified = aws.ToTime(out.CopyObjectResult.LastModified)
		return nil
	})
	if err != nil {
		return Object{}, err
	}
	return obj, nil
}

func (s *s3Store) copySource(key string) *string {
	// Servers decode this as a path or as a query: "+" must not be left to them.
	esc := strings.NewReplacer("%2F", "/", "+", "%2B").Replace(url.PathEscape(s.prefix + key))
	return aws.String(s.bucket + "/" + esc)
}

func retryable(e error) error {
	var x *Error
	if errors.As(e, &x) {
		x.retry, x.unclear = true, true
	}
	return e
}
