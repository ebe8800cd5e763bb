package serving

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/rs/zerolog"
)

// Limits bound what one connection can take. A time of 0 has no bound.
type Limits struct {
	Header      time.Duration // for a request's header
	Read        time.Duration // for a request
	Write       time.Duration // for its answer
	Idle        time.Duration // between requests
	HeaderBytes int
}

// NewServer makes a server of a handler: HTTP/1.1 alone, nothing answered past
// the handler, and what net/http has to say in the log.
func NewServer(h http.Handler, l Limits, log zerolog.Logger) *http.Server {
	var p http.Protocols
	p.SetHTTP1(true)
	return &http.Server{
		Handler: h, Protocols: &p, DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout: l.Header, ReadTimeout: l.Read, WriteTimeout: l.Write, IdleTimeout: l.Idle,
		MaxHeaderBytes: l.HeaderBytes, ErrorLog: stdLog(log),
	}
}

func stdLog(l zerolog.Logger) *log.Logger { return log.New(remarks{l}, "", 0) }

// remarks are net/http's own.
type remarks struct{ log zerolog.Logger }

// Write takes one remark. Handshakes fail whenever somebody tries the port:
// they are nobody's concern, and there may be many.
func (r remarks) Write(p []byte) (int, error) {
	e := r.log.Warn()
	if bytes.HasPrefix(p, []byte("http: TLS handshake error")) {
		e = r.log.Debug()
	}
	e.Msg(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// Admin is what a server tells those who run it.
type Admin struct {
	Metrics http.Handler
	// Health says whether it is alive, that is, whether restarting it would
	// help; nil: it is, if it answers.
	Health http.Handler
	// Ready says why requests had better go elsewhere; nil: never.
	Ready func(context.Context) error
}

// readyWithin bounds an answer to whether a server is ready.
const readyWithin = 5 * time.Second

// Listen makes a part that serves /metrics, /healthz and /readyz at an address,
// "HOST:PORT".
func (a Admin) Listen(ctx context.Context, address string, log zerolog.Logger) (Part, error) {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return Part{}, fmt.Errorf("listening at %s for metrics and health: %w", address, err)
	}
	return a.Part(ln, log), nil
}

// Part serves the same by a listener that is there.
func (a Admin) Part(ln net.Listener, log zerolog.Logger) Part {
	l := Limits{Header: 10 * time.Second, Read: 10 * time.Second, Write: 30 * time.Second, Idle: time.Minute, HeaderBytes: 16 << 10}
	return Part{Server: NewServer(a.handler(), l, log), Listener: ln}
}

func (a Admin) handler() http.Handler {
	ok := func(w http.ResponseWriter) { fmt.Fprintln(w, "ok") }
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.Metrics)
	if a.Health != nil {
		mux.Handle("GET /healthz", a.Health)
	} else {
		mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { ok(w) })
	}
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if a.Ready != nil {
			ctx, cancel := context.WithTimeout(r.Context(), readyWithin)
			defer cancel()
			if err := a.Ready(ctx); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		ok(w)
	})
	return mux
}
