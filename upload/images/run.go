package images

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// Refresh is how often a capture says that it is still under way, by SPEC.md
// §12.1.
const Refresh = 5 * time.Minute

// RunOptions says what is to be captured into which domain.
type RunOptions struct {
	Image  string  // name of the image
	Domain *Domain // whose chunks are shared

	// Owner is the key, known to this machine alone, by which it knows its own
	// packs.
	Owner chunked.Key

	// AllCreators believes the footers of all creators of the domain, not only
	// one's own: more is shared, and any of them could spoil this image.
	AllCreators bool

	// Refresh replaces the interval of that name; negative: never.
	Refresh time.Duration
}

// Run is a capture under way: between [Store.Begin] and [Run.Publish]. It is the
// writer's sink, and knows what of the store may be used as a source of chunks.
type Run struct {
	s       *Store
	opt     RunOptions
	id      string
	start   *inventory
	parent  *Image
	stop    func()
	stopped chan struct{}

	mu    sync.Mutex
	taken map[chunked.Name]bool // packs that are used by way of moved/ for the parent's sake
}

// Begin says that a capture is under way and takes stock. It comes before
// anything else: what it sees decides what may be shared.
func (s *Store) Begin(ctx context.Context, o RunOptions) (*Run, error) {
	if err := chunked.CheckImageName(o.Image); err != nil {
		return nil, err
	}
	if o.Domain == nil {
		return nil, fmt.Errorf("capture image %q: no domain is given", o.Image)
	}
	id, err := newID()
	if err != nil {
		return nil, err
	}
	r := &Run{s: s, opt: o, id: id, taken: map[chunked.Name]bool{}, stop: func() {}}
	if err := r.announce(ctx, time.Time{}); err != nil {
		return nil, err
	}
	if r.start, err = s.takeInventory(ctx); err != nil {
		// The object goes by itself in an hour, but why leave it?
		return nil, errors.Join(err, r.forget(ctx))
	}
	interval := o.Refresh
	if interval == 0 {
		interval = Refresh
	}
	if interval > 0 {
		r.keepAlive(ctx, interval)
	}
	return r, nil
}

// announce puts runs/ID.
func (r *Run) announce(ctx context.Context, started time.Time) error {
	b, err := (&chunked.RunDoc{Name: r.opt.Image, Started: started}).Document()
	if err != nil {
		return err
	}
	if _, err := upload.PutBytes(ctx, r.s.objects, chunked.RunKey(r.id), b, upload.PutOptions{}); err != nil {
		return fmt.Errorf("say that a capture of image %q is under way: %w", r.opt.Image, err)
	}
	return nil
}

// keepAlive renews runs/ID until stop. A failure is no matter: it only makes
// collectors less patient with the packs of this run.
func (r *Run) keepAlive(ctx context.Context, interval time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	r.stopped = make(chan struct{})
	r.stop = func() { cancel(); <-r.stopped }
	go func() {
		defer close(r.stopped)
		t := time.NewTicker(interval)
		defer t.Stop()
		var started time.Time
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			if started.IsZero() {
				o, err := r.s.objects.Stat(ctx, chunked.RunKey(r.id))
				if err != nil {
					continue
				}
				started = o.Modified.UTC().Truncate(time.Second)
			}
			_ = r.announce(ctx, started)
		}
	}()
}

// Close ends the run. What it stored stays, for the next run to find. It must
// be called, also after [Run.Publish].
func (r *Run) Close(ctx context.Context) error {
	r.stop()
	r.stop = func() {}
	return r.forget(context.WithoutCancel(ctx))
}

func (r *Run) forget(ctx context.Context) error {
	if err := r.s.objects.Delete(ctx, chunked.RunKey(r.id)); err != nil {
		return fmt.Errorf("say that the capture of image %q has ended: %w", r.opt.Image, err)
	}
	return nil
}

// Parent resolves the image whose chunks may be shared: ref, or the newest
// version of the run's own image if ref is "". It is nil if that image does not
// exist yet, or no more. From then on UsablePack and UsableIndex speak for it.
// What its index or chunks lack, as it is deleted while they are read, is
// [ErrCollected].
func (r *Run) Parent(ctx context.Context, ref string) (*Image, error) {
	own := ref == ""
	if own {
		ref = r.opt.Image
	}
	p, err := r.s.Resolve(ctx, ref, ResolveOptions{})
	if err == nil {
		p.during = r
	}
	if own && (errors.Is(err, ErrNoImage) || errors.Is(err, chunked.ErrDeleted)) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	taken := map[chunked.Name]bool{}
	for _, pack := range p.Manifest.Packs {
		if r.start.hasSize(chunked.PackKey(pack.Name), pack.Size) {
			continue
		}
		ok, err := r.s.follow(ctx, r.start, r.start, p.Name, pack.Name, 0)
		if err != nil {
			return nil, err
		}
		if ok {
			taken[pack.Name] = true
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.parent = p
	maps.Copy(r.taken, taken)
	return p, nil
}

// UsablePack tells whether the parent's chunks in a pack may be shared: it is
// there and not condemned, or moved to such packs. Chunks in others are to be
// stored anew.
func (r *Run) UsablePack(n chunked.Name) bool {
	if r.start.has(chunked.PackKey(n)) {
		return true
	}
	return r.viaMoved(n)
}

func (r *Run) viaMoved(n chunked.Name) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.taken[n]
}

func (r *Run) parentImage() *Image {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.parent
}

// PackSize is the size of a pack that may be shared: as it was listed, or as
// the parent has it.
func (r *Run) PackSize(n chunked.Name) (int64, bool) {
	if o, ok := r.start.objects[chunked.PackKey(n)]; ok {
		return o.Size, true
	}
	if p := r.parentImage(); p != nil {
		for _, o := range p.Manifest.Packs {
			if o.Name == n {
				return o.Size, true
			}
		}
	}
	return 0, false
}

// UsableIndex tells whether a segment of the parent's may be shared.
func (r *Run) UsableIndex(n chunked.Name) bool { return r.start.has(chunked.IndexObjectKey(n)) }

// PutPack stores a pack, whose name n is, as a [chunked.Writer] does. nil means
// that it is durable.
func (r *Run) PutPack(ctx context.Context, n chunked.Name, data []byte) error {
	return r.s.putFresh(ctx, chunked.PackKey(n), n, data)
}

// PutIndex stores an index object likewise.
func (r *Run) PutIndex(ctx context.Context, n chunked.Name, data []byte) error {
	return r.s.putFresh(ctx, chunked.IndexObjectKey(n), n, data)
}
