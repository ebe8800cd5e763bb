package server

import (
	"context"
	"net/http"

	"github.com/instar-image/instar/agent/task"
)

// route is one request that can be made: what the server does and what the
// OpenAPI document says both come from here.
type route struct {
	Method, Path string
	ID, Summary  string
	Role         Role
	Query        []param
	Body         any // a value of the type of the request's body; nil for none
	Answer       any // of the answer's; nil for text
	Stream       bool
	Statuses     []int // beyond 403: 200 first, or 201
	serve        http.HandlerFunc
}

// param is a parameter of the query.
type param struct {
	Name, About string
	Values      []string
}

func (s *Server) routes() []route {
	get := func(f func(*http.Request) (any, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, q *http.Request) {
			v, err := f(q)
			if err != nil {
				s.refuse(w, err)
				return
			}
			s.answer(w, http.StatusOK, v)
		}
	}
	var m *task.Manager
	if s.o.Manager != nil {
		m = s.o.Manager
	}
	var states []string
	for _, st := range task.States() {
		states = append(states, string(st))
	}
	const (
		ok, created, bad, none, conflict, many = http.StatusOK, http.StatusCreated, http.StatusBadRequest, http.StatusNotFound, http.StatusConflict, http.StatusTooManyRequests
	)
	return []route{
		{
			Method: "GET", Path: "/v1/status", ID: "getStatus", Summary: "how the agent is", Role: Viewer,
			Answer: Status{}, Statuses: []int{ok}, serve: get(s.status),
		},
		{
			Method: "GET", Path: "/v1/tasks", ID: "listTasks", Summary: "the tasks, oldest first; those that ended are remembered for a while", Role: Viewer,
			Query:  []param{{Name: "state", About: "only tasks in this state; may be repeated", Values: states}},
			Answer: TaskList{}, Statuses: []int{ok, bad}, serve: get(s.list),
		},
		{
			Method: "POST", Path: "/v1/tasks", ID: "startTask", Summary: "start a capture; once it is answered the task is on disk. With a client-token that was used for the same request before, 200 and that task", Role: Admin,
			Body: task.Request{}, Answer: task.Task{}, Statuses: []int{created, ok, bad, conflict, many}, serve: s.start,
		},
		{
			Method: "GET", Path: "/v1/tasks/{id}", ID: "getTask", Summary: "one task", Role: Viewer,
			Answer: task.Task{}, Statuses: []int{ok, none}, serve: get(s.show),
		},
		{
			Method: "GET", Path: "/v1/tasks/{id}/progress", ID: "followTask", Summary: "the task again whenever it changes, a line of JSON each, until it has ended", Role: Viewer,
			Answer: task.Task{}, Stream: true, Statuses: []int{ok, none}, serve: s.progress,
		},
		{
			Method: "POST", Path: "/v1/tasks/{id}/cancel", ID: "cancelTask", Summary: "end the task; what it published stays", Role: Admin,
			Answer: task.Task{}, Statuses: []int{ok, none, conflict},
			serve: get(s.steer("task cancelled", func(_ context.Context, id string) (task.Task, error) { return m.Cancel(id) })),
		},
		{
			Method: "POST", Path: "/v1/tasks/{id}/pause", ID: "pauseTask", Summary: "make the task stand still; not while units stand still for it", Role: Admin,
			Answer: task.Task{}, Statuses: []int{ok, none, conflict},
			serve: get(s.steer("task paused", func(ctx context.Context, id string) (task.Task, error) { return m.Pause(ctx, id) })),
		},
		{
			Method: "POST", Path: "/v1/tasks/{id}/resume", ID: "resumeTask", Summary: "let the task go on", Role: Admin,
			Answer: task.Task{}, Statuses: []int{ok, none, conflict},
			serve: get(s.steer("task resumed", func(ctx context.Context, id string) (task.Task, error) { return m.Resume(ctx, id) })),
		},
		{
			Method: "GET", Path: "/v1/openapi.json", ID: "getDocument", Summary: "this document", Role: Viewer,
			Answer: map[string]any{}, Statuses: []int{ok}, serve: get(func(*http.Request) (any, error) { return Document(), nil }),
		},
		{
			Method: "GET", Path: "/metrics", ID: "getMetrics", Summary: "figures for Prometheus", Role: Viewer,
			Statuses: []int{ok}, serve: s.metrics,
		},
		{
			Method: "GET", Path: "/healthz", ID: "getHealth", Summary: "whether the agent is well", Role: Nobody,
			Statuses: []int{ok, http.StatusServiceUnavailable}, serve: s.health,
		},
	}
}
