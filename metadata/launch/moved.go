package launch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// Limits of looking for what became of packs.
const (
	movedHops     = 8        // how often a reader follows (bundle/chunked/SPEC.md §12.4)
	movedParallel = 8        // objects read at a time
	movedMemory   = 32 << 20 // bytes of them, but for one that is larger
	movedKept     = 64 << 10 // objects whose targets are remembered
)

// movedID is a moved object as it was at a time.
type movedID struct {
	store, key, etag string
	size             int64
	modified         time.Time
}

// targets remembers where moved objects lead to: each claim and renewal asks.
type targets struct {
	mu   sync.Mutex
	into map[movedID][]chunked.Name
}

func (t *targets) get(id movedID) ([]chunked.Name, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	list, ok := t.into[id]
	return list, ok
}

func (t *targets) put(id movedID, list []chunked.Name) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.into == nil || len(t.into) >= movedKept {
		t.into = make(map[movedID][]chunked.Name)
	}
	t.into[id] = list
}

// moved names the objects that tell what became of packs since the image was
// made, and the packs that those lead to: garbage collection and repair put chunks
// elsewhere and delete the pack. Nothing of it is believed, here or by the
// instance: a chunk's digest and tag decide. remark says what could not be found
// out.
func (l *Launcher) moved(ctx context.Context, store upload.Store, packs []chunked.ObjectSize) (names []string, remark string, err error) {
	there := make(map[chunked.Name]upload.Object)
	for o, err := range store.List(ctx, chunked.MovedFolder) {
		if errors.Is(err, upload.ErrAccess) {
			return nil, "launch: without what became of packs that were moved: " + chunked.MovedFolder + " may not be listed", nil
		}
		if err != nil {
			return nil, "", fmt.Errorf("looking for packs that were moved: %w", err)
		}
		if n, err := chunked.ParseFanned(chunked.MovedFolder, o.Key); err == nil {
			there[n] = o
		}
	}
	if len(there) == 0 {
		return nil, "", nil
	}
	seen := make(map[chunked.Name]bool, len(packs))
	var now []chunked.Name
	for _, p := range packs {
		seen[p.Name] = true
		now = append(now, p.Name)
	}
	for range movedHops {
		var gone []upload.Object
		for _, n := range now {
			if o, ok := there[n]; ok {
				gone = append(gone, o)
				names = append(names, o.Key)
			}
		}
		into, err := l.follow(ctx, store, gone)
		if err != nil {
			return nil, "", err
		}
		now = nil
		for _, n := range into {
			if !seen[n] {
				seen[n] = true
				now = append(now, n)
				names = append(names, chunked.PackKey(n))
			}
		}
		if len(now) == 0 || len(names) > maxURLs {
			break
		}
	}
	return names, "", nil
}

// follow gives the packs that moved objects lead to. One that is gone again, or
// no moved object, leads nowhere.
func (l *Launcher) follow(ctx context.Context, store upload.Store, list []upload.Object) ([]chunked.Name, error) {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(movedParallel)
	memory := semaphore.NewWeighted(movedMemory)
	into := make([][]chunked.Name, len(list))
	for i, o := range list {
		id := movedID{store.String(), o.Key, o.ETag, o.Size, o.Modified}
		if known, ok := l.targets.get(id); ok {
			into[i] = known
			continue
		}
		if o.Size > chunked.MaxMoved {
			continue
		}
		g.Go(func() error {
			weight := min(o.Size, movedMemory)
			if err := memory.Acquire(ctx, weight); err != nil {
				return err
			}
			defer memory.Release(weight)
			data, _, err := upload.GetBytes(ctx, store, o.Key, o.Size)
			switch {
			case errors.Is(err, upload.ErrNotExist), errors.Is(err, upload.ErrTooLarge), errors.Is(err, upload.ErrChanged), errors.Is(err, upload.ErrAccess):
				return nil // the next claim sees what it is then; an instance that needs it is told
			case err != nil:
				return fmt.Errorf("reading what became of a pack: %w", err)
			}
			n, err := chunked.ParseFanned(chunked.MovedFolder, o.Key)
			if err != nil {
				return err
			}
			m, err := chunked.DecodeMoved(n, data)
			if err != nil {
				return nil //nolint:nilerr // it leads nowhere, and the instance finds that too
			}
			for _, p := range m.Packs {
				into[i] = append(into[i], p.Name)
			}
			l.targets.put(id, into[i])
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var all []chunked.Name
	for _, names := range into {
		all = append(all, names...)
	}
	return all, nil
}
