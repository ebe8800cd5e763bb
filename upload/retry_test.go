package upload

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestRetrySchedule measures the pauses, on a clock of its own.
func TestRetrySchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := Retry{Attempts: 6, Base: 100 * time.Millisecond, Max: 500 * time.Millisecond}.withDefaults()
		var waits []time.Duration
		calls := 0
		last := time.Now()
		err := r.do(t.Context(), nil, func(context.Context, int) error {
			if calls > 0 {
				waits = append(waits, time.Since(last))
			}
			last = time.Now()
			calls++
			return &Error{Op: "put", retry: true}
		})
		var e *Error
		if !errors.As(err, &e) || e.Attempts != 6 || calls != 6 {
			t.Fatalf("%d calls, %v", calls, err)
		}
		differs := false
		for i, w := range waits {
			d := min(r.Base<<i, r.Max)
			if w < d/2 || w > d {
				t.Errorf("pause %d is %v, want %v to %v", i, w, d/2, d)
			}
			differs = differs || w != d
		}
		if !differs {
			t.Errorf("no jitter in %v", waits)
		}
	})
}

func TestRetryAfterIsHonoured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := Retry{Base: time.Millisecond, Max: 10 * time.Second}.withDefaults()
		for _, c := range []struct{ after, want time.Duration }{{3 * time.Second, 3 * time.Second}, {time.Hour, 10 * time.Second}} {
			begin := time.Now()
			n := 0
			err := r.do(t.Context(), nil, func(context.Context, int) error {
				if n++; n == 1 {
					return &Error{retry: true, after: c.after}
				}
				return nil
			})
			if got := time.Since(begin); err != nil || got != c.want {
				t.Errorf("Retry-After %v: waited %v, %v", c.after, got, err)
			}
		}
	})
}

func TestRetryEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := Retry{Attempts: 1000, Base: time.Second, Max: time.Second, Total: 10 * time.Second}.withDefaults()
		begin := time.Now()
		err := r.do(t.Context(), nil, func(context.Context, int) error { return &Error{retry: true} })
		if d := time.Since(begin); err == nil || d > 10*time.Second || d < 8*time.Second {
			t.Errorf("ended after %v with %v, want nearly 10 s", d, err)
		}

		n := 0
		r.do(t.Context(), nil, func(context.Context, int) error { n++; return &Error{} })
		r.do(t.Context(), nil, func(context.Context, int) error { n++; return errors.New("other") })
		if n != 2 {
			t.Errorf("what is not worth retrying was tried %d times", n)
		}

		ctx, cancel := context.WithCancelCause(t.Context())
		go func() { time.Sleep(500 * time.Millisecond); cancel(errors.New("enough")) }()
		begin, n = time.Now(), 0
		err = r.do(ctx, nil, func(context.Context, int) error { n++; return &Error{retry: true} })
		if d := time.Since(begin); d > time.Second || err == nil {
			t.Errorf("cancellation ended it after %v with %v", d, err)
		}
		n = 0
		if err := r.do(ctx, nil, func(context.Context, int) error { n++; return nil }); err == nil || err.Error() != "enough" || n != 0 {
			t.Errorf("a cancelled context: %v, %d calls", err, n)
		}
	})
}

func TestRetryAfterHeader(t *testing.T) {
	future := time.Now().Add(time.Minute).UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT")
	for h, want := range map[string]bool{"": false, "5": true, "-5": false, "x": false, "0": false, future: true, "Mon, 02 Jan 2006 15:04:05 GMT": false} {
		if got := retryAfter(h); (got > 0) != want {
			t.Errorf("%q gives %v", h, got)
		}
	}
}
