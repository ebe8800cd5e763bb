package boot_test

import (
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

// proxy is an HTTP proxy, for plain requests and tunnels. hold, if not nil, is
// called before each.
type proxy struct {
	hold  func(n int32)
	count atomic.Int32
	bytes atomic.Int64 // to the client
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := p.count.Add(1)
	if p.hold != nil {
		p.hold(n)
	}
	if r.Method == http.MethodConnect {
		p.tunnel(w, r)
		return
	}
	out, err := http.NewRequestWithContext(r.Context(), r.Method, r.URL.String(), r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	out.Header = r.Header
	res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(out)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer res.Body.Close()
	w.WriteHeader(res.StatusCode)
	k, _ := io.Copy(w, res.Body)
	p.bytes.Add(k)
}

func (p *proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	there, err := net.DialTimeout("tcp", r.URL.Host, 10*time.Second)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer there.Close()
	here, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer here.Close()
	if _, err := io.WriteString(here, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	go func() {
		io.Copy(there, here)
		there.Close()
	}()
	k, _ := io.Copy(here, there)
	p.bytes.Add(k)
}

// serve returns the proxy's port.
func (p *proxy) serve(t testing.TB) int { return port(t, "127.0.0.1:0", p) }
