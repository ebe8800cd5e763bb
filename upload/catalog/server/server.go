// Package server runs a catalog's HTTP server: the EC2 Query API and, beside
// it, the page for people; connections, limits, TLS, the access log, metrics
// and health.
//
// What goes in: an [ec2api.Options] and where to listen. What comes out:
// answers until the context ends, then an orderly stop. It touches the
// listening sockets, the certificate's files and the log it is given, and tells
// systemd when it is ready.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/web"
)

// Options say how to run. API and a place to listen at are required.
type Options struct {
	API ec2api.Options // Report is set by Run
	Web *web.Options   // nil serves no page; Fault is set by Run
	// Listen are addresses, HOST:PORT.
	Listen []string
	// Activation takes systemd's sockets too, if it hands any over.
	Activation bool
	// TLSCert and TLSKey are files in PEM; "" serves plain HTTP. They are read
	// anew when they change.
	TLSCert, TLSKey string
	// Admin is where metrics and health are, "127.0.0.1:9256"; "" for nowhere.
	Admin string
	// AccessLog gets a line of JSON a request; nil for none.
	AccessLog io.Writer
	// Log gets what happens to the server itself.
	Log    zerolog.Logger
	Limits Limits
	// Ready is called once requests are served, with the addresses in the
	// order of Listen, systemd's after them.
	Ready func([]net.Addr)
}

// Limits bound what callers can take. The zero value of each is its default.
type Limits struct {
	Connections int           // at once, default 1024
	Header      time.Duration // for a request's header, default 5 s
	Read        time.Duration // for a request, default 30 s
	Write       time.Duration // for its answer, default 2 min
	Idle        time.Duration // between requests, default 60 s
	HeaderBytes int           // default 32,768: tokens are long
	Grace       time.Duration // to finish what is under way at the end, default 10 s
	Settle      time.Duration // between looks at what there is to do, default 15 s
}

func (l *Limits) complete() {
	for _, d := range []struct {
		at *time.Duration
		is time.Duration
	}{
		{&l.Header, 5 * time.Second},
		{&l.Read, 30 * time.Second},
		{&l.Write, 2 * time.Minute},
		{&l.Idle, time.Minute},
		{&l.Grace, 10 * time.Second},
		{&l.Settle, 15 * time.Second},
	} {
		if *d.at == 0 {
			*d.at = d.is
		}
	}
	if l.Connections == 0 {
		l.Connections = 1024
	}
	if l.HeaderBytes == 0 {
		l.HeaderBytes = 32 << 10
	}
}

// Run serves until ctx ends, then lets what is under way finish. It returns
// nil after an orderly end.
func Run(ctx context.Context, o Options) error {
	o.Limits.complete()
	m := newMetrics()
	access := accessLog{o.AccessLog, o.Log}
	o.API.Report = func(r *ec2api.Record) {
		m.request(r)
		access.request(r)
		if r.Err != nil && r.Status >= http.StatusInternalServerError {
			o.Log.Error().Err(r.Err).Str("id", r.ID).Str("action", r.Action).Str("account", r.Account).Msg("a request failed")
		}
	}
	api, err := ec2api.New(o.API)
	if err != nil {
		return err
	}
	var page http.Handler
	if o.Web != nil {
		w := *o.Web
		w.Fault = func(r *http.Request, err error) {
			o.Log.Error().Err(err).Str("path", r.URL.Path).Msg("a page could not be shown")
		}
		if page, err = web.New(w); err != nil {
			return err
		}
		page = access.pages(page)
	}
	lns, err := listen(ctx, &o)
	for _, ln := range lns {
		defer ln.Close() // a second close says only that it was the second
	}
	if err != nil {
		return err
	}
	l := o.Limits
	srv := serving.NewServer(route(api, page), serving.Limits{Header: l.Header, Read: l.Read, Write: l.Write, Idle: l.Idle, HeaderBytes: l.HeaderBytes}, o.Log)
	var crowd serving.Crowd[struct{}]
	admit := func(c net.Conn) net.Conn {
		if !crowd.Enter(struct{}{}, l.Connections, l.Connections) {
			m.turned.Inc()
			return nil
		}
		return serving.OnClose(c, func() { crowd.Leave(struct{}{}) })
	}
	var parts []serving.Part
	for _, ln := range lns {
		in := net.Listener(&serving.Gate{Listener: ln, Admit: admit})
		if o.TLSCert != "" {
			c, err := newCertificate(o.TLSCert, o.TLSKey)
			if err != nil {
				return err
			}
			in = tls.NewListener(in, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: c.get, NextProtos: []string{"http/1.1"}})
		}
		parts = append(parts, serving.Part{Server: srv, Listener: in})
	}
	if o.Admin != "" {
		p, err := admin(&o, m).Listen(ctx, o.Admin, o.Log)
		if err != nil {
			return err
		}
		parts = append(parts, p)
	}
	return serving.Run(ctx, serving.Options{
		Parts: parts, Grace: l.Grace, Notifier: serving.NewNotifier(o.Log), Status: "serving the catalog of " + o.API.Region,
		Beside: []func(context.Context) error{func(ctx context.Context) error {
			api.Work(ctx, l.Settle, func(err error) { o.Log.Error().Err(err).Msg("it is tried again") })
			return nil
		}},
		Ready: func() {
			addrs := make([]net.Addr, len(lns))
			for i, ln := range lns {
				addrs[i] = ln.Addr()
				o.Log.Info().Str("address", ln.Addr().String()).Str("region", o.API.Region).Bool("tls", o.TLSCert != "").Msg("serving the catalog")
			}
			if o.Ready != nil {
				o.Ready(addrs)
			}
		},
	})
}

// route tells requests of the API from those of people.
func route(api, page http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if page == nil || r.Method == http.MethodPost || r.Header.Get("Authorization") != "" ||
			strings.Contains(r.URL.RawQuery, "Action=") || strings.Contains(r.URL.RawQuery, "X-Amz-") {
			api.ServeHTTP(w, r)
			return
		}
		page.ServeHTTP(w, r)
	})
}

// listen opens the places to listen at, and takes those that systemd hands over:
// one of these that is named too is there already.
func listen(ctx context.Context, o *Options) (lns []net.Listener, err error) {
	var given []serving.Given
	if o.Activation {
		if given, err = serving.Activated("tcp", "unix"); err != nil {
			return nil, err
		}
	}
	for _, a := range o.Listen {
		if slices.ContainsFunc(given, func(g serving.Given) bool { return g.Addr().String() == a }) {
			continue
		}
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a)
		if err != nil {
			return append(lns, listeners(given)...), fmt.Errorf("listening at %s: %w", a, err)
		}
		lns = append(lns, ln)
	}
	lns = append(lns, listeners(given)...)
	if len(lns) == 0 {
		return nil, errors.New("catalog server: no place to listen at: give --listen 127.0.0.1:8773")
	}
	return lns, nil
}

func listeners(given []serving.Given) []net.Listener {
	lns := make([]net.Listener, len(given))
	for i, g := range given {
		lns[i] = g.Listener
	}
	return lns
}

// admin is what those who run the server are told. It is ready as long as the
// catalog can be read and is right.
func admin(o *Options, m *metrics) serving.Admin {
	return serving.Admin{
		Metrics: promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}),
		Ready:   func(ctx context.Context) error { _, err := o.API.Catalog.View(ctx); return err },
	}
}
