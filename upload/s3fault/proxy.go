// Package s3fault is an HTTP proxy that stands before an S3 server and lets
// chosen requests go wrong, for tests. What goes in: a server's URL and a rule
// that picks a [Fault] for each request; what comes out: the proxy's own URL
// and a log of what was asked. It listens on loopback and connects to nothing
// but the server.
package s3fault

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"
)

// Request is one line of the log.
type Request struct {
	Index  int // from 0, in order of arrival since the last Plan
	Method string
	Path   string
	Query  string
	Range  string // the Range header
	Fault  Fault
}

// String is "3 PUT /bucket/key?partNumber=1 lost-reply".
func (r Request) String() string {
	s := fmt.Sprintf("%d %s %s", r.Index, r.Method, r.Path)
	if r.Query != "" {
		s += "?" + r.Query
	}
	if r.Range != "" {
		s += " " + r.Range
	}
	return strings.TrimSpace(s + " " + string(r.Fault))
}

// Rule picks the fault of a request; it is called once for each, never
// concurrently.
type Rule func(r Request) Fault

// At is the rule that lets the request of one index go wrong.
func At(index int, f Fault) Rule {
	return func(r Request) Fault {
		if r.Index == index {
			return f
		}
		return None
	}
}

// Always is the rule that lets every request go wrong.
func Always(f Fault) Rule { return func(Request) Fault { return f } }

// Proxy stands before a server.
type Proxy struct {
	URL       string // where it listens
	Elsewhere string // where redirects point: a server that only counts

	target string
	server *httptest.Server
	other  *httptest.Server
	client *http.Transport
	quit   context.Context
	stop   context.CancelFunc

	mu    sync.Mutex // covers what follows
	rule  Rule
	log   []Request
	stray []string
}

// New starts a proxy before the server at target ("http://127.0.0.1:9000").
func New(target string) *Proxy {
	p := &Proxy{target: strings.TrimRight(target, "/"), client: &http.Transport{DisableCompression: true, Proxy: nil}}
	p.quit, p.stop = context.WithCancel(context.Background())
	p.server = httptest.NewServer(p)
	p.other = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.stray = append(p.stray, fmt.Sprintf("%s %s Authorization=%q token=%q", r.Method, r.URL.Path, r.Header.Get("Authorization"), r.Header.Get("X-Amz-Security-Token")))
		w.WriteHeader(http.StatusOK)
	}))
	p.URL, p.Elsewhere = p.server.URL, p.other.URL
	return p
}

// Close stops it, with the requests that stall.
func (p *Proxy) Close() {
	p.stop()
	p.server.CloseClientConnections()
	p.server.Close()
	p.other.Close()
	p.client.CloseIdleConnections()
}

// Plan sets the rule for the requests to come and empties the log.
func (p *Proxy) Plan(r Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rule, p.log = r, nil
}

// Log is what was asked since the last Plan.
func (p *Proxy) Log() []Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Request(nil), p.log...)
}

// Fired counts the faults since the last Plan.
func (p *Proxy) Fired() int {
	n := 0
	for _, r := range p.Log() {
		if r.Fault != None {
			n++
		}
	}
	return n
}

// Stray lists the requests that followed a redirect to the other host.
func (p *Proxy) Stray() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.stray...)
}

func (p *Proxy) note(r *http.Request) Fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := Request{Index: len(p.log), Method: r.Method, Path: r.URL.Path, Query: r.URL.RawQuery, Range: r.Header.Get("Range")}
	if p.rule != nil {
		q.Fault = p.rule(q)
	}
	p.log = append(p.log, q)
	return q.Fault
}

// ServeHTTP makes the fault happen.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f := p.note(r)
	if f == ResetRequest && r.ContentLength > 0 {
		io.CopyN(io.Discard, r.Body, r.ContentLength/2)
	}
	if f == RefuseExpect && r.Header.Get("Expect") == "" {
		f = None
	}
	var body []byte
	if f != ResetFirst && f != ResetRequest && f != StallRequest && f != RefuseExpect {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			return // the client has gone
		}
	}
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	switch f {
	case ResetFirst, ResetRequest:
		reset(conn)
		return
	case StallRequest:
		p.hang(conn)
		return
	}
	rep := p.instead(f, r)
	if f.Applied() {
		if rep, err = p.forward(r, body); err != nil {
			rep = errorReply(502, "BadGateway", err.Error())
		}
		rep = f.damage(rep)
	}
	switch f {
	case LostReply:
		reset(conn)
		return
	case StallReply:
		p.hang(conn)
		return
	}
	p.send(conn, f, r.Method, rep)
}

// forward asks the server. The Host header stays the proxy's: it is signed.
func (p *Proxy) forward(r *http.Request, body []byte) (*reply, error) {
	req, err := http.NewRequestWithContext(p.quit, r.Method, p.target+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = r.Header.Clone()
	req.Header.Del("Expect")
	req.Host = r.Host
	req.ContentLength = int64(len(body))
	res, err := p.client.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	n := len(b)
	if r.Method == http.MethodHead && res.ContentLength >= 0 {
		n = int(res.ContentLength)
	}
	return &reply{status: res.StatusCode, header: res.Header, body: b, length: n}, nil
}

// send writes a reply by hand, so that it can be wrong.
func (p *Proxy) send(conn net.Conn, f Fault, method string, r *reply) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", r.status, http.StatusText(r.status))
	h := r.header.Clone()
	h.Set("Connection", "close")
	h.Del("Transfer-Encoding")
	h.Del("Content-Length")
	body := r.body
	switch {
	case r.length < 0 && method != http.MethodHead:
		h.Set("Transfer-Encoding", "chunked")
		body = []byte(fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body))
		if len(r.body) == 0 {
			body = []byte("0\r\n\r\n")
		}
	case r.length >= 0:
		h.Set("Content-Length", fmt.Sprint(r.length))
	}
	h.Write(&b)
	b.WriteString("\r\n")
	head := bytes.Clone(b.Bytes())
	conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
	conn.Write(head)
	if method == http.MethodHead {
		body = nil
	}
	switch f {
	case ResetHeaders:
		reset(conn)
	case ResetBody:
		conn.Write(body[:len(body)/2])
		reset(conn)
	case Truncated:
		conn.Write(body[:len(body)/2])
	case StallBody:
		conn.Write(body[:len(body)/2])
		p.hang(conn)
	case Trickle:
		for i := range body {
			if _, err := conn.Write(body[i : i+1]); err != nil {
				return
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-p.quit.Done():
				return
			}
		}
	case Duplicated:
		conn.Write(body)
		conn.Write(head)
		conn.Write(body)
	default:
		conn.Write(body)
	}
}

// hang keeps a connection open, silent, until the client gives up.
func (p *Proxy) hang(conn net.Conn) {
	stop := context.AfterFunc(p.quit, func() { conn.Close() })
	defer stop()
	// A client that stops sending is not seen until it closes; one that has
	// a body to send is not read from, so that it stalls.
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		<-p.quit.Done()
		return
	}
	for p.quit.Err() == nil && alive(tcp) {
		time.Sleep(5 * time.Millisecond)
	}
}

func reset(conn net.Conn) {
	if t, ok := conn.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	conn.Close()
}
