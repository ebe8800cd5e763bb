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
	"net/url"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
)

// fetchAhead is how many parts are in memory or under way at a time.
const fetchAhead = 3

// fetchTries is how often one part is asked for before the boot gives up.
const fetchTries = 8

// errExpired: the store no longer takes the URL.
var errExpired = errors.New("the store refuses the ticket's URL")

// fetcher gets a bundle's parts from the store, each verified as a whole
// before anything of it is passed on.
type fetcher struct {
	client *http.Client
	stall  time.Duration // without a byte; then the request is tried again
	// urls gives the URL of an object; renew asks for fresh ones, and is told
	// the one that failed.
	urls  func(name string) (string, error)
	renew func(ctx context.Context, old string) error
	say   func(format string, args ...any)
	got   func(bytes int)
}

// storeClient is an HTTP client that trusts the initrd's certificates and
// those given.
func storeClient(caCert string) (*http.Client, error) {
	pool, err := rootCAs()
	if err != nil {
		return nil, err
	}
	if caCert != "" && !pool.AppendCertsFromPEM([]byte(caCert)) {
		return nil, errors.New("the ticket's ca-cert holds no certificate")
	}
	return &http.Client{Transport: &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: pool},
		TLSHandshakeTimeout:   30 * time.Second,
		ResponseHeaderTimeout: 60 * time.Second,
		MaxIdleConnsPerHost:   fetchAhead,
		DisableCompression:    true,
	}}, nil
}

// part gets one part, or says for good why not.
func (f *fetcher) part(ctx context.Context, p ec2.ManifestPart) ([]byte, error) {
	var last error
	wait := 500 * time.Millisecond
	for try := range fetchTries {
		if try > 0 {
			f.say("root: part %s: %v; trying again", p.Filename, last)
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("part %s: %w (%w)", p.Filename, last, ctx.Err())
			case <-time.After(wait):
			}
			wait = min(2*wait, 10*time.Second)
		}
		u, err := f.urls(p.Filename)
		if err != nil {
			return nil, final(err)
		}
		data, err := f.get(ctx, u)
		switch {
		case err == nil && ec2.Sum(data) == p.SHA1:
			return data, nil
		case err == nil:
			last = errors.New("its bytes are not those of the manifest")
		case errors.Is(err, errFinal):
			return nil, fmt.Errorf("part %s: %w", p.Filename, err)
		case errors.Is(err, errExpired):
			if rerr := f.renew(ctx, u); rerr != nil {
				err = fmt.Errorf("%w, and the ticket is not renewed: %w", err, rerr)
			}
			last = err
		default:
			last = err
		}
	}
	return nil, fmt.Errorf("part %s, tried %d times: %w", p.Filename, fetchTries, last)
}

// get reads one object. A body that does not move for the stall time ends it.
func (f *fetcher) get(ctx context.Context, u string) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(f.stall, func() { cancel(fmt.Errorf("the store sent nothing for %v", f.stall)) })
	defer watch.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, final(errors.New("the ticket's URL is none"))
	}
	resp, err := f.client.Do(req)
	if err != nil {
		// A presigned URL is a secret: the error of Do would show it.
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			return nil, final(fmt.Errorf("the store's certificate is not trusted: %w: is its CA in the ticket or the initrd?", err))
		}
		return nil, because(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusOK:
	case resp.StatusCode == http.StatusForbidden, resp.StatusCode == http.StatusUnauthorized:
		return nil, fmt.Errorf("%w (%s)", errExpired, resp.Status)
	case resp.StatusCode == http.StatusNotFound:
		return nil, final(errors.New("it is not in the store (404)"))
	default:
		return nil, fmt.Errorf("the store answers %s", resp.Status)
	}
	if resp.ContentLength > ec2.MaxPartSize {
		return nil, final(fmt.Errorf("it has %d bytes, more than a part can", resp.ContentLength))
	}
	var data []byte
	if resp.ContentLength > 0 {
		data = make([]byte, 0, resp.ContentLength)
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := resp.Body.Read(buf)
		watch.Reset(f.stall)
		data = append(data, buf[:n]...)
		if len(data) > ec2.MaxPartSize {
			return nil, final(errors.New("it has more bytes than a part can"))
		}
		if errors.Is(err, io.EOF) {
			return data, nil
		}
		if err != nil {
			return nil, because(ctx, err)
		}
	}
}

// because prefers the reason a context was cancelled for.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// partsReader reads the parts of a bundle one after the other, some ahead.
type partsReader struct {
	queue  chan chan fetchedPart
	data   []byte
	got    func(int)
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

type fetchedPart struct {
	data []byte
	err  error
}

// reader starts fetching. Close ends it.
func (f *fetcher) reader(ctx context.Context, parts []ec2.ManifestPart) *partsReader {
	ctx, cancel := context.WithCancel(ctx)
	// The one being read and the one being waited to be queued count too.
	r := &partsReader{queue: make(chan chan fetchedPart, fetchAhead-2), got: f.got, cancel: cancel}
	r.wait.Go(func() {
		defer close(r.queue)
		for _, p := range parts {
			c := make(chan fetchedPart, 1)
			r.wait.Go(func() {
				data, err := f.part(ctx, p)
				c <- fetchedPart{data, err}
			})
			select {
			case r.queue <- c:
			case <-ctx.Done():
				return
			}
		}
	})
	return r
}

func (r *partsReader) Read(p []byte) (int, error) {
	for len(r.data) == 0 {
		c, ok := <-r.queue
		if !ok {
			return 0, io.EOF
		}
		part := <-c
		if part.err != nil {
			return 0, part.err
		}
		r.data = part.data
		r.got(len(part.data))
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// Close stops what is under way.
func (r *partsReader) Close() error {
	r.cancel()
	r.wait.Wait()
	return nil
}
