package upload_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload"
)

func TestSplitLocation(t *testing.T) {
	for _, c := range []struct{ in, bucket, prefix string }{
		{"b", "b", ""}, {"b/", "b", ""}, {"/b", "b", ""}, {"//b/p//", "b", "p"}, {"b/p/q", "b", "p/q"}, {"b//p", "b", "p"}, {"my.bucket/x y", "my.bucket", "x y"},
	} {
		b, p, err := upload.SplitLocation(c.in)
		if err != nil || b != c.bucket || p != c.prefix {
			t.Errorf("%q gives %q, %q, %v", c.in, b, p, err)
		}
	}
	for _, bad := range []string{"", "/", "///", "b/p//q", "b/../q", "a b/x", "http://b", "b?x", "b/.", "b/\x00"} {
		if b, p, err := upload.SplitLocation(bad); err == nil {
			t.Errorf("%q gives %q, %q", bad, b, p)
		}
	}
}

func FuzzSplitLocation(f *testing.F) {
	for _, s := range []string{"b/p", "/b//", "b/p/../q", "b/é", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		b, p, err := upload.SplitLocation(in)
		if err != nil {
			return
		}
		if b == "" || strings.Contains(b, "/") || p != "" && upload.CheckKey(p) != nil {
			t.Fatalf("%q gives %q, %q", in, b, p)
		}
		u, err := upload.S3URL(in)
		if err != nil {
			t.Fatal(err)
		}
		b2, p2, err := upload.SplitLocation(strings.TrimPrefix(u, "s3://"))
		if err != nil || b2 != b || p2 != p {
			t.Fatalf("%q becomes %q, which gives %q, %q, %v", in, u, b2, p2, err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	for _, u := range []string{"", "ftp://x/y", "s3://", "s3:///p", "file://host/x", filepath.Join(t.TempDir(), "missing")} {
		if s, err := upload.Open(t.Context(), u, upload.Options{}); err == nil {
			t.Errorf("%q opened %s", u, s)
		}
	}
	for _, e := range []string{"minio:9000", "ftp://x", "http://", "http://user:hunter2@host", "::"} {
		_, err := upload.Open(t.Context(), "s3://b", upload.Options{Endpoint: e, Anonymous: true})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("endpoint %q: %v", e, err)
		}
	}
	if _, err := upload.Open(t.Context(), "s3://b", upload.Options{CACertFile: "/no/such.pem"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing CA file: %v", err)
	}
	junk := filepath.Join(t.TempDir(), "junk.pem")
	os.WriteFile(junk, []byte("no certificate"), 0o644)
	if _, err := upload.Open(t.Context(), "s3://b", upload.Options{CACertFile: junk}); err == nil {
		t.Error("a CA file without certificates is taken")
	}
}

// seen is what a server was asked.
type seen struct {
	mu   sync.Mutex
	reqs []*http.Request
}

func (s *seen) last() *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.reqs) == 0 {
		return nil
	}
	return s.reqs[len(s.reqs)-1]
}

// recorder is a server that takes any PUT.
func recorder(t *testing.T) (*httptest.Server, *seen) {
	rec := new(seen)
	h := func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		rec.mu.Lock()
		rec.reqs = append(rec.reqs, r)
		rec.mu.Unlock()
		w.Header().Set("ETag", fmt.Sprintf("%q", md5hex(b)))
	}
	srv := httptest.NewServer(http.HandlerFunc(h))
	t.Cleanup(srv.Close)
	return srv, rec
}

func putOne(t *testing.T, url string, o upload.Options) {
	t.Helper()
	if o.Retry == (upload.Retry{}) {
		o.Retry = quick
	}
	if _, err := upload.PutBytes(t.Context(), open(t, url, o), "k", []byte("x"), upload.PutOptions{}); err != nil {
		t.Error(err)
	}
}

func TestEnvironment(t *testing.T) {
	srv, rec := recorder(t)
	check := func(t *testing.T, keyID, region, token string) {
		t.Helper()
		r := rec.last()
		if r == nil {
			t.Fatal("nothing was asked")
		}
		a := r.Header.Get("Authorization")
		if !strings.Contains(a, "Credential="+keyID+"/") || !strings.Contains(a, "/"+region+"/s3/") || r.Header.Get("X-Amz-Security-Token") != token {
			t.Errorf("Authorization %q, token %q; want %s in %s", a, r.Header.Get("X-Amz-Security-Token"), keyID, region)
		}
		if r.URL.Path != "/bkt/k" {
			t.Errorf("path %q", r.URL.Path)
		}
		if r.Header.Get("Content-Encoding") != "" || r.Header.Get("X-Amz-Trailer") != "" || r.ContentLength != 1 || r.Header.Get("Content-Md5") == "" {
			t.Errorf("headers %v", r.Header)
		}
	}
	t.Run("variables", func(t *testing.T) {
		isolate(t)
		for k, v := range map[string]string{
			"AWS_ACCESS_KEY_ID": "AKENV", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "tok",
			"AWS_REGION": "moon-base-7", "AWS_ENDPOINT_URL_S3": srv.URL, "AWS_ENDPOINT_URL": "http://wrong.invalid",
		} {
			t.Setenv(k, v)
		}
		putOne(t, "s3://bkt", upload.Options{})
		check(t, "AKENV", "moon-base-7", "tok")
	})
	t.Run("files", func(t *testing.T) {
		home := isolate(t)
		os.WriteFile(filepath.Join(home, "config"), []byte("[profile lab]\nregion = lab-1\nendpoint_url = "+srv.URL+"\n"), 0o600)
		os.WriteFile(filepath.Join(home, "credentials"), []byte("[lab]\naws_access_key_id = AKFILE\naws_secret_access_key = s\n"), 0o600)
		putOne(t, "s3://bkt", upload.Options{Profile: "lab"})
		check(t, "AKFILE", "lab-1", "")
		t.Setenv("AWS_PROFILE", "lab")
		putOne(t, "s3://bkt", upload.Options{})
		check(t, "AKFILE", "lab-1", "")
	})
	t.Run("options win", func(t *testing.T) {
		isolate(t)
		t.Setenv("AWS_ACCESS_KEY_ID", "AKENV")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "s")
		t.Setenv("AWS_REGION", "moon-base-7")
		t.Setenv("AWS_ENDPOINT_URL", "http://wrong.invalid")
		putOne(t, "s3://bkt", upload.Options{
			Endpoint: srv.URL, Region: "here-1",
			Credentials: &upload.Credentials{AccessKeyID: "AKOPT", SecretAccessKey: "s", SessionToken: "opt-token"},
		})
		check(t, "AKOPT", "here-1", "opt-token")
	})
	t.Run("default region", func(t *testing.T) {
		isolate(t)
		putOne(t, "s3://bkt", upload.Options{Endpoint: srv.URL, Credentials: &upload.Credentials{AccessKeyID: "A", SecretAccessKey: "s"}})
		check(t, "A", "us-east-1", "")
	})
	t.Run("instance profile", func(t *testing.T) {
		isolate(t)
		md, v1 := metadataServer(t, true)
		t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", md)
		putOne(t, "s3://bkt", upload.Options{Endpoint: srv.URL})
		check(t, "AKROLE", "us-east-1", "role-token")
		if v1() {
			t.Error("metadata was asked without a token")
		}
	})
	t.Run("no metadata v1", func(t *testing.T) {
		isolate(t)
		md, v1 := metadataServer(t, false)
		t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", md)
		s := open(t, "s3://bkt", upload.Options{Endpoint: srv.URL, Retry: quick})
		if _, err := upload.PutBytes(t.Context(), s, "k", nil, upload.PutOptions{}); !errors.Is(err, upload.ErrCredentials) {
			t.Errorf("got %v", err)
		}
		if v1() {
			t.Error("metadata was asked without a token")
		}
	})
	t.Run("virtual host", func(t *testing.T) {
		isolate(t)
		no := false
		o := upload.Options{Endpoint: strings.Replace(srv.URL, "127.0.0.1", "localhost", 1), PathStyle: &no, Anonymous: true, Retry: quick}
		o.Retry.Attempts = 1
		s := open(t, "s3://bkt", o)
		_, err := upload.PutBytes(t.Context(), s, "k", []byte("x"), upload.PutOptions{})
		if r := rec.last(); err == nil && (!strings.HasPrefix(r.Host, "bkt.localhost") || r.URL.Path != "/k") {
			t.Errorf("host %q, path %q", r.Host, r.URL.Path)
		} else if err != nil && !strings.Contains(err.Error(), "bkt.localhost") {
			t.Errorf("got %v", err)
		}
	})
}

// metadataServer hands out role credentials to whoever has a token. Without
// tokens it is one that only knows version 1.
func metadataServer(t *testing.T, tokens bool) (url string, askedV1 func() bool) {
	var mu sync.Mutex
	v1 := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/latest/api/token" {
			if !tokens {
				http.NotFound(w, r)
				return
			}
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "300")
			io.WriteString(w, "TOKEN")
			return
		}
		if r.Header.Get("X-Aws-Ec2-Metadata-Token") != "TOKEN" {
			mu.Lock()
			v1 = true
			mu.Unlock()
		}
		switch r.URL.Path {
		case "/latest/meta-data/iam/security-credentials/", "/latest/meta-data/iam/security-credentials":
			io.WriteString(w, "role")
		case "/latest/meta-data/iam/security-credentials/role":
			fmt.Fprintf(w, `{"Code":"Success","AccessKeyId":"AKROLE","SecretAccessKey":"s","Token":"role-token","Expiration":%q}`, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.URL, func() bool { mu.Lock(); defer mu.Unlock(); return v1 }
}

// TestCABundle: the certificate authority comes from the option or AWS_CA_BUNDLE.
func TestCABundle(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("ETag", fmt.Sprintf("%q", md5hex(b)))
	}))
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o644)
	isolate(t)
	o := fakeOptions(srv.URL)
	o.CACertFile = file
	putOne(t, "s3://b", o)
	// httptest's certificate is for 127.0.0.1 and example.com.
	wrong := o
	wrong.Endpoint = strings.Replace(srv.URL, "127.0.0.1", "localhost", 1)
	_, err := upload.PutBytes(t.Context(), open(t, "s3://b", wrong), "k", nil, upload.PutOptions{})
	if !errors.Is(err, upload.ErrUnreachable) || !strings.Contains(err.Error(), "the endpoint says localhost") || strings.Contains(err.Error(), "--ca-cert") {
		t.Errorf("wrong name: %v", err)
	}
	o.CACertFile = ""
	t.Setenv("AWS_CA_BUNDLE", file+".missing")
	if _, err := upload.Open(t.Context(), "s3://b", o); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "AWS_CA_BUNDLE") {
		t.Errorf("missing bundle: %v", err)
	}
	t.Setenv("AWS_CA_BUNDLE", file)
	putOne(t, "s3://b", o)
	os.Unsetenv("AWS_CA_BUNDLE")
	_, err = upload.PutBytes(t.Context(), open(t, "s3://b", o), "k", nil, upload.PutOptions{})
	if unknown := (x509.UnknownAuthorityError{}); !errors.As(err, &unknown) {
		t.Errorf("without it: %v", err)
	}
}

// TestProxy needs a process of its own: net/http reads the variables once.
func TestProxy(t *testing.T) {
	var mu sync.Mutex
	var asked []string
	target, _ := recorder(t)
	px := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		mu.Lock()
		asked = append(asked, r.In.Method+" "+r.In.URL.String())
		mu.Unlock()
		r.Out.URL.Host = strings.TrimPrefix(target.URL, "http://")
	}})
	defer px.Close()
	if url := os.Getenv("INSTAR_TEST_PROXIED"); url != "" {
		putOne(t, "s3://b", fakeOptions(url))
		return
	}
	out, err := rerun(t, "TestProxy", "HTTP_PROXY="+px.URL, "NO_PROXY=", "INSTAR_TEST_PROXIED=http://s3.example.invalid")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(asked) != 1 || asked[0] != "PUT http://s3.example.invalid/b/k?x-id=PutObject" {
		t.Errorf("the proxy was asked %q", asked)
	}
}

// TestRateLimit: the limiter is asked for every byte, both ways.
func TestRateLimit(t *testing.T) {
	o := fakeOptions(fakeS3(t))
	lim := rate.NewLimiter(rate.Inf, 64<<10)
	o.Limit = lim
	s := bucket(t, o)
	data := make([]byte, 1<<20)
	if _, err := upload.PutBytes(t.Context(), s, "k", data, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	lim.SetLimit(0)
	lim.SetBurst(0) // from here nothing may pass
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := upload.PutBytes(ctx, s, "k2", data, upload.PutOptions{}); err == nil {
		t.Error("a put passed a closed limiter")
	}
}

func TestServerTimeAndPresign(t *testing.T) {
	srv := servers.MinIOTLS(t)
	s := bucket(t, serverOptions(srv))
	now, err := s.(upload.Clock).ServerTime(t.Context())
	if err != nil || time.Since(now).Abs() > time.Minute {
		t.Errorf("server time %v, %v", now, err)
	}
	data := []byte("presigned")
	if _, err := upload.PutBytes(t.Context(), s, "a b", data, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	u, err := s.(upload.Presigner).PresignGet(t.Context(), "a b", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	client := srv.Client(t)
	defer client.CloseIdleConnections()
	res, err := client.Get(u)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); res.StatusCode != 200 || !bytes.Equal(b, data) {
		t.Errorf("%s: %q", res.Status, b)
	}
	for _, d := range []time.Duration{0, -1, 8 * 24 * time.Hour} {
		if _, err := s.(upload.Presigner).PresignGet(t.Context(), "k", d); err == nil {
			t.Errorf("validity %v is taken", d)
		}
	}
}

// FuzzReply: whatever a server answers, an operation ends, with an error on one line.
func FuzzReply(f *testing.F) {
	f.Add(200, "", []byte(""))
	f.Add(200, "bytes 0-3/4", []byte("data"))
	f.Add(403, "", []byte(xmlError("AccessDenied", "no")))
	f.Add(200, "", []byte("<ListBucketResult><Name>b</Name><IsTruncated>true</IsTruncated></ListBucketResult>"))
	f.Add(404, "", []byte("<Error><Code>No"))
	f.Add(206, "bytes 9-1/0", []byte("<DeleteResult><Deleted><Key>k</Key></Deleted></DeleteResult>"))
	var mu sync.Mutex
	var status int
	var rng string
	var body []byte
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Range", rng)
		w.Header().Set("ETag", `"x"`)
		w.WriteHeader(status)
		w.Write(body)
	}))
	f.Cleanup(srv.Close)
	o := fakeOptions(srv.URL)
	o.Retry.Attempts = 2
	s, err := upload.Open(context.Background(), "s3://b", o)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	f.Fuzz(func(t *testing.T, st int, r string, b []byte) {
		mu.Lock()
		status, rng, body = 200+(st&0xffff)%400, strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return '.'
			}
			return r
		}, r), b
		mu.Unlock()
		check := func(err error) {
			if err != nil && strings.ContainsAny(err.Error(), "\r\n") {
				t.Fatalf("%q", err)
			}
		}
		ctx := t.Context()
		_, _, err := upload.GetBytes(ctx, s, "k", 1<<20)
		check(err)
		if rd, _, err := s.Get(ctx, "k", upload.GetOptions{Offset: 2, Length: 9}); err == nil {
			io.Copy(io.Discard, rd)
			rd.Close()
		}
		_, err = s.Stat(ctx, "k")
		check(err)
		for _, err := range s.List(ctx, "") {
			check(err)
		}
		check(s.Delete(ctx, "k"))
		_, err = s.Copy(ctx, "k", "j", upload.PutOptions{})
		check(err)
	})
}
