// Package server is the agent's API: HTTP and JSON over a unix socket, on which
// the kernel says who calls, and the client of it.
//
// In go a [task.Manager] and a policy; out come the answers that the OpenAPI
// document describes, which is made from the same table and the same types as
// the answers and is served at /v1/openapi.json. The package touches the socket
// and the Manager.
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/rs/zerolog"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/internal/serving"
)

// DefaultSocket is where the agent listens unless it is told otherwise.
const DefaultSocket = "/run/instar/agent.sock"

// maxBody bounds a request's body, in bytes.
const maxBody = 256 << 10

// Options say what is served to whom. Manager is required.
type Options struct {
	Manager *task.Manager
	Policy  Policy
	Version string
	// Metrics and Health are served at /metrics, to viewers, and /healthz, to
	// everybody who can connect; nil for an empty one and for "ok".
	Metrics, Health http.Handler
	Log             zerolog.Logger
	// Grace is how long what is under way may take at the end, default 5 s.
	Grace time.Duration
}

// Server answers.
type Server struct {
	o       Options
	self    uint32
	started time.Time
	mux     *http.ServeMux
	crowd   serving.Crowd[uint32] // by user
}

// New makes a server.
func New(o Options) *Server {
	if o.Grace == 0 {
		o.Grace = 5 * time.Second
	}
	s := &Server{o: o, self: uint32(os.Geteuid()), started: time.Now(), mux: http.NewServeMux()}
	for _, r := range s.routes() {
		s.mux.HandleFunc(r.Method+" "+r.Path, func(w http.ResponseWriter, q *http.Request) {
			p, _ := q.Context().Value(peerKey{}).(*peer)
			if p == nil {
				s.refuse(w, &Error{Status: http.StatusForbidden, Code: "UnauthorizedOperation", Message: "it is not known who asks"})
				return
			}
			if role := s.o.Policy.role(p, s.self); role < r.Role {
				s.refuse(w, &Error{Status: http.StatusForbidden, Code: "UnauthorizedOperation", Message: fmt.Sprintf(
					"user %d is %s here, and this is for %s: the agent's settings name the groups (admin-group, view-group)", p.UID, role, r.Role)})
				s.o.Log.Warn().Uint32("uid", p.UID).Int32("pid", p.PID).Str("request", r.Method+" "+q.URL.Path).Msg("refused")
				return
			}
			r.serve(w, q)
		})
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, q *http.Request) {
		s.refuse(w, &Error{Status: http.StatusNotFound, Code: "InvalidAction", Message: fmt.Sprintf("there is no %s %s; GET /v1/openapi.json says what there is", q.Method, q.URL.Path)})
	})
	return s
}

// Serve answers on listeners of unix sockets until ctx ends, then lets what is
// under way finish.
func (s *Server) Serve(ctx context.Context, lns ...net.Listener) error {
	srv := serving.NewServer(s.mux, serving.Limits{Header: 10 * time.Second, Read: 30 * time.Second, Idle: time.Minute, HeaderBytes: 16 << 10}, s.o.Log)
	srv.ConnContext = connContext
	var parts []serving.Part
	for _, ln := range lns {
		parts = append(parts, serving.Part{Server: srv, Listener: &serving.Gate{Listener: ln, Admit: s.admit}, EndRequests: true}) // streams end with ctx
	}
	if err := serving.Run(ctx, serving.Options{Parts: parts, Grace: s.o.Grace}); err != nil {
		return fmt.Errorf("the agent's socket: %w", err)
	}
	return nil
}

// Error is what a request that failed is answered with.
type Error struct {
	Status  int    `json:"-"`
	Code    string `json:"code"` // as EC2's: InvalidBundleId.NotFound, IncorrectState, …
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// asError gives an error of the tasks its status and EC2's code.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	for _, k := range []struct {
		err    error
		status int
		code   string
	}{
		{task.ErrNotFound, http.StatusNotFound, "InvalidBundleId.NotFound"},
		{task.ErrRequest, http.StatusBadRequest, "InvalidParameterValue"},
		{task.ErrToken, http.StatusConflict, "IdempotentParameterMismatch"},
		{task.ErrState, http.StatusConflict, "IncorrectState"},
		{task.ErrFull, http.StatusTooManyRequests, "RequestLimitExceeded"},
	} {
		if errors.Is(err, k.err) {
			return &Error{Status: k.status, Code: k.code, Message: err.Error()}
		}
	}
	return &Error{Status: http.StatusInternalServerError, Code: "InternalError", Message: err.Error()}
}

func (s *Server) refuse(w http.ResponseWriter, err error) {
	e := asError(err)
	if e.Status == http.StatusInternalServerError {
		s.o.Log.Error().Err(err).Msg("a request failed")
	}
	s.answer(w, e.Status, map[string]*Error{"error": e})
}

func (s *Server) answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.o.Log.Debug().Err(err).Msg("an answer was not taken")
	}
}

// Status is how the agent is.
type Status struct {
	Version string             `json:"version"`
	Started time.Time          `json:"started"`
	Tasks   map[task.State]int `json:"tasks"` // how many are in each state
}

// TaskList is the tasks, oldest first.
type TaskList struct {
	Tasks []task.Task `json:"tasks"`
}

func (s *Server) status(*http.Request) (any, error) {
	st := Status{Version: s.o.Version, Started: s.started.UTC(), Tasks: map[task.State]int{}}
	for _, t := range s.o.Manager.List() {
		st.Tasks[t.State]++
	}
	return st, nil
}

func (s *Server) list(q *http.Request) (any, error) {
	l := TaskList{Tasks: []task.Task{}}
	want := q.URL.Query()["state"]
	for _, w := range want {
		if !slices.Contains(task.States(), task.State(w)) {
			return nil, fmt.Errorf("%w: state %q", task.ErrRequest, w)
		}
	}
	for _, t := range s.o.Manager.List() {
		if len(want) == 0 || slices.Contains(want, string(t.State)) {
			l.Tasks = append(l.Tasks, t)
		}
	}
	return l, nil
}

func (s *Server) show(q *http.Request) (any, error) {
	t, _, err := s.o.Manager.Get(q.PathValue("id"))
	return t, err
}

func (s *Server) start(w http.ResponseWriter, q *http.Request) {
	r, err := readRequest(q.Body)
	if err != nil {
		s.refuse(w, err)
		return
	}
	p := q.Context().Value(peerKey{}).(*peer)
	t, fresh, err := s.o.Manager.Start(*r, p.Caller)
	if err != nil {
		s.refuse(w, err)
		return
	}
	status := http.StatusCreated
	if !fresh {
		status = http.StatusOK
	} else {
		s.o.Log.Info().Str("task", t.ID).Str("kind", string(r.Kind)).Str("image", r.Name).Uint32("uid", p.UID).Msg("task taken")
	}
	w.Header().Set("Location", "/v1/tasks/"+t.ID)
	s.answer(w, status, t)
}

func readRequest(body io.Reader) (*task.Request, error) {
	data, err := io.ReadAll(io.LimitReader(body, maxBody+1))
	if err != nil {
		return nil, fmt.Errorf("%w: reading it: %w", task.ErrRequest, err)
	}
	if len(data) > maxBody {
		return nil, fmt.Errorf("%w: longer than %d bytes", task.ErrRequest, maxBody)
	}
	return task.DecodeRequest(data)
}

// steer is a handler that changes a task.
func (s *Server) steer(what string, do func(ctx context.Context, id string) (task.Task, error)) func(*http.Request) (any, error) {
	return func(q *http.Request) (any, error) {
		id := q.PathValue("id")
		t, err := do(q.Context(), id)
		if err == nil {
			p := q.Context().Value(peerKey{}).(*peer)
			s.o.Log.Info().Str("task", id).Uint32("uid", p.UID).Msg(what)
		}
		return t, err
	}
}

// progress streams a task, an object a line, whenever it changes, until it ends.
func (s *Server) progress(w http.ResponseWriter, q *http.Request) {
	id := q.PathValue("id")
	t, changed, err := s.o.Manager.Get(id)
	if err != nil {
		s.refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	c := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	for {
		_ = c.SetWriteDeadline(time.Now().Add(30 * time.Second)) // who does not read is left
		if enc.Encode(t) != nil || c.Flush() != nil || t.State.Ended() {
			return
		}
		select {
		case <-q.Context().Done():
			return
		case <-changed:
		}
		if t, changed, err = s.o.Manager.Get(id); err != nil {
			return // forgotten meanwhile
		}
	}
}

func (s *Server) metrics(w http.ResponseWriter, q *http.Request) {
	if s.o.Metrics != nil {
		s.o.Metrics.ServeHTTP(w, q)
	}
}

func (s *Server) health(w http.ResponseWriter, q *http.Request) {
	if s.o.Health != nil {
		s.o.Health.ServeHTTP(w, q)
		return
	}
	fmt.Fprintln(w, "ok")
}
