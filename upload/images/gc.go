package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// Times of SPEC.md §12.1 and §12.2.
const (
	DefaultGrace = 24 * time.Hour
	deadRun      = time.Hour
	runMargin    = time.Hour // older than a capture by this much is not of it
)

// maxCondemned is how many objects one list names.
const maxCondemned = 100_000

// GCOptions says how to collect garbage.
type GCOptions struct {
	// Grace is how old an object must be before it is condemned, and how
	// long it stays condemned before it is deleted; 0 means DefaultGrace,
	// negative none.
	Grace time.Duration

	// Repack copies what is still used out of packs that are mostly garbage.
	Repack *Repack

	// Versions removes, in a bucket that keeps versions, those of what was
	// deleted longer than Grace ago, and superseded ones. What is locked is
	// named in the report and left.
	Versions bool

	// Registered, if it is set, says of a version that it is kept although no
	// head lists it: a catalog's images are.
	Registered func(image string, n chunked.Name) bool

	// DryRun changes nothing and reports what would be done.
	DryRun bool
}

// GCReport is what a collection found and did, or with DryRun would do.
type GCReport struct {
	Images, Manifests int
	Live              Tally
	Running           []string        // captures under way: images' names
	DeadRuns          int             // captures that died: their marks are removed
	Withdrawn         []string        // manifests that were never published, NAME@DIGITS
	Condemned         []Collected     // now: they go after the grace
	Waiting           Tally           // condemned before, grace not over
	Swept             []Collected     // deleted
	Spared            []Collected     // condemned, but in use after all
	Repacked          []Repacked      //
	Unreadable        []string        // images that no identity opens, which kept packs from being repacked
	OldVersions       Tally           // versions removed
	Locked            []*upload.Error // what a lock keeps
	Next              time.Time       // when something can be deleted next, by the store's clock; zero: nothing waits
}

// Tally counts objects.
type Tally struct {
	Objects int   `json:"objects"`
	Bytes   int64 `json:"bytes"`
}

func (t *Tally) add(size int64) { t.Objects++; t.Bytes += size }

// Collected is an object that nothing refers to.
type Collected struct {
	Key  string `json:"key"`
	Size int64  `json:"size"`
}

// GC collects garbage: it removes what interrupted captures and deletions left,
// condemns what nothing refers to, and deletes what was condemned a grace ago
// and still is not referred to (SPEC.md §12). It may run at any time, several
// at once, and be interrupted anywhere. If a manifest, head or moved object
// cannot be read it deletes nothing: [ErrBlocked], naming it.
func (s *Store) GC(ctx context.Context, o GCOptions) (*GCReport, error) {
	switch {
	case o.Grace == 0:
		o.Grace = DefaultGrace
	case o.Grace < 0:
		o.Grace = 0
	}
	c := &collector{s: s, o: o, report: &GCReport{}}
	if err := c.run(ctx); err != nil {
		return c.report, fmt.Errorf("collect the garbage of %s: %w", s, err)
	}
	return c.report, nil
}

type collector struct {
	s      *Store
	o      GCOptions
	report *GCReport
	now    time.Time
	oldest time.Time // what was stored before this is not of a capture under way
	marks  *marks
	seen   *inventory
	busy   map[string]bool // images of which a version is on its way; "?" may be any
}

func (c *collector) run(ctx context.Context) error {
	var err error
	if c.now, err = c.s.now(ctx); err != nil {
		return err
	}
	if err := c.runs(ctx); err != nil {
		return err
	}
	// The lists are seen in the store first, the manifests read after that.
	lists, err := c.s.condemnedLists(ctx)
	if err != nil {
		return err
	}
	if c.seen, err = c.s.takeInventory(ctx); err != nil {
		return err
	}
	if c.marks, err = c.s.mark(ctx, c.seen, c.spare); err != nil {
		return err
	}
	if err := c.withdraw(ctx); err != nil {
		return err
	}
	if err := c.sweep(ctx, lists); err != nil {
		return err
	}
	if c.o.Repack != nil {
		if err := c.repack(ctx); err != nil {
			return err
		}
	}
	if err := c.condemn(ctx); err != nil {
		return err
	}
	c.count()
	if c.o.Versions {
		return c.oldVersions(ctx)
	}
	return nil
}

// age is never negative: stores tell their time in whole seconds.
func (c *collector) age(t time.Time) time.Duration { return max(0, c.now.Sub(t)) }

// runs finds the captures under way and removes the marks of dead ones.
func (c *collector) runs(ctx context.Context) error {
	found, err := c.s.list(ctx, chunked.RunsFolder)
	if err != nil {
		return err
	}
	c.oldest, c.busy = c.now, map[string]bool{}
	for _, key := range sortedKeys(found) {
		if !isID(strings.TrimPrefix(key, chunked.RunsFolder)) {
			continue
		}
		o := found[key]
		if c.age(o.Modified) > deadRun {
			c.report.DeadRuns++
			if !c.o.DryRun {
				if err := c.s.objects.Delete(ctx, key); err != nil {
					return err
				}
			}
			continue
		}
		b, _, err := c.s.get(ctx, key, chunked.MaxRun)
		if errors.Is(err, upload.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			return err
		}
		// What cannot be read may be of a later version: somebody captures
		// since nobody knows when.
		begun, name := time.Time{}, "?"
		if d, err := chunked.ParseRun(b); err == nil {
			begun, name = o.Modified, d.Name
			if !d.Started.IsZero() && d.Started.Before(begun) {
				begun = d.Started
			}
		}
		c.report.Running = append(c.report.Running, name)
		c.busy[name] = true
		if begun.Before(c.oldest) {
			c.oldest = begun
		}
	}
	return nil
}

// spare says of a version that no head lists and none can any more that it
// stays all the same.
func (c *collector) spare(image string, n chunked.Name) bool {
	return c.busy[image] || c.busy["?"] || c.o.Registered != nil && c.o.Registered(image, n)
}

// withdraw deletes the manifests that can never be published any more. A copy
// from another store publishes one whose sequence is behind the head's: it said
// that it is under way before it put the manifest, and is asked after here
// once more, now that the manifest was seen.
func (c *collector) withdraw(ctx context.Context) error {
	if len(c.marks.dead) > 0 {
		busy, err := c.underWay(ctx)
		if err != nil {
			return err
		}
		c.marks.dead = slices.DeleteFunc(c.marks.dead, func(d *marked) bool { return busy[d.image] || busy["?"] })
	}
	for _, d := range c.marks.dead {
		c.report.Withdrawn = append(c.report.Withdrawn, d.ref())
		if c.o.DryRun {
			continue
		}
		if err := c.s.removeVersion(ctx, d.image, d.name); err != nil {
			return err
		}
	}
	return nil
}

// underWay are the images of all that says to be under way.
func (c *collector) underWay(ctx context.Context) (map[string]bool, error) {
	found, err := c.s.list(ctx, chunked.RunsFolder)
	if err != nil {
		return nil, err
	}
	busy := map[string]bool{}
	for key, o := range found {
		if !isID(strings.TrimPrefix(key, chunked.RunsFolder)) || c.age(o.Modified) > deadRun {
			continue
		}
		b, _, err := c.s.get(ctx, key, chunked.MaxRun)
		if errors.Is(err, upload.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		name := "?"
		if d, err := chunked.ParseRun(b); err == nil {
			name = d.Name
		}
		busy[name] = true
	}
	return busy, nil
}

// sweep deletes what lists older than the grace name and nothing refers to.
func (c *collector) sweep(ctx context.Context, lists []condemnedList) error {
	for _, l := range lists {
		if due := l.object.Modified.Add(c.o.Grace); c.age(l.object.Modified) < c.o.Grace {
			if c.report.Next.IsZero() || due.Before(c.report.Next) {
				c.report.Next = due
			}
			for _, key := range l.doc.Objects {
				if o, ok := c.objectAt(key); ok {
					c.report.Waiting.add(o.Size)
				}
			}
			continue
		}
		if err := c.sweepList(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) objectAt(key string) (upload.Object, bool) {
	if o, ok := c.seen.objects[key]; ok {
		return o, true
	}
	o, ok := c.marks.below[key]
	return o, ok
}

func (c *collector) sweepList(ctx context.Context, l condemnedList) error {
	var keys []string
	var gone []Collected
	spared := 0
	for _, key := range l.doc.Objects {
		o, there := c.objectAt(key)
		if c.marks.live(key) {
			// A live object that is not there keeps the list as well: it may
			// have been hidden from this list of the store.
			spared++
			c.report.Spared = append(c.report.Spared, Collected{key, o.Size})
			continue
		}
		keys = append(keys, key)
		if there {
			gone = append(gone, Collected{key, o.Size})
		}
	}
	if !c.o.DryRun {
		if err := c.s.objects.Delete(ctx, keys...); err != nil {
			return c.refused(err)
		}
		if spared == 0 {
			if err := c.s.objects.Delete(ctx, chunked.GCKey(l.id)); err != nil {
				return c.refused(err)
			}
		}
	}
	for _, o := range gone {
		delete(c.seen.objects, o.Key)
		delete(c.marks.below, o.Key)
	}
	c.report.Swept = append(c.report.Swept, gone...)
	return nil
}

// refused takes note of what locks keep; other refusals are errors.
func (c *collector) refused(err error) error {
	var d *upload.DeleteError
	if !errors.As(err, &d) {
		return err
	}
	for _, e := range d.Failed {
		if !errors.Is(e, upload.ErrLocked) {
			return err
		}
	}
	c.report.Locked = append(c.report.Locked, d.Failed...)
	return nil
}

// condemn lists what nothing refers to.
func (c *collector) condemn(ctx context.Context) error {
	var keys []string
	limit := c.oldest.Add(-runMargin)
	if len(c.report.Running) == 0 {
		limit = c.now.Add(time.Hour) // no limit
	}
	consider := func(key string, o upload.Object) {
		if c.marks.live(key) || c.seen.condemned[key] || c.age(o.Modified) < c.o.Grace || o.Modified.After(limit) {
			return
		}
		keys = append(keys, key)
	}
	for key, o := range c.seen.objects {
		consider(key, o)
	}
	for key, o := range c.marks.below {
		consider(key, o)
	}
	slices.Sort(keys)
	for _, key := range keys {
		o, _ := c.objectAt(key)
		c.report.Condemned = append(c.report.Condemned, Collected{key, o.Size})
	}
	if len(keys) == 0 {
		return nil
	}
	if due := c.now.Add(c.o.Grace); c.report.Next.IsZero() || due.Before(c.report.Next) {
		c.report.Next = due
	}
	if c.o.DryRun {
		return nil
	}
	for part := range slices.Chunk(keys, maxCondemned) {
		id, err := newID()
		if err != nil {
			return err
		}
		doc, err := (&chunked.Condemned{Created: c.s.stamp(), Objects: part}).Document()
		if err != nil {
			return err
		}
		if err := c.s.putIf(ctx, chunked.GCKey(id), doc, ""); err != nil {
			return err
		}
	}
	return nil
}

// count tallies what is in use.
func (c *collector) count() {
	images := map[string]bool{}
	for _, d := range c.marks.manifests {
		images[d.image] = true
	}
	c.report.Images, c.report.Manifests = len(images), len(c.marks.manifests)
	for key, o := range c.seen.objects {
		if c.marks.live(key) {
			c.report.Live.add(o.Size)
		}
	}
}

// oldVersions removes what a bucket keeps of objects that were deleted or
// replaced longer than the grace ago. Versions of what something refers to
// stay, were it deleted a hundred times: they are what it can be restored from.
func (c *collector) oldVersions(ctx context.Context) error {
	v, ok := c.s.objects.(upload.Versioner)
	if !ok {
		return nil
	}
	// Markers go last, and not where a lock keeps what is behind them: without
	// its marker a deleted object is there again.
	var contents, markers []upload.Version
	locked := map[string]bool{}
	remove := func(list *[]upload.Version) error {
		err := c.removeVersions(ctx, v, *list, locked)
		*list = nil
		return err
	}
	for _, folder := range []string{chunked.PacksFolder, chunked.IndexFolder, chunked.MovedFolder, chunked.GCFolder, chunked.RunsFolder, chunked.ImagesFolder, chunked.DomainsFolder} {
		var key string
		var deleted, superseded time.Time // of the key: when its marker came; when the version before was replaced
		for ver, err := range v.Versions(ctx, folder) {
			if err != nil {
				return err
			}
			if ver.Key != key {
				key, deleted, superseded = ver.Key, time.Time{}, time.Time{}
			}
			since := superseded
			if ver.Latest && ver.Marker {
				deleted = ver.Modified
				since = ver.Modified
			} else if !deleted.IsZero() {
				since = deleted
			}
			superseded = ver.Modified
			if since.IsZero() || c.age(since) < c.o.Grace || !deleted.IsZero() && !c.removable(key) {
				continue
			}
			if ver.Marker {
				markers = append(markers, ver)
				continue
			}
			contents = append(contents, ver)
			if len(contents) == 1000 {
				if err := remove(&contents); err != nil {
					return err
				}
			}
		}
	}
	if err := remove(&contents); err != nil {
		return err
	}
	markers = slices.DeleteFunc(markers, func(ver upload.Version) bool { return locked[ver.Key] })
	return remove(&markers)
}

// removeVersions removes versions and takes note of the keys that locks keep.
func (c *collector) removeVersions(ctx context.Context, v upload.Versioner, list []upload.Version, locked map[string]bool) error {
	if len(list) == 0 {
		return nil
	}
	if !c.o.DryRun {
		if err := v.DeleteVersions(ctx, list...); err != nil {
			before := len(c.report.Locked)
			if err := c.refused(err); err != nil {
				return err
			}
			for _, e := range c.report.Locked[before:] {
				locked[e.Key] = true
			}
		}
	}
	for _, ver := range list {
		if !locked[ver.Key] {
			c.report.OldVersions.add(ver.Size)
		}
	}
	return nil
}

// removable tells whether a key that was deleted may be forgotten.
func (c *collector) removable(key string) bool {
	if strings.HasPrefix(key, chunked.GCFolder) || strings.HasPrefix(key, chunked.RunsFolder) {
		return true
	}
	if image, rest, ok := imageOf(key); ok {
		if n, ok := named(rest, "manifests"); ok {
			h := c.marks.heads[image]
			return h != nil && !lists(h, n)
		}
	}
	return !c.marks.live(key)
}
