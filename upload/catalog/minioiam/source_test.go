package minioiam

import (
	"context"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestSourceCheck(t *testing.T) {
	good := Source{URL: "https://minio.example:9000", AccessKey: "k", Secret: "hidden-secret"}
	for _, x := range []struct {
		change func(*Source)
		want   string
	}{
		{func(*Source) {}, ""},
		{func(s *Source) { s.URL += "/" }, ""},
		{func(s *Source) { s.URL = "http://127.0.0.1:9000" }, ""},
		{func(s *Source) { s.URL = "http://[::1]:9000" }, ""},
		{func(s *Source) { s.URL = "http://localhost:9000" }, ""},
		{func(s *Source) { s.URL = "http://minio.example:9000" }, "not https"},
		{func(s *Source) { s.URL, s.Plain = "http://minio.example:9000", true }, ""},
		{func(s *Source) { s.URL = "minio.example:9000" }, "url"},
		{func(s *Source) { s.URL = "ftp://minio.example" }, "url"},
		{func(s *Source) { s.URL = "https://" }, "url"},
		{func(s *Source) { s.URL = "https://a:b@minio.example" }, "url"},
		{func(s *Source) { s.URL += "/bucket" }, "url"},
		{func(s *Source) { s.URL += "?x=y" }, "url"},
		{func(s *Source) { s.AccessKey = "" }, "access key"},
		{func(s *Source) { s.Secret = "" }, "access key"},
		{func(s *Source) { s.CACert = []byte("no certificate") }, "PEM"},
	} {
		s := good
		x.change(&s)
		err := s.Check()
		if (x.want == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), x.want) || strings.Contains(err.Error(), "hidden")) {
			t.Errorf("%s: %v, want %q", s, err, x.want)
		}
	}
}

// TestSourceAnswers: what a server may answer instead of an export.
func TestSourceAnswers(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("it followed a redirect with %q", r.Header.Get("Authorization"))
	}))
	defer elsewhere.Close()
	var answer http.HandlerFunc
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/minio/admin/v3/export-iam" || r.Method != "GET" || !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential=KEY/") {
			t.Errorf("%s %s %s", r.Method, r.URL, r.Header)
		}
		answer(w, r)
	}))
	defer srv.Close()
	s := Source{URL: srv.URL, AccessKey: "KEY", Secret: "hidden-secret", CACert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})}
	says := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}
	}
	export := string(made(t, map[string]string{"users": `{"u":{"secretKey":"s","status":"enabled"}}`}))
	for _, x := range []struct {
		name   string
		answer http.HandlerFunc
		is     error
		want   string
	}{
		{"an export", says(200, export), nil, ""},
		{"not allowed", says(403, `{"Code":"AccessDenied","Message":"Access Denied."}`), ErrDenied, "admin:ExportIAM"},
		{"not allowed, in XML", says(403, `<Error><Code>AccessDenied</Code></Error>`), ErrDenied, ""},
		{"a wrong key", says(403, `{"Code":"InvalidAccessKeyId","Message":"no such key"}`), nil, "InvalidAccessKeyId"},
		{"not up yet", says(503, `{"Code":"XMinioServerNotInitialized","Message":"later"}`), nil, "NotInitialized"},
		{"a page", says(502, "<html>"), nil, "502"},
		{"another server's success", says(200, "<ListBucketResult/>"), ErrExport, ""},
		{"half an export", says(200, export[:len(export)/2]), ErrExport, ""},
		{"nothing", says(200, ""), ErrExport, ""},
		{"elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}, nil, "307"},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write([]byte(export[:10]))
			panic(http.ErrAbortHandler)
		}, nil, "EOF"},
	} {
		answer = x.answer
		keys, err := s.Keys(t.Context(), now)
		if x.is == nil && x.want == "" {
			if err != nil || len(keys) != 1 {
				t.Errorf("%s: %v %v", x.name, keys, err)
			}
			continue
		}
		if err == nil || x.is != nil && !errors.Is(err, x.is) || !strings.Contains(err.Error(), x.want) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: %v, want %v %q", x.name, err, x.is, x.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Keys(ctx, now); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	s.CACert = nil
	if _, err := s.Keys(t.Context(), now); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an authority nobody knows: %v", err)
	}
}
