package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/instar-image/instar/agent/task"
)

// Client talks to an agent.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the agent at a socket.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}}
}

// Socket is where the agent is.
func (c *Client) Socket() string { return c.socket }

// maxAnswer bounds an answer, in bytes.
const maxAnswer = 64 << 20

// do makes a request; an answer that is no success is an [*Error].
func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("asking the agent: %w", err)
		}
		r = bytes.NewReader(data)
	}
	q, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, r)
	if err != nil {
		return nil, fmt.Errorf("asking the agent: %w", err)
	}
	res, err := c.http.Do(q)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, fmt.Errorf("asking the agent at %s: %w", c.socket, err)
	}
	if res.StatusCode < 300 {
		return res, nil
	}
	defer res.Body.Close()
	var e struct {
		Error *Error `json:"error"`
	}
	err = json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(&e)
	if err != nil || e.Error == nil {
		return nil, fmt.Errorf("asking the agent at %s: %s", c.socket, res.Status)
	}
	e.Error.Status = res.StatusCode
	return nil, e.Error
}

func (c *Client) read(ctx context.Context, method, path string, body, into any) error {
	res, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(into); err != nil {
		return fmt.Errorf("reading the agent's answer: %w", err)
	}
	return nil
}

// Status asks how the agent is.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.read(ctx, "GET", "/v1/status", nil, &s)
}

// List asks for the tasks, those in the given states if any are given.
func (c *Client) List(ctx context.Context, states ...task.State) ([]task.Task, error) {
	v := url.Values{}
	for _, s := range states {
		v.Add("state", string(s))
	}
	var l TaskList
	path := "/v1/tasks"
	if len(v) > 0 {
		path += "?" + v.Encode()
	}
	err := c.read(ctx, "GET", path, nil, &l)
	return l.Tasks, err
}

// Start starts a task.
func (c *Client) Start(ctx context.Context, r task.Request) (t task.Task, err error) {
	return t, c.read(ctx, "POST", "/v1/tasks", r, &t)
}

// Show asks for a task.
func (c *Client) Show(ctx context.Context, id string) (t task.Task, err error) {
	return t, c.read(ctx, "GET", "/v1/tasks/"+url.PathEscape(id), nil, &t)
}

// Cancel ends a task.
func (c *Client) Cancel(ctx context.Context, id string) (t task.Task, err error) {
	return t, c.read(ctx, "POST", "/v1/tasks/"+url.PathEscape(id)+"/cancel", nil, &t)
}

// Pause makes a task stand still.
func (c *Client) Pause(ctx context.Context, id string) (t task.Task, err error) {
	return t, c.read(ctx, "POST", "/v1/tasks/"+url.PathEscape(id)+"/pause", nil, &t)
}

// Resume lets it go on.
func (c *Client) Resume(ctx context.Context, id string) (t task.Task, err error) {
	return t, c.read(ctx, "POST", "/v1/tasks/"+url.PathEscape(id)+"/resume", nil, &t)
}

// Follow calls f with a task whenever it changes, until it has ended; the last
// is what it returns. An agent that goes away is an error.
func (c *Client) Follow(ctx context.Context, id string, f func(task.Task)) (task.Task, error) {
	res, err := c.do(ctx, "GET", "/v1/tasks/"+url.PathEscape(id)+"/progress", nil)
	if err != nil {
		return task.Task{}, err
	}
	defer res.Body.Close()
	dec := json.NewDecoder(res.Body)
	for {
		var t task.Task
		if err := dec.Decode(&t); err != nil {
			if ctx.Err() != nil {
				return t, ctx.Err()
			}
			return t, fmt.Errorf("following task %s: the agent at %s went away: %w", id, c.socket, err)
		}
		f(t)
		if t.State.Ended() {
			return t, nil
		}
	}
}

// Alive asks whether the agent answers, be it that something is wrong.
func (c *Client) Alive(ctx context.Context) error {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/healthz", nil)
	if err != nil {
		return fmt.Errorf("asking the agent: %w", err)
	}
	res, err := c.http.Do(q)
	if err != nil {
		return fmt.Errorf("asking the agent at %s: %w", c.socket, err)
	}
	return res.Body.Close()
}
