package metadata

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

// BenchmarkHandler is a request with a token and a rate limit, without HTTP.
func BenchmarkHandler(b *testing.B) {
	h := newHandler(b, Options{Rate: 1e9}, small("i-0abc1234def567890", fullAddr))
	r := httptest.NewRequest("GET", instanceID, nil)
	r.Host, r.RemoteAddr = "169.254.169.254", fullAddr+":1"
	r.Header.Set(tokHeader, token(b, h, fullAddr))
	b.ReportAllocs()
	w := &sink{header: make(http.Header)}
	for b.Loop() {
		clear(w.header)
		w.body = w.body[:0]
		h.ServeHTTP(w, r)
	}
	if w.status != 200 {
		b.Fatal(w.status)
	}
}
