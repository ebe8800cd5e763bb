package boot

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/instar-image/instar/metadata/ticket"
)

// emptySHA256 is the digest of a request without a body.
const emptySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// signGET signs a GET request for an object by AWS Signature Version 4, as S3
// has it: the path is escaped once and not made canonical. It is all of S3's
// client that an initrd needs.
func signGET(r *http.Request, c *ticket.Credentials, region string, now time.Time) {
	stamp := now.UTC().Format("20060102T150405Z")
	scope := stamp[:8] + "/" + region + "/s3/aws4_request"
	r.Header.Set("X-Amz-Date", stamp)
	r.Header.Set("X-Amz-Content-Sha256", emptySHA256)
	names := "host;x-amz-content-sha256;x-amz-date"
	headers := "host:" + r.URL.Host + "\nx-amz-content-sha256:" + emptySHA256 + "\nx-amz-date:" + stamp + "\n"
	if c.SessionToken != "" {
		r.Header.Set("X-Amz-Security-Token", c.SessionToken)
		names += ";x-amz-security-token"
		headers += "x-amz-security-token:" + c.SessionToken + "\n"
	}
	request := strings.Join([]string{r.Method, r.URL.EscapedPath(), "", headers, names, emptySHA256}, "\n")
	digest := sha256.Sum256([]byte(request))
	text := "AWS4-HMAC-SHA256\n" + stamp + "\n" + scope + "\n" + hex.EncodeToString(digest[:])
	key := []byte("AWS4" + c.SecretAccessKey)
	for _, s := range []string{stamp[:8], region, "s3", "aws4_request", text} {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(s))
		key = h.Sum(nil)
	}
	r.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x", c.AccessKeyID, scope, names, key))
}

// objectURL is where an object below the ticket's store is: by path at an
// endpoint of one's own, by host at Amazon's.
func objectURL(t *ticket.Ticket, name string) (u *url.URL, region string, err error) {
	store, err := url.Parse(t.Store)
	if err != nil || store.Scheme != "s3" || store.Host == "" {
		return nil, "", fmt.Errorf("the ticket's store %q is none that an initrd reaches: s3://BUCKET/PREFIX", t.Store)
	}
	if region = t.Region; region == "" {
		region = "us-east-1"
	}
	key := strings.Trim(store.Path, "/")
	if key != "" {
		key += "/"
	}
	key += name
	u = &url.URL{Scheme: "https", Host: store.Host + ".s3." + region + ".amazonaws.com"}
	switch {
	case t.Endpoint != "":
		if u, err = url.Parse(t.Endpoint); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, "", fmt.Errorf("the ticket's endpoint %q is no http or https URL", t.Endpoint)
		}
		key = strings.Trim(u.Path, "/") + "/" + store.Host + "/" + key
	case strings.Contains(store.Host, "."):
		// Its certificate would not match BUCKET.HOST.
		u.Host = "s3." + region + ".amazonaws.com"
		key = store.Host + "/" + key
	}
	u.Path = "/" + strings.TrimLeft(key, "/")
	u.RawPath = escapeKey(u.Path)
	return u, region, nil
}

// escapeKey escapes all but unreserved characters and slashes, as S3 counts.
func escapeKey(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("-._~/", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
