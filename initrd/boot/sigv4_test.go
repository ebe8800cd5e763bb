package boot

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/test/servers"
)

// keyNames are objects whose names need care.
var keyNames = []string{
	"web.part.0", "a b+c=d&e?f#g", "100%/%41", "ünïcode/日本", "tilde~dash-dot.under_", "(paren)*'!;:@$,", "a//b", "[x]{y}|^`\"<>\\",
}

// TestSignGET signs as Amazon's own SDK does.
func TestSignGET(t *testing.T) {
	now := time.Date(2026, 11, 22, 5, 6, 7, 0, time.UTC)
	for _, token := range []string{"", "session/token+="} {
		for _, store := range []string{"s3://bucket", "s3://bucket/pre fix/images/", "s3://dotted.bucket/x"} {
			for _, endpoint := range []string{"", "https://store.example:9000", "http://[::1]:9000/base"} {
				for _, key := range keyNames {
					c := &ticket.Credentials{AccessKeyID: "AKIDEXAMPLE", SecretAccessKey: "wJalrXUtnFEMI/K7MDENG", SessionToken: token}
					u, region, err := objectURL(&ticket.Ticket{Store: strings.ReplaceAll(store, " ", "%20"), Endpoint: endpoint, Region: "eu-west-3"}, key)
					if err != nil {
						t.Fatal(err)
					}
					ours := &http.Request{Method: http.MethodGet, URL: u, Header: http.Header{}}
					signGET(ours, c, region, now)
					theirs, err := http.NewRequest(http.MethodGet, u.String(), nil)
					if err != nil {
						t.Fatal(err)
					}
					if theirs.URL.EscapedPath() != u.EscapedPath() || strings.Contains(u.String(), "?") {
						t.Fatalf("%q becomes %s", key, u)
					}
					theirs.Header.Set("X-Amz-Content-Sha256", emptySHA256)
					signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true })
					err = signer.SignHTTP(context.Background(), aws.Credentials{AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: token}, theirs, emptySHA256, "s3", region, now)
					if err != nil {
						t.Fatal(err)
					}
					if a, b := ours.Header.Get("Authorization"), theirs.Header.Get("Authorization"); a != b {
						t.Errorf("%s %q:\nours   %s\ntheirs %s", u, token, a, b)
					}
				}
			}
		}
	}
}

// TestSignedObjects reads objects with names of all kinds from MinIO.
func TestSignedObjects(t *testing.T) {
	s := servers.MinIO(t)
	bucket := s.Bucket(t)
	a := &access{t: &ticket.Ticket{
		Store: "s3://" + bucket + "/images", Endpoint: s.Endpoint, Region: s.Region,
		Credentials: &ticket.Credentials{AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey},
	}}
	get := func(key string) (int, string) {
		req, _, err := a.request(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		res, err := s.Client(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	for _, key := range keyNames {
		if strings.ContainsAny(key, "\\") || strings.Contains(key, "//") {
			continue // MinIO has no such names
		}
		s.Put(t, bucket, "images/"+escapeKey(key), []byte("content of "+key))
		if status, body := get(key); status != 200 || body != "content of "+key {
			t.Errorf("%q: %d %s", key, status, body)
		}
	}
	a.t.Credentials.SecretAccessKey += "x"
	if status, body := get(keyNames[0]); status != 403 || !strings.Contains(body, "SignatureDoesNotMatch") {
		t.Errorf("a wrong secret: %d %s", status, body)
	}
	for _, store := range []string{"file:///x", "s3://", "%"} {
		a.t.Store = store
		if _, _, err := a.request(t.Context(), "x"); err == nil {
			t.Errorf("store %q was taken", store)
		}
	}
}
