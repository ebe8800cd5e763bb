// Package lease keeps two processes from doing the same long work at once.
//
// What goes in: a store and the name of the work. What comes out: the lease, or
// [ErrTaken]. It touches the object catalog/leases/NAME, changed by conditional
// put and never deleted, and nothing else. That is all a lease does: work is such that doing it
// twice does no harm, so a lease may end too early, and who forges one delays it.
package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/instar-image/instar/upload"
)

const (
	prefix   = "catalog/leases/"
	duration = 2 * time.Minute
	glance   = 5 * time.Second // how often a note is written that changed
	maxLease = 4096            // bytes
)

// ErrTaken says that somebody else is at it.
var ErrTaken = errors.New("another process is at it")

type object struct {
	Holder  string    `json:"holder"`
	Until   time.Time `json:"until"`
	Percent int       `json:"percent,omitempty"`
}

// Lease is one that is held. Its methods may be called concurrently.
type Lease struct {
	store  upload.Store
	key    string
	holder string
	now    func() time.Time

	writing sync.Mutex // held while the object is put, before mu

	mu      sync.Mutex // covers what follows
	etag    string
	percent int
	lost    bool // another has it
}

// Take takes a lease that nobody holds: else [ErrTaken]. holder is anything that
// tells processes apart; now is this machine's clock.
func Take(ctx context.Context, store upload.Store, name, holder string, now func() time.Time) (*Lease, error) {
	l := &Lease{store: store, key: prefix + name, holder: holder, now: now}
	data, o, err := upload.GetBytes(ctx, store, l.key, maxLease)
	put := upload.PutOptions{IfNoneMatch: true}
	switch {
	case err == nil:
		var held object
		// One that cannot be read is nobody's.
		if json.Unmarshal(data, &held) == nil && now().Before(held.Until) && held.Until.Before(now().Add(2*duration)) {
			return nil, ErrTaken
		}
		put = upload.PutOptions{IfMatch: o.ETag}
	case !errors.Is(err, upload.ErrNotExist):
		return nil, fmt.Errorf("lease %s: %w", name, err)
	}
	if err := l.put(ctx, put, now().UTC().Add(duration)); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Lease) put(ctx context.Context, o upload.PutOptions, until time.Time) error {
	l.mu.Lock()
	percent := l.percent
	l.mu.Unlock()
	data, err := json.Marshal(object{l.holder, until, percent})
	if err != nil {
		return err
	}
	put, err := upload.PutBytes(ctx, l.store, l.key, data, o)
	if errors.Is(err, upload.ErrExist) || o.IfMatch != "" && errors.Is(err, upload.ErrNotExist) {
		return ErrTaken
	} else if err != nil {
		return fmt.Errorf("%s: %w", l.key, err)
	}
	if put.ETag == "" {
		if put, err = l.store.Stat(ctx, l.key); err != nil {
			return fmt.Errorf("%s: %w", l.key, err)
		}
	}
	l.mu.Lock()
	l.etag = put.ETag
	l.mu.Unlock()
	return nil
}

// Note says how far the work is, 0 to 100, for [Percent]; Keep writes it.
func (l *Lease) Note(percent int) {
	l.mu.Lock()
	l.percent = min(max(percent, 0), 100)
	l.mu.Unlock()
}

// Keep renews the lease until ctx ends, and ends work when it is lost.
func (l *Lease) Keep(ctx context.Context, lost context.CancelFunc) {
	tick := time.NewTicker(glance)
	defer tick.Stop()
	written, renewed := 0, 0
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		l.mu.Lock()
		percent := l.percent
		l.mu.Unlock()
		if percent == written && time.Duration(n-renewed)*glance < duration/4 {
			continue
		}
		err := l.renew(ctx)
		if errors.Is(err, ErrTaken) {
			lost()
			return
		}
		if err == nil {
			written, renewed = percent, n
		}
	}
}

// renew puts the lease's end off, and remembers if it is another's.
func (l *Lease) renew(ctx context.Context) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if err := ctx.Err(); err != nil {
		return err // it may have been released
	}
	l.mu.Lock()
	etag := l.etag
	l.mu.Unlock()
	err := l.put(ctx, upload.PutOptions{IfMatch: etag}, l.now().UTC().Add(duration))
	if errors.Is(err, ErrTaken) {
		l.mu.Lock()
		l.lost = true
		l.mu.Unlock()
	}
	return err
}

// Release gives the lease back, if it is not another's by now: nobody holds it
// then. The context of Keep has ended before.
func (l *Lease) Release(ctx context.Context) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	etag, lost := l.etag, l.lost
	l.percent = 0
	l.mu.Unlock()
	if lost {
		return nil
	}
	err := l.put(ctx, upload.PutOptions{IfMatch: etag}, time.Time{})
	if !errors.Is(err, ErrTaken) {
		return err
	}
	// It is another's, or the answer to the last renewal was lost.
	data, o, err := upload.GetBytes(ctx, l.store, l.key, maxLease)
	if errors.Is(err, upload.ErrNotExist) || errors.Is(err, upload.ErrTooLarge) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", l.key, err)
	}
	var held object
	if json.Unmarshal(data, &held) != nil || held.Holder != l.holder {
		return nil
	}
	err = l.put(ctx, upload.PutOptions{IfMatch: o.ETag}, time.Time{})
	if errors.Is(err, ErrTaken) {
		return nil
	}
	return err
}

// Percent is how far work is whose lease is held: 0 to 100 by its holder's word,
// 0 if nobody is at it.
func Percent(ctx context.Context, store upload.Store, name string) (int, error) {
	data, _, err := upload.GetBytes(ctx, store, prefix+name, maxLease)
	if errors.Is(err, upload.ErrNotExist) || errors.Is(err, upload.ErrTooLarge) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("lease %s: %w", name, err)
	}
	var o object
	if json.Unmarshal(data, &o) != nil {
		return 0, nil
	}
	return min(max(o.Percent, 0), 100), nil
}
