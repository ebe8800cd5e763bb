// Package ticket is launch tickets, as metadata/TICKET.md has them: a client for
// an initrd or an agent, which asks for one, and what whoever answers reads a
// request and seals a ticket with.
//
// What goes in: the metadata server's address. What comes out: a [Ticket]. The
// package talks to that address alone, from a source port below 1024 unless
// told otherwise, and keeps the secret that opens the ticket in memory.
package ticket

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"filippo.io/age"
	"golang.org/x/sys/unix"
)

// Version is the version of tickets this package knows.
const Version = 1

// Request is the body of both of the endpoint's requests.
type Request struct {
	Version   int    `json:"version"`
	Recipient string `json:"recipient"`
}

// Ticket is what an instance needs to fetch and open its image. TICKET.md
// describes the members; String shows none of its secrets.
type Ticket struct {
	Version    int    `json:"version"`
	InstanceID string `json:"instance-id"`
	Format     string `json:"format"` // ec2 or instar
	Mode       Mode   `json:"mode,omitempty"`

	Store    string `json:"store"`
	Endpoint string `json:"endpoint,omitempty"`
	Region   string `json:"region,omitempty"`
	CACert   string `json:"ca-cert,omitempty"`

	Manifest       string `json:"manifest"`
	ManifestSHA256 string `json:"manifest-sha256"`
	ManifestBytes  []byte `json:"manifest-bytes,omitempty"`
	Certificate    string `json:"certificate,omitempty"`
	Key            string `json:"key,omitempty"`
	IV             string `json:"iv,omitempty"`
	Signers        string `json:"signers,omitempty"`
	IndexKey       string `json:"index-key,omitempty"`

	// Cache is the address of a cache of packs and index objects beside the
	// instance, asked before the store.
	Cache       string            `json:"cache,omitempty"`
	Objects     map[string]string `json:"objects,omitempty"`
	Credentials *Credentials      `json:"credentials,omitempty"`
	Expires     time.Time         `json:"expires"`
}

// Mode is how an image comes to the disk.
type Mode string

// Modes. "" leaves it to the initrd, whose default is Eager.
const (
	Eager       Mode = "eager"         // all of it before the boot
	Lazy        Mode = "lazy"          // while the system runs; else the boot fails
	LazyOrEager Mode = "lazy-or-eager" // lazily if that can be with this image and disk
)

// Check says whether m is a mode.
func (m Mode) Check() error {
	switch m {
	case "", Eager, Lazy, LazyOrEager:
		return nil
	}
	return fmt.Errorf("%q is none of eager, lazy, lazy-or-eager", string(m))
}

// Credentials are S3 credentials for the image's objects.
type Credentials struct {
	AccessKeyID     string    `json:"access-key-id"`
	SecretAccessKey string    `json:"secret-access-key"`
	SessionToken    string    `json:"session-token,omitempty"`
	Expiration      time.Time `json:"expiration"`
}

// String names the ticket without its secrets.
func (t *Ticket) String() string {
	return fmt.Sprintf("launch ticket of %s for %s (%s) in %s", t.InstanceID, t.Manifest, t.Format, t.Store)
}

// GoString is String: %#v must not print keys.
func (t *Ticket) GoString() string { return t.String() }

// StatusError is a refusal.
type StatusError struct {
	Status int    // HTTP
	Reason string // the server's, one line
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the metadata server answered %d: %s", e.Status, e.Reason)
}

// InvalidError is an answer that is no ticket this program can use: to ask
// again would bring no other.
type InvalidError struct{ Err error }

func (e *InvalidError) Error() string { return e.Err.Error() }

// Unwrap returns what is wrong with it.
func (e *InvalidError) Unwrap() error { return e.Err }

// Client asks for the ticket of the instance it runs on. It is not for
// concurrent use.
type Client struct {
	base     string
	http     *http.Client
	identity *age.X25519Identity
	token    string
}

// Options say how to ask. The zero value is right on an instance.
type Options struct {
	// AnyPort does without a source port below 1024, which needs root. Only
	// private servers take such requests.
	AnyPort bool
	// Timeout bounds each request; default 30 s.
	Timeout time.Duration
	// Holder goes on with another client's claim: what its Holder returned.
	Holder string
}

// maxTicket is the most an answer may have, in bytes.
const maxTicket = 16 << 20

// maxToken is the most a token may have; ours have 56.
const maxToken = 1024

// New returns a client of the server at base, "http://169.254.169.254", with a
// recipient of its own: it is one claim.
func New(base string, o Options) (*Client, error) {
	id, err := age.GenerateX25519Identity()
	if o.Holder != "" {
		id, err = age.ParseX25519Identity(o.Holder)
	}
	if err != nil {
		return nil, fmt.Errorf("making the ticket's recipient: %w", err)
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	// Metadata is never asked for through a proxy, and never follows elsewhere.
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10, DialContext: (&net.Dialer{}).DialContext}
	if !o.AnyPort {
		tr.DialContext = dialPrivileged
	}
	return &Client{base: strings.TrimRight(base, "/"), identity: id, http: &http.Client{
		Transport: tr, Timeout: o.Timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Holder is the secret of who holds the ticket that this client claimed: another
// process renews and completes it with that.
func (c *Client) Holder() string { return c.identity.String() }

// dialPrivileged connects from a port below 1024.
func dialPrivileged(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var serr error
		err := c.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, serr)
	}}
	var err error
	for port := 1023; port >= 512; port-- {
		d.LocalAddr = &net.TCPAddr{Port: port}
		var c net.Conn
		if c, err = d.DialContext(ctx, network, addr); err == nil {
			return c, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
	}
	if errors.Is(err, unix.EACCES) {
		return nil, fmt.Errorf("asking from a port below 1024 needs root: %w", err)
	}
	return nil, err
}

// Claim asks for the ticket; called again, it renews it.
func (c *Client) Claim(ctx context.Context) (*Ticket, error) {
	sealed, err := c.post(ctx, "/latest/api/instar/launch")
	if err != nil {
		return nil, fmt.Errorf("claiming the launch ticket: %w", err)
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), c.identity)
	if err != nil {
		return nil, &InvalidError{fmt.Errorf("opening the launch ticket: %w", err)}
	}
	b, err := io.ReadAll(io.LimitReader(r, maxTicket))
	if err != nil {
		return nil, &InvalidError{fmt.Errorf("opening the launch ticket: %w", err)}
	}
	t, err := parse(b)
	if err != nil {
		return nil, &InvalidError{fmt.Errorf("reading the launch ticket: %w", err)}
	}
	return t, nil
}

// parse reads a ticket that was opened.
func parse(b []byte) (*Ticket, error) {
	var v struct{ Version int }
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, err
	}
	if v.Version != Version {
		return nil, fmt.Errorf("it has version %d, this program knows %d: use the initrd of the server's release", v.Version, Version)
	}
	t := new(Ticket)
	if err := json.Unmarshal(b, t); err != nil {
		return nil, err
	}
	if err := t.Mode.Check(); err != nil {
		return nil, fmt.Errorf("its mode: %w", err)
	}
	if t.ManifestBytes != nil {
		if sum := sha256.Sum256(t.ManifestBytes); hex.EncodeToString(sum[:]) != t.ManifestSHA256 {
			return nil, errors.New("its manifest is not the one whose digest it names")
		}
	}
	return t, nil
}

// Complete ends the ticket: the image is on the local disk.
func (c *Client) Complete(ctx context.Context) error {
	if _, err := c.post(ctx, "/latest/api/instar/launch/complete"); err != nil {
		return fmt.Errorf("completing the launch ticket: %w", err)
	}
	return nil
}

func (c *Client) post(ctx context.Context, path string) ([]byte, error) {
	body, err := json.Marshal(Request{Version, c.identity.Recipient().String()})
	if err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		if c.token == "" {
			token, err := c.do(ctx, http.MethodPut, "/latest/api/token", nil, http.Header{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": {"21600"}})
			if err != nil {
				return nil, err
			}
			if len(token) > maxToken || printable(string(token)) != string(token) || len(token) == 0 {
				return nil, errors.New("the metadata server's answer is no token")
			}
			c.token = string(token)
		}
		b, err := c.do(ctx, http.MethodPost, path, body, http.Header{"X-Aws-Ec2-Metadata-Token": {c.token}, "Content-Type": {"application/json"}})
		var refused *StatusError
		if errors.As(err, &refused) && refused.Status == http.StatusUnauthorized && attempt == 0 {
			c.token = "" // expired, or the server was started anew
			continue
		}
		return b, err
	}
}

func (c *Client) do(ctx context.Context, method, path string, body []byte, h http.Header) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = h
	res, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxTicket+1))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusNoContent {
		reason := http.StatusText(res.StatusCode)
		if strings.HasPrefix(res.Header.Get("Content-Type"), "text/plain") {
			reason, _, _ = strings.Cut(strings.TrimSpace(string(b)), "\n")
		}
		return nil, &StatusError{res.StatusCode, printable(reason[:min(len(reason), 300)])}
	}
	if len(b) > maxTicket {
		return nil, fmt.Errorf("the metadata server's answer has more than %d bytes", maxTicket)
	}
	return b, nil
}

// printable is s without what could do something to a console.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}
