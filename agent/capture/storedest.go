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

	bundle    string
	mu        sync.Mutex // covers put
	put       map[string]upload.Object
	published bool // the manifest may be there, and is ours
}

// ErrBundleExists is wrapped by Prepare's error when the store has a complete
// bundle of that name and Replace is not set. It is a [fs.ErrExist].
var ErrBundleExists error = existError("a bundle of that name is stored already")

// existError is an error that is a [fs.ErrExist] without saying so.
type existError string

func (e existError) Error() string   { return string(e) }
func (existError) Is(err error) bool { return err == fs.ErrExist }

// ErrOtherRun is wrapped by errors about a second run that makes a bundle of
// the same name in the same place at the same time. It is a [fs.ErrExist].
var ErrOtherRun error = existError("another run makes a bundle of that name in the same place")

// Prepare removes parts that an interrupted run has left: without a manifest
// they are nobody's bundle. A store has no locks, so they may be those of a run
// that is still going on: that one finds out in Commit.
func (b *Bucket) Prepare(ctx context.Context, bundle string) error {
	b.bundle, b.put = bundle, map[string]upload.Object{}
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
	if _, err := b.Store.Stat(ctx, manifest); err == nil { // published while we listed
		return fmt.Errorf("%s/%s: %w", b.Store, manifest, ErrOtherRun)
	} else if !errors.Is(err, upload.ErrNotExist) {
		return err
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
	b.note(p.Name, upload.Object{}) // before: an answer may be lost
	o, err := b.Store.Put(ctx, p.Name, bytes.NewReader(p.Data), int64(len(p.Data)), upload.PutOptions{})
	if err == nil {
		b.note(p.Name, o)
	}
	return err
}

func (b *Bucket) note(key string, o upload.Object) {
	b.mu.Lock()
	b.put[key] = o
	b.mu.Unlock()
}

// Commit makes sure that the parts are still there and ours, and uploads the
// manifest if no other run has put one meanwhile.
func (b *Bucket) Commit(ctx context.Context, m *ec2.Manifest, doc []byte) (string, error) {
	stored, err := b.stored(ctx)
	if err != nil {
		return "", err
	}
	for _, p := range m.Parts {
		o, ok := stored[p.Filename]
		if !ok || !b.ours(o) {
			return "", fmt.Errorf("%s/%s was removed or replaced meanwhile: %w", b.Store, p.Filename, ErrOtherRun)
		}
	}
	name := ManifestName(b.bundle)
	b.published = true // before: an answer may be lost
	o := upload.PutOptions{ContentType: "application/xml", IfNoneMatch: true}
	_, err = upload.PutBytes(ctx, b.Store, name, doc, o)
	if errors.Is(err, upload.ErrUnsupported) { // by an old server, which takes it without the condition
		o.IfNoneMatch = false
		_, err = upload.PutBytes(ctx, b.Store, name, doc, o)
	}
	if errors.Is(err, upload.ErrExist) {
		b.published = false
		return "", fmt.Errorf("%s/%s: %w", b.Store, name, ErrOtherRun)
	}
	if err != nil {
		return "", err
	}
	return b.Store.String() + "/" + name, nil
}

// stored describes the parts that are in the store.
func (b *Bucket) stored(ctx context.Context) (map[string]upload.Object, error) {
	found := map[string]upload.Object{}
	for o, err := range b.Store.List(ctx, b.bundle+".part.") {
		if err != nil {
			return nil, fmt.Errorf("looking at the parts stored: %w", err)
		}
		found[o.Key] = o
	}
	return found, nil
}

// ours reports whether an object can be what this run has put. Parts of two
// runs never have the same bytes: each run has its own key.
func (b *Bucket) ours(o upload.Object) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	put, ok := b.put[o.Key]
	return ok && (put.Key == "" || put.Size == o.Size && (put.ETag == "" || o.ETag == "" || put.ETag == o.ETag))
}

// Abort deletes the manifest, if it got there, and the parts, but none that
// another run has put over them.
func (b *Bucket) Abort(ctx context.Context) error {
	if len(b.put) == 0 {
		return nil
	}
	stored, err := b.stored(ctx)
	if err != nil {
		stored = nil // then everything goes that was put
	}
	var keys []string
	if b.published {
		keys = append(keys, ManifestName(b.bundle))
	}
	for k := range b.put {
		if o, ok := stored[k]; !ok || b.ours(o) {
			keys = append(keys, k)
		}
	}
	if err := b.Store.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("removing the parts stored so far: %w", err)
	}
	return nil
}
