package boot

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/instar-image/instar/metadata/ticket"
)

// storeClient is an HTTP client that trusts the initrd's certificates, which it
// adds to, and those given, and goes through the proxy, if there is one.
func storeClient(pool *x509.CertPool, caCert, proxy string) (*http.Client, error) {
	if caCert != "" && !pool.AppendCertsFromPEM([]byte(caCert)) {
		return nil, errors.New("the ticket's ca-cert holds no certificate")
	}
	tr := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   30 * time.Second,
		ResponseHeaderTimeout: 60 * time.Second,
		MaxIdleConnsPerHost:   fetchAhead,
		DisableCompression:    true,
	}
	if proxy != "" {
		u, err := url.Parse(proxy)
		if err != nil {
			return nil, fmt.Errorf("instar.proxy: %w", err)
		}
		tr.Proxy = http.ProxyURL(u)
	}
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error {
		return errors.New("the store redirects, which is not followed")
	}}, nil
}

// access is what a ticket gives of access to the store, renewed when the store
// takes it no more.
type access struct {
	client *ticket.Client

	// renewing is held while the metadata server is asked, and taken before mu.
	renewing sync.Mutex
	failed   error     // what the last renewal ended with
	again    time.Time // until then nobody asks after it

	mu    sync.Mutex // never held across a request
	t     *ticket.Ticket
	stamp int // counts renewals
}

// renewPause is how long one failed renewal counts for all that need one: each
// may have waited for the metadata server.
const renewPause = 3 * time.Second

// errNoURL: the ticket gives no access to an object.
var errNoURL = errors.New("the ticket has neither a URL for it nor credentials")

// find makes the request for an object, with a fresh ticket if the one at hand
// has no URL for it: what became of a pack may be known only since. [errNoURL] that
// is not final says that there was no fresh ticket.
func (a *access) find(ctx context.Context, object string) (req *http.Request, stamp int, err error) {
	if req, stamp, err = a.request(ctx, object); !errors.Is(err, errNoURL) {
		return req, stamp, err
	}
	if rerr := a.renew(ctx, stamp); rerr != nil {
		return nil, 0, fmt.Errorf("%w, and is not renewed: %w", err, rerr)
	}
	if req, stamp, err = a.request(ctx, object); errors.Is(err, errNoURL) {
		return nil, 0, final(fmt.Errorf("%w: %w", err, errNotThere))
	}
	return req, stamp, err
}

// request makes the request for an object: by its presigned URL, else signed
// with the ticket's credentials. stamp is for renew.
func (a *access) request(ctx context.Context, object string) (req *http.Request, stamp int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if u := a.t.Objects[object]; u != "" {
		if req, err = http.NewRequestWithContext(ctx, http.MethodGet, u, nil); err != nil {
			return nil, 0, errors.New("the ticket's URL is none")
		}
		return req, a.stamp, nil
	}
	if a.t.Credentials == nil {
		return nil, a.stamp, fmt.Errorf("%s: %w", object, errNoURL)
	}
	u, region, err := objectURL(a.t, object)
	if err != nil {
		return nil, 0, err
	}
	if req, err = http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil); err != nil {
		return nil, 0, err
	}
	req.URL = u
	signGET(req, a.t.Credentials, region, time.Now())
	return req, a.stamp, nil
}

// renew asks for a fresh ticket, unless that was done since the request that
// has the stamp. Who needs none does not wait for it.
func (a *access) renew(ctx context.Context, stamp int) error {
	a.renewing.Lock()
	defer a.renewing.Unlock()
	if a.renewed(stamp) {
		return nil
	}
	if a.client == nil {
		return final(errors.New("nobody gives tickets"))
	}
	if time.Now().Before(a.again) {
		return a.failed
	}
	fresh, err := a.client.Claim(ctx)
	if err != nil {
		if ctx.Err() == nil { // else it says nothing of the server
			a.failed, a.again = err, time.Now().Add(renewPause)
		}
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if fresh.ManifestSHA256 != a.t.ManifestSHA256 {
		return final(errors.New("the renewed ticket is for another image"))
	}
	a.t.Objects, a.t.Credentials = fresh.Objects, fresh.Credentials
	a.stamp++
	return nil
}

// renewed tells whether there is a fresher ticket than the stamp's.
func (a *access) renewed(stamp int) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return stamp != a.stamp
}
