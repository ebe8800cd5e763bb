// Package watch lets others see how an agent's captures go, and tells them.
//
// In go tasks as they change, the executables of a directory, and metadata's
// notices of an interruption; out come figures for Prometheus, a statement of
// health, and calls of these executables. The package runs those, asks the
// metadata service if it is told to, and touches nothing else.
package watch

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/instar-image/instar/agent/task"
)

// Options of [New].
type Options struct {
	Version string
	// MaxAge is how old the last complete capture of a name may be before health
	// says that something is wrong; 0: any age is well.
	MaxAge time.Duration
	Now    func() time.Time // nil: time.Now
}

// Watch keeps what is to be seen of an agent's tasks. It may be used
// concurrently. Nothing in it wakes up by itself.
type Watch struct {
	o        Options
	registry *prometheus.Registry
	ended    *prometheus.CounterVec
	begun    prometheus.Counter
	added    prometheus.Counter
	read     prometheus.Counter
	seconds  *prometheus.HistogramVec

	mu    sync.Mutex
	tasks map[string]task.State // that go on
	names map[name]*record
}

// name is what captures are kept apart by.
type name struct {
	kind task.Kind
	name string
}

// record is what came of the captures of a name.
type record struct {
	success time.Time // end of the last complete one
	ended   time.Time // of the last one, whatever it came to
	state   task.State
	reason  string
	size    int64
	added   int64
}

// maxNames bounds the labels: beyond it a name has no figures of its own.
const maxNames = 1000

// New makes a Watch that has seen nothing.
func New(o Options) *Watch {
	if o.Now == nil {
		o.Now = time.Now
	}
	w := &Watch{o: o, registry: prometheus.NewRegistry(), tasks: map[string]task.State{}, names: map[name]*record{}}
	w.ended = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "instar_agent_tasks_ended_total", Help: "Tasks that ended, by kind and state."}, []string{"kind", "state"})
	for _, k := range []task.Kind{task.Bundle, task.CreateImage} {
		for _, s := range task.States() {
			if s.Ended() {
				w.ended.WithLabelValues(string(k), string(s))
			}
		}
	}
	count := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "instar_agent_" + name, Help: help})
	}
	w.begun = count("attempts_cut_short_total", "Attempts at a task that were cut short and begun again.")
	w.added = count("bytes_added_total", "Bytes of objects that complete captures stored.")
	w.read = count("bytes_read_total", "Bytes of files that complete captures read.")
	w.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "instar_agent_capture_seconds", Help: "Time from the beginning of a complete task's last attempt to its end, by kind.",
		Buckets: prometheus.ExponentialBuckets(1, 4, 8), // 1 s to 4.5 h
	}, []string{"kind"})
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "instar_agent_info", Help: "1, with the agent's version.", ConstLabels: prometheus.Labels{"version": o.Version}})
	build.Set(1)
	w.registry.MustRegister(w.ended, w.begun, w.added, w.read, w.seconds, build, captures{w},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return w
}

// Restore takes the tasks that an agent finds when it starts: their states and
// the last captures count, not the totals of what this process saw.
func (w *Watch) Restore(tasks []task.Task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range tasks {
		w.note(t)
	}
}

// Changed takes a task after its state changed. It does not block.
func (w *Watch) Changed(t task.Task) {
	w.mu.Lock()
	before, known := w.tasks[t.ID]
	w.note(t)
	w.mu.Unlock()
	if known && t.State == task.Pending && before != task.Pending {
		w.begun.Inc()
	}
	if !t.State.Ended() {
		return
	}
	w.ended.WithLabelValues(string(t.Request.Kind), string(t.State)).Inc()
	if t.State != task.Complete || t.Result == nil {
		return
	}
	w.added.Add(float64(max(0, t.Result.BytesAdded)))
	w.read.Add(float64(max(0, t.Result.BytesRead)))
	if n := len(t.Attempts); n > 0 {
		w.seconds.WithLabelValues(string(t.Request.Kind)).Observe(max(0, t.Ended.Sub(t.Attempts[n-1].Started).Seconds()))
	}
}

// note takes up a task; w.mu is held.
func (w *Watch) note(t task.Task) {
	if !t.State.Ended() {
		w.tasks[t.ID] = t.State
		return
	}
	delete(w.tasks, t.ID)
	key := name{t.Request.Kind, t.Request.Name}
	r := w.names[key]
	if r == nil {
		if len(w.names) >= maxNames {
			return
		}
		r = &record{}
		w.names[key] = r
	}
	now := w.o.Now()
	r.past(now)
	if t.Ended.After(now) {
		t.Ended = now
	}
	if t.State == task.Complete && t.Ended.After(r.success) {
		r.success = t.Ended
		if t.Result != nil {
			r.size, r.added = t.Result.Size, t.Result.BytesAdded
		}
	}
	if !t.Ended.Before(r.ended) {
		r.ended, r.state, r.reason = t.Ended, t.State, ""
		if t.Error != nil {
			r.reason = t.Error.Message
		}
	}
}

// past takes what a clock that was ahead has dated in the future for now: it
// would be the newest, and young, until that time has come.
func (r *record) past(now time.Time) {
	if r.success.After(now) {
		r.success = now
	}
	if r.ended.After(now) {
		r.ended = now
	}
}

// Metrics serves the figures in Prometheus's text format.
func (w *Watch) Metrics() http.Handler {
	return promhttp.HandlerFor(w.registry, promhttp.HandlerOpts{Registry: w.registry})
}

// captures collects what is known of tasks and names when it is asked.
type captures struct{ w *Watch }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("instar_agent_"+name, help, labels, nil)
}

func (captures) descs() [6]*prometheus.Desc {
	return [6]*prometheus.Desc{
		desc("tasks", "Tasks that have not ended, by state.", "state"),
		desc("last_success_timestamp_seconds", "When the last complete capture of a name ended.", "kind", "name"),
		desc("last_success_age_seconds", "How long ago that was.", "kind", "name"),
		desc("last_end_timestamp_seconds", "When the last capture of a name ended, whatever it came to.", "kind", "name", "state"),
		desc("last_added_bytes", "Bytes the last complete capture of a name stored.", "kind", "name"),
		desc("healthy", "1 if all is well, as /healthz says."),
	}
}

func (c captures) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs() {
		ch <- d
	}
}

func (c captures) Collect(ch chan<- prometheus.Metric) {
	d := c.descs()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	healthy := 0.0
	if c.w.State().Healthy {
		healthy = 1
	}
	gauge(d[5], healthy)
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	states := map[task.State]int{}
	for _, s := range c.w.tasks {
		states[s]++
	}
	for _, s := range task.States() {
		if !s.Ended() {
			gauge(d[0], float64(states[s]), string(s))
		}
	}
	now := c.w.o.Now()
	for key, r := range c.w.names {
		r.past(now)
		kind, name := string(key.kind), strings.ToValidUTF8(key.name, "?")
		if !r.success.IsZero() {
			gauge(d[1], float64(r.success.UnixMilli())/1000, kind, name)
			gauge(d[2], now.Sub(r.success).Seconds(), kind, name)
			gauge(d[4], float64(r.added), kind, name)
		}
		gauge(d[3], float64(r.ended.UnixMilli())/1000, kind, name, string(r.state))
	}
}

// State is how the agent's captures are.
type State struct {
	Healthy  bool      `json:"healthy"`
	Problems []string  `json:"problems,omitempty"`
	Captures []Capture `json:"captures"`
	Tasks    int       `json:"tasks"` // that have not ended
}

// Capture is what is known of the captures of a name.
type Capture struct {
	Kind        task.Kind  `json:"kind"`
	Name        string     `json:"name"`
	LastSuccess time.Time  `json:"last-success,omitzero"`
	AgeSeconds  int64      `json:"age-seconds,omitempty"` // of the last success
	LastEnd     time.Time  `json:"last-end"`
	LastState   task.State `json:"last-state"`
	Reason      string     `json:"reason,omitempty"` // why the last one failed
}

// State tells how it is now. With MaxAge something is wrong if no capture was
// ever complete, or the last one of a name is older than that.
func (w *Watch) State() State {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.o.Now()
	s := State{Captures: []Capture{}, Tasks: len(w.tasks)}
	keys := slices.SortedFunc(maps.Keys(w.names), func(a, b name) int {
		if a.name != b.name {
			return strings.Compare(a.name, b.name)
		}
		return strings.Compare(string(a.kind), string(b.kind))
	})
	any := false
	for _, k := range keys {
		r := w.names[k]
		r.past(now)
		c := Capture{Kind: k.kind, Name: k.name, LastSuccess: r.success, LastEnd: r.ended, LastState: r.state, Reason: r.reason}
		switch {
		case r.success.IsZero():
			if w.o.MaxAge > 0 {
				s.Problems = append(s.Problems, "no capture of "+k.name+" was ever complete")
			}
		default:
			any = true
			age := now.Sub(r.success)
			c.AgeSeconds = int64(age.Seconds())
			if w.o.MaxAge > 0 && age > w.o.MaxAge {
				s.Problems = append(s.Problems, "the last complete capture of "+k.name+" is "+age.Round(time.Second).String()+" old, more than "+w.o.MaxAge.String())
			}
		}
		s.Captures = append(s.Captures, c)
	}
	if !any && w.o.MaxAge > 0 && len(s.Problems) == 0 {
		s.Problems = append(s.Problems, "no capture was ever complete")
	}
	s.Healthy = len(s.Problems) == 0
	return s
}

// Health serves [Watch.State] as JSON: status 200 if it is healthy, else 503.
func (w *Watch) Health() http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		s := w.State()
		rw.Header().Set("Content-Type", "application/json")
		if !s.Healthy {
			rw.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(rw).Encode(s) // whoever asked may have gone
	})
}

// Facts are a task's for hooks. Failures are given in the words of the agent's
// log, which have no secrets.
func Facts(t task.Task) map[string]string {
	f := map[string]string{
		"task": t.ID, "kind": string(t.Request.Kind), "name": t.Request.Name, "store": t.Request.Store,
		"state": string(t.State), "schedule": t.Request.Schedule, "ended": t.Ended.UTC().Format(time.RFC3339),
	}
	if t.Error != nil {
		f["error"], f["error-code"] = t.Error.Message, t.Error.Code
	}
	if t.Result != nil {
		f["manifest"], f["location"] = t.Result.Manifest, t.Result.Location
	}
	return f
}
