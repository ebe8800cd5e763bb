// Package cacheclient reads from a host's cache of packs and index objects.
//
// What goes in: the cache's place, and which bytes of which object are wanted.
// What comes out: those bytes, not verified, or an error that says to go to the
// store instead. It talks to the cache alone. A cache that is dead is left alone
// for a while, so that its readers lose no time with it.
package cacheclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrUnavailable says that the cache is dead, or was a short while ago.
var ErrUnavailable = errors.New("the cache is not available")

// Times of a client.
const (
	dialTime     = 3 * time.Second
	progressTime = 20 * time.Second // without a byte
	restTime     = 30 * time.Second // before a dead cache is asked again
)

// Client reads from one cache. Its methods may be called concurrently.
type Client struct {
	place string
	base  string
	http  *http.Client

	mu    sync.Mutex
	until time.Time // before, the cache is left alone
}

// CheckPlace says what is wrong with a cache's place, if anything: one that [New]
// takes.
func CheckPlace(place string) error {
	_, _, err := parse(place)
	return err
}

// parse gives the base of URLs and the socket's path, "" for TCP.
func parse(place string) (base, socket string, err error) {
	if path, ok := strings.CutPrefix(place, "unix:"); ok {
		if !strings.HasPrefix(path, "/") || len(path) > 100 {
			return "", "", fmt.Errorf("cache %q: unix: is followed by the absolute path of a socket, of at most 100 bytes", place)
		}
		return "http://cache", path, nil
	}
	u, err := url.Parse(place)
	if err != nil || u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return "", "", fmt.Errorf("cache %q: neither http://HOST:PORT nor unix:/PATH", place)
	}
	return "http://" + u.Host, "", nil
}

// New makes a client of the cache at place, "http://HOST:PORT" or "unix:/PATH".
// It asks nothing yet.
func New(place string) (*Client, error) {
	base, socket, err := parse(place)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: dialTime}
	t := &http.Transport{
		DialContext: dialer.DialContext, DisableCompression: true, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
		MaxResponseHeaderBytes: 16 << 10, ResponseHeaderTimeout: progressTime,
	}
	if socket != "" {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		}
	}
	return &Client{place: place, base: base, http: &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// String is the cache's place.
func (c *Client) String() string { return c.place }

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// ReadRange reads len(p) bytes from off of the object under key, a pack's or
// index object's. Whatever the error, the store is to be asked instead.
func (c *Client) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	_, err := c.ReadSized(ctx, key, off, p)
	return err
}

// ReadSized is ReadRange, and tells how long the object is.
func (c *Client) ReadSized(ctx context.Context, key string, off int64, p []byte) (size int64, err error) {
	if len(p) == 0 {
		return c.Size(ctx, key)
	}
	return c.get(ctx, key, off, p, false)
}

// Get reads the whole object under key, which has size bytes.
func (c *Client) Get(ctx context.Context, key string, size int64) ([]byte, error) {
	p := make([]byte, size)
	if err := c.ReadRange(ctx, key, 0, p); err != nil {
		return nil, err
	}
	return p, nil
}

// Size asks how long the object under key is.
func (c *Client) Size(ctx context.Context, key string) (int64, error) {
	var p [1]byte
	return c.get(ctx, key, 0, p[:], false)
}

// ReadAgain is ReadRange after bytes came from the cache that were not those of
// the object: it first compares what it keeps with the object's name.
func (c *Client) ReadAgain(ctx context.Context, key string, off int64, p []byte) error {
	_, err := c.get(ctx, key, off, p, true)
	return err
}

// Distrust has the cache compare what it keeps of an object with its name, after
// bytes came from it that were not those of the object.
func (c *Client) Distrust(ctx context.Context, key string) error {
	var p [1]byte
	_, err := c.get(ctx, key, 0, p[:], true)
	return err
}

func (c *Client) get(ctx context.Context, key string, off int64, p []byte, again bool) (int64, error) {
	c.mu.Lock()
	rest := time.Now().Before(c.until)
	c.mu.Unlock()
	if rest {
		return 0, fmt.Errorf("cache %s: %w", c.place, ErrUnavailable)
	}
	size, dead, err := c.ask(ctx, key, off, p, again)
	if err == nil {
		return size, nil
	}
	if dead && ctx.Err() == nil {
		c.mu.Lock()
		c.until = time.Now().Add(restTime)
		c.mu.Unlock()
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return 0, fmt.Errorf("cache %s: %s: %w", c.place, key, err)
}

// ask makes a request. dead: the cache itself does not answer as it should.
func (c *Client) ask(ctx context.Context, key string, off int64, p []byte, again bool) (size int64, dead bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Each piece that comes gives it more time.
	timer := time.AfterFunc(progressTime+dialTime, func() { cancel(errors.New("no byte came for a while")) })
	defer timer.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/"+key, nil)
	if err != nil {
		return 0, false, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
	if again {
		req.Header.Set("Cache-Control", "no-cache")
	}
	res, err := c.http.Do(req)
	if err != nil {
		return 0, true, cause(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusPartialContent {
		b, _ := io.ReadAll(io.LimitReader(res.Body, 200)) // for the message alone
		// What it answers about an object is no sign of its own end.
		return 0, res.StatusCode >= 500 && res.StatusCode != http.StatusBadGateway, fmt.Errorf("it answers %d: %q", res.StatusCode, strings.TrimSpace(string(b)))
	}
	size, ok := contentRange(res.Header.Get("Content-Range"), off, int64(len(p)))
	if !ok {
		return 0, true, fmt.Errorf("it answers with another range: %.100q", res.Header.Get("Content-Range"))
	}
	for rest := p; len(rest) > 0; {
		n, err := res.Body.Read(rest)
		rest = rest[n:]
		if n > 0 {
			timer.Reset(progressTime)
		}
		if err != nil && len(rest) > 0 {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return 0, true, cause(ctx, err)
		}
	}
	return size, false, nil
}

// cause prefers why a context ended to what followed from it.
func cause(ctx context.Context, err error) error {
	if why := context.Cause(ctx); why != nil {
		return why
	}
	return err
}

// contentRange makes sure that an answer is of exactly n bytes from off, and
// gives the object's size.
func contentRange(s string, off, n int64) (size int64, ok bool) {
	rest, ok := strings.CutPrefix(s, fmt.Sprintf("bytes %d-%d/", off, off+n-1))
	if !ok {
		return 0, false
	}
	size, err := strconv.ParseInt(rest, 10, 64)
	return size, err == nil && size >= off+n
}
