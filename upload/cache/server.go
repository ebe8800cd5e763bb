package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/upload"
)

// ServeOptions of [Serve]. A Cache and a listener are required.
type ServeOptions struct {
	Cache     *Cache
	Listeners []net.Listener // Serve closes them
	// Allow are the clients that are served, beside those of a unix socket and
	// this machine's own addresses 127.0.0.0/8 and ::1; nil: no others.
	Allow []netip.Prefix
	// Admin serves /metrics, /healthz and /readyz; nil: nobody does.
	Admin net.Listener
	// PerClient is how many connections one client address may have; 0: 256.
	// Clients of a unix socket are not told apart and have 4096 together.
	PerClient int
	AccessLog io.Writer // a line of JSON for each request; nil: none
	Log       zerolog.Logger
}

// Times and sizes of the server.
const (
	headerTime = 10 * time.Second
	idleTime   = 2 * time.Minute
	writeTime  = time.Minute // for each piece
	pieceSize  = 256 << 10
	graceTime  = 5 * time.Second
	unixMost   = 4096
)

// Serve hands the objects of a cache out by HTTP until ctx ends:
// GET and HEAD of /packs/HH/NAME and /index/HH/NAME, whole or by Range. With
// "Cache-Control: no-cache" what is kept is first compared with its name again.
// It returns nil after an orderly end.
func Serve(ctx context.Context, o ServeOptions) error {
	if o.Cache == nil || len(o.Listeners) == 0 {
		return errors.New("serve a cache: no cache, or no place to listen at")
	}
	if o.PerClient <= 0 {
		o.PerClient = 256
	}
	s := &server{o: o, metrics: newMetrics(o.Cache)}
	main := serving.NewServer(s, serving.Limits{Header: headerTime, Read: headerTime, Idle: idleTime, HeaderBytes: 16 << 10}, o.Log)
	var parts []serving.Part
	for _, l := range o.Listeners {
		// Requests end with the server: what they wait for may take a store's time.
		parts = append(parts, serving.Part{Server: main, Listener: &serving.Gate{Listener: l, Admit: s.admit}, EndRequests: true})
	}
	if o.Admin != nil {
		a := serving.Admin{Metrics: promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{})}
		parts = append(parts, a.Part(o.Admin, o.Log))
	}
	return serving.Run(ctx, serving.Options{
		Parts: parts, Grace: graceTime, Notifier: serving.NewNotifier(o.Log), Status: "serving the cache",
		Alive: func(context.Context) error { o.Cache.Stats(); return nil }, // takes the lock that everything takes
		Ready: func() {
			for _, l := range o.Listeners {
				o.Log.Info().Str("address", l.Addr().String()).Msg("serving the cache")
			}
		},
	})
}

type server struct {
	o       ServeOptions
	metrics *metrics
	logging sync.Mutex
	crowd   serving.Crowd[netip.Addr] // zero Addr: those of unix sockets
}

// ServeHTTP answers one request.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := &answer{start: time.Now(), w: w, control: http.NewResponseController(w)}
	defer func() {
		s.metrics.requests.WithLabelValues(strconv.Itoa(a.status)).Inc()
		s.metrics.sent.Add(float64(a.sent))
		s.log(r, a)
	}()
	s.answer(r, a)
	if a.broken {
		panic(http.ErrAbortHandler) // the client is to see that it is not all
	}
}

type answer struct {
	start   time.Time
	w       http.ResponseWriter
	control *http.ResponseController
	status  int
	sent    int64
	hit     bool
	broken  bool
	err     error
}

func (a *answer) refuse(status int, format string, args ...any) {
	a.status = status
	// A peer that is gone is found out by the write.
	_ = a.control.SetWriteDeadline(time.Now().Add(writeTime))
	http.Error(a.w, fmt.Sprintf(format, args...), status)
}

func (s *server) answer(r *http.Request, a *answer) {
	key, ok := strings.CutPrefix(r.URL.Path, "/")
	if _, err := parseKey(key); !ok || err != nil {
		a.refuse(http.StatusNotFound, "only packs/HH/NAME and index/HH/NAME are here: the rest is the store's")
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		a.w.Header().Set("Allow", "GET, HEAD")
		a.refuse(http.StatusMethodNotAllowed, "this cache is read only")
		return
	}
	if r.Header.Get("Cache-Control") == "no-cache" {
		s.o.Cache.Recheck(r.Context(), key)
	}
	ask := r.Header.Get("Range")
	// What is asked for of an object whose size is not known yet.
	off, length, whole := byteRange(ask, 1<<62)
	if whole || off > 1<<61 {
		off, length = 0, 0
	}
	if r.Method == http.MethodHead {
		off, length = 0, 1
	}
	o, err := s.o.Cache.Get(r.Context(), key, off, min(length, 1<<40))
	if err != nil {
		a.err = err
		switch {
		case r.Context().Err() != nil:
			a.refuse(http.StatusServiceUnavailable, "the cache stops, or nobody waits any more")
		case errors.Is(err, upload.ErrNotExist):
			a.refuse(http.StatusNotFound, "the store has no such object")
		default:
			a.refuse(http.StatusBadGateway, "the store: %v", err)
		}
		return
	}
	defer o.Close()
	a.hit = o.Hit()
	off, length, whole = byteRange(ask, o.Size())
	h := a.w.Header()
	h.Set("Accept-Ranges", "bytes")
	if !whole && length == 0 {
		h.Set("Content-Range", fmt.Sprintf("bytes */%d", o.Size()))
		a.refuse(http.StatusRequestedRangeNotSatisfiable, "the object has %d bytes", o.Size())
		return
	}
	_, name, _ := strings.Cut(strings.TrimPrefix(key, "packs/"), "/")
	h.Set("ETag", `"`+name+`"`)
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Cache-Control", "immutable")
	h.Set("Content-Length", strconv.FormatInt(length, 10))
	a.status = http.StatusOK
	if !whole {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+length-1, o.Size()))
		a.status = http.StatusPartialContent
	}
	if r.Method == http.MethodHead {
		a.w.WriteHeader(a.status)
		return
	}
	s.send(r.Context(), a, o, off, length)
}

// send writes the bytes as they come.
func (s *server) send(ctx context.Context, a *answer, o *Object, off, length int64) {
	buf := make([]byte, min(pieceSize, length))
	for begun := false; length > 0; {
		p := buf[:min(int64(len(buf)), length)]
		if _, err := o.ReadAt(ctx, p, off); err != nil {
			a.err = err
			if !begun {
				for _, name := range []string{"Content-Length", "Content-Range", "ETag", "Cache-Control"} {
					a.w.Header().Del(name)
				}
				a.refuse(http.StatusBadGateway, "the store: %v", err)
				return
			}
			a.broken = true
			return
		}
		if !begun {
			a.w.WriteHeader(a.status)
			begun = true
		}
		// A client that does not read is cut off.
		_ = a.control.SetWriteDeadline(time.Now().Add(writeTime))
		n, err := a.w.Write(p)
		a.sent += int64(n)
		if err != nil {
			a.err, a.broken = err, true
			return
		}
		off, length = off+int64(len(p)), length-int64(len(p))
	}
}

// log writes a line about a request.
func (s *server) log(r *http.Request, a *answer) {
	if s.o.AccessLog == nil {
		return
	}
	line := struct {
		Time   string  `json:"time"`
		Client string  `json:"client"`
		Method string  `json:"method"`
		Path   string  `json:"path"`
		Range  string  `json:"range,omitempty"`
		Status int     `json:"status"`
		Bytes  int64   `json:"bytes"`
		Hit    bool    `json:"hit"`
		Millis float64 `json:"ms"`
		Error  string  `json:"error,omitempty"`
	}{
		a.start.UTC().Format("2006-01-02T15:04:05.000Z"), r.RemoteAddr, r.Method, cut(r.URL.Path), cut(r.Header.Get("Range")), a.status, a.sent, a.hit,
		float64(time.Since(a.start).Microseconds()) / 1000, "",
	}
	if a.err != nil {
		line.Error = cut(a.err.Error())
	}
	b, err := json.Marshal(line)
	if err != nil {
		return // there is nothing in it that could fail
	}
	s.logging.Lock()
	defer s.logging.Unlock()
	if _, err := s.o.AccessLog.Write(append(b, '\n')); err != nil {
		s.metrics.lost.Inc()
	}
}

// cut keeps a log's lines from growing without end.
func cut(s string) string { return s[:min(len(s), 300)] }

// Allowed tells whether a client at an address is served.
func Allowed(allow []netip.Prefix, a netip.Addr) bool {
	return a.IsLoopback() || slices.ContainsFunc(allow, func(p netip.Prefix) bool { return p.Contains(a) })
}

// admit lets in who may have a connection, or another one.
func (s *server) admit(c net.Conn) net.Conn {
	var from netip.Addr
	most := unixMost
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		from, most = t.AddrPort().Addr().Unmap().WithZone(""), s.o.PerClient
		if !Allowed(s.o.Allow, from) {
			s.metrics.refused.Inc()
			return nil
		}
	}
	if !s.crowd.Enter(from, most, math.MaxInt) {
		s.metrics.refused.Inc()
		return nil
	}
	return serving.OnClose(c, func() { s.crowd.Leave(from) })
}
