package catalog

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// api makes a request of this region's API, which must be answered well.
func (w *world) api(t *testing.T, form string) string {
	t.Helper()
	return w.apiAt(t, w.url, region, "ec2", form)
}

func (w *world) sts(t *testing.T, form string) string {
	t.Helper()
	return w.apiAt(t, w.url, region, "sts", form)
}

func (w *world) apiAt(t *testing.T, url, region, service, form string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "POST", url, strings.NewReader(form))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	sum := sha256.Sum256([]byte(form))
	creds := aws.Credentials{AccessKeyID: "AKALICE", SecretAccessKey: "alice-secret-key"}
	if err := v4.NewSigner().SignHTTP(t.Context(), creds, r, hex.EncodeToString(sum[:]), service, region, time.Now()); err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %d %v %s", form, res.StatusCode, err, b)
	}
	return string(b)
}
