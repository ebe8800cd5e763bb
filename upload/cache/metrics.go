package cache

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are what Prometheus is told.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	sent     prometheus.Counter
	refused  prometheus.Counter
	lost     prometheus.Counter
}

func newMetrics(c *Cache) *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	count := func(name, help string) prometheus.Counter {
		k := prometheus.NewCounter(prometheus.CounterOpts{Name: "instar_cache_" + name, Help: help})
		m.registry.MustRegister(k)
		return k
	}
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "instar_cache_requests_total", Help: "Requests answered, by status."}, []string{"status"})
	m.sent = count("sent_bytes_total", "Bytes of objects handed out.")
	m.refused = count("connections_refused_total", "Connections of clients that are not allowed, or have too many.")
	m.lost = count("log_lines_lost_total", "Lines that the access log did not take.")
	m.registry.MustRegister(m.requests, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, v := range []struct {
		name, help string
		gauge      bool
		get        func(Stats) int64
	}{
		{"objects", "Objects kept, complete or not.", true, func(s Stats) int64 { return s.Objects }},
		{"used_bytes", "Bytes of objects kept.", true, func(s Stats) int64 { return s.Used }},
		{"limit_bytes", "Bytes that may be kept.", true, func(s Stats) int64 { return s.Limit }},
		{"hits_total", "Reads of what was there.", false, func(s Stats) int64 { return s.Hits }},
		{"misses_total", "Reads of what had to be fetched.", false, func(s Stats) int64 { return s.Misses }},
		{"store_requests_total", "Requests to the store.", false, func(s Stats) int64 { return s.Requests }},
		{"store_bytes_total", "Bytes that came from the store to be kept.", false, func(s Stats) int64 { return s.Fetched }},
		{"store_errors_total", "Requests to the store that failed.", false, func(s Stats) int64 { return s.StoreErrors }},
		{"bypassed_total", "Reads passed on to the store for lack of room.", false, func(s Stats) int64 { return s.Bypassed }},
		{"evicted_total", "Objects dropped for room.", false, func(s Stats) int64 { return s.Evicted }},
		{"corrupt_total", "Objects dropped for their bytes.", false, func(s Stats) int64 { return s.Corrupt }},
		{"disk_errors_total", "Writes to the cache's disk that failed.", false, func(s Stats) int64 { return s.DiskErrors }},
	} {
		get := func() float64 { return float64(v.get(c.Stats())) }
		if v.gauge {
			m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "instar_cache_" + v.name, Help: v.help}, get))
			continue
		}
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "instar_cache_" + v.name, Help: v.help}, get))
	}
	return m
}
