package upload_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
)

// answer starts a server that gives every request the same reply.
func answer(t testing.TB, status int, header map[string]string, body string) (endpoint string, asked *atomic.Int32) {
	asked = new(atomic.Int32)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		io.Copy(io.Discard, r.Body)
		for k, v := range header {
			w.Header().Set(k, v)
		}
		w.Header().Set("X-Amz-Request-Id", "REQ42")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}))
	t.Cleanup(srv.Close)
	return srv.URL, asked
}

func xmlError(code, message string) string {
	return fmt.Sprintf("<?xml version=\"1.0\"?><Error><Code>%s</Code><Message>%s</Message></Error>", code, message)
}

// TestServerErrors: what a PUT's caller is told, and how often it was tried.
func TestServerErrors(t *testing.T) {
	for _, c := range []struct {
		name   string
		status int
		header map[string]string
		body   string
		acl    upload.ACL
		kind   error
		tries  int32
		says   []string
	}{
		{
			name: "denied", status: 403, body: xmlError("AccessDenied", "Access Denied."), kind: upload.ErrAccess, tries: 1,
			says: []string{"s3://b/k", "AccessDenied", `"Access Denied."`, "HTTP 403", "REQ42"},
		},
		{name: "no bucket", status: 404, body: xmlError("NoSuchBucket", "The specified bucket does not exist"), kind: upload.ErrNoBucket, tries: 1},
		{name: "bad key id", status: 403, body: xmlError("InvalidAccessKeyId", "unknown"), kind: upload.ErrCredentials, tries: 1},
		{name: "bad signature", status: 403, body: xmlError("SignatureDoesNotMatch", "mismatch"), kind: upload.ErrCredentials, tries: 1},
		{name: "expired", status: 400, body: xmlError("ExpiredToken", "The provided token has expired."), kind: upload.ErrCredentials, tries: 2},
		{
			name: "skew", status: 403, header: map[string]string{"Date": time.Now().Add(-48 * time.Hour).UTC().Format(http.TimeFormat)},
			body: xmlError("RequestTimeTooSkewed", "too large"), kind: upload.ErrClockSkew, tries: 4, says: []string{"48h0m", "clock"},
		},
		{
			name: "moved", status: 301, header: map[string]string{"X-Amz-Bucket-Region": "eu-central-1", "Location": "http://elsewhere.example/"},
			body: xmlError("PermanentRedirect", "use the other"), kind: upload.ErrBucketElsewhere, tries: 1, says: []string{"eu-central-1", "region"},
		},
		{
			name: "wrong region", status: 400, body: xmlError("AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'here-1'"),
			kind: upload.ErrBucketElsewhere, tries: 1, says: []string{"(here-1)"},
		},
		{
			name: "acl 501", status: 501, acl: upload.ACLAWSExecRead, body: xmlError("NotImplemented", "A header you provided implies functionality that is not implemented."),
			kind: upload.ErrACL, tries: 1, says: []string{"aws-exec-read", "bucket policy", "NotImplemented"},
		},
		{
			name: "acl off", status: 400, acl: upload.ACLPublicRead, body: xmlError("AccessControlListNotSupported", "The bucket does not allow ACLs"),
			kind: upload.ErrACL, tries: 1, says: []string{"public-read", "bucket policy"},
		},
		{name: "501", status: 501, body: xmlError("NotImplemented", "A header you provided implies functionality that is not implemented."), kind: upload.ErrUnsupported, tries: 1},
		{name: "exists", status: 412, body: xmlError("PreconditionFailed", "no"), kind: upload.ErrExist, tries: 1},
		{name: "slow", status: 503, body: xmlError("SlowDown", "Please reduce your request rate."), kind: nil, tries: 4, says: []string{"SlowDown", "tried 4 times"}},
		{name: "full", status: 507, body: xmlError("XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."), kind: upload.ErrNoSpace, tries: 1},
		{name: "locked", status: 403, body: xmlError("AccessDenied", "Access Denied because object protected by object lock."), kind: upload.ErrLocked, tries: 1},
		{name: "page", status: 502, body: "<html>Bad Gateway</html>", kind: nil, tries: 4, says: []string{"HTTP 502"}},
		{name: "teapot", status: 418, body: "short and stout", kind: nil, tries: 1, says: []string{"HTTP 418"}},
		{name: "newlines", status: 403, body: xmlError("AccessDenied", "line\nanother\u009b31m"), kind: upload.ErrAccess, tries: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			endpoint, asked := answer(t, c.status, c.header, c.body)
			o := fakeOptions(endpoint)
			o.ACL = c.acl
			s := open(t, "s3://b", o)
			_, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{})
			var e *upload.Error
			if !errors.As(err, &e) || e.Kind != c.kind || e.Status != c.status {
				t.Fatalf("got %#v", err)
			}
			if n := asked.Load(); n != c.tries {
				t.Errorf("tried %d times, want %d", n, c.tries)
			}
			for _, w := range c.says {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			if strings.ContainsAny(err.Error(), "\n\u009b") {
				t.Errorf("%q has control characters", err)
			}
		})
	}
}

// TestSecretsStay: even a server that sends them back does not get them printed.
func TestSecretsStay(t *testing.T) {
	c := upload.Credentials{AccessKeyID: "AKIAVISIBLE", SecretAccessKey: "very-secret-key", SessionToken: "very-secret-token"}
	endpoint, _ := answer(t, 403, nil, xmlError("SignatureDoesNotMatch", "you signed with very-secret-key and very-secret-token"))
	s := open(t, "s3://b", upload.Options{Endpoint: endpoint, Credentials: &c, Retry: quick})
	_, err := s.Stat(t.Context(), "k")
	_, err2 := upload.PutBytes(t.Context(), s, "k", nil, upload.PutOptions{})
	for _, text := range []string{err.Error(), err2.Error(), fmt.Sprintf("%+v %#v", err2, err2), c.String(), fmt.Sprintf("%v %+v %#v %s", c, c, c, &c), s.String()} {
		if strings.Contains(text, "secret") {
			t.Errorf("a secret is in %q", text)
		}
	}
}

// TestRealRefusals asks the real servers with wrong keys and for what is not there.
func TestRealRefusals(t *testing.T) {
	for name, start := range map[string]func(testing.TB) *servers.Server{"minio": servers.MinIO, "versitygw": servers.Versity} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			good := serverOptions(start(t))
			s := bucket(t, good)
			name := s.(upload.BucketManager).Bucket()
			put := func(o upload.Options, url string) error {
				_, err := upload.PutBytes(t.Context(), open(t, url, o), "k", []byte("x"), upload.PutOptions{})
				return err
			}
			bad := good
			bad.Credentials = &upload.Credentials{AccessKeyID: good.Credentials.AccessKeyID, SecretAccessKey: "wrong"}
			if err := put(bad, "s3://"+name); !errors.Is(err, upload.ErrCredentials) {
				t.Errorf("wrong secret key: %v", err)
			}
			bad.Credentials = &upload.Credentials{AccessKeyID: "nobody", SecretAccessKey: "wrong"}
			if err := put(bad, "s3://"+name); !errors.Is(err, upload.ErrCredentials) {
				t.Errorf("wrong access key: %v", err)
			}
			bad.Credentials, bad.Anonymous = nil, true
			if err := put(bad, "s3://"+name); !errors.Is(err, upload.ErrAccess) {
				t.Errorf("anonymous: %v", err)
			}
			if err := put(good, "s3://no-such-bucket"); !errors.Is(err, upload.ErrNoBucket) {
				t.Errorf("no bucket: %v", err)
			}
			none := open(t, "s3://no-such-bucket/x", good)
			for _, err := range none.List(t.Context(), "") {
				if !errors.Is(err, upload.ErrNoBucket) {
					t.Errorf("list of no bucket: %v", err)
				}
			}
			if _, err := upload.CheckWritable(t.Context(), none, upload.PutOptions{}); !errors.Is(err, upload.ErrNoBucket) || !strings.Contains(err.Error(), "create it") {
				t.Errorf("check of no bucket: %v", err)
			}
			if err := none.Delete(t.Context(), "a", "b"); !errors.Is(err, upload.ErrNoBucket) {
				t.Errorf("delete in no bucket: %v", err)
			}
			skew := good
			skew.Region = "another-region-9"
			// Any region name is taken; whether the server cares is its own
			// business, but the error then names the right one.
			if err := put(skew, "s3://"+name); err != nil && !errors.Is(err, upload.ErrBucketElsewhere) {
				t.Errorf("another region: %v", err)
			}
		})
	}
}

// TestUnreachable: each way not to reach a server says what to do.
func TestUnreachable(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	tls := httptest.NewTLSServer(http.NotFoundHandler())
	tls.Config.ErrorLog = nil
	defer tls.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for _, c := range []struct{ name, endpoint, says string }{
		{"tls unknown", tls.URL, "--ca-cert"},
		{"http as https", strings.Replace(plain.URL, "http:", "https:", 1), "http://"},
		{"refused", gone.URL, "connection refused"},
		{"no such host", "http://no-such-host.invalid", "check the endpoint"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, "s3://b", fakeOptions(c.endpoint))
			_, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{})
			if !errors.Is(err, upload.ErrUnreachable) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want it to say %q", err, c.says)
			}
		})
	}
}

// TestNoCredentials: an empty chain is told from a refusal, nothing is sent, and
// a metadata service that does not answer is not waited for eight times.
func TestNoCredentials(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for name, env := range map[string][2]string{
		"disabled": {"AWS_EC2_METADATA_DISABLED", "true"},
		"silent":   {"AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://" + silent.Addr().String()},
		"refused":  {"AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1"},
	} {
		t.Run(name, func(t *testing.T) {
			isolate(t)
			t.Setenv(env[0], env[1])
			endpoint, asked := answer(t, 200, nil, "")
			s := open(t, "s3://b", upload.Options{Endpoint: endpoint})
			_, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{})
			var e *upload.Error
			if !errors.As(err, &e) || e.Kind != upload.ErrCredentials || e.Attempts > 1 || !strings.Contains(err.Error(), "AWS_ACCESS_KEY_ID") {
				t.Errorf("got %v", err)
			}
			if asked.Load() != 0 {
				t.Error("a request was sent")
			}
		})
	}
}

// isolate hides the machine's own AWS configuration.
func isolate(t *testing.T) (home string) {
	home = t.TempDir()
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	t.Setenv("HOME", home)
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(home, "config"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(home, "credentials"))
	return home
}

// TestStalledServer: a server that accepts and is silent is given up and asked again.
func TestStalledServer(t *testing.T) {
	var n atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body) // else the server does not notice that the client leaves
		if n.Add(1) < 3 {
			<-r.Context().Done()
			return
		}
		w.Header().Set("ETag", fmt.Sprintf("%q", md5hex(b)))
	}))
	defer srv.Close()
	o := fakeOptions(srv.URL)
	// On a busy machine an answer may take long: such a one is asked again, too.
	o.Retry.Attempts = 20
	o.Timeouts = upload.Timeouts{Stall: 300 * time.Millisecond, Reply: 300 * time.Millisecond, MinBytes: 1}
	var seen []upload.RetryEvent
	o.OnRetry = func(e upload.RetryEvent) { seen = append(seen, e) }
	s := open(t, "s3://b", o)
	if _, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if len(seen) < 2 || !strings.Contains(seen[0].Err.Error(), "stalled") {
		t.Errorf("retries: %+v", seen)
	}
}

// TestCancelEndsWaiting: a cancelled context ends a request that hangs.
func TestCancelEndsWaiting(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		cancel()
		<-r.Context().Done()
	}))
	defer srv.Close()
	s := open(t, "s3://b", fakeOptions(srv.URL))
	_, err := upload.PutBytes(ctx, s, "k", bytes.Repeat([]byte("x"), 1000), upload.PutOptions{})
	var e *upload.Error
	if !errors.Is(err, context.Canceled) || !errors.As(err, &e) || e.Attempts != 1 {
		t.Errorf("got %v", err)
	}
}
