package images

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// inventory is what a store held at one moment: what is condemned, read first,
// and what is there, listed after it. The order is what SPEC.md §12.3's
// argument stands on: a list that is gone took all it named along.
type inventory struct {
	condemned map[string]bool          // keys
	objects   map[string]upload.Object // under packs/, index/ and moved/
}

// maxHops is how often a pack that was moved is followed.
const maxHops = 8

func (s *Store) takeInventory(ctx context.Context) (*inventory, error) {
	lists, err := s.condemnedLists(ctx)
	if err != nil {
		return nil, err
	}
	v := &inventory{condemned: map[string]bool{}, objects: map[string]upload.Object{}}
	for _, l := range lists {
		for _, k := range l.doc.Objects {
			v.condemned[k] = true
		}
	}
	for _, folder := range []string{chunked.PacksFolder, chunked.IndexFolder, chunked.MovedFolder} {
		found, err := s.list(ctx, folder)
		if err != nil {
			return nil, err
		}
		for k, o := range found {
			if _, err := chunked.ParseFanned(folder, k); err == nil {
				v.objects[k] = o
			}
		}
	}
	return v, nil
}

// condemnedList is one object under gc/.
type condemnedList struct {
	id     string
	object upload.Object
	doc    *chunked.Condemned
}

// condemnedLists reads all of gc/, in order of their IDs.
func (s *Store) condemnedLists(ctx context.Context) ([]condemnedList, error) {
	found, err := s.list(ctx, chunked.GCFolder)
	if err != nil {
		return nil, err
	}
	var lists []condemnedList
	for _, key := range sortedKeys(found) {
		id := strings.TrimPrefix(key, chunked.GCFolder)
		if !isID(id) {
			continue
		}
		b, o, err := s.get(ctx, key, chunked.MaxCondemned)
		if errors.Is(err, upload.ErrNotExist) {
			continue // swept meanwhile: nothing it named is left
		}
		if err != nil {
			return nil, err
		}
		doc, err := chunked.ParseCondemned(b)
		if err != nil {
			return nil, fmt.Errorf("read %s/%s: %w: %w; repair it or, if no capture or collection is under way, remove it", s, key, ErrBlocked, err)
		}
		o.Key, o.Modified = key, found[key].Modified
		lists = append(lists, condemnedList{id: id, object: o, doc: doc})
	}
	return lists, nil
}

// has tells whether the object is there and not condemned.
func (v *inventory) has(key string) bool {
	_, ok := v.objects[key]
	return ok && !v.condemned[key]
}

// hasSize is has for an object of a known size.
func (v *inventory) hasSize(key string, size int64) bool {
	return v.has(key) && v.objects[key].Size == size
}

// readMoved reads the moved/ object of a pack; nil if there is none.
func (s *Store) readMoved(ctx context.Context, pack chunked.Name) (*chunked.Moved, upload.Object, error) {
	key := chunked.MovedKey(pack)
	b, o, err := s.get(ctx, key, chunked.MaxMoved)
	if errors.Is(err, upload.ErrNotExist) {
		return nil, o, nil
	}
	if err != nil {
		return nil, o, err
	}
	m, err := chunked.DecodeMoved(pack, b)
	if err != nil {
		return nil, o, fmt.Errorf("read %s/%s: %w", s, key, err)
	}
	return m, o, nil
}

// follow decides by SPEC.md §11 whether what an image has of a pack, taken over
// from its parent, stays within reach although the pack itself is condemned or
// gone. start is the inventory from before the parent was opened.
func (s *Store) follow(ctx context.Context, start, now *inventory, parent, pack chunked.Name, hops int) (bool, error) {
	if hops > maxHops || !now.has(chunked.MovedKey(pack)) {
		return false, nil
	}
	m, _, err := s.readMoved(ctx, pack)
	if err != nil || m == nil {
		return false, err
	}
	if _, was := start.objects[chunked.PackKey(pack)]; was && !m.Serves(parent) {
		return false, nil
	}
	for _, t := range m.Packs {
		if now.hasSize(chunked.PackKey(t.Name), t.Size) {
			continue
		}
		if ok, err := s.follow(ctx, start, now, parent, t.Name, hops+1); err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}
