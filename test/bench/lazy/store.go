package main

import (
	"context"
	"fmt"
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

// pacing lets bytes by as fast as a line carries those of all requests together.
type pacing struct {
	line line

	mu   sync.Mutex
	free time.Time // when the line has carried all that was asked for
}

// carry waits until the line has carried n bytes more.
func (p *pacing) carry(ctx context.Context, n int) error {
	if p.line.rate == 0 {
		return ctx.Err()
	}
	p.mu.Lock()
	now := time.Now()
	if p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(int64(n) * int64(time.Second) / p.line.rate))
	wait := p.free.Sub(now)
	p.mu.Unlock()
	return pause(ctx, wait)
}

// far is a store behind a line, which counts what comes by it.
type far struct {
	upload.Store
	line *pacing
	none string // an object that it does not have

	mu       sync.Mutex
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
	if err := pause(ctx, f.line.line.delay); err != nil {
		return nil, upload.Object{}, err
	}
	if key == f.none {
		return nil, upload.Object{}, fmt.Errorf("%s: %w", key, upload.ErrNotExist)
	}
	r, obj, err := f.Store.Get(ctx, key, o)
	if err != nil {
		return nil, obj, err
	}
	return &paced{ReadCloser: r, ctx: ctx, line: f.line, count: func(n int) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.bytes += int64(n)
	}}, obj, nil
}

// ServerTime is the store's own, whom nothing delays.
func (f *far) ServerTime(context.Context) (time.Time, error) { return time.Now(), nil }

// paced is what comes by a line.
type paced struct {
	io.ReadCloser
	ctx   context.Context //nolint:containedctx // io.Reader has no place for one
	line  *pacing
	count func(n int) // nil: nobody counts
}

// Read takes its turn on the line, in pieces, as connections share one.
func (b *paced) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), 32<<10)])
	if b.count != nil {
		b.count(n)
	}
	if perr := b.line.carry(b.ctx, n); perr != nil {
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
