package upload_test

import (
	"bytes"
	"errors"
	"maps"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
)

// TestTags: an object has the tags and the metadata that it was put with, whether
// it goes by one request or in parts; where there are no tags it is refused.
func TestTags(t *testing.T) {
	tags := map[string]string{"keep": "10 years", "a+b/c=d:e@f": "z", "empty": ""}
	metadata := map[string]string{"ami-name": "web 1"}
	for name, o := range map[string]upload.Options{"minio": serverOptions(servers.MinIO(t)), "versitygw": serverOptions(servers.Versity(t))} {
		t.Run(name, func(t *testing.T) {
			s := bucket(t, o)
			b := s.(upload.BucketManager).Bucket()
			for key, size := range map[string]int{"small": 10, "large": 6 << 20} {
				_, err := s.PutStream(t.Context(), key, bytes.NewReader(make([]byte, size)), upload.PutOptions{PartSize: 5 << 20, Tags: tags, Metadata: metadata})
				if err != nil {
					t.Fatal(err)
				}
				full := "pre/fix/" + key
				out, err := sdk(o).GetObjectTagging(t.Context(), &s3.GetObjectTaggingInput{Bucket: &b, Key: &full})
				if err != nil {
					t.Fatal(err)
				}
				got := map[string]string{}
				for _, x := range out.TagSet {
					got[*x.Key] = *x.Value
				}
				if !maps.Equal(got, tags) {
					t.Errorf("%s has the tags %v", key, got)
				}
				h, err := sdk(o).HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: &b, Key: &full})
				if err != nil || h.Metadata["ami-name"] != "web 1" {
					t.Errorf("%s has the metadata %v, %v", key, h.Metadata, err)
				}
			}
			if _, err := s.Copy(t.Context(), "copy", "small", upload.PutOptions{Tags: tags}); !errors.Is(err, upload.ErrUnsupported) {
				t.Errorf("a copy with other tags: %v", err)
			}
		})
	}
	dir := open(t, t.TempDir(), upload.Options{})
	if _, err := upload.PutBytes(t.Context(), dir, "k", nil, upload.PutOptions{Tags: tags}); !errors.Is(err, upload.ErrUnsupported) {
		t.Errorf("in a directory: %v", err)
	}
	if _, err := upload.PutBytes(t.Context(), dir, "k", nil, upload.PutOptions{Metadata: metadata}); err != nil {
		t.Error(err)
	}
}
