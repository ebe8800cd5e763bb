package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// View is the catalog at one moment, verified. What it gives is shared and not
// to be changed. Its methods fetch what they need and keep it; a View so old
// that its objects are gone says errors.Is(err, upload.ErrNotExist): take a new
// one, as [Catalog.Read] does.
type View struct {
	Lookup
	c      *Catalog
	head   *head
	object []byte // the signed head
	etag   string
	signer string // fingerprint
	root   *root
	pages  []*slot
	byName map[chunked.Name]*slot
}

// slot is a page of a root, fetched when it is needed first. Views share the
// slots of pages that did not change.
type slot struct {
	ref  pageRef
	next string // the first key behind it
	mu   sync.Mutex
	page *page
}

// View gives the newest state: one that was the newest at some moment of the
// call. Callers at the same time share a request.
func (c *Catalog) View(ctx context.Context) (*View, error) {
	v, err := c.view(ctx)
	if err != nil {
		return nil, fmt.Errorf("catalog of %s: %w", c, err)
	}
	return v, nil
}

func (c *Catalog) view(ctx context.Context) (*View, error) {
	c.mu.Lock()
	arrived := c.begun
	c.mu.Unlock()
	select {
	case c.reading <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-c.reading }()
	c.mu.Lock()
	if c.latest != nil && c.done > arrived { // a reading began after this call, and succeeded
		v := c.latest
		c.mu.Unlock()
		return v, nil
	}
	c.begun++
	mine, last := c.begun, c.latest
	c.mu.Unlock()
	v, err := c.load(ctx, last)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.latest, c.done = v, mine
	c.mu.Unlock()
	return v, nil
}

// load reads head and root. last, if not nil, is a state from before.
func (c *Catalog) load(ctx context.Context, last *View) (*View, error) {
	if c.opt.Trust == nil {
		return nil, ErrNoTrust
	}
	for try := 1; ; try++ {
		v, err := c.loadOnce(ctx, last)
		// The root of a head that is replaced at this moment may be gone.
		if err == nil || !errors.Is(err, errGone) || try == 10 {
			return v, err
		}
	}
}

// errGone is that of an object which the head refers to and the store has not.
var errGone = errors.New("an object of the catalog is gone")

func (c *Catalog) loadOnce(ctx context.Context, last *View) (*View, error) {
	known, err := c.memory.current(c.opt.Trust)
	if err != nil {
		return nil, err
	}
	b, o, err := upload.GetBytes(ctx, c.objects, HeadKey, maxHead+keys.MaxSignature)
	if errors.Is(err, upload.ErrNotExist) {
		if len(known.Seen) > 0 {
			return nil, fmt.Errorf("%w: the head is gone, sequence %d was there before", ErrRollback, known.Seen[0].Sequence)
		}
		return nil, fmt.Errorf("%w: %w", ErrNoCatalog, err)
	}
	if err != nil {
		return nil, err
	}
	if last != nil && bytes.Equal(b, last.object) {
		same := *last
		same.etag, same.Lookup = o.ETag, Lookup{&same}
		return &same, errors.Join(c.aged(last.head), known.fresh(last.head))
	}
	h, signer, err := openHead(b, c.opt.Trust, c.opt.Region)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(known.fresh(h), c.aged(h)); err != nil {
		return nil, err
	}
	rb, err := c.get(ctx, h.Root, maxRoot)
	if errors.Is(err, upload.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errGone, err)
	}
	if err != nil {
		return nil, err
	}
	r, err := openRoot(h, rb)
	if err != nil {
		return nil, err
	}
	v := newView(c, h, r, last)
	v.object, v.etag, v.signer = b, o.ETag, signer
	return v, c.memory.see(h, signer)
}

// aged holds a head against its expiry and the limits of Options.
func (c *Catalog) aged(h *head) error {
	now := c.opt.Now()
	switch {
	case h.Sequence < c.opt.AtLeast:
		return fmt.Errorf("head %d of the catalog of %q: %w: sequence %d and up is asked for", h.Sequence, h.Region, ErrRollback, c.opt.AtLeast)
	case !h.Expires.IsZero() && now.After(h.Expires) && !c.opt.Lapsed:
		return fmt.Errorf("head %d of the catalog of %q: %w: it expired at %s", h.Sequence, h.Region, ErrStale, h.Expires.Format(time.RFC3339))
	case c.opt.MaxAge > 0 && now.Sub(h.Created) > c.opt.MaxAge:
		return fmt.Errorf("head %d of the catalog of %q: %w: it is of %s, older than %s", h.Sequence, h.Region, ErrStale, h.Created.Format(time.RFC3339), c.opt.MaxAge)
	}
	return nil
}

func newView(c *Catalog, h *head, r *root, last *View) *View {
	v := &View{c: c, head: h, root: r, pages: make([]*slot, len(r.Pages)), byName: make(map[chunked.Name]*slot, len(r.Pages))}
	v.Lookup = Lookup{v}
	for i, ref := range r.Pages {
		next := ""
		if i+1 < len(r.Pages) {
			next = r.Pages[i+1].First
		}
		var s *slot
		if last != nil {
			s = last.byName[ref.Name]
		}
		if s == nil || s.ref != ref || s.next != next {
			n := &slot{ref: ref, next: next}
			if s != nil && s.ref == ref { // only its neighbour is another
				s.mu.Lock()
				if p := s.page; p != nil && (next == "" || p.Entries[len(p.Entries)-1].Key < next) {
					n.page = p
				}
				s.mu.Unlock()
			}
			s = n
		}
		v.pages[i], v.byName[ref.Name] = s, s
	}
	return v
}

// Region is the catalog's.
func (v *View) Region() string { return v.head.Region }

// Sequence counts the changes of the catalog.
func (v *View) Sequence() int64 { return v.head.Sequence }

// Changed is when the newest change was made, as its signer says.
func (v *View) Changed() time.Time { return v.head.Created }

// Expires is when the newest change is not taken for the newest any more; zero
// for never.
func (v *View) Expires() time.Time { return v.head.Expires }

// Signer is the fingerprint of the key that signed the newest change.
func (v *View) Signer() string { return v.signer }

// Root is the name of the state: the digest of all it holds.
func (v *View) Root() chunked.Name { return v.head.Root }

func (v *View) fetch(ctx context.Context, s *slot) (*page, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.page != nil {
		return s.page, nil
	}
	b, err := v.c.get(ctx, s.ref.Name, maxPage)
	if err != nil {
		return nil, fmt.Errorf("page %s of the catalog: %w", s.ref.Name, err)
	}
	p, err := openPage(s.ref, s.next, b)
	if err != nil {
		return nil, err
	}
	s.page = p
	return p, nil
}

// Load fetches all that the View does not have yet, several pages at once: for
// whoever is going to look at everything.
func (v *View) Load(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, s := range v.pages {
		g.Go(func() error { _, err := v.fetch(ctx, s); return err })
	}
	return g.Wait()
}

// find is the index of the page that key belongs to; -1 if it is before all.
func (v *View) find(key string) int {
	return sort.Search(len(v.pages), func(i int) bool { return v.pages[i].ref.First > key }) - 1
}

// entry is what lies under a key; nil if nothing does.
func (v *View) entry(ctx context.Context, key string) (*entry, error) {
	i := v.find(key)
	if i < 0 {
		return nil, nil
	}
	p, err := v.fetch(ctx, v.pages[i])
	if err != nil {
		return nil, err
	}
	j, ok := slices.BinarySearchFunc(p.Entries, key, func(e entry, k string) int { return strings.Compare(e.Key, k) })
	if !ok {
		return nil, nil
	}
	return &p.Entries[j], nil
}

// scan gives the entries whose keys begin with prefix, in order.
func (v *View) scan(ctx context.Context, prefix string) iter.Seq2[*entry, error] {
	return func(yield func(*entry, error) bool) {
		for i := max(0, v.find(prefix)); i < len(v.pages); i++ {
			if f := v.pages[i].ref.First; f > prefix && !strings.HasPrefix(f, prefix) {
				return
			}
			p, err := v.fetch(ctx, v.pages[i])
			if err != nil {
				yield(nil, err)
				return
			}
			j, _ := slices.BinarySearchFunc(p.Entries, prefix, func(e entry, k string) int { return strings.Compare(e.Key, k) })
			// Of a page whose last key has the prefix, all from here on have it: who
			// looks at everything does not look at the keys.
			n := len(p.Entries)
			whole := strings.HasPrefix(p.Entries[n-1].Key, prefix)
			for ; j < n; j++ {
				if !whole && !strings.HasPrefix(p.Entries[j].Key, prefix) {
					return
				}
				if !yield(&p.Entries[j], nil) {
					return
				}
			}
		}
	}
}

// Read calls f with the newest state, and again with a newer one if objects of
// that went away while f looked at them.
func (c *Catalog) Read(ctx context.Context, f func(*View) error) error {
	for try := 1; ; try++ {
		v, err := c.View(ctx)
		if err != nil {
			return err
		}
		err = f(v)
		if err == nil || !errors.Is(err, upload.ErrNotExist) || try == 10 {
			return err
		}
		now, nerr := c.View(ctx)
		if nerr != nil || now.head.Root == v.head.Root {
			return err
		}
	}
}
