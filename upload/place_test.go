package upload_test

import (
	"testing"

	"github.com/instar-image/instar/upload"
)

// TestPlace: a bucket's name does not say which service it is of.
func TestPlace(t *testing.T) {
	place := func(url, endpoint string) string {
		t.Helper()
		s, err := upload.Open(t.Context(), url, upload.Options{
			Endpoint: endpoint, Region: "us-east-1", Credentials: &upload.Credentials{AccessKeyID: "a", SecretAccessKey: "b"},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		p, ok := s.(upload.Placer)
		if !ok {
			t.Fatalf("%s has no place", url)
		}
		return p.Place()
	}
	a := place("s3://images/fleet", "http://127.0.0.1:9000")
	if place("s3://images/fleet", "http://127.0.0.1:9000/") != a {
		t.Error("one store has two places")
	}
	for _, other := range []string{
		place("s3://images/fleet", "http://127.0.0.1:9001"), place("s3://images/fleet2", "http://127.0.0.1:9000"), place("s3://images/fleet", ""),
	} {
		if other == a {
			t.Errorf("two stores are both %s", a)
		}
	}
}
