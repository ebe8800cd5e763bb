package userdata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// NewClient is an HTTP client for [Fetch]: it refuses link-local addresses, so
// that no included address or redirect leads to the metadata server, whose
// answers are not user data. tries of each URL and the waits between them are
// Fetch's.
func NewClient() *http.Client {
	dialer := &net.Dialer{Timeout: 10 * time.Second, Control: refuseLinkLocal}
	return &http.Client{
		Timeout: 60 * time.Second,
		Transport: &http.Transport{
			DialContext:           dialer.DialContext,
			Proxy:                 http.ProxyFromEnvironment,
			TLSHandshakeTimeout:   10 * time.Second,
			ResponseHeaderTimeout: 20 * time.Second,
			DisableKeepAlives:     true,
			DisableCompression:    true,
		},
	}
}

// refuseLinkLocal judges the address that is really dialled, after any name
// resolution and redirect.
func refuseLinkLocal(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	a := ap.Addr().Unmap()
	if a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || a.WithZone("") == netip.MustParseAddr("fd00:ec2::254") {
		return fmt.Errorf("%w: #include of a link-local address", ErrUnsupported)
	}
	return nil
}

// includeTries is how often each URL is tried, and includeWait the first wait
// between, doubled each time.
const (
	includeTries = 4
	includeWait  = time.Second
)

// Fetch replaces each #include part by the parts found at its URLs, in order,
// includes of includes too. One URL that cannot be had is an error: nothing of
// the user data is to run then.
func Fetch(ctx context.Context, client *http.Client, parts []Part) ([]Part, error) {
	f := &fetcher{client: client}
	for _, p := range parts {
		f.p.bytes += len(p.Data)
	}
	if err := f.expand(ctx, parts, 0); err != nil {
		return nil, err
	}
	return f.out, nil
}

type fetcher struct {
	client *http.Client
	p      parser // for its counts
	out    []Part
	chain  []string
}

func (f *fetcher) expand(ctx context.Context, parts []Part, depth int) error {
	for _, part := range parts {
		if part.Kind != Include {
			f.out = append(f.out, part)
			continue
		}
		if depth >= MaxNesting {
			return fmt.Errorf("%w: #include nested more than %d deep", ErrLimit, MaxNesting)
		}
		for line := range strings.Lines(string(part.Data)) {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			if f.p.urls++; f.p.urls > MaxURLs {
				return fmt.Errorf("%w: #include of more than %d URLs", ErrLimit, MaxURLs)
			}
			if err := f.include(ctx, line, depth); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *fetcher) include(ctx context.Context, raw string, depth int) error {
	u, err := url.Parse(raw)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return fmt.Errorf("%w: #include takes http and https URLs only", ErrUnsupported)
	}
	for _, seen := range f.chain {
		if seen == raw {
			return fmt.Errorf("%w: #include of %s from itself", ErrLimit, show(u))
		}
	}
	f.chain = append(f.chain, raw)
	defer func() { f.chain = f.chain[:len(f.chain)-1] }()
	data, err := f.get(ctx, u)
	if err != nil {
		return err
	}
	before := len(f.p.out)
	if err := f.p.parse(data, "", "", depth+1); err != nil {
		return fmt.Errorf("#include of %s: %w", show(u), err)
	}
	found := append([]Part(nil), f.p.out[before:]...)
	f.p.out = f.p.out[:before]
	return f.expand(ctx, found, depth+1)
}

// show is a URL without what may be secret in it: user, query, fragment.
func show(u *url.URL) string { return u.Scheme + "://" + u.Host + u.EscapedPath() }

func (f *fetcher) get(ctx context.Context, u *url.URL) ([]byte, error) {
	var last error
	wait := includeWait
	for try := range includeTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("#include of %s: %w (%w)", show(u), ctx.Err(), last)
			case <-time.After(wait):
			}
			wait *= 2
		}
		data, final, err := f.once(ctx, u)
		if err == nil {
			return data, nil
		}
		if final {
			return nil, fmt.Errorf("#include of %s: %w", show(u), err)
		}
		last = err
	}
	return nil, fmt.Errorf("#include of %s, tried %d times: %w", show(u), includeTries, last)
}

// once tells with final that trying again is of no use.
func (f *fetcher) once(ctx context.Context, u *url.URL) (data []byte, final bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, true, err
	}
	resp, err := f.client.Do(req)
	if err != nil {
		// The error of Do quotes the URL; its cause does not.
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		return nil, errors.Is(err, ErrUnsupported), err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		retry := resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusRequestTimeout
		return nil, !retry, fmt.Errorf("the server answers %s", resp.Status)
	}
	left := MaxBytes - f.p.bytes
	data, err = io.ReadAll(io.LimitReader(resp.Body, int64(left)+1))
	if err != nil {
		return nil, false, err
	}
	if len(data) > left {
		return nil, true, fmt.Errorf("%w: more than %d bytes", ErrLimit, MaxBytes)
	}
	return data, false, nil
}
