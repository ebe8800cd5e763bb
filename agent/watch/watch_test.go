package watch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var noon = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func ended(id, name string, state task.State, at time.Time) task.Task {
	t := task.Task{
		ID: id, Request: task.Request{Kind: task.CreateImage, Name: name, Store: "s3://b/p"}, State: state, Ended: at,
		Attempts: []task.Attempt{{Started: at.Add(-90 * time.Second), Ended: at}},
	}
	if state == task.Complete {
		t.Result = &task.Result{Manifest: "abc", BytesAdded: 1000, BytesRead: 5000, Size: 1 << 30}
	} else {
		t.Error = &task.Failure{Code: task.CodeCapture, Message: "the store is away"}
	}
	return t
}

func scrape(t *testing.T, h http.Handler) (int, string) {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/", nil))
	return rec.Code, rec.Body.String()
}

func TestFigures(t *testing.T) {
	now := noon
	w := New(Options{Version: "v1", MaxAge: 26 * time.Hour, Now: func() time.Time { return now }})
	if code, body := scrape(t, w.Health()); code != http.StatusServiceUnavailable || !strings.Contains(body, "no capture was ever complete") {
		t.Errorf("before the first capture: %d %s", code, body)
	}
	w.Restore([]task.Task{ended("bun-1", "web", task.Complete, noon.Add(-25*time.Hour)), ended("bun-2", "web", task.Failed, noon.Add(-time.Hour))})
	running := task.Task{ID: "bun-3", Request: task.Request{Kind: task.CreateImage, Name: "db"}, State: task.Bundling}
	w.Changed(running)
	running.State = task.Pending
	w.Changed(running) // cut short
	running.State = task.Storing
	w.Changed(running)
	code, body := scrape(t, w.Health())
	var s State
	must(t, json.Unmarshal([]byte(body), &s))
	if code != http.StatusOK || !s.Healthy || s.Tasks != 1 || len(s.Captures) != 1 || s.Captures[0].AgeSeconds != 25*3600 || s.Captures[0].LastState != task.Failed || s.Captures[0].Reason != "the store is away" {
		t.Errorf("health %d %+v", code, s)
	}
	now = noon.Add(2 * time.Hour)
	if code, body := scrape(t, w.Health()); code != http.StatusServiceUnavailable || !strings.Contains(body, "last complete capture of web is 27h0m0s old") {
		t.Errorf("after 27 hours: %d %s", code, body)
	}
	w.Changed(ended("bun-3", "db", task.Complete, now))
	w.Changed(ended("bun-4", "web", task.Cancelled, now))
	w.Changed(ended("bun-5", "web", task.Complete, now.Add(-time.Minute)))
	_, text := scrape(t, w.Metrics())
	for _, want := range []string{
		`instar_agent_tasks{state="storing"} 0`, `instar_agent_tasks{state="pending"} 0`,
		`instar_agent_tasks_ended_total{kind="create-image",state="complete"} 2`,
		`instar_agent_tasks_ended_total{kind="create-image",state="failed"} 0`,
		`instar_agent_tasks_ended_total{kind="bundle",state="failed"} 0`,
		`instar_agent_attempts_cut_short_total 1`, `instar_agent_bytes_added_total 2000`, `instar_agent_bytes_read_total 10000`,
		`instar_agent_last_success_age_seconds{kind="create-image",name="web"} 60`,
		`instar_agent_last_success_age_seconds{kind="create-image",name="db"} 0`,
		`instar_agent_last_end_timestamp_seconds{kind="create-image",name="web",state="cancelled"} 1.777644e+09`,
		`instar_agent_capture_seconds_count{kind="create-image"} 2`, `instar_agent_healthy 1`, `instar_agent_info{version="v1"} 1`,
		`process_resident_memory_bytes`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the figures lack %s", want)
		}
	}
	if t.Failed() {
		t.Log(regexp.MustCompile(`(?m)^(#|go_).*\n`).ReplaceAllString(text, ""))
	}
}

// TestClockAhead: a success of the future is one of now, and ages.
func TestClockAhead(t *testing.T) {
	now := noon
	w := New(Options{MaxAge: 26 * time.Hour, Now: func() time.Time { return now }})
	w.Restore([]task.Task{ended("bun-1", "web", task.Complete, noon.AddDate(10, 0, 0))})
	now = noon.Add(time.Hour)
	w.Changed(ended("bun-2", "web", task.Failed, now))
	if s := w.State(); !s.Healthy || s.Captures[0].AgeSeconds != 3600 || s.Captures[0].LastState != task.Failed {
		t.Errorf("%+v", s)
	}
	now = noon.AddDate(0, 0, -7) // the clock was set right while the agent ran
	if s := w.State(); !s.Healthy || s.Captures[0].AgeSeconds != 0 {
		t.Errorf("%+v", s)
	}
	now = now.Add(27 * time.Hour)
	if s := w.State(); s.Healthy {
		t.Errorf("27 hours after: %+v", s)
	}
}

// TestNoAgeLimit: without one any age is well.
func TestNoAgeLimit(t *testing.T) {
	w := New(Options{})
	if code, _ := scrape(t, w.Health()); code != http.StatusOK {
		t.Errorf("status %d", code)
	}
}

// TestManyNames keeps the labels bounded.
func TestManyNames(t *testing.T) {
	w := New(Options{})
	for i := range maxNames + 10 {
		w.Changed(ended(fmt.Sprint("bun-", i), fmt.Sprint("n", i), task.Complete, noon))
	}
	if n := len(w.State().Captures); n != maxNames {
		t.Errorf("%d names", n)
	}
}

// hooks is a directory of hooks that note how they were called.
func hooks(t *testing.T) (*Hooks, func(name, script string, mode os.FileMode), func() string) {
	dir := t.TempDir()
	log := filepath.Join(t.TempDir(), "log")
	add := func(name, script string, mode os.FileMode) {
		t.Helper()
		file := filepath.Join(dir, name)
		must(t, os.WriteFile(file, []byte("#!/bin/sh\nLOG="+log+"\n"+script+"\n"), 0o600))
		must(t, os.Chmod(file, mode))
	}
	read := func() string {
		data, _ := os.ReadFile(log) // nothing was called
		return string(data)
	}
	return &Hooks{Dir: dir}, add, read
}

func TestHooks(t *testing.T) {
	h, add, log := hooks(t)
	var out bytes.Buffer
	h.Output = &out
	var told []string
	h.Report = func(line string, warn bool) { told = append(told, fmt.Sprint(warn, " ", line)) }
	t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
	add("20-second", `echo "second $1 $INSTAR_NAME" >>$LOG; exit 3`, 0o755)
	add("10-first", `echo "first $1 $INSTAR_EVENT" >>$LOG; env; cat`, 0o755)
	add("30-third", `echo third >>$LOG`, 0o700)
	add("README", `echo readme >>$LOG`, 0o644)
	add("40-open", `echo open >>$LOG`, 0o777)
	add("50-old~", `echo old >>$LOG`, 0o755)
	add(".hidden", `echo hidden >>$LOG`, 0o755)
	must(t, os.Symlink("/nowhere", filepath.Join(h.Dir, "60-dangling")))
	task := ended("bun-7", "web", task.Failed, noon)
	err := h.Run(t.Context(), Failure, Facts(task))
	if err == nil || !strings.Contains(err.Error(), "20-second") || strings.Contains(err.Error(), "third") {
		t.Errorf("error %v", err)
	}
	if want := "first failure failure\nsecond failure web\nthird\n"; log() != want {
		t.Errorf("called:\n%swant:\n%s", log(), want)
	}
	for _, want := range []string{"INSTAR_TASK=bun-7\n", "INSTAR_STATE=failed\n", "INSTAR_STORE=s3://b/p\n", "INSTAR_ERROR=the store is away\n", "INSTAR_ENDED=2026-05-01T12:00:00Z\n", "PATH="} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the environment lacks %s: %s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "hunter2") || strings.Contains(out.String(), "HOME=") {
		t.Errorf("the environment is the agent's own:\n%s", out.String())
	}
	joined := strings.Join(told, "\n")
	for _, want := range []string{"true hook is not run: " + h.Dir + "/40-open", "true hook " + h.Dir + "/60-dangling is not run", "false hook " + h.Dir + "/30-third on failure: done"} {
		if !strings.Contains(joined, want) {
			t.Errorf("told\n%s\nnot %s", joined, want)
		}
	}
	// A directory that others may change: none is run.
	must(t, os.Chmod(h.Dir, 0o777))
	if err := h.Run(t.Context(), Success, nil); err == nil || strings.Count(log(), "first") != 1 {
		t.Errorf("an open directory: %v, log %s", err, log())
	}
	if err := (&Hooks{Dir: "/nowhere"}).Run(t.Context(), Success, nil); err != nil {
		t.Errorf("no directory: %v", err)
	}
}

func TestHooksAreBounded(t *testing.T) {
	h, add, log := hooks(t)
	var out bytes.Buffer
	h.Output = &out
	facts := map[string]string{"long": strings.Repeat("x", 1<<20), "nul": "a\x00b", "none": ""}
	add("1", `head -c 1000000 /dev/zero; echo done >>$LOG`, 0o755)
	if err := h.Run(t.Context(), Success, facts); err != nil {
		t.Error(err)
	}
	if log() != "done\n" || out.Len() != maxHookOutput {
		t.Errorf("log %q, %d bytes of output", log(), out.Len())
	}
	h.Timeout = 2 * time.Second
	mine := fmt.Sprintf("sleep %d", 100_000+os.Getpid()) // nobody else's
	add("1", mine+" & "+mine, 0o755)                     // with a child that keeps the output open
	if err := h.Run(t.Context(), Success, facts); err == nil || !strings.Contains(err.Error(), "killed after 2s") {
		t.Errorf("error %v", err)
	}
	// They were killed; their ends come a moment later.
	for exec.Command("pgrep", "-f", "^"+mine+"$").Run() == nil {
		time.Sleep(10 * time.Millisecond)
	}
}

// service is a metadata server that can be told to fail and to forget its tokens.
type service struct {
	mu    sync.Mutex
	tree  map[string]string
	token int
	down  bool
	asked int
}

func (m *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked++
	v, ok := m.tree[strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")]
	switch {
	case m.down:
		w.WriteHeader(http.StatusInternalServerError)
	case r.Method == http.MethodPut:
		fmt.Fprint(w, m.token)
	case r.Header.Get("X-Aws-Ec2-Metadata-Token") != fmt.Sprint(m.token):
		w.WriteHeader(http.StatusUnauthorized)
	case !ok:
		http.NotFound(w, r)
	default:
		fmt.Fprint(w, v)
	}
}

func TestNotices(t *testing.T) {
	m := &service{tree: map[string]string{}}
	server := httptest.NewServer(m)
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var got []string
	fail := false
	var told []string
	// One look after the other, each with something changed before it.
	steps := []func(){
		func() {}, // nothing yet
		func() { m.tree["events/maintenance/scheduled"] = "[]" },
		func() { m.tree["spot/instance-action"] = `{"action":"terminate","time":"2026-05-01T12:02:00Z"}` },
		func() { m.token++ }, // tokens expire
		func() { m.down = true },
		func() { m.down = false },
		func() {
			m.tree["events/maintenance/scheduled"] = `[{"NotBefore":"21 Jan 2027 09:00:43 GMT","Code":"instance-retirement","Description":"d","EventId":"instance-event-1","State":"active"},` +
				`{"NotBefore":"21 Jan 2026 09:00:43 GMT","Code":"system-reboot","EventId":"instance-event-0","State":"completed"}]`
			fail = true
		},
		func() { fail = false },
		func() { m.tree["spot/instance-action"] = `rubbish` },
		func() { delete(m.tree, "spot/instance-action") },
		func() { m.tree["spot/instance-action"] = `{"action":"terminate","time":"2026-05-01T12:02:00Z"}` }, // given again
		func() {
			m.tree["events/recommendations/rebalance"] = `{"noticeTime":"2026-05-01T11:00:00Z"}`
		},
		cancel,
	}
	err := WatchNotices(ctx, NoticeOptions{
		Endpoint: server.URL, Kinds: Kinds(),
		OnNotice: func(_ context.Context, n Notice) error {
			if fail {
				return errors.New("not now")
			}
			got = append(got, n.Kind+" "+n.Action+" "+n.ID)
			return nil
		},
		Report: func(line string, warn bool) { told = append(told, line) },
		after: func(d time.Duration) <-chan time.Time {
			if d != DefaultInterval {
				t.Errorf("interval %v", d)
			}
			m.mu.Lock()
			steps[0]()
			steps = steps[1:]
			m.mu.Unlock()
			c := make(chan time.Time, 1)
			c <- noon
			return c
		},
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	want := []string{
		"spot terminate spot-terminate-20260501T120200Z", "maintenance instance-retirement instance-event-1",
		"spot terminate spot-terminate-20260501T120200Z", "rebalance rebalance rebalance-20260501T110000Z",
	}
	if !slices.Equal(got, want) {
		t.Errorf("notices\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	joined := strings.Join(told, "\n")
	for _, w := range []string{"looking for notices: ", "metadata answers again", "not now; it is tried again", "spot/instance-action"} {
		if !strings.Contains(joined, w) {
			t.Errorf("told\n%s\nnot %s", joined, w)
		}
	}
	if err := WatchNotices(t.Context(), NoticeOptions{Kinds: []string{"x"}}); err == nil {
		t.Error("an unknown kind is looked for")
	}
}

func FuzzNotices(f *testing.F) {
	f.Add([]byte(`{"action":"stop","time":"2017-09-18T08:22:00Z"}`))
	f.Add([]byte(`{"noticeTime":"2020-10-27T08:22:00Z"}`))
	f.Add([]byte(`[{"NotBefore":"21 Jan 2019 09:00:43 GMT","Code":"system-reboot","Description":"x","EventId":"e","State":"active"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, parse := range []func([]byte) ([]Notice, error){parseSpot, parseRebalance, parseMaintenance} {
			list, err := parse(data)
			if err != nil {
				continue
			}
			for _, n := range list {
				if !plain(n.ID) || n.Kind == "" || n.Action == "" {
					t.Errorf("notice %+v", n)
				}
			}
		}
	})
}
