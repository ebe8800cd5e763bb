package server

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/instar-image/instar/metadata"
)

// metrics are what Prometheus is told. No label grows with the number of
// instances.
type metrics struct {
	registry *prometheus.Registry
	requests [600]prometheus.Counter // by status
	other    prometheus.Counter
	tokens   prometheus.Counter
	bad      prometheus.Counter
	unknown  prometheus.Counter
	turned   prometheus.Counter
	seconds  prometheus.Histogram
	reloads  *prometheus.CounterVec
	reloadOK prometheus.Gauge
}

func newMetrics(instances func() int) *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	count := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "instar_metadata_" + name, Help: help})
		m.registry.MustRegister(c)
		return c
	}
	byStatus := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "instar_metadata_requests_total", Help: "Requests answered, by status."}, []string{"status"})
	for _, s := range []int{200, 204, 400, 401, 403, 404, 405, 421, 429, 500, 503} {
		m.requests[s] = byStatus.WithLabelValues(strconv.Itoa(s))
	}
	m.other = byStatus.WithLabelValues("other")
	m.tokens = count("tokens_issued_total", "Tokens given out.")
	m.bad = count("tokens_refused_total", "Requests with a token that is wrong, expired or another instance's.")
	m.unknown = count("unknown_callers_total", "Requests from callers that are no instance.")
	m.turned = count("connections_refused_total", "Connections closed because there were too many.")
	m.seconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "instar_metadata_request_seconds", Help: "Time from a request's header to the end of its answer.",
		Buckets: prometheus.ExponentialBuckets(16e-6, 4, 9), // 16 µs to 1 s
	})
	m.reloads = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "instar_metadata_reloads_total", Help: "Reloads of the records, by result."}, []string{"result"})
	m.reloadOK = prometheus.NewGauge(prometheus.GaugeOpts{Name: "instar_metadata_reload_ok", Help: "1 if the last reload went well, 0 if the records of before are still served."})
	m.reloadOK.Set(1)
	m.registry.MustRegister(byStatus, m.seconds, m.reloads, m.reloadOK,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "instar_metadata_instances", Help: "Instances served."}, func() float64 { return float64(instances()) }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) Request(q *metadata.Request) {
	c := m.other
	if q.Status > 0 && q.Status < len(m.requests) && m.requests[q.Status] != nil {
		c = m.requests[q.Status]
	}
	c.Inc()
	m.seconds.Observe(q.Duration.Seconds())
	switch q.Token {
	case "issued":
		m.tokens.Inc()
	case "bad":
		m.bad.Inc()
	}
	if q.Instance == "" {
		m.unknown.Inc()
	}
}

func (m *metrics) reloaded(err error) {
	result, ok := "ok", 1.0
	if err != nil {
		result, ok = "failed", 0
	}
	m.reloads.WithLabelValues(result).Inc()
	m.reloadOK.Set(ok)
}
