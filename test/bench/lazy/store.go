package main

import (
	"context"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/upload"
)

// line is what there is between this machine and the store.
type line struct {
	name  string
	rate  int64         // bytes a second, all requests together; 0: as fast as it goes
	delay time.Duration // before the first byte of each answer
}

// far is a store behind a line, which counts what comes by it.
type far struct {
	upload.Store
	line line

	mu       sync.Mutex
	free     time.Time // when the line has carried all that was asked for
	requests int
	packs    int // of them, for ranges of packs
	bytes    int64
}

// traffic is what came so far.
type traffic struct {
	requests, packs int
	bytes           int64
}

func (f *far) traffic() traffic {
	f.mu.Lock()
	defer f.mu.Unlock()
	return traffic{f.requests, f.packs, f.bytes}
}

// Get opens an object, or a range of it, at the end of the line.
func (f *far) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	f.mu.Lock()
	f.requests++
	if strings.HasPrefix(key, "packs/") {
		f.packs++
	}
	f.mu.Unlock()
	if err := pause(ctx, f.line.delay); err != nil {
		return nil, upload.Object{}, err
	}
	r, obj, err := f.Store.Get(ctx, key, o)
	if err != nil {
		return nil, obj, err
	}
	return &body{ReadCloser: r, ctx: ctx, far: f}, obj, nil
}

// ServerTime is the store's own, whom nothing delays.
func (f *far) ServerTime(context.Context) (time.Time, error) { return time.Now(), nil }

type body struct {
	io.ReadCloser
	ctx context.Context //nolint:containedctx // io.Reader has no place for one
	far *far
}

// Read takes its turn on the line, in pieces, as connections share one.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), 32<<10)])
	f := b.far
	f.mu.Lock()
	f.bytes += int64(n)
	wait := time.Duration(0)
	if f.line.rate > 0 {
		now := time.Now()
		if f.free.Before(now) {
			f.free = now
		}
		f.free = f.free.Add(time.Duration(int64(n) * int64(time.Second) / f.line.rate))
		wait = f.free.Sub(now)
	}
	f.mu.Unlock()
	if perr := pause(b.ctx, wait); perr != nil {
		return n, perr
	}
	return n, err
}

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
