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
	"log"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

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
	group, gctx := errgroup.WithContext(ctx)
	srv := httpServer(&o, route(api, page))
	servers := []*http.Server{srv}
	serve := func(s *http.Server, ln net.Listener) {
		group.Go(func() error {
			if err := s.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serving at %s: %w", ln.Addr(), err)
			}
			return nil
		})
	}
	slots := make(chan struct{}, o.Limits.Connections)
	for _, ln := range lns {
		ln = &limited{Listener: ln, slots: slots, refused: m.turned.Inc}
		if o.TLSCert != "" {
			c, err := newCertificate(o.TLSCert, o.TLSKey)
			if err != nil {
				return err
			}
			ln = tls.NewListener(ln, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: c.get, NextProtos: []string{"http/1.1"}})
		}
		serve(srv, ln)
	}
	if o.Admin != "" {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.Admin)
		if err != nil {
			return fmt.Errorf("listening at %s for metrics and health: %w", o.Admin, err)
		}
		defer ln.Close()
		s := httpServer(&o, admin(&o, m))
		servers = append(servers, s)
		serve(s, ln)
	}
	group.Go(func() error {
		api.Work(gctx, o.Limits.Settle, func(err error) { o.Log.Error().Err(err).Msg("it is tried again") })
		return nil
	})
	group.Go(func() error { return watchdog(gctx, &o) })
	group.Go(func() error {
		<-gctx.Done()
		notify(&o, daemon.SdNotifyStopping)
		return stop(servers, o.Limits.Grace)
	})
	addrs := make([]net.Addr, len(lns))
	for i, ln := range lns {
		addrs[i] = ln.Addr()
		o.Log.Info().Str("address", ln.Addr().String()).Str("region", o.API.Region).Bool("tls", o.TLSCert != "").Msg("serving the catalog")
	}
	notify(&o, daemon.SdNotifyReady+"\nSTATUS=serving the catalog of "+o.API.Region)
	if o.Ready != nil {
		o.Ready(addrs)
	}
	return group.Wait()
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

func httpServer(o *Options, h http.Handler) *http.Server {
	l := o.Limits
	var p http.Protocols
	p.SetHTTP1(true)
	return &http.Server{
		Handler: h, Protocols: &p, DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout: l.Header, ReadTimeout: l.Read, WriteTimeout: l.Write, IdleTimeout: l.Idle,
		MaxHeaderBytes: l.HeaderBytes, ErrorLog: log.New(httpErrors{o.Log}, "", 0),
	}
}

// listen opens the places to listen at.
func listen(ctx context.Context, o *Options) (lns []net.Listener, err error) {
	for _, a := range o.Listen {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a)
		if err != nil {
			return lns, fmt.Errorf("listening at %s: %w", a, err)
		}
		lns = append(lns, ln)
	}
	if o.Activation {
		given, err := activation.Listeners()
		if err != nil {
			return lns, fmt.Errorf("taking systemd's sockets: %w", err)
		}
		lns = append(lns, given...)
	}
	if len(lns) == 0 {
		return nil, errors.New("catalog server: no place to listen at: give --listen 127.0.0.1:8773")
	}
	return lns, nil
}

// admin serves metrics and health.
func admin(o *Options, m *metrics) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	// Ready, as long as the catalog can be read and is right.
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		if _, err := o.API.Catalog.View(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// notify tells systemd, where there is one.
func notify(o *Options, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		o.Log.Warn().Err(err).Msg("telling systemd")
	}
}

// watchdog keeps systemd's watchdog quiet.
func watchdog(ctx context.Context, o *Options) error {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return err
	}
	tick := time.NewTicker(every / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			notify(o, daemon.SdNotifyWatchdog)
		}
	}
}

func stop(servers []*http.Server, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	var group errgroup.Group
	for _, s := range servers {
		group.Go(func() error {
			if err := s.Shutdown(ctx); err != nil {
				return s.Close() // the grace is over: whoever is left is cut off
			}
			return nil
		})
	}
	return group.Wait()
}
