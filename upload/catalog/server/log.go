package server

import (
	"encoding/json"
	"io"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/rs/zerolog"

	"github.com/instar-image/instar/upload/catalog/ec2api"
)

// accessLog writes a line of JSON for every request.
type accessLog struct {
	out io.Writer
	log zerolog.Logger
}

// line is one request. It holds no secret and nothing of a request's parameters
// but its action.
type line struct {
	Time    string `json:"time"`
	ID      string `json:"id,omitempty"`
	From    string `json:"from"`
	Account string `json:"account,omitempty"`
	Key     string `json:"key,omitempty"`
	Action  string `json:"action,omitempty"`
	Path    string `json:"path,omitempty"`
	Status  int    `json:"status"`
	Code    string `json:"code,omitempty"`
	Bytes   int    `json:"bytes"`
	Micros  int64  `json:"us"`
}

func (a *accessLog) write(l *line) {
	if a.out == nil {
		return
	}
	b, err := json.Marshal(l)
	if err == nil {
		_, err = a.out.Write(append(b, '\n'))
	}
	if err != nil {
		a.log.Error().Err(err).Msg("the access log cannot be written: lines are lost")
	}
}

func (a *accessLog) request(r *ec2api.Record) {
	a.write(&line{
		Time: r.Start.UTC().Format(time.RFC3339Nano), ID: r.ID, From: r.From, Account: r.Account, Key: r.Key, Action: r.Action,
		Status: r.Status, Code: r.Code, Bytes: r.Bytes, Micros: r.Duration.Microseconds(),
	})
}

// pages logs what people read.
func (a *accessLog) pages(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		c := &counter{ResponseWriter: w, status: http.StatusOK}
		h.ServeHTTP(c, r)
		path := r.URL.Path
		a.write(&line{
			Time: start.UTC().Format(time.RFC3339Nano), From: r.RemoteAddr, Path: path[:min(len(path), 200)], Status: c.status, Bytes: c.bytes,
			Micros: time.Since(start).Microseconds(),
		})
	})
}

type counter struct {
	http.ResponseWriter
	status, bytes int
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.bytes += n
	return n, err
}

// metrics are what Prometheus is told. Labels are names of actions and codes of
// errors, never anything a caller makes up.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	turned   prometheus.Counter
}

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "instar_catalog_requests_total", Help: "Requests of the EC2 API answered, by action and error code."}, []string{"action", "code"})
	m.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "instar_catalog_request_seconds", Help: "Time from a request's header to the end of its answer, by action.",
		Buckets: prometheus.ExponentialBuckets(1e-3, 3, 9), // 1 ms to 6.6 s
	}, []string{"action"})
	m.turned = prometheus.NewCounter(prometheus.CounterOpts{Name: "instar_catalog_connections_refused_total", Help: "Connections closed because there were too many."})
	m.registry.MustRegister(m.requests, m.seconds, m.turned, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) request(r *ec2api.Record) {
	action := r.Action
	if action == "" {
		action = "none"
	}
	m.requests.WithLabelValues(action, r.Code).Inc()
	m.seconds.WithLabelValues(action).Observe(r.Duration.Seconds())
}
