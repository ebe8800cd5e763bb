// Package imds asks the metadata service of the machine it runs on what image
// and devices the machine was started from.
//
// A [Client] takes the service's address; out come values of the metadata
// tree. It asks with a session token (IMDSv2) and, only where the service does
// not know tokens, without (version 1). The package touches the network at
// that one address, past any proxy, and nothing else.
package imds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// DefaultEndpoint is the service's address on EC2 and its likes.
const DefaultEndpoint = "http://169.254.169.254"

// tokenTTL is how long a token is asked for, in seconds: longer than any use
// of a Client.
const tokenTTL = "300"

// maxBody bounds a reply; the tree's own limit, user data, is 16 KiB.
const maxBody = 1 << 20

// Errors of a [Client].
var (
	ErrUnreachable = errors.New("the metadata service does not answer")
	ErrNotFound    = errors.New("no such metadata")
	ErrRefused     = errors.New("the metadata service refuses")
)

// Options of [New]. The zero value is usable.
type Options struct {
	Endpoint string // default DefaultEndpoint
	// NoTokens asks without a token from the start; for services that hang on
	// the token request.
	NoTokens bool
	// TokensOnly never asks without a token: a service that knows none, or a
	// proxy in its place, is refused.
	TokensOnly bool
}

// Client asks one metadata service. It may be used concurrently.
type Client struct {
	base       string
	http       *http.Client
	tokensOnly bool

	mu    sync.Mutex // covers the two below
	asked bool
	token string
}

// New returns a client. It does not ask anything yet.
func New(o Options) (*Client, error) {
	if o.Endpoint == "" {
		o.Endpoint = DefaultEndpoint
	}
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("metadata endpoint %q: want http://HOST[:PORT]", o.Endpoint)
	}
	return &Client{
		base: strings.TrimRight(o.Endpoint, "/"), asked: o.NoTokens, tokensOnly: o.TokensOnly,
		http: &http.Client{
			// The service is on the link: a proxy would answer for its own machine.
			Transport: &http.Transport{
				DialContext:       (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
				DisableKeepAlives: true, ResponseHeaderTimeout: 10 * time.Second,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Get returns one value of the tree under latest/meta-data/. The error is or
// wraps one of the package's; how long to wait is ctx's to say.
func (c *Client) Get(ctx context.Context, path string) (string, error) {
	body, err := c.get(ctx, "meta-data/"+path)
	return strings.TrimSuffix(body, "\n"), err
}

// UserData returns the instance's user data as it stands; nil if there is none.
func (c *Client) UserData(ctx context.Context) ([]byte, error) {
	body, err := c.get(ctx, "user-data")
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return []byte(body), nil
}

// maxKeys bounds how many public keys are read.
const maxKeys = 100

// PublicKeys returns the instance's SSH public keys, as lines of an
// authorized_keys file; none if the service lists none.
func (c *Client) PublicKeys(ctx context.Context) ([]string, error) {
	list, err := c.Get(ctx, "public-keys/")
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var keys []string
	for _, line := range lines(list) {
		index, _, ok := strings.Cut(line, "=")
		if !ok || index == "" || strings.Trim(index, "0123456789") != "" {
			return nil, fmt.Errorf("%w: its list of public keys has a line that is not INDEX=NAME", ErrRefused)
		}
		if len(keys) >= maxKeys {
			return nil, fmt.Errorf("%w: it lists more than %d public keys", ErrRefused, maxKeys)
		}
		key, err := c.Get(ctx, "public-keys/"+index+"/openssh-key")
		if err != nil {
			return nil, err
		}
		keys = append(keys, strings.TrimSpace(key))
	}
	return keys, nil
}

// get reads below latest/. A token that the service no longer takes is
// replaced once.
func (c *Client) get(ctx context.Context, path string) (string, error) {
	for try := 0; ; try++ {
		token, err := c.session(ctx)
		if err != nil {
			return "", err
		}
		h := http.Header{}
		if token != "" {
			h.Set("X-aws-ec2-metadata-token", token)
		}
		status, body, err := c.do(ctx, http.MethodGet, "/latest/"+path, h)
		switch {
		case err != nil:
			return "", err
		case status == http.StatusUnauthorized && token != "" && try == 0:
			c.forget(token)
			continue
		case status == http.StatusNotFound:
			return "", fmt.Errorf("%w: %s", ErrNotFound, strings.TrimPrefix(path, "meta-data/"))
		case status != http.StatusOK:
			return "", fmt.Errorf("%w %s: HTTP status %d", ErrRefused, strings.TrimPrefix(path, "meta-data/"), status)
		}
		return body, nil
	}
}

// forget drops a token, if it is still the one in use.
func (c *Client) forget(token string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token == token {
		c.asked, c.token = false, ""
	}
}

// session gets a token once. A service that answers 403, 404 or 405 to the
// request does not know tokens; silence is not taken for that.
func (c *Client) session(ctx context.Context) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked {
		return c.token, nil
	}
	h := http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {tokenTTL}}
	status, body, err := c.do(ctx, http.MethodPut, "/latest/api/token", h)
	switch {
	case err != nil:
		return "", err
	case status == http.StatusOK:
		if strings.ContainsAny(body, "\r\n") || body == "" {
			return "", fmt.Errorf("%w a token: what it gave is none", ErrRefused)
		}
		c.token = body
	case c.tokensOnly:
		return "", fmt.Errorf("%w a token: HTTP status %d", ErrRefused, status)
	case status == http.StatusForbidden, status == http.StatusNotFound, status == http.StatusMethodNotAllowed, status == http.StatusNotImplemented:
	default:
		return "", fmt.Errorf("%w a token: HTTP status %d", ErrRefused, status)
	}
	c.asked = true
	return c.token, nil
}

func (c *Client) do(ctx context.Context, method, path string, h http.Header) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, nil)
	if err != nil {
		return 0, "", fmt.Errorf("asking for metadata: %w", err)
	}
	req.Header = h
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	switch {
	case err != nil:
		return 0, "", fmt.Errorf("%w: %w", ErrUnreachable, err)
	case len(body) > maxBody:
		return 0, "", fmt.Errorf("%w: %s has more than %d bytes", ErrRefused, path, maxBody)
	}
	return resp.StatusCode, string(body), nil
}

// Mapping is an entry of the block device mapping.
type Mapping struct{ Virtual, Device string }

// Ancestry is what a bundle inherits from the instance it is made in.
type Ancestry struct {
	Ancestors    []string // AMI ids, the running one last
	KernelID     string
	RamdiskID    string
	ProductCodes []string
	Mappings     []Mapping // sorted by virtual name
	Missing      []string  // what the service does not have
}

// Ancestry asks for all of it. What the service does not have is listed in
// Missing; any other failure is an error.
func (c *Client) Ancestry(ctx context.Context) (Ancestry, error) {
	var a Ancestry
	get := func(path string) (string, error) {
		v, err := c.Get(ctx, path)
		if errors.Is(err, ErrNotFound) {
			a.Missing = append(a.Missing, path)
			return "", nil
		}
		return v, err
	}
	ancestors, err := get("ancestor-ami-ids")
	if err != nil {
		return a, err
	}
	a.Ancestors = lines(ancestors)
	own, err := get("ami-id")
	if err != nil {
		return a, err
	}
	if own != "" && !slices.Contains(a.Ancestors, own) {
		a.Ancestors = append(a.Ancestors, own)
	}
	if a.KernelID, err = get("kernel-id"); err != nil {
		return a, err
	}
	if a.RamdiskID, err = get("ramdisk-id"); err != nil {
		return a, err
	}
	codes, err := get("product-codes")
	if err != nil {
		return a, err
	}
	a.ProductCodes = lines(codes)
	names, err := get("block-device-mapping/")
	if err != nil {
		return a, err
	}
	for _, n := range lines(names) {
		dev, err := get("block-device-mapping/" + url.PathEscape(n))
		if err != nil {
			return a, err
		}
		if dev != "" {
			a.Mappings = append(a.Mappings, Mapping{n, dev})
		}
	}
	slices.SortFunc(a.Mappings, func(x, y Mapping) int { return strings.Compare(x.Virtual, y.Virtual) })
	return a, nil
}

func lines(s string) []string {
	var out []string
	for l := range strings.Lines(s) {
		if l = strings.TrimSpace(l); l != "" {
			out = append(out, l)
		}
	}
	return out
}
