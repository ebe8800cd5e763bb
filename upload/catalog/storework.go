package catalog

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"path"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/lease"
	"github.com/instar-image/instar/upload/catalog/stored"
	"github.com/instar-image/instar/upload/images"
)

// storeBuffers is how much memory the parts of an object may take on their way,
// as long as there are not more than S3 counts.
const (
	storePart    = 16 << 20
	storeBuffers = 6 * storePart
	storeParts   = 9_500 // of the 10,000 that S3 allows
)

// putOptions are for an object of a size. Up to 150 GiB some parts of 16 MiB are
// held in memory, above that two of a 9,500th of the object.
func putOptions(size int64) upload.PutOptions {
	o := upload.PutOptions{PartSize: storePart, ContentType: "application/x-tar"}
	if least := (size + storeParts - 1) / storeParts; least > o.PartSize {
		o.PartSize = (least + 1<<20 - 1) &^ (1<<20 - 1)
	}
	o.Parallel = int(max(1, storeBuffers/o.PartSize-2))
	return o
}

// CompleteStore carries a task out: it reads what the image consists of, compares
// every digest on the way, and puts the object, whole or not at all. It may be
// called again after any failure. A task that has ended is given as it is; one that
// somebody else is at is [lease.ErrTaken]. What is wrong with the image or the
// bucket for good makes the task failed, with the error; else it stays in progress.
// holder tells those who carry out tasks apart.
func (c *Catalog) CompleteStore(ctx context.Context, holder string, t *StoreTask, progress func(done, total int64)) (*StoreTask, error) {
	l, err := lease.Take(ctx, c.objects, t.lease(), holder, c.opt.Now)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Release(context.WithoutCancel(ctx))) }()
	working, stop := context.WithCancel(ctx)
	defer stop()
	go l.Keep(working, stop)
	now, err := c.storeTask(working, t)
	if err != nil || now.State != InProgress {
		return now, err
	}
	size, err := c.store(working, now, func(done, total int64) {
		l.Note(int(100 * done / max(total, 1)))
		if progress != nil {
			progress(done, total)
		}
	})
	if err != nil {
		if ctx.Err() == nil && working.Err() == nil && isRefusal(err) {
			_, ferr := c.endStore(ctx, now, func(n *StoreTask) { n.State, n.Reason = TaskFailed, oneLine(err.Error(), 1000) })
			return nil, errors.Join(fmt.Errorf("store image %s: %w", t.Image, err), ferr)
		}
		return nil, fmt.Errorf("store image %s, which stays in progress and can be gone on with: %w", t.Image, err)
	}
	return c.endStore(ctx, now, func(n *StoreTask) { n.State, n.Size = Completed, size })
}

// storeTask is a task as it is now.
func (c *Catalog) storeTask(ctx context.Context, t *StoreTask) (now *StoreTask, err error) {
	err = c.Read(ctx, func(v *View) error {
		e, err := v.entry(ctx, t.key())
		if err == nil && e == nil {
			err = refuse(CodeParameterValue, "There is no task of storing '%s' in %s", t.Image, t.Bucket)
		}
		if err == nil {
			now = e.StoreTask
		}
		return err
	})
	return now, err
}

func (c *Catalog) endStore(ctx context.Context, was *StoreTask, f func(*StoreTask)) (*StoreTask, error) {
	var n *StoreTask
	err := c.Update(ctx, func(t *Tx) error {
		e, err := t.entry(ctx, was.key())
		if err != nil {
			return err
		}
		if e != nil && (e.StoreTask.State != InProgress || !e.StoreTask.Started.Equal(was.Started)) {
			n = e.StoreTask // somebody else has ended it
			return nil
		}
		now := *was
		f(&now)
		now.Ended = t.at
		n = &now
		return t.set(&entry{Key: now.key(), StoreTask: n})
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// store puts the object of a task and says how large it is.
func (c *Catalog) store(ctx context.Context, t *StoreTask, progress func(done, total int64)) (size int64, err error) {
	v, err := c.View(ctx)
	if err != nil {
		return 0, err
	}
	m, err := v.storable(ctx, t.Owner, t.Image)
	if err != nil {
		return 0, err
	}
	if c.now().Sub(t.Started) > StoreTaskLife {
		return 0, refuse(CodeState, "It could not be done within %d days", int(StoreTaskLife/(24*time.Hour)))
	}
	dst, err := c.bucket(ctx, t.Bucket)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if err := c.replaceable(ctx, dst, t.Key, t.Image); err != nil {
		return 0, asBucket(ctx, t.Bucket, err)
	}
	err = c.pieces(ctx, m, func(src upload.Store, members []stored.Member, key func(stored.Member) string) error {
		at := c.now()
		behind, err := stored.Lay(members, at)
		if err != nil {
			return &Error{Code: CodeManifest, Message: "The image cannot be one object", Err: err}
		}
		head, err := c.signStored(ctx, m, t.Owner, v.Region(), at, members)
		if err != nil {
			return err
		}
		size = stored.HeadSize(len(head)) + behind
		o := putOptions(size)
		o.Tags, o.Metadata = t.Tags, storedMetadata(m, at)
		var done int64
		r, err := stored.NewReader(ctx, head, members, at, func(ctx context.Context, p stored.Member) (io.ReadCloser, error) {
			r, obj, err := src.Get(ctx, key(p), upload.GetOptions{})
			if err == nil && obj.Size != p.Size {
				err = errors.Join(fmt.Errorf("%w: it has %d bytes, not %d", stored.ErrDamaged, obj.Size, p.Size), r.Close())
			}
			if err != nil {
				return nil, asManifest(ctx, err)
			}
			return r, nil
		})
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = dst.PutStream(ctx, t.Key, readFunc(func(p []byte) (int, error) {
			n, err := r.Read(p)
			done += int64(n)
			progress(done, size)
			return n, err
		}), o)
		switch {
		case errors.Is(err, stored.ErrDamaged):
			return &Error{Code: CodeManifest, Message: "The image is damaged", Err: err}
		}
		return asBucket(ctx, t.Bucket, err)
	})
	return size, err
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// storedMetadata is what is told of an image beside the object.
func storedMetadata(m *Image, at time.Time) map[string]string {
	const format = "2006-01-02T15:04:05.000Z"
	all := map[string]string{
		"ami-name": m.Name, "ami-description": mime.QEncoding.Encode("utf-8", m.Description), "ami-owner-account": m.Owner,
		"ami-registration-date": m.Created.Format(format), "ami-store-date": at.Format(format),
	}
	maps.DeleteFunc(all, func(_, v string) bool { return v == "" })
	return all
}

// bundleFolder is where the members of an EC2 bundle are.
const bundleFolder = "bundle/"

// pieces finds what an image consists of, each piece with its size and digest, and
// where it is read.
func (c *Catalog) pieces(ctx context.Context, m *Image, use func(src upload.Store, members []stored.Member, key func(stored.Member) string) error) error {
	if m.Kind == KindBundle {
		return c.bundlePieces(ctx, m, use)
	}
	if c.opt.Images == nil {
		return errors.New("storing an Instar image needs the store's images")
	}
	img, err := c.opt.Images.Resolve(ctx, m.Location, images.ResolveOptions{})
	if err != nil {
		return asManifest(ctx, err)
	}
	parts, err := img.Parts(ctx)
	if err != nil {
		return asManifest(ctx, err)
	}
	members := make([]stored.Member, 0, len(parts))
	for _, p := range parts {
		members = append(members, stored.Member{Name: p.Key, Size: p.Size, SHA256: p.SHA256.String()})
	}
	return use(c.opt.Images.Objects(), members, func(p stored.Member) string { return p.Name })
}

func manifestName(location string) string { return bundleFolder + path.Base(location) }

// bundlePieces are the manifest, and the parts in its order.
func (c *Catalog) bundlePieces(ctx context.Context, m *Image, use func(src upload.Store, members []stored.Member, key func(stored.Member) string) error) error {
	return c.bundle(ctx, m.Location, func(src upload.Store, at string, data []byte, manifest *ec2.Manifest) error {
		if digestOf(string(data)) != m.Digest {
			return refuse(CodeManifest, "The manifest at %s is not the one that was registered", m.Location)
		}
		sizes, err := partSizes(ctx, src, path.Dir(at), manifest)
		if err != nil {
			return err
		}
		keys := map[string]string{manifestName(m.Location): at}
		members := []stored.Member{{Name: manifestName(m.Location), Size: int64(len(data)), SHA256: m.Digest}}
		for _, p := range manifest.Parts {
			key, name := partKey(path.Dir(at), p.Filename), bundleFolder+p.Filename
			if _, twice := keys[name]; twice {
				return refuse(CodeManifest, "The manifest at %s names %q twice", m.Location, clip(p.Filename))
			}
			keys[name] = key
			members = append(members, stored.Member{Name: name, Size: sizes[key], SHA1: hex.EncodeToString(p.SHA1[:])})
		}
		return use(src, members, func(p stored.Member) string { return keys[p.Name] })
	})
}
