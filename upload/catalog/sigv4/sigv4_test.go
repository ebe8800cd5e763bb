package sigv4_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/upload/catalog/sigv4"
)

const (
	keyID  = "AKIDEXAMPLE"
	secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
)

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func verifier() *sigv4.Verifier {
	keys := map[string]sigv4.Key{
		keyID:   {ID: keyID, Secret: secret},
		"TEMP":  {ID: "TEMP", Secret: secret, Token: "token/+=", Expires: now.Add(time.Hour)},
		"ENDED": {ID: "ENDED", Secret: secret, Expires: now.Add(-time.Hour)},
	}
	return &sigv4.Verifier{
		Key:   func(id string) (sigv4.Key, bool) { k, ok := keys[id]; return k, ok },
		Scope: func(region, service string) bool { return region == "us-east-1" && service == "ec2" },
		Now:   func() time.Time { return now },
	}
}

// TestPublishedVectors are of AWS's test suite for Signature Version 4 and of
// the example in the IAM User Guide.
func TestPublishedVectors(t *testing.T) {
	for _, c := range []struct{ request, service, headers, signature string }{
		{"GET / HTTP/1.1\r\nHost: example.amazonaws.com\r\nX-Amz-Date: 20150830T123600Z\r\n", "service", "host;x-amz-date", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"POST / HTTP/1.1\r\nHost: example.amazonaws.com\r\nX-Amz-Date: 20150830T123600Z\r\n", "service", "host;x-amz-date", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
		{"GET /?Param2=value2&Param1=value1 HTTP/1.1\r\nHost: example.amazonaws.com\r\nX-Amz-Date: 20150830T123600Z\r\n", "service", "host;x-amz-date", "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"},
		{
			"GET /?Action=ListUsers&Version=2010-05-08 HTTP/1.1\r\nHost: iam.amazonaws.com\r\nX-Amz-Date: 20150830T123600Z\r\n" +
				"Content-Type: application/x-www-form-urlencoded; charset=utf-8\r\n",
			"iam", "content-type;host;x-amz-date", "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
		},
	} {
		raw := c.request + "Authorization: AWS4-HMAC-SHA256 Credential=" + keyID + "/20150830/us-east-1/" + c.service + "/aws4_request, SignedHeaders=" +
			c.headers + ", Signature=" + c.signature + "\r\n\r\n"
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
		if err != nil {
			t.Fatal(err)
		}
		v := verifier()
		v.Scope = func(string, string) bool { return true }
		v.Now = func() time.Time { return time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC) }
		if s, err := v.Verify(r, nil); err != nil || s.KeyID != keyID || s.Service != c.service {
			t.Errorf("%.60q: %v, %v", c.request, s, err)
		}
	}
}

const form = "Action=DescribeImages&ImageId.1=ami-0123456789abcdef0&Version=2016-11-15"

// signed is a request by the AWS SDK's signer.
func signed(t testing.TB, key, token string, at time.Time, mutate func(*http.Request)) (*http.Request, []byte) {
	t.Helper()
	body := []byte(form)
	r, err := http.NewRequestWithContext(context.Background(), "POST", "http://127.0.0.1:8773/", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	if mutate != nil {
		mutate(r)
	}
	sum := sha256.Sum256(body)
	if err := v4.NewSigner().SignHTTP(t.Context(), aws.Credentials{AccessKeyID: key, SecretAccessKey: secret, SessionToken: token}, r, hex.EncodeToString(sum[:]), "ec2", "us-east-1", at); err != nil {
		t.Fatal(err)
	}
	return r, body
}

func presigned(t testing.TB, key, token string, at time.Time, expires string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(context.Background(), "GET", "http://127.0.0.1:8773/?"+form+"&Filter.1.Value.1=a%20b~%2F*"+expires, nil)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(nil)
	u, _, err := v4.NewSigner().PresignHTTP(t.Context(), aws.Credentials{AccessKeyID: key, SecretAccessKey: secret, SessionToken: token}, r, hex.EncodeToString(sum[:]), "ec2", "us-east-1", at)
	if err != nil {
		t.Fatal(err)
	}
	if r, err = http.NewRequestWithContext(context.Background(), "GET", u, nil); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSDKsSignatures(t *testing.T) {
	v := verifier()
	for _, key := range []struct{ id, token string }{{keyID, ""}, {"TEMP", "token/+="}} {
		r, body := signed(t, key.id, key.token, now, nil)
		if s, err := v.Verify(r, body); err != nil || s.KeyID != key.id || s.Region != "us-east-1" {
			t.Errorf("signed with %s: %v, %v", key.id, s, err)
		}
		if s, err := v.Verify(presigned(t, key.id, key.token, now, "&X-Amz-Expires=60"), nil); err != nil || s.KeyID != key.id {
			t.Errorf("presigned with %s: %v, %v", key.id, s, err)
		}
	}
	r, body := signed(t, keyID, "", now, func(r *http.Request) {
		r.Header.Set("Amz-Sdk-Request", "attempt=1;  max=3 ")
		r.Header["X-Amz-Meta"] = []string{"a", "b  c"}
	})
	if _, err := v.Verify(r, body); err != nil {
		t.Errorf("with headers that are folded: %v", err)
	}
}

func TestRefused(t *testing.T) {
	plain := func(r *http.Request) *http.Request { return r }
	for _, c := range []struct {
		name   string
		key    string
		token  string
		at     time.Time
		change func(*http.Request) *http.Request
		body   string
		want   error
	}{
		{"unsigned", keyID, "", now, func(r *http.Request) *http.Request { r.Header.Del("Authorization"); return r }, form, sigv4.ErrMissing},
		{"another body", keyID, "", now, plain, form + "&DryRun=true", sigv4.ErrSignature},
		{"old", keyID, "", now.Add(-sigv4.Window - time.Second), plain, form, sigv4.ErrSkew},
		{"of the future", keyID, "", now.Add(sigv4.Window + time.Second), plain, form, sigv4.ErrSkew},
		{"unknown key", "NOBODY", "", now, plain, form, sigv4.ErrSignature},
		{"a key that ended", "ENDED", "", now, plain, form, sigv4.ErrSignature},
		{"a token for a key without", keyID, "token", now, plain, form, sigv4.ErrSignature},
		{"no token", "TEMP", "", now, plain, form, sigv4.ErrSignature},
		{"another token", "TEMP", "other", now, plain, form, sigv4.ErrSignature},
		{"two signatures", keyID, "", now, func(r *http.Request) *http.Request {
			r.Header.Add("Authorization", r.Header.Get("Authorization"))
			return r
		}, form, sigv4.ErrIncomplete},
		{"two dates", keyID, "", now, func(r *http.Request) *http.Request {
			r.Header.Add("X-Amz-Date", r.Header.Get("X-Amz-Date"))
			return r
		}, form, sigv4.ErrIncomplete},
		{"an unsigned header that counts", keyID, "", now, func(r *http.Request) *http.Request {
			r.Header.Set("X-Amz-Target", "x")
			return r
		}, form, sigv4.ErrIncomplete},
		{"a signature in header and query", keyID, "", now, func(r *http.Request) *http.Request {
			r.URL.RawQuery = "X-Amz-Signature=" + strings.Repeat("0", 64)
			return r
		}, form, sigv4.ErrIncomplete},
		{"a digest that lies", keyID, "", now, func(r *http.Request) *http.Request {
			r.Header.Set("X-Amz-Content-Sha256", strings.Repeat("0", 64))
			return r
		}, form, sigv4.ErrIncomplete},
		{"an older algorithm", keyID, "", now, func(r *http.Request) *http.Request {
			r.Header.Set("Authorization", "AWS "+keyID+":x")
			return r
		}, form, sigv4.ErrIncomplete},
		{"unsorted headers", keyID, "", now, func(r *http.Request) *http.Request {
			a := r.Header.Get("Authorization")
			r.Header.Set("Authorization", strings.Replace(a, "content-length;content-type", "content-type;content-length", 1))
			return r
		}, form, sigv4.ErrIncomplete},
	} {
		r, _ := signed(t, c.key, c.token, c.at, nil)
		if _, err := verifier().Verify(c.change(r), []byte(c.body)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	for _, c := range []struct {
		expires string
		after   time.Duration
		want    error
	}{
		{"", sigv4.Window, nil},
		{"", sigv4.Window + time.Second, sigv4.ErrExpired},
		{"&X-Amz-Expires=", 0, sigv4.ErrIncomplete},
		{"&X-Amz-Expires=60", 60 * time.Second, nil},
		{"&X-Amz-Expires=60", 61 * time.Second, sigv4.ErrExpired},
		{"&X-Amz-Expires=604800", 7 * 24 * time.Hour, nil},
		{"&X-Amz-Expires=604801", 0, sigv4.ErrIncomplete},
		{"&X-Amz-Expires=0", 0, sigv4.ErrIncomplete},
		{"&X-Amz-Expires=-1", 0, sigv4.ErrIncomplete},
		{"&X-Amz-Expires=60", -sigv4.Window - time.Second, sigv4.ErrSkew},
	} {
		v := verifier()
		v.Now = func() time.Time { return now.Add(c.after) }
		if _, err := v.Verify(presigned(t, keyID, "", now, c.expires), nil); !errors.Is(err, c.want) {
			t.Errorf("presigned with %q, after %s: %v, want %v", c.expires, c.after, err, c.want)
		}
	}
	v := verifier()
	v.Scope = func(string, string) bool { return false }
	r, body := signed(t, keyID, "", now, nil)
	if _, err := v.Verify(r, body); !errors.Is(err, sigv4.ErrScope) {
		t.Errorf("another region: %v, want ErrScope", err)
	}
}

// wire is the request as it travels, its signed headers and nothing else.
func wire(t testing.TB, r *http.Request, body []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(r.Method + " " + r.URL.RequestURI() + " HTTP/1.1\r\nHost: " + r.Host + "\r\n")
	if err := r.Header.Write(&b); err != nil {
		t.Fatal(err)
	}
	if body != nil {
		b.WriteString("Content-Length: 72\r\n")
	}
	b.WriteString("\r\n")
	b.Write(body)
	return b.Bytes()
}

// receive is what a server does with the bytes; nil means that net/http
// refuses them.
func receive(raw []byte) (*http.Request, []byte) {
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
	if err != nil {
		return nil, nil
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, nil
	}
	return r, body
}

// TestMutations changes requests on the wire, every byte in turn: none is
// taken.
func TestMutations(t *testing.T) {
	header, body := signed(t, keyID, "", now, nil)
	temporary, tbody := signed(t, "TEMP", "token/+=", now, nil)
	refused := 0
	for _, raw := range [][]byte{wire(t, header, body), wire(t, temporary, tbody), wire(t, presigned(t, keyID, "", now, "&X-Amz-Expires=60"), nil)} {
		r, b := receive(raw)
		if r == nil {
			t.Fatalf("not a request:\n%s", raw)
		}
		if _, err := verifier().Verify(r, b); err != nil {
			t.Fatalf("the request itself: %v\n%s", err, raw)
		}
		version := bytes.Index(raw, []byte(" HTTP/1.1\r\n"))
		for i := range raw {
			if i > version && i < version+len(" HTTP/1.1\r\n") {
				continue // HTTP/1.0 is as good
			}
			for _, flip := range []byte{1, 0x10} {
				bad := bytes.Clone(raw)
				bad[i] ^= flip
				r, b := receive(bad)
				if r == nil {
					refused++
					continue
				}
				if _, err := verifier().Verify(r, b); err == nil {
					t.Errorf("byte %d, %q to %q, is taken:\n%s", i, raw[i], bad[i], bad)
					continue
				}
				refused++
			}
		}
	}
	t.Logf("%d mutated requests were refused", refused)
	if refused < 500 {
		t.Errorf("only %d requests", refused)
	}
}

func FuzzVerify(f *testing.F) {
	header, body := signed(f, keyID, "", now, nil)
	f.Add(wire(f, header, body))
	f.Add(wire(f, presigned(f, keyID, "", now, "&X-Amz-Expires=60"), nil))
	good := map[string]bool{}
	for _, raw := range [][]byte{wire(f, header, body), wire(f, presigned(f, keyID, "", now, "&X-Amz-Expires=60"), nil)} {
		r, b := receive(raw)
		good[r.Method+string(b)] = true
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, b := receive(raw)
		if r == nil {
			return
		}
		if _, err := verifier().Verify(r, b); err == nil && !good[r.Method+string(b)] {
			t.Fatalf("nobody signed this:\n%s", raw)
		}
	})
}
