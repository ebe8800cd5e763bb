package upload

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"net/url"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

func (s *s3Store) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		in := &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: s.full(prefix), EncodingType: types.EncodingTypeUrl}
		last := ""
		for {
			var out *s3.ListObjectsV2Output
			err := s.do(ctx, "list", prefix, func(ctx context.Context) (err error) {
				if out, err = s.client.ListObjectsV2(ctx, in); err != nil {
					return s.listError(ctx, prefix, err)
				}
				return s.listReply(prefix, out.Name, out.IsTruncated)
			})
			if err != nil {
				yield(Object{}, err)
				return
			}
			for i := range out.Contents {
				c := &out.Contents[i]
				full := decodeKey(aws.ToString(c.Key), out.EncodingType)
				key, ok := strings.CutPrefix(full, s.prefix)
				// Consoles make "directories", empty objects whose names end
				// in a slash. Repeated pages are skipped over.
				if !ok || key == "" || strings.HasSuffix(key, "/") || last != "" && full <= last {
					continue
				}
				last = full
				if !yield(s.object(key, aws.ToInt64(c.Size), c.ETag, c.LastModified, "", nil), nil) {
					return
				}
			}
			if !aws.ToBool(out.IsTruncated) {
				return
			}
			next := aws.ToString(out.NextContinuationToken)
			if next == "" || next == aws.ToString(in.ContinuationToken) {
				yield(Object{}, newError("list", s.String(), prefix, nil, errors.New("the server announces another page without telling where it begins")))
				return
			}
			in.ContinuationToken = &next
		}
	}
}

func (s *s3Store) listError(ctx context.Context, prefix string, err error) error {
	e := s.classify(ctx, "list", prefix, err)
	if e.Kind == ErrNotExist {
		e.Kind = ErrNoBucket // a list has no object that could be missing
	}
	return e
}

// listReply refuses what the SDK takes for an empty list: no body, or XML of
// another kind.
func (s *s3Store) listReply(prefix string, name *string, truncated *bool) error {
	if name == nil && truncated == nil {
		return retryable(newError("list", s.String(), prefix, nil, errors.New("the reply is no list")))
	}
	return nil
}

func decodeKey(key string, enc types.EncodingType) string {
	if enc != types.EncodingTypeUrl {
		return key
	}
	if k, err := url.QueryUnescape(key); err == nil {
		return k
	}
	return key
}

// Versions implements Versioner.
func (s *s3Store) Versions(ctx context.Context, prefix string) iter.Seq2[Version, error] {
	return func(yield func(Version, error) bool) {
		in := &s3.ListObjectVersionsInput{Bucket: &s.bucket, Prefix: s.full(prefix), EncodingType: types.EncodingTypeUrl}
		for {
			var out *s3.ListObjectVersionsOutput
			err := s.do(ctx, "list versions", prefix, func(ctx context.Context) (err error) {
				if out, err = s.client.ListObjectVersions(ctx, in); err != nil {
					return s.listError(ctx, prefix, err)
				}
				return s.listReply(prefix, out.Name, out.IsTruncated)
			})
			if err != nil {
				yield(Version{}, err)
				return
			}
			for _, v := range s.versionPage(out) {
				if !yield(v, nil) {
					return
				}
			}
			if !aws.ToBool(out.IsTruncated) {
				return
			}
			k, id := decodeKey(aws.ToString(out.NextKeyMarker), out.EncodingType), aws.ToString(out.NextVersionIdMarker)
			if k == aws.ToString(in.KeyMarker) && id == aws.ToString(in.VersionIdMarker) {
				yield(Version{}, newError("list versions", s.String(), prefix, nil, errors.New("the server announces another page without telling where it begins")))
				return
			}
			in.KeyMarker, in.VersionIdMarker = &k, nil
			if id != "" {
				in.VersionIdMarker = &id
			}
		}
	}
}

func (s *s3Store) versionPage(out *s3.ListObjectVersionsOutput) []Version {
	var vs []Version
	add := func(v Version) {
		full := decodeKey(v.Key, out.EncodingType)
		if key, ok := strings.CutPrefix(full, s.prefix); ok && key != "" {
			v.Key = key
			vs = append(vs, v)
		}
	}
	for _, v := range out.Versions {
		add(Version{Key: aws.ToString(v.Key), ID: aws.ToString(v.VersionId), Latest: aws.ToBool(v.IsLatest), Size: aws.ToInt64(v.Size), Modified: aws.ToTime(v.LastModified)})
	}
	for _, v := range out.DeleteMarkers {
		add(Version{Key: aws.ToString(v.Key), ID: aws.ToString(v.VersionId), Latest: aws.ToBool(v.IsLatest), Marker: true, Modified: aws.ToTime(v.LastModified)})
	}
	slices.SortStableFunc(vs, func(a, b Version) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), b.Modified.Compare(a.Modified))
	})
	return vs
}
