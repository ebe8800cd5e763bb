package upload

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"
)

// abortTime bounds the clearing away of a failed multipart upload.
const abortTime = 30 * time.Second

// markName is the name of the metadata that identifies a multipart upload.
const markName = "instar-upload"

// multipart is one multipart upload in progress.
type multipart struct {
	s   *s3Store
	key string
	o   PutOptions
	id  string

	// mark is stored with the object as metadata: it tells whether the object
	// that is there after a lost reply is this upload's.
	mark   string
	began  time.Time
	orphan bool // an attempt to begin may have left another upload behind

	mu    sync.Mutex
	parts []types.CompletedPart // index is part number - 1
}

func (o PutOptions) partSize(size int64) int64 {
	p := o.PartSize
	if p == 0 {
		p = defaultPart
	}
	p = max(p, minPart)
	for size > p*maxParts {
		p *= 2
	}
	return p
}

func (o PutOptions) parallel() int {
	if o.Parallel <= 0 {
		return defaultParallel
	}
	return o.Parallel
}

// PutStream implements Store: a body that fits one part goes by one PUT.
func (s *s3Store) PutStream(ctx context.Context, key string, r io.Reader, o PutOptions) (Object, error) {
	if err := keyErr("put", s.String(), key); err != nil {
		return Object{}, err
	}
	size := o.partSize(0)
	// The buffer grows with the body: most streams are small.
	var first bytes.Buffer
	n, err := io.Copy(&first, io.LimitReader(&countingReader{ctx: ctx, r: r, add: func(int64) {}}, size))
	if err != nil {
		return Object{}, newError("put", s.String(), key, nil, fmt.Errorf("reading the body: %w", err))
	}
	if n < size {
		return s.Put(ctx, key, bytes.NewReader(first.Bytes()), n, o)
	}
	free := make(chan []byte, o.parallel()+1)
	free <- first.Bytes()
	for range o.parallel() {
		free <- nil
	}
	used := false
	return s.sendParts(ctx, key, o, func(ctx context.Context) (*bytes.Reader, func(), error) {
		var buf []byte
		select {
		case buf = <-free:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
		n := int(size)
		if used {
			if buf == nil {
				buf = make([]byte, size)
			}
			var err error
			n, err = io.ReadFull(r, buf[:size])
			if errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF {
				err = nil
			}
			if err != nil {
				return nil, nil, fmt.Errorf("reading the body: %w", err)
			}
			if n == 0 {
				return nil, nil, io.EOF
			}
		}
		used = true
		return bytes.NewReader(buf[:n]), func() { free <- buf }, nil
	})
}

// putParts is Put for what is too large for one request.
func (s *s3Store) putParts(ctx context.Context, key string, body *io.SectionReader, size int64, o PutOptions) (Object, error) {
	part, off := o.partSize(size), int64(0)
	// Parts go as sections of the body, so they need no buffers but the
	// goroutines' turns.
	turns := make(chan struct{}, o.parallel())
	return s.sendSections(ctx, key, o, func(ctx context.Context) (*io.SectionReader, func(), error) {
		select {
		case turns <- struct{}{}:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
		if off >= size {
			return nil, nil, io.EOF
		}
		n := min(part, size-off)
		sec := io.NewSectionReader(body, off, n)
		off += n
		return sec, func() { <-turns }, nil
	})
}

func (s *s3Store) sendParts(ctx context.Context, key string, o PutOptions, next func(context.Context) (*bytes.Reader, func(), error)) (Object, error) {
	return s.sendSections(ctx, key, o, func(ctx context.Context) (*io.SectionReader, func(), error) {
		r, done, err := next(ctx)
		if err != nil {
			return nil, nil, err
		}
		return io.NewSectionReader(r, 0, r.Size()), done, nil
	})
}

// sendSections uploads the parts next yields until io.EOF, several at a time
// (next decides how many by blocking), and completes the upload; or leaves
// nothing behind.
func (s *s3Store) sendSections(ctx context.Context, key string, o PutOptions, next func(context.Context) (*io.SectionReader, func(), error)) (_ Object, err error) {
	m := &multipart{s: s, key: key, o: o}
	if err := m.create(ctx); err != nil {
		return Object{}, err
	}
	var sent int64
	defer func() {
		if err != nil {
			m.abort(ctx)
			if o.Progress != nil {
				o.Progress(-sent)
			}
		}
	}()
	var mu sync.Mutex // covers sent
	g, gctx := errgroup.WithContext(ctx)
	size, n := int64(0), int32(0)
	for {
		sec, done, nerr := next(gctx)
		if nerr == io.EOF {
			break
		}
		if nerr == nil && n >= maxParts {
			nerr = fmt.Errorf("more than %d parts: choose larger ones", maxParts)
		}
		if nerr != nil {
			if werr := g.Wait(); werr != nil {
				return Object{}, werr // the cause, not the cancellation it led to
			}
			return Object{}, newError("put", s.String(), key, nil, nerr)
		}
		n++
		size += sec.Size()
		num := n
		g.Go(func() error {
			defer done()
			if err := m.part(gctx, num, sec); err != nil {
				return err
			}
			mu.Lock()
			sent += sec.Size()
			mu.Unlock()
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return Object{}, err
	}
	return m.complete(ctx, size)
}

func (m *multipart) create(ctx context.Context) error {
	m.began, m.mark = time.Now(), rand.Text()
	return m.s.attempts(ctx, "put", m.key, func(ctx context.Context, last *Error) error {
		m.orphan = last != nil && last.unclear
		out, err := m.s.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
			Bucket: &m.s.bucket, Key: m.s.full(m.key), ContentType: contentType(m.o), ACL: m.s.acl(m.o),
			Metadata: m.metadata(), Tagging: tagging(m.o),
		})
		if err != nil {
			e := m.s.classify(ctx, "put", m.key, err)
			m.s.aclRefused(e, m.o)
			return e
		}
		m.id = aws.ToString(out.UploadId)
		if m.id == "" {
			return retryable(newError("put", m.s.String(), m.key, nil, errors.New("the reply has no upload id")))
		}
		return nil
	})
}

// metadata is the object's with the mark.
func (m *multipart) metadata() map[string]string {
	all := map[string]string{markName: m.mark}
	for k, v := range m.o.Metadata {
		if k != markName {
			all[k] = v
		}
	}
	return all
}

// part uploads one part; the server's ETag must be its MD5, unless encrypted.
func (m *multipart) part(ctx context.Context, num int32, body *io.SectionReader) error {
	s, size := m.s, body.Size()
	d, err := s.digest(body, size, PutOptions{})
	if err != nil {
		return newError("put", s.String(), m.key, nil, err)
	}
	return s.do(ctx, "put", m.key, func(ctx context.Context) error {
		b := &sender{SectionReader: io.NewSectionReader(body, 0, size), progress: m.o.Progress}
		out, err := s.client.UploadPart(ctx, &s3.UploadPartInput{
			Bucket: &s.bucket, Key: s.full(m.key), UploadId: &m.id, PartNumber: &num,
			Body: b, ContentLength: &size, ContentMD5: d.contentMD5(),
		}, d.withPayloadHash)
		if err != nil {
			b.add(-b.sent)
			return s.classify(ctx, "put", m.key, err)
		}
		etag := plainETag(out.ETag)
		if etag == "" || out.ServerSideEncryption == "" && etagMD5(etag) != nil && !bytes.Equal(etagMD5(etag), d.md5) {
			b.add(-b.sent)
			return retryable(newError("put", s.String(), m.key, ErrCorrupt,
				fmt.Errorf("part %d acknowledged with ETag %q, its MD5 is %x", num, etag, d.md5)))
		}
		m.done(num, etag)
		return nil
	})
}

// done notes a finished part.
func (m *multipart) done(num int32, etag string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for int(num) > len(m.parts) {
		m.parts = append(m.parts, types.CompletedPart{})
	}
	m.parts[num-1] = types.CompletedPart{ETag: quoted(etag), PartNumber: &num}
}

func (m *multipart) complete(ctx context.Context, size int64) (Object, error) {
	s := m.s
	obj := Object{Key: m.key, Size: size}
	err := s.attempts(ctx, "put", m.key, func(ctx context.Context, last *Error) error {
		out, err := s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
			Bucket: &s.bucket, Key: s.full(m.key), UploadId: &m.id,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: m.parts},
			IfNoneMatch:     star(m.o.IfNoneMatch), IfMatch: quoted(m.o.IfMatch),
		})
		if err != nil {
			e := s.classify(ctx, "put", m.key, err)
			// The upload is gone, or the condition fails, if an attempt
			// whose reply was lost has completed it.
			if (e.Code == "NoSuchUpload" || e.Kind == ErrExist) && last != nil && last.unclear {
				if have, herr := s.Stat(ctx, m.key); herr == nil && have.mark == m.mark && have.Size == size {
					obj.ETag, obj.Modified = have.ETag, have.Modified
					return nil
				}
			}
			return e
		}
		if obj.ETag = plainETag(out.ETag); obj.ETag == "" {
			return retryable(newError("put", s.String(), m.key, nil, errors.New("the reply has no ETag")))
		}
		return nil
	})
	if err != nil {
		return Object{}, err
	}
	m.clearOrphans(ctx)
	return obj, nil
}

// clearOrphans aborts the uploads that lost replies to create have left behind:
// of this key, begun since, and without a part.
func (m *multipart) clearOrphans(ctx context.Context) {
	if !m.orphan {
		return
	}
	s := m.s
	_, date, seen := s.server.get()
	since := m.began.Add(date.Sub(seen)).Add(-2 * time.Second) // by the server's clock
	out, err := s.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: &s.bucket, Prefix: s.full(m.key)})
	if err != nil {
		return // tidiness only; lifecycle rules do it too
	}
	for _, u := range out.Uploads {
		if aws.ToString(u.Key) != *s.full(m.key) || aws.ToString(u.UploadId) == m.id || aws.ToTime(u.Initiated).Before(since) {
			continue
		}
		parts, err := s.client.ListParts(ctx, &s3.ListPartsInput{Bucket: &s.bucket, Key: u.Key, UploadId: u.UploadId})
		if err == nil && len(parts.Parts) == 0 {
			s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &s.bucket, Key: u.Key, UploadId: u.UploadId})
		}
	}
}

// abort removes the parts of an upload that failed, also after cancellation.
func (m *multipart) abort(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTime)
	defer cancel()
	defer m.clearOrphans(ctx)
	m.s.do(ctx, "put", m.key, func(ctx context.Context) error {
		_, err := m.s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{
			Bucket: &m.s.bucket, Key: m.s.full(m.key), UploadId: &m.id,
		})
		if err != nil {
			return m.s.classify(ctx, "put", m.key, err)
		}
		return nil
	})
}

// copyParts copies an object that is too large for one request, on the server.
func (s *s3Store) copyParts(ctx context.Context, dst string, from *s3Store, have Object, o PutOptions) (_ Object, err error) {
	m := &multipart{s: s, key: dst, o: o}
	if err := m.create(ctx); err != nil {
		return Object{}, err
	}
	defer func() {
		if err != nil {
			m.abort(ctx)
		}
	}()
	const piece = 1 << 30
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.parallel())
	num := int32(0)
	for off := int64(0); off < have.Size; off += piece {
		num++
		n := num
		rng := fmt.Sprintf("bytes=%d-%d", off, min(off+piece, have.Size)-1)
		g.Go(func() error {
			return s.do(gctx, "copy", dst, func(ctx context.Context) error {
				out, err := s.client.UploadPartCopy(ctx, &s3.UploadPartCopyInput{
					Bucket: &s.bucket, Key: s.full(dst), UploadId: &m.id, PartNumber: &n,
					CopySource: from.copySource(have.Key), CopySourceRange: &rng, CopySourceIfMatch: quoted(have.ETag),
				})
				if err != nil {
					return s.classify(ctx, "copy", dst, err)
				}
				if out.CopyPartResult == nil || plainETag(out.CopyPartResult.ETag) == "" {
					return retryable(newError("copy", s.String(), dst, nil, errors.New("the reply has no result")))
				}
				etag := plainETag(out.CopyPartResult.ETag)
				m.done(n, etag)
				return nil
			})
		})
	}
	if err := g.Wait(); err != nil {
		return Object{}, err
	}
	return m.complete(ctx, have.Size)
}
