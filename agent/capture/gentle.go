package capture

import (
	"context"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	gentleRead = 128 << 10            // bytes others may have to wait for at a disk
	gentleNap  = time.Millisecond     // shorter ones are saved up: timers are not that exact
	gentleDebt = 2 * time.Second      // the longest: one read that hung is not made up for
	gentleLead = 5 * time.Millisecond // of the time that may be read beforehand
)

// gentle is a source that spends but a share of the time on reading. That holds
// for all disks, whatever their scheduler: what comes from the page cache takes
// next to no time, and a disk that others keep busy makes each read take longer
// and the pause after it too.
type gentle struct {
	filetree.Source
	pauses float64 // seconds for each second of reading

	mu    sync.Mutex
	until time.Time // what was read so far is made up for then
}

// newGentle spends percent of the time on reading, 1 to 99.
func newGentle(src filetree.Source, percent int) *gentle {
	return &gentle{Source: src, pauses: float64(100-percent) / float64(percent)}
}

func (g *gentle) Open(ctx context.Context, id filetree.ID) (filetree.File, error) {
	if err := g.wait(ctx); err != nil {
		return nil, err
	}
	begun := time.Now()
	f, err := g.Source.Open(ctx, id)
	g.took(time.Since(begun))
	if err != nil {
		return nil, err
	}
	return &gentleFile{f, g, ctx}, nil
}

// took says that reading took a while.
func (g *gentle) took(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if early := time.Now().Add(-gentleLead); g.until.Before(early) {
		g.until = early
	}
	g.until = g.until.Add(min(time.Duration(float64(d)*g.pauses), gentleDebt))
}

// wait returns when it is time to read again.
func (g *gentle) wait(ctx context.Context) error {
	g.mu.Lock()
	d := time.Until(g.until)
	g.mu.Unlock()
	if d < gentleNap {
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

type gentleFile struct {
	filetree.File
	g   *gentle
	ctx context.Context //nolint:containedctx // of who opened it
}

func (f *gentleFile) ReadAt(p []byte, off int64) (n int, err error) {
	for err == nil && n < len(p) {
		if err := f.g.wait(f.ctx); err != nil {
			return n, err
		}
		part := p[n:min(n+gentleRead, len(p))]
		begun := time.Now()
		var k int
		k, err = f.File.ReadAt(part, off+int64(n))
		f.g.took(time.Since(begun))
		n += k
	}
	return n, err
}
