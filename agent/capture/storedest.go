package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/upload"
)

// Bucket is a store as a [Destination]: parts leave as they are made.
type Bucket struct {
	Store   upload.Store
	Replace bool // remove a bundle of the same name first
	// Removed, if set, is told of each leftover of an earlier run that Prepare removes.
	Removed func(key string)

	bundle string
	mu     sync.Mutex // covers put
	put    map[string]bool
}

// ErrBundleExists is wrapped by Prepare's error when the store has a complete
// bundle of that name and Replace is not set. It is a [fs.ErrExist].
var ErrBundleExists = fmt.Errorf("a bundle of that name is stored already: %w", fs.ErrExist)

// Prepare removes parts that an interrupted run has left: without a manifest
// they are nobody's bundle.
func (b *Bucket) Prepare(ctx context.Context, bundle string) error {
	b.bundle, b.put = bundle, map[string]bool{}
	manifest := ManifestName(bundle)
	_, err := b.Store.Stat(ctx, manifest)
	switch {
	case err == nil && !b.Replace:
		return fmt.Errorf("%s/%s: %w", b.Store, manifest, ErrBundleExists)
	case err == nil:
		if err := b.Store.Delete(ctx, manifest); err != nil {
			return fmt.Errorf("removing the manifest of an earlier bundle: %w", err)
		}
	case !errors.Is(err, upload.ErrNotExist):
		return err
	}
	keys, err := StoredParts(ctx, b.Store, bundle)
	if err != nil {
		return err
	}
	if len(keys) == 0 {
		return nil
	}
	if err := b.Store.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("removing parts of an earlier run: %w", err)
	}
	if b.Removed != nil {
		for _, k := range keys {
			b.Removed(k)
		}
	}
	return nil
}

// StoredParts lists the objects that are called like parts of the bundle.
func StoredParts(ctx context.Context, s upload.Store, bundle string) ([]string, error) {
	var keys []string
	for o, err := range s.List(ctx, bundle+".part.") {
		if err != nil {
			return nil, fmt.Errorf("looking for parts of an earlier run: %w", err)
		}
		if IsPart(o.Key, bundle) {
			keys = append(keys, o.Key)
		}
	}
	return keys, nil
}

// PutPart uploads a part.
func (b *Bucket) PutPart(ctx context.Context, p ec2.Part) error {
	b.mu.Lock()
	b.put[p.Name] = true // before: an answer may be lost
	b.mu.Unlock()
	_, err := b.Store.Put(ctx, p.Name, bytes.NewReader(p.Data), int64(len(p.Data)), upload.PutOptions{})
	return err
}

// Commit uploads the manifest.
func (b *Bucket) Commit(ctx context.Context, _ *ec2.Manifest, doc []byte) (string, error) {
	name := ManifestName(b.bundle)
	if _, err := upload.PutBytes(ctx, b.Store, name, doc, upload.PutOptions{ContentType: "application/xml"}); err != nil {
		return "", err
	}
	return b.Store.String() + "/" + name, nil
}

// Abort deletes the manifest, if it got there, and the parts.
func (b *Bucket) Abort(ctx context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.put) == 0 {
		return nil
	}
	keys := []string{ManifestName(b.bundle)}
	for k := range b.put {
		keys = append(keys, k)
	}
	if err := b.Store.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("removing the parts stored so far: %w", err)
	}
	return nil
}
