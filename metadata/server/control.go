package server

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/metadata"
)

// reloadResult is when and how the last reload ended.
type reloadResult struct {
	mu  sync.Mutex
	at  time.Time
	err error
}

func (r *reloadResult) set(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at, r.err = time.Now(), err
}

func (r *reloadResult) get() (time.Time, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at, r.err
}

// listenControl makes the control socket, in the place of one nobody serves.
func listenControl(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	ln, err := serving.Unix(ctx, path, 0o660)
	if err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	return ln, nil
}

// Status is the state of a server.
type Status struct {
	Started    time.Time `json:"started"`
	Instances  int       `json:"instances"`
	Listeners  []string  `json:"listeners"` // "NAME ADDRESS INTERFACE"
	Reloaded   time.Time `json:"reloaded,omitzero"`
	ReloadFail string    `json:"reload-error,omitempty"`
}

// Summary is an instance as a list shows it.
type Summary struct {
	ID        string       `json:"instance-id"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Listener  string       `json:"listener,omitempty"`
	Hostname  string       `json:"hostname"`
	Events    []string     `json:"events,omitempty"` // kinds that are set
	Ticket    string       `json:"ticket,omitempty"` // none, unclaimed, claimed, completed
}

// Detail is all about an instance but its secrets.
type Detail struct {
	Summary
	MAC            string                   `json:"mac,omitempty"`
	Options        metadata.MetadataOptions `json:"metadata-options"`
	PublicKeys     []string                 `json:"public-keys,omitempty"` // names
	Role           string                   `json:"role,omitempty"`
	UserDataBytes  int                      `json:"user-data-bytes"`
	UserDataSHA256 string                   `json:"user-data-sha256,omitempty"`
	Live           metadata.Live            `json:"live"`
	Current        metadata.Events          `json:"current-events"`
}

// EventChange sets and clears events of an instance. What is not named stays.
type EventChange struct {
	Set   metadata.Events `json:"set"`
	Clear []string        `json:"clear,omitempty"` // spot, rebalance, lifecycle, maintenance, all
}

func (r *running) controlHandler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, q *http.Request) {
			out, err := f(q)
			var refused *metadata.Refusal
			status := http.StatusOK
			switch {
			case errors.As(err, &refused):
				status, out = refused.Status, map[string]string{"error": refused.Reason}
			case err != nil:
				status, out = http.StatusInternalServerError, map[string]string{"error": err.Error()}
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			if err := json.NewEncoder(w).Encode(out); err != nil {
				r.o.Log.Warn().Err(err).Msg("answering a control request")
			}
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return r.status(), nil })
	handle("GET /v1/instances", func(*http.Request) (any, error) { return r.list(), nil })
	handle("GET /v1/instances/{id}", func(q *http.Request) (any, error) {
		in, err := r.instance(q)
		if err != nil {
			return nil, err
		}
		return r.detail(in), nil
	})
	handle("POST /v1/instances/{id}/events", r.setEvents)
	handle("POST /v1/instances/{id}/revoke", func(q *http.Request) (any, error) {
		return r.update(q, "tokens revoked", func(l *metadata.Live) error { l.Generation++; return nil })
	})
	ticket := func(what string, completed bool) func(*http.Request) (any, error) {
		return func(q *http.Request) (any, error) {
			in, err := r.instance(q)
			if err != nil {
				return nil, err
			}
			if in.Launch == nil {
				return nil, &metadata.Refusal{Status: http.StatusConflict, Reason: "the instance's record has no launch"}
			}
			return r.update(q, what, func(l *metadata.Live) error {
				l.Ticket = metadata.TicketState{Launch: in.LaunchID(), Completed: completed}
				return nil
			})
		}
	}
	handle("POST /v1/instances/{id}/ticket/withdraw", ticket("launch ticket withdrawn", true))
	handle("POST /v1/instances/{id}/ticket/renew", ticket("launch ticket made good again", false))
	handle("POST /v1/reload", func(*http.Request) (any, error) {
		if r.o.Reload == nil {
			return nil, &metadata.Refusal{Status: http.StatusConflict, Reason: "this source of records cannot be reloaded"}
		}
		err := r.o.Reload()
		r.reloaded(err)
		return r.status(), err
	})
	return mux
}

func (r *running) instance(q *http.Request) (*metadata.Instance, error) {
	if in := r.o.Metadata.Source.Instances().Get(q.PathValue("id")); in != nil {
		return in, nil
	}
	return nil, &metadata.Refusal{Status: http.StatusNotFound, Reason: fmt.Sprintf("no instance %q", q.PathValue("id"))}
}

func (r *running) status() Status {
	s := Status{Started: r.started, Instances: r.o.Metadata.Source.Instances().Len()}
	for _, l := range r.specs {
		s.Listeners = append(s.Listeners, strings.TrimSpace(l.Name+" "+l.Address+" "+l.Interface))
	}
	at, err := r.last.get()
	s.Reloaded = at
	if err != nil {
		s.ReloadFail = err.Error()
	}
	return s
}

func (r *running) list() []Summary {
	set := r.o.Metadata.Source.Instances()
	out := make([]Summary, 0, set.Len())
	for _, id := range set.IDs() {
		in := set.Get(id)
		out = append(out, r.summary(in, r.state.Live(id)))
	}
	return out
}

func (r *running) summary(in *metadata.Instance, live metadata.Live) Summary {
	s := Summary{ID: in.ID, Addresses: in.Caller.Addresses, Listener: in.Caller.Listener, Hostname: in.Hostname}
	ev := current(in, live)
	for kind, on := range map[string]bool{
		"spot": ev.SpotAction != nil, "rebalance": ev.Rebalance != nil, "lifecycle": ev.Lifecycle != "", "maintenance": ev.Maintenance != nil,
	} {
		if on {
			s.Events = append(s.Events, kind)
		}
	}
	slices.Sort(s.Events)
	switch t := live.Ticket; {
	case in.Launch == nil:
	case t.Launch != in.LaunchID():
		s.Ticket = "unclaimed"
	case t.Completed:
		s.Ticket = "completed"
	case t.Claims > 0:
		s.Ticket = "claimed"
	default:
		s.Ticket = "unclaimed"
	}
	return s
}

func current(in *metadata.Instance, live metadata.Live) metadata.Events {
	if live.Events != nil {
		return *live.Events
	}
	return in.Events
}

func (r *running) detail(in *metadata.Instance) Detail {
	live := r.state.Live(in.ID)
	d := Detail{
		Summary: r.summary(in, live), MAC: in.Caller.MAC, Options: in.Metadata,
		UserDataBytes: len(in.UserData), Live: live, Current: current(in, live),
	}
	for _, k := range in.PublicKeys {
		d.PublicKeys = append(d.PublicKeys, k.Name)
	}
	if in.Role != nil {
		d.Role = in.Role.Name
	}
	if in.UserData != nil {
		d.UserDataSHA256 = fmt.Sprintf("%x", sha256.Sum256(in.UserData))
	}
	return d
}

// update changes what is known of the instance and answers with its detail.
func (r *running) update(q *http.Request, what string, change func(*metadata.Live) error) (any, error) {
	in, err := r.instance(q)
	if err != nil {
		return nil, err
	}
	if err := r.state.Update(q.Context(), in.ID, change); err != nil {
		return nil, err
	}
	r.o.Log.Info().Str("instance", in.ID).Msg(what)
	return r.detail(in), nil
}

func (r *running) setEvents(q *http.Request) (any, error) {
	in, err := r.instance(q)
	if err != nil {
		return nil, err
	}
	bad := func(format string, a ...any) error {
		return &metadata.Refusal{Status: http.StatusBadRequest, Reason: fmt.Sprintf(format, a...)}
	}
	var c EventChange
	dec := json.NewDecoder(io.LimitReader(q.Body, 64<<10))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return nil, bad("reading the change: %v", err)
	}
	if p := c.Set.Check(); p != nil {
		return nil, bad("%s", p[0].Error())
	}
	return r.update(q, "events changed", func(l *metadata.Live) error {
		ev := current(in, *l)
		for _, kind := range c.Clear {
			if err := clearEvent(&ev, kind); err != nil {
				return bad("%v", err)
			}
		}
		if c.Set.SpotAction != nil {
			ev.SpotAction = c.Set.SpotAction
		}
		if c.Set.Rebalance != nil {
			ev.Rebalance = c.Set.Rebalance
		}
		if c.Set.Lifecycle != "" {
			ev.Lifecycle = c.Set.Lifecycle
		}
		if c.Set.Maintenance != nil {
			ev.Maintenance = c.Set.Maintenance
		}
		l.Events = &ev
		return nil
	})
}

func clearEvent(ev *metadata.Events, kind string) error {
	switch kind {
	case "spot":
		ev.SpotAction = nil
	case "rebalance":
		ev.Rebalance = nil
	case "lifecycle":
		ev.Lifecycle = ""
	case "maintenance":
		ev.Maintenance = nil
	case "all":
		*ev = metadata.Events{}
	default:
		return fmt.Errorf("%q is none of spot, rebalance, lifecycle, maintenance, all", kind)
	}
	return nil
}
