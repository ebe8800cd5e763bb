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
)

// Client talks to a server's control socket.
type Client struct {
	http http.Client
	path string
}

// NewClient returns a client for the socket at path.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}, DisableKeepAlives: true}
	return c
}

// Status asks how the server is.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, "GET", "/v1/status", nil, &s)
}

// List asks for all instances, sorted by id.
func (c *Client) List(ctx context.Context) (l []Summary, err error) {
	return l, c.do(ctx, "GET", "/v1/instances", nil, &l)
}

// Show asks for one instance.
func (c *Client) Show(ctx context.Context, id string) (d Detail, err error) {
	return d, c.do(ctx, "GET", "/v1/instances/"+url.PathEscape(id), nil, &d)
}

// SetEvents changes an instance's events.
func (c *Client) SetEvents(ctx context.Context, id string, change EventChange) (d Detail, err error) {
	return d, c.do(ctx, "POST", "/v1/instances/"+url.PathEscape(id)+"/events", change, &d)
}

// Revoke makes all tokens of an instance invalid.
func (c *Client) Revoke(ctx context.Context, id string) (d Detail, err error) {
	return d, c.do(ctx, "POST", "/v1/instances/"+url.PathEscape(id)+"/revoke", nil, &d)
}

// WithdrawTicket ends an instance's launch ticket; RenewTicket makes it good
// again, as if it had never been claimed.
func (c *Client) WithdrawTicket(ctx context.Context, id string) (d Detail, err error) {
	return d, c.do(ctx, "POST", "/v1/instances/"+url.PathEscape(id)+"/ticket/withdraw", nil, &d)
}

// RenewTicket makes an instance's launch ticket good again.
func (c *Client) RenewTicket(ctx context.Context, id string) (d Detail, err error) {
	return d, c.do(ctx, "POST", "/v1/instances/"+url.PathEscape(id)+"/ticket/renew", nil, &d)
}

// Reload makes the server read its records anew.
func (c *Client) Reload(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, "POST", "/v1/reload", nil, &s)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("asking the metadata server: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, body)
	if err != nil {
		return fmt.Errorf("asking the metadata server: %w", err)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("asking the metadata server at %s (is it running? --control names its socket): %w", c.path, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("reading the metadata server's answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		var e struct{ Error string }
		if json.Unmarshal(b, &e) == nil && e.Error != "" {
			return errors.New(e.Error)
		}
		return fmt.Errorf("the metadata server answered %s", res.Status)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("reading the metadata server's answer: %w", err)
	}
	return nil
}
