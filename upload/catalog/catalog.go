package catalog

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// Catalog is the catalog of one region, in a store.
type Catalog struct {
	objects upload.Store
	opt     Options
	memory  *memory

	reading chan struct{} // held by whoever asks for the head
	mu      sync.Mutex
	begun   int64 // readings of the head
	done    int64 // the last one that succeeded
	latest  *View // by it

	writing chan struct{} // held by whoever commits
	queue   []*request    // under mu
	checked bool          // the store keeps conditions
}

// Options says whom to trust, and what the catalog may do. The zero value can
// do nothing.
type Options struct {
	// Trust says whose signatures count: namespace instar-catalog, principal
	// the region. Without it nothing is read: [ErrNoTrust].
	Trust *keys.AllowedSigners

	// Signer signs changes; without it there are none: [ErrReadOnly].
	Signer keys.Signer

	// Region is the one the catalog is expected to be of; "" takes what the
	// head says, whose signer must be allowed to speak for that region.
	Region string

	// State is a directory, made if it is missing, that remembers the newest
	// state seen. It may be shared between processes. "" remembers as long as
	// the Catalog is open.
	State string

	// MaxAge is how old the head may be; 0 is any age. Beyond it: [ErrStale].
	MaxAge time.Duration

	// AtLeast is the least sequence the head may have; below it: [ErrRollback].
	AtLeast int64

	// Expires is how long heads signed here are taken for the newest; 0 as long
	// as the one before, less than 0 for ever. Somebody must call
	// [Catalog.KeepFresh] in time.
	Expires time.Duration

	// Lapsed takes heads that have expired, too: for who renews one, and knows
	// that it is the newest. It also signs a head that is older by this machine's
	// clock than the one before, which is [ErrClock] else.
	Lapsed bool

	// Images are the Instar images of the catalog's own store, to check what
	// is registered, to copy, and to share keys. Without it Instar images are
	// not registered.
	Images *images.Store

	// Bucket opens another bucket of the region, for EC2 bundles; the caller
	// of Bucket closes it. Without it they are not registered.
	Bucket func(ctx context.Context, bucket string) (upload.Store, error)

	// Folder is where bundles that are copied here go, below bundles/ID:
	// BUCKET/PREFIX as Bucket opens it. "" is the catalog's own bucket and prefix,
	// which a directory does not have.
	Folder string

	// Missed is told why what only helps, a boot trace or an opening, did not come
	// along with an image that is copied or restored; nil: nobody is. It may be called concurrently.
	Missed func(error)

	// Now is this machine's clock; nil is time.Now.
	Now func() time.Time

	// NewID draws an id "ami-", "aki-", "ari-" or "key-" and 17 hex digits, of
	// the prefix it is given; one that was used before is drawn again. nil is
	// at random, which is what keeps several writers apart.
	NewID func(prefix string) (string, error)
}

// Open opens the catalog of a store. It asks the store nothing yet; the store
// is the caller's to close.
func Open(objects upload.Store, o Options) (*Catalog, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NewID == nil {
		o.NewID = randomID
	}
	if o.Region != "" {
		if err := CheckRegion(o.Region); err != nil {
			return nil, err
		}
	}
	place := objects.String()
	if p, ok := objects.(upload.Placer); ok {
		place = p.Place()
	}
	m, err := openMemory(o.State, place)
	if err != nil {
		return nil, fmt.Errorf("open the catalog of %s: %w", objects, err)
	}
	return &Catalog{objects: objects, opt: o, memory: m, reading: make(chan struct{}, 1), writing: make(chan struct{}, 1)}, nil
}

// String is the store's URL.
func (c *Catalog) String() string { return c.objects.String() }

// Objects is the store beneath.
func (c *Catalog) Objects() upload.Store { return c.objects }

// Region is what Options.Region says, or the region of the newest state seen.
func (c *Catalog) Region() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.opt.Region == "" && c.latest != nil {
		return c.latest.head.Region
	}
	return c.opt.Region
}

// now is the time in a document.
func (c *Catalog) now() time.Time { return c.opt.Now().UTC().Truncate(time.Second) }

// Create makes the catalog of a region where there is none; one that is there
// already, of the same region, is no error. The store must keep the conditions
// of writes: else [ErrConditional].
func (c *Catalog) Create(ctx context.Context, region string) error {
	if err := c.create(ctx, region); err != nil {
		return fmt.Errorf("make the catalog of %s: %w", c, err)
	}
	return nil
}

func (c *Catalog) create(ctx context.Context, region string) error {
	if err := CheckRegion(region); err != nil {
		return err
	}
	v, err := c.View(ctx)
	if err == nil {
		if v.head.Region != region {
			return fmt.Errorf("%w: it is of region %q, not of %q", ErrOther, v.head.Region, region)
		}
		return nil
	}
	if !errors.Is(err, ErrNoCatalog) {
		return err
	}
	if err := c.conditional(ctx); err != nil {
		return err
	}
	if c.opt.Signer == nil {
		return ErrReadOnly
	}
	empty := newView(c, &head{Region: region}, &root{Region: region}, nil)
	prepared, err := c.prepare(ctx, empty, nil)
	if err == nil {
		err = c.publish(ctx, empty, prepared)
	}
	if !errors.Is(err, errMoved) {
		return err
	}
	if v, err = c.View(ctx); err == nil && v.head.Region != region { // somebody else made it
		err = fmt.Errorf("%w: it is of region %q, not of %q", ErrOther, v.head.Region, region)
	}
	return err
}

// conditional makes sure, once, that the store refuses a write whose condition
// does not hold: some servers take the header and write all the same, and two
// changes at once would be one.
func (c *Catalog) conditional(ctx context.Context) error {
	c.mu.Lock()
	checked := c.checked
	c.mu.Unlock()
	if checked {
		return nil
	}
	if err := upload.CheckConditional(ctx, c.objects, DataFold+"probe-"); err != nil {
		if errors.Is(err, upload.ErrUnsupported) {
			return fmt.Errorf("%w: %w; use a server that does (MinIO, versitygw, Amazon S3) or a directory", ErrConditional, err)
		}
		return err
	}
	c.mu.Lock()
	c.checked = true
	c.mu.Unlock()
	return nil
}

// Renew signs the newest state again, with a new time of creation and a new
// expiry.
func (c *Catalog) Renew(ctx context.Context) error {
	return c.Update(ctx, func(t *Tx) error { t.touch(); return nil })
}

// KeepFresh renews the newest state if half the time for which it is taken for
// the newest is over, and tells whether it did. It may be called by any number of
// processes; every few minutes is enough.
func (c *Catalog) KeepFresh(ctx context.Context) (bool, error) {
	v, err := c.View(ctx)
	if err != nil {
		return false, err
	}
	h := v.head
	if h.Expires.IsZero() || c.now().Before(h.Created.Add(h.Expires.Sub(h.Created)/2)) {
		return false, nil
	}
	err = c.Renew(ctx)
	return err == nil, err
}

// Forget drops what is remembered of the catalog, so that an older state of it
// is accepted once: after a store was put back.
func (c *Catalog) Forget() error {
	c.mu.Lock()
	c.latest = nil
	c.mu.Unlock()
	return c.memory.forget()
}

// get reads a content-addressed object.
func (c *Catalog) get(ctx context.Context, n chunked.Name, limit int64) ([]byte, error) {
	b, _, err := upload.GetBytes(ctx, c.objects, DataFold+n.String(), limit)
	return b, err
}
