// Package storesource reads instance records from an object store, so that
// many metadata servers serve one fleet, and keeps there what changes.
//
// What goes in: a store with an object instances/ID for every instance, signed
// by an allowed signer and sealed to the servers (see [Seal]). What comes out:
// a [metadata.Source] that follows the store, and a [metadata.State] whose
// token keys, events and withdrawals all servers of the store share. Unsigned
// objects are refused: whoever writes the bucket would otherwise own every
// instance. An object's old version can be put back by whoever writes the
// bucket; use a versioned or locked bucket where that matters.
package storesource

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/upload"
)

// maxObject is the most an object may have, in bytes.
const maxObject = 512 << 10

// Prefix is where the records are in the store.
const Prefix = "instances/"

// Options say what is read and who is believed. All but Every are required.
type Options struct {
	Store      upload.Store
	Signers    []Signer
	Identities []age.Identity // that open the objects
	Every      time.Duration  // between looks; default 10 s
}

// Source follows the records of a store. It is made by [Open].
type Source struct {
	o   Options
	set atomic.Pointer[metadata.Set]

	mu      sync.Mutex // one load at a time
	objects map[string]object
}

var _ metadata.Source = (*Source)(nil)

type object struct {
	etag string
	in   *metadata.Instance // the last good record, nil if there was none
	err  error              // of this version
}

// Open reads the records. An object that is refused is reported in the error;
// the source is usable all the same, without that instance.
func Open(ctx context.Context, o Options) (*Source, error) {
	if o.Every == 0 {
		o.Every = 10 * time.Second
	}
	if len(o.Signers) == 0 || len(o.Identities) == 0 {
		return nil, errors.New("records in a store need allowed signers and an identity to open them")
	}
	s := &Source{o: o}
	empty, err := metadata.NewSet()
	if err != nil {
		return nil, err
	}
	s.set.Store(empty)
	return s, s.Reload(ctx)
}

// Instances returns the current set.
func (s *Source) Instances() *metadata.Set { return s.set.Load() }

// Reload looks at the store. A refused object keeps the record it had before;
// records that contradict each other keep the whole set of before.
func (s *Source) Reload(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	objects := make(map[string]object, len(s.objects))
	var changed []string
	for o, err := range s.o.Store.List(ctx, Prefix) {
		if err != nil {
			return fmt.Errorf("listing the records: %w", err)
		}
		id := strings.TrimPrefix(o.Key, Prefix)
		have, ok := s.objects[id]
		if !ok || have.etag != o.ETag || o.ETag == "" {
			changed = append(changed, id)
		}
		objects[id] = have
	}
	read := make([]object, len(changed))
	each(len(changed), func(i int) {
		o := &read[i]
		o.in, o.etag, o.err = s.read(ctx, Prefix+changed[i], changed[i])
	})
	for i, id := range changed {
		if read[i].err != nil {
			read[i].in = objects[id].in // the last good one
		}
		objects[id] = read[i]
	}
	var instances []*metadata.Instance
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(objects)) {
		if err := objects[id].err; err != nil {
			errs = append(errs, err)
		}
		if in := objects[id].in; in != nil {
			instances = append(instances, in)
		}
	}
	set, err := metadata.NewSet(instances...)
	if err != nil {
		return errors.Join(some(errs), err)
	}
	s.objects = objects
	s.set.Store(set)
	return some(errs)
}

// each calls f for 0 to n-1, some at a time: stores are far away.
func each(n int, f func(int)) {
	var group errgroup.Group
	group.SetLimit(16)
	for i := range n {
		group.Go(func() error { f(i); return nil })
	}
	_ = group.Wait() // f has no error to give
}

// some joins errors, but not more of them than somebody would read: whoever
// fills a bucket with nonsense is not to fill the log too.
func some(errs []error) error {
	const most = 20
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if n := len(errs) - most; n > 0 {
		errs = append(errs[:most:most], fmt.Errorf("and %d more", n))
	}
	return errors.Join(errs...)
}

func (s *Source) read(ctx context.Context, key, id string) (*metadata.Instance, string, error) {
	b, o, err := upload.GetBytes(ctx, s.o.Store, key, maxObject)
	if err != nil {
		return nil, "", fmt.Errorf("reading the record %s: %w", key, err)
	}
	record, err := open(b, id, s.o.Signers, s.o.Identities)
	if err != nil {
		return nil, o.ETag, fmt.Errorf("the record %s is refused: %w", key, err)
	}
	in, err := metadata.Decode(key, record, metadata.DecodeOptions{})
	if err != nil {
		return nil, o.ETag, err
	}
	if in.ID != id {
		return nil, o.ETag, fmt.Errorf("the record %s is refused: it is instance %s's", key, in.ID)
	}
	return in, o.ETag, nil
}

// Watch looks at the store again and again until ctx ends.
func (s *Source) Watch(ctx context.Context, after func(error)) error {
	tick := time.NewTicker(s.o.Every)
	defer tick.Stop()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			before := s.Instances()
			err := s.Reload(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil || failed || before.Len() != s.Instances().Len() {
				after(err)
			}
			failed = err != nil
		}
	}
}
