package catalog

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/lease"
	"github.com/instar-image/instar/upload/catalog/stored"
	"github.com/instar-image/instar/upload/images"
)

// RestoreRequest is what CreateRestoreImageTask is asked for.
type RestoreRequest struct {
	Bucket string
	Key    string // of the object
	Name   string // "": the one that the image was stored under
	Tags   Tags   // beside those that were stored, and before them
	Token  string // makes the request idempotent
	Folder string // where a bundle goes, BUCKET/PREFIX; "" is bundles/ID in the bucket of this catalog

	// Check, if it is not nil, is asked of the location, NAME@VERSION, that an Instar
	// image is registered at again: it keeps the one that it had, where a bundle
	// gets a new one.
	Check func(ctx context.Context, location string) error `json:"-"`
}

// restorable is an object that an image is restored from, its head verified.
type restorable struct {
	*storedDoc
	view upload.Store
}

// stored opens an object; nothing of it is used before its head is verified.
func (c *Catalog) stored(ctx context.Context, bucket, key string, use func(r *restorable) error) (err error) {
	if err := CheckBucket(bucket); err != nil {
		return err
	}
	if err := upload.CheckKey(key); err != nil {
		return &Error{Code: CodeParameterValue, Message: "The object's key is not one", Err: err}
	}
	s, err := c.bucket(ctx, bucket)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	o, err := stored.Open(ctx, s, key)
	if err != nil {
		return asBucket(ctx, bucket, err)
	}
	bad := func(err error) error {
		return &Error{Code: CodeParameterValue, Message: fmt.Sprintf("The object %q is no stored image that is believed here", clip(key)), Err: err}
	}
	d, err := openStored(o.Head, c.opt.Trust)
	if err != nil {
		return bad(err)
	}
	view, err := o.View(d.Members)
	if err != nil {
		return bad(err)
	}
	return use(&restorable{d, view})
}

// IsUntrusted says whether an object was refused because of who signed it.
func IsUntrusted(err error) bool {
	return errors.Is(err, keys.ErrUntrusted) || errors.Is(err, keys.ErrNamespace) || errors.Is(err, keys.ErrExpired)
}

// Restore begins to restore an image from one object that [Catalog.CompleteStore]
// has put, here or elsewhere: it registers a pending image of a new id, with what
// the object's head says, which must be signed by a key that may speak for the
// region it was stored in. [Catalog.CompleteRestore] fetches and verifies the rest.
func (c *Catalog) Restore(ctx context.Context, call Call, r RestoreRequest) (*Image, error) {
	if err := CheckAccount(call.Account); err != nil {
		return nil, err
	}
	digest := requestDigest(r)
	if m, err := c.repeated(ctx, call, "CreateRestoreImageTask", r.Token, digest); m != nil || err != nil {
		return m, err
	}
	if r.Name != "" {
		if err := CheckName(r.Name); err != nil {
			return nil, err
		}
	}
	var from *storedDoc
	if err := c.stored(ctx, r.Bucket, r.Key, func(s *restorable) error { from = s.storedDoc; return nil }); err != nil {
		return nil, err
	}
	if from.Image.Kind == KindInstar && r.Check != nil {
		if err := r.Check(ctx, from.Image.Location); err != nil {
			return nil, err
		}
	}
	if r.Name == "" {
		r.Name = from.Image.Name
	}
	var made *Image
	err := c.run(ctx, call, func(t *Tx) error {
		made = nil
		if id, ok, err := t.Token(ctx, call.Account, "CreateRestoreImageTask", r.Token, digest); err != nil || ok {
			if err == nil {
				made, err = t.Image(ctx, id)
			}
			return err
		}
		m := storedRecord(from.Image, call.Account)
		m.Name, m.Owner, m.State, m.Created = r.Name, call.Account, Pending, t.Now()
		m.Tags = mergeTags(from.Image.Tags, r.Tags)
		if len(m.Tags) == 0 {
			m.Tags = nil
		}
		if len(m.Tags) > maxTags {
			return refuse(CodeTagLimit, "The image would have %d tags, more than %d", len(m.Tags), maxTags)
		}
		m.SourceImage, m.SourceRegion, m.SourceObject = from.Image.ID, from.Region, r.Bucket+"/"+r.Key
		var err error
		if m.ID, err = t.newID(ctx, prefixOf(m.Type)); err != nil {
			return err
		}
		if m.Kind == KindBundle {
			if m.Location, err = c.bundleTarget(r.Folder, m.ID, from.Image.Location); err != nil {
				return err
			}
		}
		if err := t.claimed(ctx, m.Location, t.view.Sequence()+1); err != nil {
			return err
		}
		if made, err = t.create(ctx, m, call, "CreateRestoreImageTask", m.SourceObject); err != nil {
			return err
		}
		return t.PutToken(call.Account, "CreateRestoreImageTask", r.Token, digest, m.ID)
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// CompleteRestore fetches what a pending image consists of out of the object it is
// restored from, verifies every piece where it has arrived, and makes the image
// available; only then. It may be called again after any failure, and goes on where
// it stopped; what somebody else is at is [lease.ErrTaken]. An image that is there
// already is given as it is. What is wrong with the object for good makes the
// image failed; else it stays pending.
func (c *Catalog) CompleteRestore(ctx context.Context, call Call, holder, id string, progress func(done, total int64)) (_ *Image, err error) {
	v, err := c.View(ctx)
	if err != nil {
		return nil, err
	}
	m, err := v.Own(ctx, call.Account, id)
	if err != nil || m.State == Available {
		return m, err
	}
	if m.State != Pending || m.SourceObject == "" {
		return nil, refuse(CodeState, "The image '%s' is %s: it is not being restored", id, m.State)
	}
	l, err := lease.Take(ctx, c.objects, id, holder, c.opt.Now)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Release(context.WithoutCancel(ctx))) }()
	working, stop := context.WithCancel(ctx)
	defer stop()
	go l.Keep(working, stop)
	if err := c.restore(working, call, m, func(done, total int64) {
		l.Note(int(100 * done / max(total, 1)))
		if progress != nil {
			progress(done, total)
		}
	}); err != nil {
		if working.Err() == nil && isRefusal(err) {
			ferr := c.Fail(ctx, call, id, Reason{Code: "Client.InvalidStoredImage", Message: err.Error()})
			return nil, errors.Join(fmt.Errorf("restore image %s: %w", id, err), ferr)
		}
		return nil, fmt.Errorf("restore image %s, which stays pending and can be gone on with: %w", id, err)
	}
	return c.settled(ctx, call, id, "CreateRestoreImageTask")
}

// settled makes an image available that was pending until all of it was verified.
func (c *Catalog) settled(ctx context.Context, call Call, id, action string) (*Image, error) {
	var made *Image
	err := c.run(ctx, call, func(t *Tx) error {
		made = nil
		m, err := t.Own(ctx, call.Account, id)
		if err != nil {
			return err
		}
		if m.State == Available {
			made = m
			return nil
		}
		made, err = t.Change(ctx, m, call, action, "available", func(n *Image) error {
			if n.State != Pending {
				return refuse(CodeState, "The image '%s' is %s", id, n.State)
			}
			n.State = Available
			return nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

func (c *Catalog) restore(ctx context.Context, call Call, m *Image, progress func(done, total int64)) error {
	if c.now().Sub(m.Created) > StoreTaskLife {
		return refuse(CodeState, "It could not be done within %d days", int(StoreTaskLife/(24*time.Hour)))
	}
	bucket, key, _ := strings.Cut(m.SourceObject, "/")
	err := c.stored(ctx, bucket, key, func(from *restorable) error {
		if from.Image.Digest != m.Digest || from.Image.Kind != m.Kind || from.Image.ID != m.SourceImage ||
			m.Kind == KindInstar && from.Image.Location != m.Location {
			return refuse(CodeManifest, "The object '%s' is not what it was when the restoration began", m.SourceObject)
		}
		if m.Kind == KindBundle {
			return c.restoreBundle(ctx, m, from, progress)
		}
		return c.restoreInstar(ctx, m, from, progress)
	})
	if errors.Is(err, stored.ErrDamaged) && !isRefusal(err) {
		return &Error{Code: CodeManifest, Message: "The object is damaged", Err: err}
	}
	if err != nil {
		return err
	}
	// As anybody will find it here.
	f, err := c.Inspect(ctx, m.Location)
	if err == nil && f.Digest != m.Digest {
		err = refuse(CodeManifest, "What arrived at %s is not what was stored", m.Location)
	}
	return err
}

func (c *Catalog) restoreInstar(ctx context.Context, m *Image, from *restorable, progress func(done, total int64)) error {
	if c.opt.Images == nil || c.opt.Signer == nil {
		return errors.New("restoring an Instar image needs the store's images and a key that signs here")
	}
	there, err := c.opt.Images.Beside(from.view)
	if err != nil {
		return err
	}
	img, err := there.Resolve(ctx, from.Image.Location, images.ResolveOptions{})
	if err != nil {
		return asManifest(ctx, err)
	}
	return c.adopt(ctx, img, "The object", progress)
}

func (c *Catalog) restoreBundle(ctx context.Context, m *Image, from *restorable, progress func(done, total int64)) error {
	at := manifestName(from.Image.Location)
	data, _, err := upload.GetBytes(ctx, from.view, at, maxManifest)
	if err != nil {
		return asManifest(ctx, err)
	}
	manifest, err := ec2.ParseManifest(data)
	if err != nil {
		return &Error{Code: CodeManifest, Message: "The manifest is not usable", Err: err}
	}
	return c.putBundle(ctx, m, from.view, path.Dir(at), data, manifest, progress)
}
