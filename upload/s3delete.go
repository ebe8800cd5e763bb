package upload

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// deleteBatch is how many keys one request may name.
const deleteBatch = 1000

func (s *s3Store) Delete(ctx context.Context, keys ...string) error {
	var ids []Version
	var failed []*Error
	for _, k := range keys {
		if err := keyErr("delete", s.String(), k); err != nil {
			failed = appendFailed(failed, err)
			continue
		}
		ids = append(ids, Version{Key: k})
	}
	return s.deleteAll(ctx, ids, failed)
}

// DeleteVersions implements Versioner. Keys need not be ones that could be put.
func (s *s3Store) DeleteVersions(ctx context.Context, vs ...Version) error {
	return s.deleteAll(ctx, vs, nil)
}

func (s *s3Store) deleteAll(ctx context.Context, ids []Version, failed []*Error) error {
	for batch := range slices.Chunk(ids, deleteBatch) {
		failed = append(failed, s.deleteSome(ctx, batch)...)
	}
	if failed != nil {
		return &DeleteError{failed}
	}
	return nil
}

type objectVersion struct{ key, id string }

// deleteSome deletes one batch; attempts after the first name only what is left.
func (s *s3Store) deleteSome(ctx context.Context, batch []Version) []*Error {
	left := slices.Clone(batch)
	var failed []*Error
	err := s.do(ctx, "delete", "", func(ctx context.Context) error {
		objs := make([]types.ObjectIdentifier, len(left))
		for i, v := range left {
			objs[i] = types.ObjectIdentifier{Key: s.full(v.Key)}
			if v.ID != "" {
				objs[i].VersionId = aws.String(v.ID)
			}
		}
		out, err := s.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{
			Bucket: &s.bucket, Delete: &types.Delete{Objects: objs},
		}, withContentMD5)
		if err != nil {
			return s.classify(ctx, "delete", "", err)
		}
		// Every object must be answered for: silence is no success.
		if len(out.Deleted)+len(out.Errors) < len(left) {
			return retryable(newError("delete", s.String(), "", nil,
				fmt.Errorf("the reply tells of %d objects, %d were to be deleted", len(out.Deleted)+len(out.Errors), len(left))))
		}
		again := map[objectVersion]bool{}
		var worst *Error
		for _, f := range out.Errors {
			e := s.deleteFailure(ctx, f)
			if e == nil {
				continue
			}
			if e.retry {
				again[objectVersion{aws.ToString(f.Key), aws.ToString(f.VersionId)}] = true
				worst = e
				continue
			}
			failed = append(failed, e)
		}
		if worst == nil {
			left = nil
			return nil
		}
		left = slices.DeleteFunc(left, func(v Version) bool { return !again[objectVersion{s.prefix + v.Key, v.ID}] })
		return worst
	})
	if err == nil {
		return failed
	}
	for _, v := range left {
		e := &Error{Op: "delete", Store: s.String(), Err: err}
		var cause *Error
		if errors.As(err, &cause) {
			c := *cause
			e = &c
		}
		e.Key = v.Key
		failed = append(failed, e)
	}
	return failed
}

// deleteFailure judges one object's refusal; nil if it is gone all the same.
func (s *s3Store) deleteFailure(ctx context.Context, f types.Error) *Error {
	full := aws.ToString(f.Key)
	e := newError("delete", s.String(), full, nil, nil)
	if len(full) >= len(s.prefix) {
		e.Key = full[len(s.prefix):]
	}
	e.Code, e.Message = printable(aws.ToString(f.Code)), s.redact(printable(aws.ToString(f.Message)))
	s.byReply(e, nil)
	if e.Kind == ErrNotExist {
		return nil
	}
	id := aws.ToString(f.VersionId)
	if id == "" || e.Kind == ErrLocked || e.retry {
		if e.Kind != ErrLocked {
			return e
		}
	}
	// Servers put a lock's refusal in various words, "AccessDenied" most
	// often: the lock itself tells.
	if until, why := s.lockOf(ctx, full, id); why != "" {
		e.Kind, e.retry = ErrLocked, false
		e.Until = until
		e.Err = errors.New(why)
		e.Advice = fmt.Sprintf("version %s stays until its %s ends", id, why)
	}
	return e
}

// withContentMD5 adds the checksum that older servers demand of a multi-delete.
func withContentMD5(so *s3.Options) {
	so.APIOptions = append(so.APIOptions, func(st *middleware.Stack) error {
		return smithyhttp.AddContentChecksumMiddleware(st)
	})
}
