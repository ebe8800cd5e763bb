package images

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// wrapKey makes the object with the key of an index root.
func wrapKey(key chunked.Key, root chunked.Name, to []*keys.Recipient) ([]byte, error) {
	if len(to) == 0 {
		return nil, errors.New("no recipient is given: nobody could read the image")
	}
	doc := &chunked.KeysObject{}
	for _, r := range to {
		if has(doc.Recipients, r.String()) {
			continue
		}
		w, err := chunked.WrapIndexKey(root, key, r, r.Comment())
		if err != nil {
			return nil, err
		}
		doc.Recipients = append(doc.Recipients, w)
	}
	return doc.Document()
}

// keysObject reads the object with an image's index key, and its ETag.
func (i *Image) keysObject(ctx context.Context) (*chunked.KeysObject, string, error) {
	key := chunked.KeysKey(i.Manifest.Name, i.Name)
	b, o, err := i.s.get(ctx, key, chunked.MaxRecipientsText)
	if err != nil {
		return nil, "", err
	}
	doc, err := chunked.ParseKeysObject(b)
	if err == nil {
		i.s.keep(key, b)
	}
	return doc, o.ETag, err
}

// Recipients are those the image's key is wrapped for, as the store says.
func (i *Image) Recipients(ctx context.Context) ([]Recipient, error) {
	doc, _, err := i.keysObject(ctx)
	if err != nil {
		return nil, fmt.Errorf("recipients of image %s: %w", i.ref(), err)
	}
	var l []Recipient
	for _, w := range doc.Recipients {
		l = append(l, Recipient{w.Recipient, w.Comment})
	}
	return l, nil
}

// IndexKey is the key of the image's index, opened with an identity of
// [Options]; [keys.ErrNoIdentity] if none fits.
func (i *Image) IndexKey(ctx context.Context) (chunked.Key, error) {
	doc, _, err := i.keysObject(ctx)
	if err == nil {
		var k chunked.Key
		if k, err = doc.IndexKey(i.Manifest.Index.Root.Name, i.s.opt.Identities...); err == nil {
			return k, nil
		}
	}
	if i.during != nil && errors.Is(err, upload.ErrNotExist) {
		err = fmt.Errorf("%w: %w", ErrCollected, err)
	}
	return chunked.Key{}, fmt.Errorf("key of image %s: %w", i.ref(), err)
}

// Open opens the image's index.
func (i *Image) Open(ctx context.Context) (*chunked.Index, error) {
	return i.OpenWith(ctx, &source{s: i.s, run: i.during != nil})
}

// OpenWith opens the image's index by way of a source that the caller shares
// between images, or has wrapped.
func (i *Image) OpenWith(ctx context.Context, src chunked.Source) (*chunked.Index, error) {
	key, err := i.IndexKey(ctx)
	if err != nil {
		return nil, err
	}
	return i.openIndex(ctx, src, key)
}

func (i *Image) openIndex(ctx context.Context, src chunked.Source, key chunked.Key) (*chunked.Index, error) {
	root := i.Manifest.Index.Root
	x, err := chunked.OpenIndex(ctx, src, root.Name, root.Size, key)
	if err == nil {
		err = i.Manifest.CheckRoot(x.Root())
	}
	if err != nil {
		return nil, fmt.Errorf("index of image %s: %w", i.ref(), err)
	}
	return x, nil
}

// ref names the version in messages.
func (i *Image) ref() string { return i.Manifest.Name + "@" + i.Name.String()[:12] }

// Store is the store the image is in.
func (i *Image) Store() *Store { return i.s }

// AddRecipient lets another key read this version. The image's key must be
// open to an identity of this store's.
func (i *Image) AddRecipient(ctx context.Context, r *keys.Recipient) error {
	return i.changeKeys(ctx, func(doc *chunked.KeysObject) (bool, error) {
		if has(doc.Recipients, r.String()) {
			return false, nil
		}
		root := i.Manifest.Index.Root
		key, err := doc.IndexKey(root.Name, i.s.opt.Identities...)
		if err == nil {
			// A wrong key would be handed on for the right one.
			_, err = chunked.OpenIndex(ctx, i.s.Source(), root.Name, root.Size, key)
		}
		if err != nil {
			return false, err
		}
		w, err := chunked.WrapIndexKey(root.Name, key, r, r.Comment())
		doc.Recipients = append(doc.Recipients, w)
		return true, err
	})
}

// RemoveRecipient takes a key (as [Image.Recipients] lists it) off this
// version. What its owner has read, or could have read, stays read.
func (i *Image) RemoveRecipient(ctx context.Context, recipient string) error {
	return i.changeKeys(ctx, func(doc *chunked.KeysObject) (bool, error) {
		before := len(doc.Recipients)
		doc.Recipients = slices.DeleteFunc(doc.Recipients, func(w chunked.Wrapped) bool { return w.Recipient == recipient })
		if len(doc.Recipients) == 0 {
			return false, fmt.Errorf("the last recipient stays: %w; delete the version instead", ErrLast)
		}
		return len(doc.Recipients) != before, nil
	})
}

func (i *Image) changeKeys(ctx context.Context, change func(*chunked.KeysObject) (bool, error)) error {
	fail := func(err error) error { return fmt.Errorf("change the recipients of image %s: %w", i.ref(), err) }
	for range maxTries {
		doc, etag, err := i.keysObject(ctx)
		if err != nil {
			return fail(err)
		}
		changed, err := change(doc)
		if err != nil {
			return fail(err)
		}
		if !changed {
			return nil
		}
		data, err := doc.Document()
		if err != nil {
			return fail(err)
		}
		err = i.s.putIf(ctx, chunked.KeysKey(i.Manifest.Name, i.Name), data, etag)
		if err == nil {
			return nil
		}
		if !errors.Is(err, upload.ErrExist) {
			return fail(err)
		}
	}
	return fail(ErrBusy)
}

func has(l []chunked.Wrapped, recipient string) bool {
	return slices.ContainsFunc(l, func(w chunked.Wrapped) bool { return w.Recipient == recipient })
}
