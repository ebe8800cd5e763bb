package servers

import (
	"bytes"
	"net/http"
	"slices"
	"testing"
)

// TestServers proves that each server starts, refuses strangers, and keeps
// what it is given.
func TestServers(t *testing.T) {
	for name, start := range map[string]func(testing.TB) *Server{"minio": MinIO, "minio-tls": MinIOTLS, "versitygw": Versity} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t)
			bucket := s.Bucket(t)
			data := bytes.Repeat([]byte("instar"), 1000)
			s.Put(t, bucket, "a/b", data)
			if got := s.Get(t, bucket, "a/b"); !bytes.Equal(got, data) {
				t.Fatalf("got %d bytes back, put %d", len(got), len(data))
			}
			if keys := s.Keys(t, bucket); !slices.Equal(keys, []string{"a/b"}) {
				t.Fatalf("keys %q", keys)
			}
			s.Delete(t, bucket, "a/b")
			if keys := s.Keys(t, bucket); len(keys) != 0 {
				t.Fatalf("keys %q after deletion", keys)
			}
			res, err := s.Client(t).Get(s.Endpoint + "/" + bucket)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != http.StatusForbidden {
				t.Fatalf("a request without signature got %s", res.Status)
			}
		})
	}
}
