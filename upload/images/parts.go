package images

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// Part is an object that a version of an image consists of.
type Part struct {
	Key    string
	Size   int64        // bytes
	SHA256 chunked.Name // of its bytes
}

// Parts are the objects of a version: manifest, index key, index, where packs
// were moved, and packs. Under these keys in another store they are the version
// there, which is found by its whole name. What must be there and is not is
// [ErrDamaged]. Packs are not read; the key's object and what says where packs
// went may be others, of other digests, a moment later.
func (i *Image) Parts(ctx context.Context) ([]Part, error) {
	l, err := i.parts(ctx)
	if err != nil {
		return nil, fmt.Errorf("what image %s in %s consists of: %w", i.ref(), i.s, err)
	}
	return l, nil
}

func (i *Image) parts(ctx context.Context) ([]Part, error) {
	m := i.Manifest
	keysKey := chunked.KeysKey(m.Name, i.Name)
	wrapped, _, err := i.s.get(ctx, keysKey, chunked.MaxRecipientsText)
	if err != nil {
		return nil, err
	}
	l := []Part{
		{chunked.ManifestKey(m.Name, i.Name), i.Size, i.Name},
		{keysKey, int64(len(wrapped)), chunked.NameOf(wrapped)},
	}
	for _, o := range append([]chunked.ObjectSize{m.Index.Root}, m.Index.Segments...) {
		l = append(l, Part{chunked.IndexObjectKey(o.Name), o.Size, o.Name})
	}
	there, err := i.s.list(ctx, chunked.PacksFolder)
	if err != nil {
		return nil, err
	}
	var packs []Part
	seen := map[chunked.Name]bool{}
	var add func(p chunked.ObjectSize, hops int) error
	add = func(p chunked.ObjectSize, hops int) error {
		if seen[p.Name] {
			return nil
		}
		seen[p.Name] = true
		key := chunked.PackKey(p.Name)
		if o, ok := there[key]; ok && o.Size == p.Size {
			packs = append(packs, Part{key, p.Size, p.Name})
			return nil
		}
		b, _, err := i.s.get(ctx, chunked.MovedKey(p.Name), chunked.MaxMoved)
		if errors.Is(err, upload.ErrNotExist) || err == nil && hops == maxHops {
			return fmt.Errorf("%w: pack %s is not there", ErrDamaged, p.Name)
		}
		if err != nil {
			return err
		}
		moved, err := chunked.DecodeMoved(p.Name, b)
		if err != nil {
			return fmt.Errorf("%s: %w", chunked.MovedKey(p.Name), err)
		}
		l = append(l, Part{chunked.MovedKey(p.Name), int64(len(b)), chunked.NameOf(b)})
		for _, t := range moved.Packs {
			if err := add(t, hops+1); err != nil {
				return err
			}
		}
		return nil
	}
	for _, p := range m.Packs {
		if err := add(p, 0); err != nil {
			return nil, err
		}
	}
	return slices.Concat(l, packs), nil
}

// Beside opens the images of other objects with the same trust and identities.
// It remembers nothing of them.
func (s *Store) Beside(objects upload.Store) (*Store, error) {
	o := s.opt
	o.State, o.Claim, o.Remember, o.Now = "", nil, false, nil
	return Open(objects, o)
}
