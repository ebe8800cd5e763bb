package metadata

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
)

// full is the record that has everything.
func full(t testing.TB) *Instance {
	t.Helper()
	b, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	in, err := Decode("full.yaml", b, DecodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// small is a record with no more than it needs.
func small(id, addr string) *Instance {
	return &Instance{ID: id, Caller: Caller{Addresses: []netip.Addr{netip.MustParseAddr(addr)}}}
}

func newHandler(t testing.TB, o Options, instances ...*Instance) *Handler {
	t.Helper()
	set, err := NewSet(instances...)
	if err != nil {
		t.Fatal(err)
	}
	o.Source = Static(set)
	if o.Rate == 0 {
		o.Rate = -1
	}
	h, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// ask makes one request from an address; headers are "Name: value".
func ask(h http.Handler, from, method, path string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "/", nil)
	r.Host = "169.254.169.254"
	r.URL.Path = path
	if i := strings.IndexByte(path, '?'); i >= 0 {
		r.URL.Path, r.URL.RawQuery = path[:i], path[i+1:]
	}
	r.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(from), 40000).String()
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ":")
		r.Header.Add(k, strings.TrimPrefix(v, " "))
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

const (
	fullAddr   = "192.0.2.10"
	ttlHeader  = "X-aws-ec2-metadata-token-ttl-seconds"
	tokHeader  = "X-aws-ec2-metadata-token"
	tokenPath  = "/latest/api/token"
	instanceID = "/latest/meta-data/instance-id"
)

func token(t testing.TB, h http.Handler, from string) string {
	t.Helper()
	w := ask(h, from, "PUT", tokenPath, ttlHeader+": 21600")
	if w.Code != 200 {
		t.Fatalf("PUT token: %d %s", w.Code, w.Body)
	}
	return w.Body.String()
}
