package catalog

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// maxTries is how often a change is tried against others who change the same
// catalog, or a store whose answers are lost.
const maxTries = 100

// request is a change that waits to be made.
type request struct {
	f     func(*Tx) error
	taken bool // by whoever commits
	done  bool
	err   error
}

// Update changes the catalog by what f puts, all or nothing, as if nobody else
// did anything meanwhile. f may be called several times, each time with the
// newest state, also from another goroutine; it must have no effect but on the
// Tx and on variables it sets anew each time. If f gives an error, that is
// Update's, and nothing is changed; so it is if f puts nothing.
//
// After any other error nothing was changed, but for [ErrUnknown]: the answer to
// the last request was lost for good, and the change may yet appear.
func (c *Catalog) Update(ctx context.Context, f func(*Tx) error) error {
	if c.opt.Signer == nil {
		return fmt.Errorf("change the catalog of %s: %w", c, ErrReadOnly)
	}
	r := &request{f: f}
	c.mu.Lock()
	c.queue = append(c.queue, r)
	c.mu.Unlock()
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		c.mu.Lock()
		if !r.taken {
			c.queue = slices.DeleteFunc(c.queue, func(x *request) bool { return x == r })
			c.mu.Unlock()
			return context.Cause(ctx)
		}
		c.mu.Unlock()
		c.writing <- struct{}{} // somebody is making it: whether he succeeds is soon known
	}
	defer func() { <-c.writing }()
	if !r.done {
		c.mu.Lock()
		batch := c.queue
		c.queue = nil
		for _, x := range batch {
			x.taken = true
		}
		c.mu.Unlock()
		c.commit(ctx, batch)
		// What was not decided, since this caller gave up, others go on with.
		c.mu.Lock()
		var left []*request
		for _, x := range batch {
			if !x.done && x != r {
				x.taken = false
				left = append(left, x)
			}
		}
		c.queue = append(left, c.queue...)
		c.mu.Unlock()
		if !r.done {
			return context.Cause(ctx)
		}
	}
	if r.err != nil && !isRefusal(r.err) {
		return fmt.Errorf("change the catalog of %s: %w", c, r.err)
	}
	return r.err
}

func isRefusal(err error) bool {
	var e *Error
	return errors.As(err, &e)
}

// finish gives all that wait the same answer.
func finish(rs []*request, err error) {
	for _, r := range rs {
		if !r.done {
			r.done, r.err = true, err
		}
	}
}

// commit makes the changes of a batch, in one step.
func (c *Catalog) commit(ctx context.Context, batch []*request) {
	if err := c.conditional(ctx); err != nil {
		if ctx.Err() == nil {
			finish(batch, err)
		}
		return
	}
	for try := 0; ; try++ {
		if try == maxTries {
			finish(batch, ErrBusy)
			return
		}
		if ctx.Err() != nil {
			return
		}
		v, err := c.view(ctx)
		if err != nil {
			if ctx.Err() == nil {
				finish(batch, err)
			}
			return
		}
		changes := map[string]*entry{}
		var made, idle []*request // with an effect and without
		renew, again := false, false
		for _, r := range batch {
			if r.done {
				continue
			}
			t := newTx(v, changes, c.now())
			err := r.f(t)
			switch {
			case err != nil && errors.Is(err, upload.ErrNotExist) && !isRefusal(err) && try < 10:
				again = true // the state is so old that its objects are gone
			case err != nil && ctx.Err() != nil:
				return
			case err != nil && len(made) > 0 && isRefusal(err):
				// It may stand on what others in this batch are about to do.

				idle = append(idle, r)
				r.err = err
			case err != nil:
				r.done, r.err = true, err
			case len(t.own) == 0 && !t.renew && len(made) == 0:
				r.done = true
			case len(t.own) == 0 && !t.renew:
				idle = append(idle, r)
				r.err = nil
			default:
				maps.Copy(changes, t.own)
				renew = renew || t.renew
				made = append(made, r)
			}
		}
		if again {
			continue
		}
		if len(made) == 0 {
			return
		}
		p, err := c.prepare(ctx, v, changes)
		if err == nil {
			err = c.publish(ctx, v, p)
		}
		switch {
		case err == nil:
			finish(made, nil)
			for _, r := range idle {
				r.done = true
			}
			return
		case errors.Is(err, errMoved):
			continue
		case ctx.Err() != nil && !errors.Is(err, ErrUnknown):
			return
		}
		finish(made, err)
		// The others' answers stood on these changes: they begin again.
		if errors.Is(err, ErrUnknown) {
			finish(idle, err)
		}
	}
}

// errMoved is that of a change whose state is not the newest any more: it was
// not made, and never will be.
var errMoved = errors.New("somebody else changed the catalog first")

// prepared is a change whose objects are stored, all but the head.
type prepared struct {
	head   *head
	root   *root
	object []byte // the signed head
	commit string
	fresh  map[chunked.Name]*page
}

// prepare stores the pages and the root that v with changes is.
func (c *Catalog) prepare(ctx context.Context, v *View, changes map[string]*entry) (*prepared, error) {
	// What is signed with a clock that is behind would be expired for everybody else,
	// or count as the older of the two.
	now := c.now()
	if was := v.head.Created; now.Before(was.Add(-ClockSlack)) && !c.opt.Lapsed {
		return nil, fmt.Errorf("%w: it is %s, and the catalog's last change is of %s: set this machine's clock", ErrClock, now.Format(time.RFC3339), was.UTC().Format(time.RFC3339))
	}
	id, err := newNonce()
	if err != nil {
		return nil, err
	}
	p := &prepared{commit: id, fresh: map[chunked.Name]*page{}}
	r := &root{Region: v.head.Region, Sequence: v.head.Sequence + 1, Commits: append(slices.Clone(v.root.Commits), id), Retired: slices.Clone(v.root.Retired), Pages: []pageRef{}}
	if n := len(r.Commits); n > keptIDs {
		r.Commits = r.Commits[n-keptIDs:]
	}
	objects := map[chunked.Name][]byte{}
	retired := []chunked.Name{}
	if v.head.Sequence > 0 {
		retired = append(retired, v.head.Root)
	}
	keys := slices.Sorted(maps.Keys(changes))
	for i := -1; i < len(v.pages); i++ {
		// The keys that belong to page i; those before the first page go with it.
		n := len(keys)
		if i+1 < len(v.pages) {
			next := v.pages[i+1].ref.First
			n, _ = slices.BinarySearch(keys, next)
		}
		if i < 0 && len(v.pages) > 0 {
			continue
		}
		mine := keys[:n]
		keys = keys[n:]
		if len(mine) == 0 {
			if i >= 0 {
				r.Pages = append(r.Pages, v.pages[i].ref)
			}
			continue
		}
		var old []entry
		if i >= 0 {
			pg, err := v.fetch(ctx, v.pages[i])
			if err != nil {
				return nil, err
			}
			old = pg.Entries
			retired = append(retired, v.pages[i].ref.Name)
		}
		for _, entries := range split(merge(old, mine, changes)) {
			pg := &page{Entries: entries}
			if pg.Salt, err = newNonce(); err != nil {
				return nil, err
			}
			b, err := pg.encode()
			if err != nil {
				return nil, err
			}
			name := chunked.NameOf(b)
			objects[name], p.fresh[name] = b, pg
			r.Pages = append(r.Pages, pageRef{First: entries[0].Key, Name: name, Size: int64(len(b)), Entries: len(entries)})
		}
	}
	r.Retired = append(r.Retired, retired)
	if n := len(r.Retired); n > keptStates {
		r.Retired = r.Retired[n-keptStates:]
	}
	b, err := r.encode()
	if err != nil {
		return nil, err
	}
	if len(b) > maxRoot {
		return nil, fmt.Errorf("the catalog is full: its root would have %d bytes, more than %d", len(b), maxRoot)
	}
	name := chunked.NameOf(b)
	objects[name] = b
	p.root = r
	p.head = &head{Region: r.Region, Sequence: r.Sequence, Root: name, Size: int64(len(b)), Created: now}
	span := c.opt.Expires
	if span == 0 && !v.head.Expires.IsZero() {
		span = v.head.Expires.Sub(v.head.Created)
	}
	if span > 0 {
		p.head.Expires = p.head.Created.Add(span)
	}
	if p.object, err = p.head.sign(ctx, c.opt.Signer); err != nil {
		return nil, err
	}
	// A signature that readers will not take is found out now.
	if _, _, err := openHead(p.object, c.opt.Trust, p.head.Region); err != nil {
		return nil, fmt.Errorf("the signing key is not one this machine trusts for the catalog: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for n, b := range objects {
		g.Go(func() error {
			_, err := upload.PutBytes(gctx, c.objects, DataFold+n.String(), b, upload.PutOptions{SHA256: n[:]})
			return err
		})
	}
	return p, g.Wait()
}

// merge gives old with the changes under keys, in order.
func merge(old []entry, keys []string, changes map[string]*entry) []entry {
	out := make([]entry, 0, len(old)+len(keys))
	for _, k := range keys {
		for len(old) > 0 && old[0].Key < k {
			out = append(out, old[0])
			old = old[1:]
		}
		if len(old) > 0 && old[0].Key == k {
			old = old[1:]
		}
		if e := changes[k]; e != nil {
			out = append(out, *e)
		}
	}
	return append(out, old...)
}

// split cuts entries into pages of about pageFull bytes at most, none empty.
func split(entries []entry) [][]entry {
	if len(entries) == 0 {
		return nil
	}
	sizes := make([]int, len(entries))
	total := 0
	for i := range entries {
		b, _ := encodeJSON(&entries[i]) // they were encoded when they were put
		sizes[i] = len(b)
		total += len(b)
	}
	n := (total + pageFull - 1) / pageFull
	if n <= 1 {
		return [][]entry{entries}
	}
	// Halves for a page that has just grown too long; as many as it takes for a
	// catalog filled at once.
	want := total/n + 1
	var pages [][]entry
	at, sum := 0, 0
	for i := range entries {
		if sum += sizes[i]; sum >= want && i+1 < len(entries) {
			pages = append(pages, entries[at:i+1])
			at, sum = i+1, 0
		}
	}
	return append(pages, entries[at:])
}

// publish makes a prepared change the newest state, if v still is. The error is
// [errMoved] if it is not, and the change can never be made any more.
func (c *Catalog) publish(ctx context.Context, v *View, p *prepared) error {
	o := upload.PutOptions{IfMatch: v.etag, IfNoneMatch: v.etag == ""}
	sum := sha256.Sum256(p.object)
	o.SHA256 = sum[:]
	// A caller that goes away must not leave in doubt what a moment decides.
	ctx = context.WithoutCancel(ctx)
	for try := 1; ; try++ {
		obj, err := upload.PutBytes(ctx, c.objects, HeadKey, p.object, o)
		if err == nil {
			c.made(ctx, v, p, obj.ETag)
			return nil
		}
		now, lerr := c.view(ctx)
		switch {
		case errors.Is(lerr, ErrNoCatalog) && v.etag == "":
			// Still none, as before.
			if definite(err) || try == 3 {
				return unknown(err)
			}
		case lerr != nil:
			return fmt.Errorf("%w: %w", ErrUnknown, errors.Join(err, lerr))
		case slices.Contains(now.root.Commits, p.commit):
			return nil
		case now.head.Sequence > v.head.Sequence:
			if now.head.Sequence-v.head.Sequence >= keptIDs {
				return fmt.Errorf("%w: %w", ErrUnknown, err)
			}
			return errMoved
		case definite(err) || try == 3:
			return unknown(err)
		}
		// The same state as before: the request may still be under way, but of
		// it and the same one again only one can succeed.
	}
}

// definite tells an error after which nothing is under way any more: the server
// refused.
func definite(err error) bool {
	for _, e := range []error{upload.ErrAccess, upload.ErrCredentials, upload.ErrNoBucket, upload.ErrNoSpace, upload.ErrUnsupported, upload.ErrClockSkew, upload.ErrBucketElsewhere, upload.ErrLocked} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func unknown(err error) error {
	if definite(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnknown, err)
}

// made takes note of a change that was made, and removes what older states left.
func (c *Catalog) made(ctx context.Context, v *View, p *prepared, etag string) {
	n := newView(c, p.head, p.root, v)
	n.object, n.etag = p.object, etag
	for name, pg := range p.fresh {
		n.byName[name].page = pg
	}
	_, n.signer, _ = openHead(p.object, c.opt.Trust, p.head.Region)
	// What is remembered is no reason to call it unmade.
	_ = c.memory.see(p.head, n.signer)
	c.mu.Lock()
	if c.latest == nil || c.latest.head.Sequence < n.head.Sequence {
		c.latest = n
	}
	c.mu.Unlock()
	if len(v.root.Retired) == keptStates {
		// Best effort: what stays, [Catalog.Collect] finds. Credentials that
		// cannot delete are right for many.
		var old []string
		for _, name := range v.root.Retired[0] {
			old = append(old, DataFold+name.String())
		}
		_ = c.objects.Delete(ctx, old...)
	}
}

// Report is what [Catalog.Collect] removed.
type Report struct {
	Objects int   `json:"objects"`
	Bytes   int64 `json:"bytes"`
	Tokens  int   `json:"tokens"`
}

// Collect removes the objects that changes which were interrupted, and states
// long past, have left, and forgets client tokens older than a week. It may run
// at any time: it makes a change of its own between listing and deleting, after
// which nothing that was listed, and is not used then, can ever be.
func (c *Catalog) Collect(ctx context.Context, dryRun bool) (*Report, error) {
	r, err := c.collect(ctx, dryRun)
	if err != nil {
		return nil, fmt.Errorf("collect the garbage of the catalog of %s: %w", c, err)
	}
	return r, nil
}

func (c *Catalog) collect(ctx context.Context, dryRun bool) (*Report, error) {
	listed := map[string]int64{}
	for o, err := range c.objects.List(ctx, DataFold) {
		if err != nil {
			return nil, err
		}
		listed[o.Key] = o.Size
	}
	r := &Report{}
	if !dryRun {
		err := c.Update(ctx, func(t *Tx) error {
			t.touch()
			r.Tokens = 0
			for e, err := range t.scan(ctx, keyToken) {
				if err != nil {
					return err
				}
				if t.at.Sub(e.Token.Created) > tokenLife {
					t.delete(e.Key)
					r.Tokens++
				}
			}
			return errors.Join(t.forgetStored(ctx), t.forgetClaims(ctx))
		})
		if err != nil {
			return nil, err
		}
	}
	v, err := c.View(ctx)
	if err != nil {
		return nil, err
	}
	live := map[string]bool{DataFold + v.head.Root.String(): true}
	for _, p := range v.root.Pages {
		live[DataFold+p.Name.String()] = true
	}
	for _, l := range v.root.Retired { // their turn comes
		for _, n := range l {
			live[DataFold+n.String()] = true
		}
	}
	var dead []string
	for k, size := range listed {
		if !live[k] && strings.HasPrefix(k, DataFold) {
			dead = append(dead, k)
			r.Objects++
			r.Bytes += size
		}
	}
	slices.Sort(dead)
	if dryRun || len(dead) == 0 {
		return r, nil
	}
	return r, c.objects.Delete(ctx, dead...)
}
