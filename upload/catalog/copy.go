package catalog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// CopyRequest is what CopyImage is asked for, in the region copied to.
type CopyRequest struct {
	Name         string // "": the source's
	Description  string // "": the source's
	SourceID     string
	SourceRegion string
	Token        string // makes the request idempotent
	CopyTags     bool   // the source's tags too; only its owner may
	Tags         Tags

	// Folder is where a bundle goes, BUCKET/PREFIX; "" is bundles/ID in the
	// bucket of this catalog.
	Folder string
}

// Copy begins to copy an image from another region's catalog, from, in which
// the caller must be allowed to launch it: it registers a pending image here,
// which [Catalog.CompleteCopy] fills and makes available. The same token gives
// the same image, however far it is.
func (c *Catalog) Copy(ctx context.Context, call Call, r CopyRequest, from *Catalog) (*Image, error) {
	if err := CheckAccount(call.Account); err != nil {
		return nil, err
	}
	digest := requestDigest(r)
	if m, err := c.repeated(ctx, call, "CopyImage", r.Token, digest); m != nil || err != nil {
		return m, err
	}
	var source *Image
	err := from.Read(ctx, func(v *View) (err error) {
		if r.SourceRegion != "" && v.Region() != r.SourceRegion {
			return refuse(CodeParameterValue, "The source region %q is not that of the source catalog, %q", clip(r.SourceRegion), v.Region())
		}
		r.SourceRegion = v.Region()
		if source, err = v.See(ctx, call.Account, r.SourceID); err != nil {
			return err
		}
		if !source.Launchable(call.Account) {
			return refuse(CodeAMIUnavailable, "The image '%s' is %s: only one that is available is copied", r.SourceID, source.State)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if source.Kind == KindNone {
		return nil, refuse(CodeParameter, "The image '%s' is a record without bytes: there is nothing to copy", r.SourceID)
	}
	if r.CopyTags && source.Owner != call.Account {
		return nil, refuse(CodeAuthFailure, "Only its owner copies an image with its tags")
	}
	if r.Name == "" {
		r.Name = source.Name
	}
	if err := CheckName(r.Name); err != nil {
		return nil, err
	}
	var made *Image
	err = c.run(ctx, call, func(t *Tx) error {
		made = nil
		if id, ok, err := t.Token(ctx, call.Account, "CopyImage", r.Token, digest); err != nil || ok {
			if err == nil {
				made, err = t.Image(ctx, id)
			}
			return err
		}
		m := source.Clone()
		m.Name, m.Owner, m.State, m.Created = r.Name, call.Account, Pending, t.Now()
		if r.Description != "" {
			m.Description = r.Description
		}
		m.SourceImage, m.SourceRegion, m.SourceObject = source.ID, r.SourceRegion, ""
		if source.Owner != call.Account {
			m.SourceInstance = "" // for its owner to know
		}
		m.Public, m.LaunchAccounts, m.LaunchOrgs, m.LaunchOrgUnits = false, nil, nil, nil
		m.Protection, m.Reason = "", Reason{}
		m.Deprecated, m.LastLaunched, m.ProtectedUntil = m.Deregistered, m.Deregistered, m.Deregistered
		m.Tags = mergeTags(nil, r.Tags)
		if r.CopyTags {
			m.Tags = mergeTags(source.Tags, r.Tags)
		}
		if len(m.Tags) == 0 {
			m.Tags = nil
		}
		var err error
		if m.ID, err = t.newID(ctx, prefixOf(m.Type)); err != nil {
			return err
		}
		if m.Kind == KindBundle {
			if m.Location, err = c.bundleTarget(r.Folder, m.ID, source.Location); err != nil {
				return err
			}
		}
		if err := t.claimed(ctx, m.Location, t.view.Sequence()+1); err != nil {
			return err
		}
		if made, err = t.create(ctx, m, call, "CopyImage", r.SourceRegion+" "+source.ID); err != nil {
			return err
		}
		return t.PutToken(call.Account, "CopyImage", r.Token, digest, m.ID)
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// bundleTarget is the location that a bundle's manifest is copied to.
func (c *Catalog) bundleTarget(folder, id, source string) (string, error) {
	if folder == "" {
		if folder = c.opt.Folder; folder == "" {
			b, ok := c.objects.(upload.BucketManager)
			if !ok {
				return "", refuse(CodeParameter, "The catalog lies in a directory: say which bucket and prefix the bundle is put into")
			}
			_, prefix, _ := strings.Cut(strings.TrimPrefix(c.objects.String(), "s3://"), "/")
			folder = path.Join(b.Bucket(), prefix)
		}
		folder = path.Join(folder, "bundles", id)
	}
	to := path.Join(folder, path.Base(source))
	_, _, err := SplitBundle(to)
	return to, err
}

// CompleteCopy copies what a pending copy consists of, verifies every object
// where it has arrived, and makes the image available; only then. It may be
// called again after any failure, and goes on where it stopped. An image that
// is there already is given as it is. What is wrong with the source for good
// makes the image failed; else it stays pending.
func (c *Catalog) CompleteCopy(ctx context.Context, call Call, id string, from *Catalog, progress func(done, total int64)) (*Image, error) {
	v, err := c.View(ctx)
	if err != nil {
		return nil, err
	}
	m, err := v.Own(ctx, call.Account, id)
	if err != nil || m.State == Available {
		return m, err
	}
	if m.State != Pending || m.SourceImage == "" || m.SourceObject != "" {
		return nil, refuse(CodeState, "The image '%s' is %s: it is not a copy on its way", id, m.State)
	}
	var source *Image
	err = from.Read(ctx, func(v *View) (err error) {
		source, err = v.See(ctx, call.Account, m.SourceImage)
		return err
	})
	if err == nil && (source.Digest != m.Digest || source.Kind != m.Kind) {
		err = refuse(CodeManifest, "The source '%s' is not what it was when the copy began", m.SourceImage)
	}
	if err == nil {
		switch m.Kind {
		case KindInstar:
			err = c.copyInstar(ctx, call, m, from, progress)
		case KindBundle:
			err = c.copyBundle(ctx, m, source, from, progress)
		}
	}
	if err == nil {
		// As anybody will find it here.
		var f *Facts
		if f, err = c.Inspect(ctx, m.Location); err == nil && f.Digest != m.Digest {
			err = refuse(CodeManifest, "What arrived at %s is not what was copied", m.Location)
		}
	}
	if err != nil {
		if ctx.Err() == nil && isRefusal(err) {
			_, ferr := c.Modify(ctx, call, id, "CopyImage", "failed", func(n *Image) error {
				n.State, n.Reason = Failed, Reason{Code: "Client.InvalidSource", Message: oneLine(err.Error(), 1000)}
				return nil
			})
			return nil, errors.Join(fmt.Errorf("copy image %s: %w", id, err), ferr)
		}
		return nil, fmt.Errorf("copy image %s, which stays pending and can be gone on with: %w", id, err)
	}
	return c.settled(ctx, call, id, "CopyImage")
}

func (c *Catalog) copyInstar(ctx context.Context, call Call, m *Image, from *Catalog, progress func(done, total int64)) error {
	if c.opt.Images == nil || from.opt.Images == nil || c.opt.Signer == nil {
		return errors.New("copying an Instar image needs both stores' images and a key that signs here")
	}
	img, err := from.opt.Images.Resolve(ctx, m.Location, images.ResolveOptions{})
	if err != nil {
		return asManifest(ctx, err)
	}
	return c.adopt(ctx, img, "The source", progress)
}

// adopt makes another store's version of an image one of this store's, found by its
// digest. Whoever may copy or restore is not thereby who says what the image's
// name stands for here, nor that it stands for anything again.
func (c *Catalog) adopt(ctx context.Context, img *images.Image, what string, progress func(done, total int64)) error {
	a, err := c.opt.Images.Adopt(ctx, img, images.AdoptOptions{Signer: c.opt.Signer, Behind: true, Progress: progress})
	switch {
	case err == nil && a.Beside != nil && c.opt.Missed != nil:
		c.opt.Missed(fmt.Errorf("image %s is copied without what lies beside it: %w", img.Manifest.Name, a.Beside))
	case errors.Is(err, images.ErrDamaged):
		return &Error{Code: CodeManifest, Message: what + " is damaged", Err: err}
	case errors.Is(err, chunked.ErrDeleted):
		return &Error{Code: CodeState, Message: "The image's name was deleted from this store: it has to be captured here again first", Err: err}
	}
	return err
}

// copyBundle copies the parts, each verified by its digest where it arrived,
// and the manifest last.
func (c *Catalog) copyBundle(ctx context.Context, m, source *Image, from *Catalog, progress func(done, total int64)) error {
	return from.bundle(ctx, source.Location, func(src upload.Store, srcKey string, data []byte, manifest *ec2.Manifest) error {
		if digestOf(string(data)) != m.Digest {
			return refuse(CodeManifest, "The manifest at %s is not the one that was registered", source.Location)
		}
		return c.putBundle(ctx, m, src, path.Dir(srcKey), data, manifest, progress)
	})
}

// putBundle puts a bundle, whose parts are in a folder of src, where the record
// says.
func (c *Catalog) putBundle(ctx context.Context, m *Image, src upload.Store, folder string, data []byte, manifest *ec2.Manifest, progress func(done, total int64)) (err error) {
	bucket, key, err := SplitBundle(m.Location)
	if err != nil {
		return err
	}
	if c.opt.Bucket == nil {
		return errors.New("a bundle needs a bucket to be put into")
	}
	dst, err := c.opt.Bucket(ctx, bucket)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	var mu sync.Mutex
	var done int64
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, p := range manifest.Parts {
		g.Go(func() error {
			to, at := partKey(path.Dir(key), p.Filename), partKey(folder, p.Filename)
			n, err := checkPart(gctx, dst, to, p)
			if err != nil && (errors.Is(err, upload.ErrNotExist) || isRefusal(err)) {
				if _, err = upload.Copy(gctx, dst, to, src, at, upload.PutOptions{}); err == nil {
					n, err = checkPart(gctx, dst, to, p)
				}
			}
			if err != nil || progress == nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			done += n
			progress(done, manifest.BundledSize)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		if errors.Is(err, upload.ErrNotExist) {
			return asManifest(ctx, err)
		}
		return err
	}
	_, err = upload.PutBytes(ctx, dst, key, data, upload.PutOptions{ContentType: "application/xml"})
	return err
}

// checkPart reads a part and compares its digest.
func checkPart(ctx context.Context, s upload.Store, key string, p ec2.ManifestPart) (int64, error) {
	r, _, err := s.Get(ctx, key, upload.GetOptions{})
	if err != nil {
		return 0, err
	}
	defer r.Close()
	h := ec2.NewSum()
	n, err := io.Copy(h, r)
	if err != nil {
		return 0, err
	}
	if string(h.Sum(nil)) != string(p.SHA1[:]) {
		return 0, refuse(CodeManifest, "The part %q has not the digest that the manifest says", p.Filename)
	}
	return n, nil
}

// Shared says what [Catalog.Share] did beside the permissions.
type Shared struct {
	Image   *Image
	Wrapped []string // keys that open the image now
	Removed []string // keys that it is not wrapped for any more
	Keyless []string // accounts whose permission is no key: the catalog knows none of theirs
	KeyKept bool     // the last key an image is wrapped for stays
}

// Share is [Catalog.ModifyLaunchPermissions], and for an Instar image gives the
// accounts' keys ([Account.Recipients]) what opens it, before the permission;
// or takes it away, after. What has been read, or could have been, cannot be
// taken back. An account without a key is an error unless flagOnly is set, which
// leaves keys alone altogether.
func (c *Catalog) Share(ctx context.Context, call Call, id string, add, remove Permissions, flagOnly bool) (*Shared, error) {
	v, err := c.View(ctx)
	if err != nil {
		return nil, err
	}
	m, err := v.Own(ctx, call.Account, id)
	if err != nil {
		return nil, err
	}
	s := &Shared{}
	var img *images.Image
	if m.Kind == KindInstar && !flagOnly && !call.DryRun && len(add.Accounts)+len(remove.Accounts) > 0 {
		if c.opt.Images == nil {
			return nil, errors.New("sharing an Instar image needs the store's images")
		}
		if img, err = c.opt.Images.Resolve(ctx, m.Location, images.ResolveOptions{}); err != nil {
			return nil, err
		}
		var give []*keys.Recipient
		for _, a := range add.Accounts {
			l, err := v.recipients(ctx, a)
			if err != nil {
				return nil, err
			}
			if len(l) == 0 {
				s.Keyless = append(s.Keyless, a)
			}
			give = append(give, l...)
		}
		if len(s.Keyless) > 0 {
			return s, &Error{Code: CodeParameterValue, Message: fmt.Sprintf("The catalog knows no key of account %s", strings.Join(s.Keyless, ", "))}
		}
		for _, r := range give {
			if err := img.AddRecipient(ctx, r); err != nil {
				return nil, err
			}
			s.Wrapped = append(s.Wrapped, r.String())
		}
	}
	if s.Image, err = c.ModifyLaunchPermissions(ctx, call, id, add, remove); err != nil {
		return nil, err
	}
	if img == nil {
		return s, nil
	}
	// Keys that another account which may launch it, or the owner, has too stay.
	keep := map[string]bool{}
	for _, a := range append([]string{m.Owner}, s.Image.LaunchAccounts...) {
		l, err := v.recipients(ctx, a)
		if err != nil {
			return nil, err
		}
		for _, r := range l {
			keep[r.String()] = true
		}
	}
	have, err := img.Recipients(ctx)
	if err != nil {
		return nil, err
	}
	wrapped := map[string]bool{}
	for _, r := range have {
		wrapped[r.Key] = true
	}
	for _, a := range remove.Accounts {
		l, err := v.recipients(ctx, a)
		if err != nil {
			return nil, err
		}
		for _, r := range l {
			if keep[r.String()] || !wrapped[r.String()] {
				continue
			}
			err := img.RemoveRecipient(ctx, r.String())
			if errors.Is(err, images.ErrLast) {
				s.KeyKept = true
				continue
			}
			if err != nil {
				return nil, err
			}
			s.Removed = append(s.Removed, r.String())
		}
	}
	return s, nil
}

// recipients are an account's keys.
func (v *View) recipients(ctx context.Context, account string) ([]*keys.Recipient, error) {
	a, err := v.Account(ctx, account)
	if err != nil || a == nil {
		return nil, err
	}
	var l []*keys.Recipient
	for _, text := range a.Recipients {
		r, err := keys.ParseRecipient(text)
		if err != nil {
			return nil, fmt.Errorf("key of account %s: %w", account, err)
		}
		l = append(l, r)
	}
	return l, nil
}
