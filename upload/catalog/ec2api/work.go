package ec2api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/lease"
)

// How long work that failed waits before it is tried again: twice as long with
// each failure. Others get their turn meanwhile.
const (
	firstWait = time.Minute
	mostWait  = time.Hour
)

// job is work that a request began: a copy to be filled, an image to be stored or
// restored.
type job struct {
	id    string
	owner string // the account that asked
	what  string // for people
	run   func(context.Context) error
}

// inTurn has the jobs of one account after the other, so that nobody waits for all
// that another asked for.
func inTurn(jobs []job) []job {
	turn := make([]int, len(jobs)) // how many of its owner's come before
	count := make(map[string]int)
	order := make([]int, len(jobs))
	for i, j := range jobs {
		turn[i], order[i] = count[j.owner], i
		count[j.owner]++
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(turn[a], turn[b]) })
	out := make([]job, len(jobs))
	for i, n := range order {
		out[i] = jobs[n]
	}
	return out
}

// roomFor makes sure that an account has not begun more than others can wait for.
func (s *Server) roomFor(ctx context.Context, account string) error {
	jobs, err := s.jobs(ctx)
	if err != nil {
		return err
	}
	n := 0
	for _, j := range jobs {
		if j.owner == account {
			n++
		}
	}
	if n >= s.o.MaxImages {
		return refuse(codeLimit, "%d images of the account are being copied, stored or restored: wait for some of them", n)
	}
	return nil
}

// waits are jobs that failed and wait. It may be used concurrently.
type waits struct {
	mu sync.Mutex
	m  map[string]wait
}

type wait struct {
	long  time.Duration
	until time.Time
}

// failed has a job wait from now on.
func (w *waits) failed(id string, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m == nil {
		w.m = make(map[string]wait)
	}
	long := min(max(2*w.m[id].long, firstWait), mostWait)
	w.m[id] = wait{long, now.Add(long)}
}

// later has a job that somebody else does wait for a while.
func (w *waits) later(id string, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m == nil {
		w.m = make(map[string]wait)
	}
	w.m[id] = wait{w.m[id].long, now.Add(firstWait)}
}

// done forgets a job.
func (w *waits) done(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.m, id)
}

// ready are those of jobs that do not wait; what is no job any more is forgotten.
func (w *waits) ready(jobs []job, now time.Time) []job {
	w.mu.Lock()
	defer w.mu.Unlock()
	there := make(map[string]bool, len(jobs))
	for _, j := range jobs {
		there[j.id] = true
	}
	maps.DeleteFunc(w.m, func(id string, _ wait) bool { return !there[id] })
	return slices.DeleteFunc(jobs, func(j job) bool { return now.Before(w.m[j.id].until) })
}

// atOnce is how many jobs a server does at a time.
const atOnce = 2

// Work does what requests began and do not wait for, until ctx ends: it fills
// copies, stores and restores images, takes up what agents made, and forgets old
// tasks. It looks every so often, and when a request says that there is something.
// What is interrupted goes on with the next server that looks. failed is told of
// what went wrong and is tried again; it may be called concurrently.
func (s *Server) Work(ctx context.Context, every time.Duration, failed func(error)) {
	if s.o.ReadOnly {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	var group errgroup.Group
	group.SetLimit(atOnce)
	defer group.Wait() // the work ends with ctx
	// A catalog must not expire because of what else there is to do.
	var fresh sync.WaitGroup
	defer fresh.Wait()
	fresh.Go(func() { s.keepFresh(ctx, every, failed) })
	for {
		if err := s.Settle(ctx); err != nil && ctx.Err() == nil {
			failed(fmt.Errorf("taking up what agents made: %w", err))
		}
		jobs, err := s.jobs(ctx)
		if err != nil && ctx.Err() == nil {
			failed(fmt.Errorf("looking for what is to be done: %w", err))
		}
		if err == nil {
			jobs = inTurn(s.waits.ready(jobs, s.o.Now()))
		}
		for _, j := range jobs {
			if _, busy := s.busy.LoadOrStore(j.id, true); busy {
				continue
			}
			if !group.TryGo(func() error {
				defer s.begun() // there is room for another
				defer s.busy.Delete(j.id)
				switch err := j.run(ctx); {
				case err == nil:
					s.waits.done(j.id)
				case errors.Is(err, lease.ErrTaken), errors.Is(err, errElsewhere):
					s.waits.later(j.id, s.o.Now())
				case ctx.Err() == nil:
					s.waits.failed(j.id, s.o.Now())
					failed(fmt.Errorf("%s: %w", j.what, err))
				}
				return nil
			}) {
				s.busy.Delete(j.id)
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

// keepFresh renews the catalog before it expires, until ctx ends.
func (s *Server) keepFresh(ctx context.Context, every time.Duration, failed func(error)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if _, err := s.o.Catalog.KeepFresh(ctx); err != nil && ctx.Err() == nil {
			failed(fmt.Errorf("renewing the catalog before it expires: %w", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
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

// jobs are what is to be done, by what the catalog has now.
func (s *Server) jobs(ctx context.Context) (out []job, err error) {
	err = s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		out = nil
		for m, err := range v.Images(ctx) {
			switch {
			case err != nil:
				return err
			case m.State != catalog.Pending:
			case m.SourceObject != "":
				out = append(out, job{m.ID, m.Owner, fmt.Sprintf("restoring %s from %s", m.ID, m.SourceObject), func(ctx context.Context) error {
					_, err := s.o.Catalog.CompleteRestore(ctx, catalog.Call{Account: m.Owner, By: settler}, s.id, m.ID, nil)
					return err
				}})
			case m.SourceImage != "" && m.SourceRegion != "":
				out = append(out, job{m.ID, m.Owner, fmt.Sprintf("copying %s from %s", m.ID, m.SourceRegion), func(ctx context.Context) error { return s.fill(ctx, m) }})
			}
		}
		tasks, err := v.StoreTasks(ctx, "")
		for _, t := range tasks {
			if t.State == catalog.InProgress {
				out = append(out, job{t.Owner + "/" + t.ID(), t.Owner, fmt.Sprintf("storing %s in %s/%s", t.Image, t.Bucket, t.Key), func(ctx context.Context) error {
					_, err := s.o.Catalog.CompleteStore(ctx, s.id, t, nil)
					return err
				}})
			}
		}
		return err
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

// errElsewhere says that a server that knows the region does it.
var errElsewhere = errors.New("the region is not known to this server")

// fill copies what a pending copy consists of.
func (s *Server) fill(ctx context.Context, m *catalog.Image) error {
	from, err := s.source(ctx, m.SourceRegion)
	if err != nil {
		return err
	}
	if from == nil {
		return errElsewhere
	}
	l, err := lease.Take(ctx, s.o.Catalog.Objects(), m.ID, s.id, s.o.Now)
	if err != nil {
		return err
	}
	working, stop := context.WithCancel(ctx)
	go l.Keep(working, stop)
	_, err = s.o.Catalog.CompleteCopy(working, catalog.Call{Account: m.Owner, By: settler}, m.ID, from, nil)
	stop()
	return errors.Join(err, l.Release(context.WithoutCancel(ctx)))
}
