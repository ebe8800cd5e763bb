package upload

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// Retry says how failed requests are repeated. This is the only place where
// that is decided: the SDK's own retries are off. The unit is the request (one
// PUT, one part of a multipart upload, one page of a list), and a Get that
// breaks off goes on where it stopped. The zero value takes the defaults.
type Retry struct {
	Attempts int           // per request, the first included; default 8; 1 never repeats
	Base     time.Duration // first delay, doubled each time; the delay is drawn from [d/2, d); default 250 ms
	Max      time.Duration // longest delay, also for a server's Retry-After; default 20 s
	Total    time.Duration // no attempt begins after this much time; default 15 min
}

func (r Retry) withDefaults() Retry {
	if r.Attempts <= 0 {
		r.Attempts = 8
	}
	if r.Base <= 0 {
		r.Base = 250 * time.Millisecond
	}
	if r.Max <= 0 {
		r.Max = 20 * time.Second
	}
	if r.Total <= 0 {
		r.Total = 15 * time.Minute
	}
	return r
}

// delay is how long to wait before attempt n+1 (n counts from 1).
func (r Retry) delay(n int, after time.Duration) time.Duration {
	d := r.Max
	if n < 30 && r.Base<<(n-1) < r.Max && r.Base<<(n-1) > 0 {
		d = r.Base << (n - 1)
	}
	d = d/2 + rand.N(d/2+1)
	return max(d, min(after, r.Max))
}

// RetryEvent tells of a request that failed and will be repeated.
type RetryEvent struct {
	Op, Key string
	Attempt int           // the one that failed, from 1
	Wait    time.Duration // until the next
	Err     error
}

// do runs f until it succeeds, fails for good, or the policy ends. f's error
// must be an *Error for it to be retried.
func (r Retry) do(ctx context.Context, notify func(RetryEvent), f func(ctx context.Context, attempt int) error) error {
	start := time.Now()
	for n := 1; ; n++ {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := f(ctx, n)
		if err == nil {
			return nil
		}
		var e *Error
		if !errors.As(err, &e) {
			return err
		}
		e.Attempts = n
		if !e.retry || n >= r.Attempts || ctx.Err() != nil {
			return err
		}
		wait := r.delay(n, e.after)
		if time.Since(start)+wait > r.Total {
			return err
		}
		if notify != nil {
			notify(RetryEvent{Op: e.Op, Key: e.Key, Attempt: n, Wait: wait, Err: err})
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return err
		case <-t.C:
		}
	}
}
