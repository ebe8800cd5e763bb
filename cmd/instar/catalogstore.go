package main

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/images"
)

// openedCatalog is a catalog, the store it is in, and the images beside it.
type openedCatalog struct {
	*catalog.Catalog
	store  upload.Store
	signer keys.Signer // nil if it is only read
	trust  *keys.AllowedSigners
	close  func() error
}

// openCatalog opens the catalog of the store that the options name, for changes
// too if change is set: sign is --sign then, "" for the machine's own key.
func (a *app) openCatalog(ctx context.Context, o *imageStore, sign string, change bool, more ...func(*catalog.Options)) (*openedCatalog, error) {
	m := a.machineKeys(o, sign, false)
	ids, err := m.Identities()
	if err != nil && (len(o.identities) > 0 || !errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	trust, err := trusted(m)
	if err != nil {
		return nil, err
	}
	k := &openedCatalog{trust: trust}
	if change {
		if k.signer, err = a.signer(ctx, o, sign); err != nil {
			return nil, err
		}
	}
	if k.store, err = a.openImages(ctx, o, false); err != nil {
		return nil, err
	}
	k.close = k.store.Close
	io := images.Options{Trust: trust, Identities: ids, State: a.stateDir()}
	stored, err := images.Open(k.store, io)
	if err != nil {
		return nil, errors.Join(err, k.close())
	}
	co := catalog.Options{Trust: trust, Signer: k.signer, State: a.stateDir(), Images: stored, Bucket: a.catalogBucket(o), Folder: a.catalogFolder(o)}
	co.Missed = func(err error) { a.ui.Warn(err.Error(), nil) }
	for _, f := range more {
		f(&co)
	}
	k.Catalog, err = catalog.Open(k.store, co)
	if err != nil {
		return nil, errors.Join(err, k.close())
	}
	return k, nil
}

// catalogBucket opens the buckets that bundles, and images as one object, are in: at
// the endpoint of the catalog's own store, by the same keys. Beside a store that is
// a directory they are directories too.
func (a *app) catalogBucket(o *imageStore) func(context.Context, string) (upload.Store, error) {
	return func(ctx context.Context, bucket string) (upload.Store, error) {
		if err := catalog.CheckBucket(bucket); err != nil {
			return nil, err
		}
		if beside, _ := a.bucketsBeside(o); beside != "" {
			s, err := upload.OpenDir(filepath.Join(beside, bucket), false)
			if errors.Is(err, fs.ErrNotExist) {
				err = &upload.Error{Op: "open", Store: filepath.Join(beside, bucket), Kind: upload.ErrNoBucket, Err: fs.ErrNotExist}
			}
			return s, err
		}
		return a.openBucket(ctx, &o.storage, bucket, false)
	}
}

// bucketsBeside is the directory that has the catalog's store as a bucket, and how
// the store is called in it; "" if buckets are not directories, or the endpoint says
// where they are.
func (a *app) bucketsBeside(o *imageStore) (dir, name string) {
	endpoint := a.setting("endpoint", "--url", o.url)
	store := a.imageStoreDir(o)
	if store == "" || strings.HasPrefix(endpoint, "file://") || strings.HasPrefix(endpoint, "/") {
		return "", ""
	}
	return filepath.Dir(store), filepath.Base(store)
}

// catalogFolder is where bundles go that are copied into a catalog whose store is a
// directory: into that directory.
func (a *app) catalogFolder(o *imageStore) string {
	root, name := a.bucketsBeside(o)
	if root == "" { // the endpoint may be a directory
		local, isFile := strings.CutPrefix(a.setting("endpoint", "--url", o.url), "file://")
		store := a.imageStoreDir(o)
		rel, err := filepath.Rel(local, store)
		if store == "" || !isFile && !strings.HasPrefix(local, "/") || err != nil {
			return ""
		}
		name = filepath.ToSlash(rel)
	}
	if bucket, _, _ := strings.Cut(name, "/"); catalog.CheckBucket(bucket) != nil {
		return ""
	}
	return name
}
