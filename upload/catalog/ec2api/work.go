package ec2api

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/upload/catalog"
)

// How long a copy that failed waits before it is tried again: twice as long with
// each failure. Others get their turn meanwhile.
const (
	firstWait = time.Minute
	mostWait  = time.Hour
)

// waits are copies that failed and wait. It may be used concurrently.
type waits struct {
	mu sync.Mutex
	m  map[string]wait
}

type wait struct {
	long  time.Duration
	until time.Time
}

// failed has a copy wait from now on.
func (w *waits) failed(id string, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m == nil {
		w.m = make(map[string]wait)
	}
	long := min(max(2*w.m[id].long, firstWait), mostWait)
	w.m[id] = wait{long, now.Add(long)}
}

// done forgets a copy.
func (w *waits) done(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.m, id)
}

// ready are those of copies that do not wait; what is no copy any more is
// forgotten.
func (w *waits) ready(copies []*catalog.Image, now time.Time) []*catalog.Image {
	w.mu.Lock()
	defer w.mu.Unlock()
	there := make(map[string]bool, len(copies))
	for _, m := range copies {
		there[m.ID] = true
	}
	maps.DeleteFunc(w.m, func(id string, _ wait) bool { return !there[id] })
	return slices.DeleteFunc(copies, func(m *catalog.Image) bool { return now.Before(w.m[m.ID].until) })
}

// atOnce is how many copies a server makes at a time.
const atOnce = 2

// Work does what requests began and do not wait for, until ctx ends: it fills
// copies, takes up what agents made, and forgets old tasks. It looks every so
// often, and when a request says that there is something. What is interrupted
// goes on with the next server that looks. failed is told of what went wrong
// and is tried again; it may be called concurrently.
func (s *Server) Work(ctx context.Context, every time.Duration, failed func(error)) {
	if s.o.ReadOnly {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	var group errgroup.Group
	group.SetLimit(atOnce)
	defer group.Wait() // the work ends with ctx
	for {
		if err := s.Settle(ctx); err != nil && ctx.Err() == nil {
			failed(fmt.Errorf("taking up what agents made: %w", err))
		}
		copies, err := s.pendingCopies(ctx)
		if err != nil && ctx.Err() == nil {
			failed(fmt.Errorf("looking for copies to be made: %w", err))
		}
		if err == nil {
			copies = s.waits.ready(copies, s.o.Now())
		}
		for _, m := range copies {
			if _, busy := s.busy.LoadOrStore(m.ID, true); busy {
				continue
			}
			if !group.TryGo(func() error {
				defer s.busy.Delete(m.ID)
				switch err := s.fill(ctx, m); {
				case err == nil:
					s.waits.done(m.ID)
				case ctx.Err() == nil && !errors.Is(err, errLeased):
					s.waits.failed(m.ID, s.o.Now())
					failed(fmt.Errorf("copying %s from %s: %w", m.ID, m.SourceRegion, err))
				}
				return nil
			}) {
				s.busy.Delete(m.ID)
				break
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-s.wake:
		}
	}
}

// begun says that there is something to do.
func (s *Server) begun() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Server) pendingCopies(ctx context.Context) (out []*catalog.Image, err error) {
	err = s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		out = nil
		for m, err := range v.Images(ctx) {
			if err != nil {
				return err
			}
			if m.State == catalog.Pending && m.SourceImage != "" && m.SourceRegion != "" {
				out = append(out, m)
			}
		}
		return nil
	})
	return out, err
}

// source opens the catalog of a region that images are copied from; nil if it
// is not known here.
func (s *Server) source(ctx context.Context, region string) (*catalog.Catalog, error) {
	if region == s.o.Region {
		return s.o.Catalog, nil
	}
	if s.o.Sources == nil {
		return nil, nil
	}
	return s.o.Sources(ctx, region)
}

// fill copies what a pending copy consists of.
func (s *Server) fill(ctx context.Context, m *catalog.Image) error {
	from, err := s.source(ctx, m.SourceRegion)
	if err != nil || from == nil {
		return err // a server that knows the region does it
	}
	l, err := takeLease(ctx, s.o.Catalog.Objects(), m.ID, s.id, s.o.Now)
	if err != nil {
		return err
	}
	working, stop := context.WithCancel(ctx)
	go l.keep(working, stop)
	_, err = s.o.Catalog.CompleteCopy(working, catalog.Call{Account: m.Owner, By: settler}, m.ID, from, nil)
	stop()
	return errors.Join(err, l.release(context.WithoutCancel(ctx)))
}
