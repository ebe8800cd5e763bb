package boot

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject"
)

// instance is what metadata says of this machine.
type instance = inject.Instance

// metadataClient speaks the instance metadata service, version 2: a token
// first, sent with every request. There is no falling back to version 1.
type metadataClient struct {
	base  string
	http  *http.Client
	token string
	date  func(time.Time) // told the server's time
}

const maxMetadata = 1 << 20 // bytes of one answer

// statusError is an answer other than 200.
type statusError struct {
	what   string
	status int
}

func (e *statusError) Error() string {
	return fmt.Sprintf("%s answers %d %s", e.what, e.status, http.StatusText(e.status))
}

func newMetadataClient(base string) (*metadataClient, error) {
	transport := &http.Transport{
		// Never by proxy: it would be another machine that is asked about.
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		ResponseHeaderTimeout: 10 * time.Second,
		DisableCompression:    true,
	}
	if strings.HasPrefix(base, "https:") {
		pool, err := rootCAs()
		if err != nil {
			return nil, err
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &metadataClient{
		base: strings.TrimRight(base, "/"),
		http: &http.Client{
			Transport: transport,
			Timeout:   20 * time.Second,
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return errors.New("the metadata server redirects, which is not followed")
			},
		},
	}, nil
}

// rootCAs are the certificates built into the initrd.
func rootCAs() (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	data, err := os.ReadFile(CAFile)
	if errors.Is(err, os.ErrNotExist) {
		return pool, nil
	}
	if err != nil {
		return nil, err
	}
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s has no certificate in it", CAFile)
	}
	return pool, nil
}

func (c *metadataClient) do(ctx context.Context, method, path string, header http.Header) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header = header
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if c.date != nil {
		if at, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
			c.date(at)
		}
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadata+1))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, &statusError{method + " " + c.base + path, resp.StatusCode}
	}
	if len(body) > maxMetadata {
		return nil, fmt.Errorf("%s %s: the answer is longer than %d bytes", method, path, maxMetadata)
	}
	return body, nil
}

func (c *metadataClient) authorize(ctx context.Context) error {
	header := http.Header{}
	header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
	token, err := c.do(ctx, http.MethodPut, "/latest/api/token", header)
	if err != nil {
		return err
	}
	t := strings.TrimSpace(string(token))
	if t == "" || strings.ContainsAny(t, "\r\n") {
		return fmt.Errorf("%s gave a token that is none", c.base)
	}
	c.token = t
	return nil
}

// get reads a leaf or listing; found is false if there is none.
func (c *metadataClient) get(ctx context.Context, path string) (body []byte, found bool, err error) {
	header := http.Header{}
	header.Set("X-Aws-Ec2-Metadata-Token", c.token)
	body, err = c.do(ctx, http.MethodGet, "/latest/"+path, header)
	if s, ok := errors.AsType[*statusError](err); ok && s.status == http.StatusNotFound {
		return nil, false, nil
	}
	return body, err == nil, err
}

// read asks for all that an instance is told.
func (c *metadataClient) read(ctx context.Context) (instance, error) {
	in := instance{Facts: make(map[string]string)}
	leaf := func(path string) (string, error) {
		body, found, err := c.get(ctx, "meta-data/"+path)
		if err != nil || !found {
			return "", err
		}
		return string(body), nil
	}
	var err error
	if in.ID, err = leaf("instance-id"); err != nil {
		return in, err
	}
	if in.ID == "" {
		return in, final(errors.New("the metadata server knows no instance-id for this machine: is there a record with its address?"))
	}
	if in.Hostname, err = leaf("local-hostname"); err != nil {
		return in, err
	}
	if in.Hostname == "" {
		if in.Hostname, err = leaf("hostname"); err != nil {
			return in, err
		}
	}
	for name, path := range map[string]string{
		"ami-id": "ami-id", "instance-type": "instance-type", "availability-zone": "placement/availability-zone",
		"region": "placement/region", "local-ipv4": "local-ipv4",
	} {
		v, err := leaf(path)
		if err != nil {
			return in, err
		}
		if v != "" {
			in.Facts[name] = v
		}
	}
	if in.Keys, err = c.keys(ctx); err != nil {
		return in, err
	}
	in.UserData, _, err = c.get(ctx, "user-data")
	return in, err
}

// keys reads the public keys: a listing of lines "0=name".
func (c *metadataClient) keys(ctx context.Context) ([]string, error) {
	list, found, err := c.get(ctx, "meta-data/public-keys/")
	if err != nil || !found {
		return nil, err
	}
	var keys []string
	for line := range strings.Lines(string(list)) {
		index, _, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || index == "" || strings.Trim(index, "0123456789") != "" {
			continue
		}
		if len(keys) >= 100 {
			return nil, errors.New("the metadata server lists more than 100 public keys")
		}
		key, found, err := c.get(ctx, "meta-data/public-keys/"+index+"/openssh-key")
		if err != nil {
			return nil, err
		}
		if found {
			keys = append(keys, strings.TrimSpace(string(key)))
		}
	}
	return keys, nil
}

// metadata asks the metadata server who this machine is, waiting for it.
func (m *machine) metadata(ctx context.Context) error {
	if m.handed != nil {
		m.instance = *m.handed
		m.say("metadata: instance %s, as the initrd before this one was told", m.instance.ID)
		return nil
	}
	if m.config.Net == "none" {
		return final(errors.New("there is no network to ask for metadata (instar.net=none)"))
	}
	client, err := newMetadataClient(m.config.Metadata)
	if err != nil {
		return err
	}
	client.date = m.setClock
	m.client = client
	told := ""
	err = until(ctx, func(ctx context.Context) error {
		err := client.authorize(ctx)
		if err == nil {
			m.instance, err = client.read(ctx)
		}
		if s, ok := errors.AsType[*statusError](err); ok && s.status == http.StatusForbidden {
			return final(fmt.Errorf("%w: metadata is switched off for this instance", err))
		}
		if err != nil && ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			m.say("metadata: waiting: %v", err)
		}
		return err
	})
	if err != nil {
		return err
	}
	m.client.date = nil
	if m.instance.User == "" {
		m.instance.User = m.config.User
	}
	m.instance.Facts["metadata"] = m.config.Metadata
	if m.instance.User != "" {
		m.instance.Facts["user"] = m.instance.User
	}
	m.say("metadata: instance %s, %d SSH keys, %d bytes of user data", m.instance.ID, len(m.instance.Keys), len(m.instance.UserData))
	return nil
}

// setClock sets a clock that is far off, as after years without a battery:
// certificates could not be judged by it. The image's own time service does
// the rest.
func (m *machine) setClock(at time.Time) {
	off := time.Until(at)
	if off.Abs() < time.Minute {
		return
	}
	tv := unix.NsecToTimeval(at.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		m.say("warning: the clock is off by %v and cannot be set: %v", off.Round(time.Second), err)
		return
	}
	m.say("clock set to %s by the metadata server (it was off by %v)", at.UTC().Format(time.RFC3339), off.Round(time.Second))
}
