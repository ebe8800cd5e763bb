package upload

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

func (s *s3Store) Stat(ctx context.Context, key string) (Object, error) {
	if err := keyErr("stat", s.String(), key); err != nil {
		return Object{}, err
	}
	var obj Object
	err := s.do(ctx, "stat", key, func(ctx context.Context) (err error) {
		obj, err = s.headOnce(ctx, "stat", key)
		return err
	})
	return obj, err
}

// headOnce is one HEAD request, not repeated.
func (s *s3Store) headOnce(ctx context.Context, op, key string) (Object, error) {
	out, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{
		Bucket: &s.bucket, Key: s.full(key), ChecksumMode: types.ChecksumModeEnabled,
	})
	if err != nil {
		return Object{}, s.classify(ctx, op, key, err)
	}
	if out.ContentLength == nil {
		return Object{}, retryable(newError(op, s.String(), key, nil, errors.New("the reply tells no size")))
	}
	if plainETag(out.ETag) == "" {
		return Object{}, retryable(newError(op, s.String(), key, nil, errors.New("the reply has no ETag")))
	}
	o := s.object(key, *out.ContentLength, out.ETag, out.LastModified, out.ServerSideEncryption, out.ChecksumSHA256)
	o.mark = out.Metadata[markName]
	return o, nil
}

func (s *s3Store) object(key string, size int64, etag *string, mod *time.Time, sse types.ServerSideEncryption, sha *string) Object {
	o := Object{Key: key, Size: size, ETag: plainETag(etag), Modified: aws.ToTime(mod)}
	if sse == "" || sse == types.ServerSideEncryptionAes256 {
		o.MD5 = etagMD5(o.ETag)
	}
	if b, err := base64.StdEncoding.DecodeString(aws.ToString(sha)); err == nil && len(b) == 32 {
		o.SHA256 = b
	}
	return o
}

func (s *s3Store) Get(ctx context.Context, key string, o GetOptions) (io.ReadCloser, Object, error) {
	if err := keyErr("get", s.String(), key); err != nil {
		return nil, Object{}, err
	}
	r := &s3Reader{s: s, ctx: ctx, key: key, etag: o.IfMatch, pos: max(o.Offset, 0), end: -1}
	if o.Length > 0 {
		r.end = r.pos + o.Length
	}
	if err := s.do(ctx, "get", key, r.open); err != nil {
		if r.emptyRange {
			// Past the end, or an empty object.
			obj, serr := s.Stat(ctx, key)
			if serr != nil {
				return nil, Object{}, serr
			}
			if r.pos >= obj.Size {
				return io.NopCloser(eofReader{}), obj, nil
			}
		}
		return nil, Object{}, err
	}
	r.failures = s.opt.Retry.Attempts
	return r, r.obj, nil
}

type eofReader struct{}

func (eofReader) Read([]byte) (int, error) { return 0, io.EOF }

// s3Reader reads a range of an object and asks for the rest when the reply
// breaks off; If-Match keeps two writings from being mixed.
type s3Reader struct {
	s          *s3Store
	ctx        context.Context
	key        string
	etag       string
	pos, end   int64 // end is -1 until the size is known
	obj        Object
	body       io.ReadCloser // nil: to be opened at pos
	cancel     context.CancelFunc
	emptyRange bool

	failures int   // how many more may follow before the Get fails
	renewed  int64 // pos at which failures was last filled up
}

// renewAfter is how much a reader must progress to be granted all its attempts anew.
const renewAfter = 1 << 20

// open begins a request for [pos, end).
func (r *s3Reader) open(octx context.Context) error {
	in := &s3.GetObjectInput{Bucket: &r.s.bucket, Key: r.s.full(r.key), IfMatch: quoted(r.etag)}
	ranged := r.pos > 0 || r.end >= 0
	switch {
	case r.end >= 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", r.pos, r.end-1))
	case ranged:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-", r.pos))
	}
	// The body outlives the attempt's context: it hangs on the caller's.
	ctx, cancel := context.WithCancel(r.ctx)
	stop := context.AfterFunc(octx, cancel)
	out, err := r.s.client.GetObject(ctx, in)
	stop()
	fail := func(e error) error {
		if out != nil && out.Body != nil {
			out.Body.Close()
		}
		cancel()
		return e
	}
	if err != nil {
		e := r.s.classify(octx, "get", r.key, err)
		if e.Status == http.StatusRequestedRangeNotSatisfiable {
			r.emptyRange, e.retry = true, false
		}
		if e.Kind == ErrExist {
			e.Kind = ErrChanged
		}
		return fail(e)
	}
	bad := func(format string, a ...any) error {
		return fail(retryable(newError("get", r.s.String(), r.key, nil, fmt.Errorf(format, a...))))
	}
	if out.ContentLength == nil || *out.ContentLength < 0 {
		return bad("the reply tells no length")
	}
	if plainETag(out.ETag) == "" {
		return bad("the reply has no ETag: it is no object")
	}
	n, size := *out.ContentLength, *out.ContentLength
	if ranged {
		var first, last, total int64
		if c, err := fmt.Sscanf(aws.ToString(out.ContentRange), "bytes %d-%d/%d", &first, &last, &total); err != nil || c != 3 {
			return bad("the server ignores ranges (Content-Range is %q)", printable(aws.ToString(out.ContentRange)))
		}
		if first != r.pos || last-first+1 != n || total < last+1 {
			return bad("asked for bytes from %d, got %q with %d bytes", r.pos, printable(aws.ToString(out.ContentRange)), n)
		}
		size = total
	}
	obj := r.s.object(r.key, size, out.ETag, out.LastModified, out.ServerSideEncryption, out.ChecksumSHA256)
	want := size
	if r.end >= 0 {
		want = min(r.end, size)
	}
	if r.pos+n != want {
		return bad("asked for bytes %d to %d, got %d bytes", r.pos, want, n)
	}
	// Not every server knows If-Match on GET.
	if r.etag != "" && r.etag != obj.ETag || r.obj.Key != "" && r.obj.Size != obj.Size {
		return fail(newError("get", r.s.String(), r.key, ErrChanged, nil))
	}
	if aws.ToString(out.ContentEncoding) != "" {
		// The object may have been stored so; else something on the way
		// has compressed it, and its length tells.
		have, err := r.s.headOnce(octx, "get", r.key)
		if err != nil {
			return fail(err)
		}
		if have.Size != size {
			return bad("it was compressed on the way")
		}
	}
	r.obj, r.end, r.etag = obj, want, obj.ETag
	r.body, r.cancel = out.Body, cancel
	return nil
}

func (r *s3Reader) Read(p []byte) (int, error) {
	for {
		if r.pos >= r.end {
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		if r.body == nil {
			if err := r.reopen(); err != nil {
				return 0, err
			}
		}
		if rest := r.end - r.pos; int64(len(p)) > rest {
			p = p[:rest]
		}
		n, err := r.body.Read(p)
		r.pos += int64(n)
		if r.pos-r.renewed >= renewAfter {
			r.renewed, r.failures = r.pos, r.s.opt.Retry.Attempts
		}
		if err == nil || r.pos >= r.end {
			return n, nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		e := r.s.classify(r.ctx, "get", r.key, err)
		r.close()
		r.failures--
		if !e.retry || r.failures <= 0 {
			e.Attempts = r.s.opt.Retry.Attempts
			return n, e
		}
		if r.s.opt.OnRetry != nil {
			r.s.opt.OnRetry(RetryEvent{Op: "get", Key: r.key, Attempt: r.s.opt.Retry.Attempts - r.failures, Err: e})
		}
		if n > 0 {
			return n, nil
		}
	}
}

// reopen goes on at pos, after a pause that grows with the failures.
func (r *s3Reader) reopen() error {
	t := time.NewTimer(r.s.opt.Retry.delay(r.s.opt.Retry.Attempts-r.failures, 0))
	defer t.Stop()
	select {
	case <-r.ctx.Done():
		return newError("get", r.s.String(), r.key, nil, context.Cause(r.ctx))
	case <-t.C:
	}
	return r.s.do(r.ctx, "get", r.key, r.open)
}

func (r *s3Reader) close() {
	if r.body != nil {
		r.body.Close()
		r.cancel()
		r.body = nil
	}
}

// Close may leave the rest of a large body unread: the connection is dropped.
func (r *s3Reader) Close() error {
	r.close()
	r.end = r.pos
	return nil
}

// PresignGet implements Presigner.
func (s *s3Store) PresignGet(ctx context.Context, key string, valid time.Duration) (string, error) {
	if err := keyErr("presign", s.String(), key); err != nil {
		return "", err
	}
	if valid <= 0 || valid > 7*24*time.Hour {
		return "", newError("presign", s.String(), key, nil, fmt.Errorf("validity %v is not within 0 to 7 days", valid))
	}
	req, err := s3.NewPresignClient(s.client).PresignGetObject(ctx,
		&s3.GetObjectInput{Bucket: &s.bucket, Key: s.full(key)}, s3.WithPresignExpires(valid))
	if err != nil {
		return "", s.classify(ctx, "presign", key, err)
	}
	return req.URL, nil
}
