package ec2api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/instar-image/instar/upload"
)

// A lease keeps two servers from doing the same long work at once: an object
// catalog/leases/NAME, changed by conditional put. That is all it does: work is
// such that doing it twice does no harm, so a lease may end too early, and who
// forges one delays it.
const (
	leasePrefix = "catalog/leases/"
	leaseTime   = 2 * time.Minute
	maxLease    = 4096 // bytes
)

type leaseObject struct {
	Holder string    `json:"holder"`
	Until  time.Time `json:"until"`
}

type lease struct {
	store  upload.Store
	key    string
	holder string
	now    func() time.Time
	etag   string
}

// errLeased says that somebody else is at it.
var errLeased = errors.New("another server is at it")

// takeLease takes a lease that nobody holds.
func takeLease(ctx context.Context, store upload.Store, name, holder string, now func() time.Time) (*lease, error) {
	l := &lease{store: store, key: leasePrefix + name, holder: holder, now: now}
	data, o, err := upload.GetBytes(ctx, store, l.key, maxLease)
	put := upload.PutOptions{IfNoneMatch: true}
	switch {
	case err == nil:
		var held leaseObject
		// One that cannot be read is nobody's.
		if json.Unmarshal(data, &held) == nil && now().Before(held.Until) && held.Until.Before(now().Add(2*leaseTime)) {
			return nil, errLeased
		}
		put = upload.PutOptions{IfMatch: o.ETag}
	case !errors.Is(err, upload.ErrNotExist):
		return nil, fmt.Errorf("lease %s: %w", name, err)
	}
	return l, l.put(ctx, put)
}

func (l *lease) put(ctx context.Context, o upload.PutOptions) error {
	data, err := json.Marshal(leaseObject{l.holder, l.now().UTC().Add(leaseTime)})
	if err != nil {
		return err
	}
	put, err := upload.PutBytes(ctx, l.store, l.key, data, o)
	if errors.Is(err, upload.ErrExist) {
		return errLeased
	} else if err != nil {
		return fmt.Errorf("%s: %w", l.key, err)
	}
	if put.ETag == "" {
		put, err = l.store.Stat(ctx, l.key)
	}
	l.etag = put.ETag
	return err
}

// keep renews the lease until ctx ends, and ends work when it is lost.
func (l *lease) keep(ctx context.Context, lost context.CancelFunc) {
	tick := time.NewTicker(leaseTime / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := l.put(ctx, upload.PutOptions{IfMatch: l.etag}); errors.Is(err, errLeased) {
				lost()
				return
			}
		}
	}
}

// release gives the lease back.
func (l *lease) release(ctx context.Context) error { return l.store.Delete(ctx, l.key) }
