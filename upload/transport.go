package upload

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// newTransport tunes a transport for many parallel bodies: HTTP/1.1, since one
// HTTP/2 connection is slower than several, and connections kept for reuse.
func newTransport(base *http.Transport, t Timeouts) *http.Transport {
	tr := base.Clone()
	d := &net.Dialer{Timeout: t.Connect, KeepAlive: 30 * time.Second}
	tr.DialContext = d.DialContext
	tr.TLSHandshakeTimeout = t.Connect
	tr.MaxIdleConns = 64
	tr.MaxIdleConnsPerHost = 64
	tr.IdleConnTimeout = 60 * time.Second
	tr.ExpectContinueTimeout = time.Second
	tr.DisableCompression = true // bodies are bytes, never to be decoded on the way
	tr.WriteBufferSize = 64 << 10
	tr.ReadBufferSize = 64 << 10
	tr.ForceAttemptHTTP2 = false
	tr.Protocols = new(http.Protocols)
	tr.Protocols.SetHTTP1(true)
	tr.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	if tr.TLSClientConfig != nil {
		tr.TLSClientConfig.NextProtos = nil
	}
	return tr
}

func checkEndpoint(e string) error {
	if e == "" {
		return nil
	}
	u, err := url.Parse(e)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return fmt.Errorf("endpoint %q: want a URL such as https://minio.example:9000", e)
	}
	if u.User != nil {
		return errors.New("endpoint: a URL with a user name or password in it is not accepted; credentials have options of their own")
	}
	return nil
}

// errStalled is the cause of a request given up because nothing moved.
var errStalled = errors.New("transfer stalled")

// guard is a RoundTripper that gives up requests which do not move, limits the
// rate of bodies and notes who answers.
type guard struct {
	next   http.RoundTripper
	limits Timeouts
	rate   *rate.Limiter
	note   *serverNote

	noExpect atomic.Bool // something on the way refuses "Expect: 100-continue"
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	w := &watch{limits: g.limits, cancel: cancel}
	req = req.WithContext(ctx)
	if g.noExpect.Load() && req.Header.Get("Expect") != "" {
		req.Header = req.Header.Clone()
		req.Header.Del("Expect") // not signed
	}
	if req.Body != nil && req.Body != http.NoBody {
		w.start(g.limits.Stall, false)
		req.Body = &sendBody{g: g, w: w, ctx: ctx, r: req.Body, left: req.ContentLength}
	} else {
		w.start(g.limits.Reply, true)
	}
	resp, err := g.next.RoundTrip(req)
	w.stop()
	if err != nil {
		err = w.explain(ctx, err)
		cancel(nil)
		return nil, err
	}
	g.note.saw(resp)
	if resp.StatusCode == http.StatusExpectationFailed {
		g.noExpect.Store(true)
	}
	resp.Body = &recvBody{g: g, w: w, ctx: ctx, r: resp.Body}
	return resp, nil
}

// CloseIdleConnections lets http.Client find it.
func (g *guard) CloseIdleConnections() {
	if c, ok := g.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// watch cancels a request when too few bytes move while somebody waits.
// It is paused while nobody does: a slow consumer is no slow server.
type watch struct {
	limits Timeouts
	cancel context.CancelCauseFunc

	mu     sync.Mutex
	timer  *time.Timer   // nil while paused
	since  time.Time     // when it was armed
	budget time.Duration // waiting left for MinBytes to move
	moved  int64

	waiting bool // for the reply: everything is sent
}

// start arms the watch with a fresh budget; waiting is for the reply, not for bytes.
func (w *watch) start(d time.Duration, waiting bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disarm()
	w.budget, w.moved, w.waiting = d, 0, waiting
	w.arm()
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disarm()
}

func (w *watch) resume() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disarm()
	w.arm()
}

// progress counts bytes, and renews the budget when enough have moved.
func (w *watch) progress(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.moved += int64(n)
	if w.moved >= w.limits.MinBytes {
		armed := w.timer != nil
		w.disarm()
		w.budget, w.moved = w.limits.Stall, 0
		if armed {
			w.arm()
		}
	}
}

func (w *watch) arm() {
	w.since = time.Now()
	w.timer = time.AfterFunc(max(w.budget, 0), func() { w.cancel(errStalled) })
}

func (w *watch) disarm() {
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
		w.budget -= time.Since(w.since)
	}
}

// explain replaces "context canceled" by the watch's verdict.
func (w *watch) explain(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStalled) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.waiting {
			return fmt.Errorf("%w: no reply for %v", errStalled, w.limits.Reply)
		}
		return fmt.Errorf("%w: fewer than %d bytes in %v", errStalled, w.limits.MinBytes, w.limits.Stall)
	}
	return err
}

// limit waits until n more bytes may pass.
func (g *guard) limit(ctx context.Context, p []byte) ([]byte, error) {
	if g.rate == nil || len(p) == 0 {
		return p, nil
	}
	if b := g.rate.Burst(); len(p) > b && b > 0 {
		p = p[:b]
	}
	return p, g.rate.WaitN(ctx, len(p))
}

// sendBody is a request's body. The watch runs between Reads, when the
// connection has bytes to send, and not during them.
type sendBody struct {
	g    *guard
	w    *watch
	ctx  context.Context
	r    io.ReadCloser
	left int64
}

func (b *sendBody) Read(p []byte) (int, error) {
	b.w.stop()
	p, err := b.g.limit(b.ctx, p)
	if err != nil {
		return 0, err
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	if err != nil || b.left <= 0 {
		b.w.start(b.g.limits.Reply, true)
	} else {
		b.w.progress(n)
		b.w.resume()
	}
	return n, err
}

func (b *sendBody) Close() error { return b.r.Close() }

// recvBody is a reply's body. The watch runs during Reads.
type recvBody struct {
	g   *guard
	w   *watch
	ctx context.Context
	r   io.ReadCloser
	on  bool
}

func (b *recvBody) Read(p []byte) (int, error) {
	p, err := b.g.limit(b.ctx, p)
	if err != nil {
		return 0, err
	}
	if b.on {
		b.w.resume()
	} else {
		b.w.start(b.g.limits.Stall, false)
		b.on = true
	}
	n, err := b.r.Read(p)
	b.w.progress(n)
	b.w.stop()
	if err != nil && err != io.EOF {
		err = b.w.explain(b.ctx, err)
	}
	return n, err
}

func (b *recvBody) Close() error {
	b.w.stop()
	err := b.r.Close()
	b.w.cancel(nil)
	return err
}

// serverNote remembers what the last reply's headers said of the server.
type serverNote struct {
	mu     sync.Mutex
	server string
	date   time.Time
	seen   time.Time // local time of that reply
}

func (s *serverNote) saw(r *http.Response) {
	d, err := http.ParseTime(r.Header.Get("Date"))
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := r.Header.Get("Server"); v != "" {
		s.server = v
	}
	if err == nil {
		s.date, s.seen = d, time.Now()
	}
}

func (s *serverNote) get() (server string, date, seen time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server, s.date, s.seen
}
