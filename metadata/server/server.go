package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/metadata"
)

// Options say how to run. A place to listen at and Metadata.Source are required.
type Options struct {
	// Metadata is what the handler serves. Run sets Reporter, and
	// Neighbours if it is nil.
	Metadata metadata.Options
	Listen   []Listen
	// Activation takes systemd's sockets too, if it hands any over.
	Activation bool
	// Admin is where metrics and health are, "127.0.0.1:9254"; "" for nowhere.
	Admin string
	// Control is the control socket's path; "" for none.
	Control string
	// Reload reads the records anew; nil if the source cannot.
	Reload func() error
	// Watch reloads by itself until ctx ends, and calls after each time.
	Watch func(ctx context.Context, after func(error)) error
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
	Connections int           // at once, default 16,384
	PerInstance int           // at once of one instance, default 64
	Strangers   int           // at once of all callers that are no instance, default 256
	Header      time.Duration // for a request's header, default 5 s
	Read        time.Duration // for a request, default as Header
	Write       time.Duration // for its answer, default 30 s
	Idle        time.Duration // between requests, default 60 s
	HeaderBytes int           // default 16,384
	Grace       time.Duration // to finish what is under way at the end, default 5 s
}

func (l *Limits) complete() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	setInt := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	setInt(&l.Connections, 16384)
	setInt(&l.PerInstance, 64)
	setInt(&l.Strangers, 256)
	set(&l.Header, 5*time.Second)
	set(&l.Read, l.Header)
	set(&l.Write, 30*time.Second)
	set(&l.Idle, time.Minute)
	setInt(&l.HeaderBytes, 16384)
	set(&l.Grace, 5*time.Second)
}

// running is a server at work.
type running struct {
	o       Options
	state   metadata.State
	metrics *metrics
	notify  *serving.Notifier
	started time.Time
	specs   []Listen
	last    reloadResult
}

// Run serves until ctx ends, then lets what is under way finish. It returns
// nil after an orderly end.
func Run(ctx context.Context, o Options) (err error) {
	o.Limits.complete()
	if o.Metadata.Source == nil {
		return errors.New("metadata server: no source of instances")
	}
	if o.Metadata.State == nil {
		o.Metadata.State = metadata.NewState()
	}
	if o.Metadata.Neighbours == nil {
		o.Metadata.Neighbours = Neighbours()
	}
	r := &running{o: o, state: o.Metadata.State, notify: serving.NewNotifier(o.Log), started: time.Now()}
	r.metrics = newMetrics(func() int { return o.Metadata.Source.Instances().Len() })
	tell := reporters{r.metrics}
	var access *logBuffer
	if o.AccessLog != nil {
		access = newLogBuffer(o.AccessLog, func(err error) {
			o.Log.Error().Err(err).Msg("the access log cannot be written: lines are lost")
		})
		tell = append(tell, &accessLog{out: access})
	}
	r.o.Metadata.Reporter = tell
	handler, err := metadata.New(r.o.Metadata)
	if err != nil {
		return err
	}

	var open []io.Closer
	defer func() {
		for _, c := range open {
			c.Close() // a second close says only that it was the second
		}
	}()
	lns, specs, err := r.listeners(ctx)
	for _, ln := range lns {
		open = append(open, ln)
	}
	if err != nil {
		return err
	}
	r.specs = specs
	var parts []serving.Part // beside the listeners
	if o.Admin != "" {
		p, err := r.admin().Listen(ctx, o.Admin, o.Log)
		if err != nil {
			return err
		}
		open, parts = append(open, p.Listener), append(parts, p)
	}
	if o.Control != "" {
		ln, err := listenControl(ctx, o.Control)
		if err != nil {
			return err
		}
		open, parts = append(open, ln), append(parts, serving.Part{Server: r.httpServer(r.controlHandler()), Listener: ln})
	}

	// The log and the helpers outlive ctx until the last answer is given.
	tail, stopTail := context.WithCancel(context.WithoutCancel(ctx))
	var tailGroup errgroup.Group
	if access != nil {
		tailGroup.Go(func() error { return access.run(tail) })
	}
	defer func() {
		stopTail()
		if terr := tailGroup.Wait(); terr != nil {
			err = errors.Join(err, fmt.Errorf("writing the access log: %w", terr))
		}
	}()

	g := &gate{
		total: o.Limits.Connections, each: o.Limits.PerInstance, strangers: o.Limits.Strangers, refused: r.metrics.turned.Inc,
		owner: func(from netip.Addr, l *Listen) string { return handler.Owner(from, l.Name, l.Interface) },
	}
	w := newWatch(o.Limits.Write)
	tailGroup.Go(func() error { w.run(tail); return nil })
	srv := r.httpServer(patient(handler))
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		k, ok := c.(*counted)
		if !ok {
			return ctx
		}
		return metadata.ConnContext(context.WithValue(ctx, countedKey{}, k), c, k.spec.Name, k.spec.Interface)
	}
	srv.WriteTimeout = 0 // the connections see to that
	for i, ln := range lns {
		in := &serving.Gate{Listener: ln, Admit: func(c net.Conn) net.Conn { return g.admit(c, &specs[i], w) }}
		parts = append(parts, serving.Part{Server: srv, Listener: in})
	}
	var beside []func(context.Context) error
	if o.Watch != nil {
		beside = append(beside, func(ctx context.Context) error { return o.Watch(ctx, r.reloaded) })
	}
	return serving.Run(ctx, serving.Options{
		Parts: parts, Beside: beside, Grace: o.Limits.Grace, Notifier: r.notify, Status: r.doing(),
		Alive: func(context.Context) error { o.Metadata.Source.Instances(); return nil }, // takes the source's lock, if it has one
		Ready: func() { r.ready(lns) },
	})
}

// doing says what the server does, in a line.
func (r *running) doing() string {
	return fmt.Sprintf("serving %d instances", r.o.Metadata.Source.Instances().Len())
}

func (r *running) listeners(ctx context.Context) ([]net.Listener, []Listen, error) {
	var given []net.Listener
	var givenSpecs []Listen
	if r.o.Activation {
		var err error
		if given, givenSpecs, err = activated(); err != nil {
			return given, nil, err
		}
	}
	var lns []net.Listener
	var specs []Listen
	for _, l := range r.o.Listen {
		// The service's --listen and the socket's ListenStream may name the
		// same place: the socket is there already.
		if slices.ContainsFunc(givenSpecs, func(g Listen) bool { return g.Address == l.Address && g.Interface == l.Interface }) {
			continue
		}
		ln, err := l.open(ctx)
		if err != nil {
			return append(lns, given...), nil, err
		}
		lns, specs = append(lns, ln), append(specs, l)
	}
	lns, specs = append(lns, given...), append(specs, givenSpecs...)
	if len(lns) == 0 {
		return nil, nil, errors.New("metadata server: no place to listen at: give --listen 169.254.169.254:80")
	}
	return lns, specs, nil
}

func (r *running) httpServer(h http.Handler) *http.Server {
	l := r.o.Limits
	return serving.NewServer(h, serving.Limits{Header: l.Header, Read: l.Read, Write: l.Write, Idle: l.Idle, HeaderBytes: l.HeaderBytes}, r.o.Log)
}

// ready says where requests are served.
func (r *running) ready(lns []net.Listener) {
	addrs := make([]net.Addr, len(lns))
	for i, ln := range lns {
		addrs[i] = ln.Addr()
		r.o.Log.Info().Str("listener", r.specs[i].Name).Str("address", ln.Addr().String()).
			Str("interface", r.specs[i].Interface).Msg("serving instance metadata")
	}
	if r.o.Ready != nil {
		r.o.Ready(addrs)
	}
}

// admin is what those who run the server are told. It is alive whatever the
// records: restarting would not mend those.
func (r *running) admin() serving.Admin {
	return serving.Admin{
		Metrics: promhttp.HandlerFor(r.metrics.registry, promhttp.HandlerOpts{}),
		Ready: func(context.Context) error {
			if _, err := r.last.get(); err != nil { // old records are served
				return errors.New("the last reload failed; 'instar metadata ctl status' says why")
			}
			return nil
		},
	}
}

// reloaded notes the result of a reload.
func (r *running) reloaded(err error) {
	r.last.set(err)
	r.metrics.reloaded(err)
	n := r.o.Metadata.Source.Instances().Len()
	if err != nil {
		r.o.Log.Error().Err(err).Int("instances", n).Msg("the records were not reloaded: those of before are served")
		return
	}
	r.notify.Status(r.doing())
	r.o.Log.Info().Int("instances", n).Msg("records reloaded")
}
