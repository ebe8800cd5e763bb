package boot

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"
)

// fetchAhead is how many parts are in memory or under way at a time.
const fetchAhead = 3

// fetchTries is how often one part is asked for before the boot gives up.
const fetchTries = 8

// errExpired: the store no longer takes what the ticket gave.
var errExpired = errors.New("the store refuses the ticket's URL or credentials")

var errNotThere = errors.New("it is not in the store (404)")

// errWithheld: what a store answers for an object that is not there to who may
// not list, and for one that may not be read.
var errWithheld = errors.New("the store refuses it with fresh credentials too: it is not there, or they may not read it")

// freshTries is how often a ticket is renewed, with success, for one request.
const freshTries = 3

// notThere tells whether a store has no such object, as far as it says.
func notThere(err error) bool {
	return errors.Is(err, errNotThere) || errors.Is(err, errWithheld)
}

// fetcher gets objects from the store, each verified as a whole before anything
// of it is passed on.
type fetcher struct {
	client *http.Client
	stall  time.Duration // without a byte; then the request is tried again
	access *access
	say    func(format string, args ...any)
}

// object gets one object of at most limit bytes that good accepts, or says for
// good why not. what names it on the console.
func (f *fetcher) object(ctx context.Context, what, name string, limit int64, good func([]byte) bool) ([]byte, error) {
	return f.try(ctx, what, name, "", limit, nil, good)
}

// piece gets an object's bytes from off on, to fill p.
func (f *fetcher) piece(ctx context.Context, what, name string, off int64, p []byte) error {
	n := int64(len(p))
	_, err := f.try(ctx, what, name, fmt.Sprintf("bytes=%d-%d", off, off+n-1), n, p, func(b []byte) bool { return int64(len(b)) == n })
	return err
}

// try gets an object, or the span of it, in the memory of into if that is not nil:
// then it has room for limit bytes.
func (f *fetcher) try(ctx context.Context, what, name, span string, limit int64, into []byte, good func([]byte) bool) ([]byte, error) {
	var last error
	fresh := 0
	wait := 250 * time.Millisecond
	for try := range fetchTries {
		if try > 0 {
			f.say("root: %s: %v; trying again", what, last)
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("%s: %w (%w)", what, last, ctx.Err())
			case <-time.After(wait):
			}
			wait = min(2*wait, 5*time.Second)
		}
		req, stamp, err := f.access.find(ctx, name)
		switch {
		case errors.Is(err, errNoURL) && !errors.Is(err, errFinal):
			last = err
			continue
		case err != nil:
			return nil, final(fmt.Errorf("%s: %w", what, err))
		}
		if span != "" {
			req.Header.Set("Range", span)
		}
		data, err := f.get(req, limit, into)
		switch {
		case err == nil && good(data):
			return data, nil
		case err == nil:
			last = errors.New("its bytes are not those of the manifest")
		case errors.Is(err, errFinal):
			return nil, fmt.Errorf("%s: %w", what, err)
		case errors.Is(err, errExpired):
			if rerr := f.access.renew(ctx, stamp); rerr != nil {
				if errors.Is(rerr, errFinal) {
					return nil, fmt.Errorf("%s: %w", what, rerr)
				}
				err = fmt.Errorf("%w, and the ticket is not renewed: %w", err, rerr)
			} else if fresh++; fresh >= freshTries {
				return nil, fmt.Errorf("%s: %w", what, errWithheld)
			}
			last = err
		default:
			last = err
		}
	}
	return nil, fmt.Errorf("%s, tried %d times: %w", what, fetchTries, last)
}

// get reads one object. A body that does not move for the stall time ends it.
func (f *fetcher) get(req *http.Request, limit int64, into []byte) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	defer cancel(nil)
	watch := time.AfterFunc(f.stall, func() { cancel(fmt.Errorf("the store sent nothing for %v", f.stall)) })
	defer watch.Stop()
	resp, err := f.client.Do(req.WithContext(ctx))
	if err != nil {
		// A presigned URL is a secret: the error of Do would show it.
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err
		}
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			return nil, final(fmt.Errorf("the store's certificate is not trusted: %w: is its CA in the ticket or the initrd?", err))
		}
		if inv, ok := errors.AsType[x509.CertificateInvalidError](err); ok && inv.Reason == x509.Expired {
			return nil, final(fmt.Errorf("the store's certificate: %w; this machine's clock says %s", err, time.Now().UTC().Format(time.RFC3339)))
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			return nil, final(fmt.Errorf("the store's certificate: %w", err))
		}
		return nil, because(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusOK && req.Header.Get("Range") == "", resp.StatusCode == http.StatusPartialContent:
	case resp.StatusCode == http.StatusForbidden, resp.StatusCode == http.StatusUnauthorized:
		return nil, fmt.Errorf("%w (%s)", errExpired, resp.Status)
	case resp.StatusCode == http.StatusNotFound:
		return nil, final(errNotThere)
	default:
		return nil, fmt.Errorf("the store answers %s", resp.Status)
	}
	if resp.ContentLength > limit {
		return nil, final(fmt.Errorf("it has %d bytes, more than the %d it can have", resp.ContentLength, limit))
	}
	data := into[:0]
	if into == nil {
		data = make([]byte, 0, max(resp.ContentLength, 4<<10))
	}
	var over [1]byte // beyond what it can have there must be nothing
	for {
		space := over[:]
		if int64(len(data)) < limit {
			if len(data) == cap(data) {
				data = slices.Grow(data, len(data))
			}
			space = data[len(data):min(int64(cap(data)), limit)]
		}
		n, err := resp.Body.Read(space)
		watch.Reset(f.stall)
		if int64(len(data)+n) > limit {
			return nil, final(fmt.Errorf("it has more than the %d bytes it can have", limit))
		}
		data = data[:len(data)+n]
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
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		// Who reads the parts one after the other must not take it for their end.
		return errors.New("the store closed the connection")
	}
	return err
}
