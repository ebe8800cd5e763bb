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

// Deleted says what Delete removed. Packs and index objects go with the next
// garbage collections.
type Deleted struct {
	Image    string
	Versions []chunked.Name // manifests that are no more
	Newest   chunked.Name   // what the head names now; zero: the image is deleted
	Sequence int64          // of the head
}

// Delete removes an image with all its versions (ref is NAME), or one version.
// The head goes first; from then on nobody finds what is removed after it. It
// may be run again after any failure.
func (s *Store) Delete(ctx context.Context, ref string, signer keys.Signer) (*Deleted, error) {
	r, err := ParseRef(ref)
	if err != nil {
		return nil, err
	}
	var releases []func(context.Context) error
	d, err := s.delete(ctx, r, signer, func(versions []chunked.Name) error {
		if s.opt.Claim == nil || len(versions) == 0 {
			return nil
		}
		release, err := s.opt.Claim(ctx, r.Image, versions)
		if err == nil {
			releases = append(releases, release)
		}
		return err
	})
	for _, release := range releases {
		err = errors.Join(err, release(context.WithoutCancel(ctx)))
	}
	if err != nil {
		return nil, fmt.Errorf("delete image %s in %s: %w", r, s, err)
	}
	return d, nil
}

func (s *Store) delete(ctx context.Context, r Ref, signer keys.Signer, claim func([]chunked.Name) error) (*Deleted, error) {
	var gone []chunked.Name
	var head *chunked.Head
	for try := 0; ; try++ {
		if try == maxTries {
			return nil, fmt.Errorf("%w: its head", ErrBusy)
		}
		old, err := s.head(ctx, r.Image)
		if err != nil {
			return nil, err
		}
		keep := []chunked.Name{}
		gone = nil
		if r.Version == "" && r.Parents == 0 {
			if old != nil && old.doc.Manifest == (chunked.Name{}) {
				head = old.doc // what is left from the last time may still be there
				break
			}
			if old == nil {
				if ok, err := s.exists(ctx, chunked.ImageFolder(r.Image)); err != nil || !ok {
					return nil, errors.Join(err, ErrNoImage)
				}
			} else {
				gone = versions(old.doc)
			}
		} else {
			if old == nil {
				return nil, ErrNoImage
			}
			name, err := s.which(ctx, r, old)
			if err != nil {
				return nil, err
			}
			if !lists(old.doc, name) {
				head, gone = old.doc, []chunked.Name{name} // not listed any more: finish the job
				if err := claim(gone); err != nil {
					return nil, err
				}
				break
			}
			gone = []chunked.Name{name}
			keep = slices.DeleteFunc(versions(old.doc), func(n chunked.Name) bool { return n == name })
		}
		if err := claim(gone); err != nil {
			return nil, err
		}
		head = &chunked.Head{Name: r.Image, Sequence: 1, Created: s.stamp()}
		etag := ""
		if old != nil {
			head.Sequence, etag = old.doc.Sequence+1, old.etag
			head.Expires = old.doc.Expires
		}
		if len(keep) > 0 {
			head.Manifest, head.Versions = keep[0], keep[1:]
		}
		data, err := head.Sign(ctx, signer)
		if err != nil {
			return nil, err
		}
		if _, _, err := chunked.OpenHead(data, s.opt.Trust, r.Image); err != nil {
			return nil, fmt.Errorf("the signing key is not one this machine trusts for the image: %w", err)
		}
		err = s.putIf(ctx, chunked.HeadKey(r.Image), data, etag)
		if errors.Is(err, upload.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		_ = s.memory.see(head, keys.Fingerprint(signer.Public()))
		break
	}
	d := &Deleted{Image: r.Image, Newest: head.Manifest, Sequence: head.Sequence}
	if r.Version == "" && r.Parents == 0 {
		dead, err := s.deadManifests(ctx, r.Image, head)
		if err != nil {
			return nil, err
		}
		if err := claim(dead); err != nil {
			return nil, err
		}
		gone = union(gone, dead)
	}
	for _, n := range gone {
		if err := s.removeVersion(ctx, r.Image, n); err != nil {
			return nil, err
		}
		d.Versions = append(d.Versions, n)
	}
	return d, nil
}

// which is the version that r means, listed or, if it is named in full, left
// over from a deletion that was interrupted.
func (s *Store) which(ctx context.Context, r Ref, old *storedHead) (chunked.Name, error) {
	if n, ok := r.pinned(); ok && r.Parents == 0 {
		if lists(old.doc, n) {
			return n, nil
		}
		img := &Image{}
		if err := s.readManifest(ctx, r.Image, n, img); err != nil {
			return n, err
		}
		if img.Manifest.Sequence > old.doc.Sequence {
			return n, fmt.Errorf("%w: version %s is being published", ErrBusy, n)
		}
		return n, nil
	}
	if r.Parents == 0 {
		return pick(old.doc, r)
	}
	img, err := s.resolve(ctx, r, ResolveOptions{})
	if err != nil {
		return chunked.Name{}, err
	}
	return img.Name, nil
}

// removeVersion deletes a version that no head lists: manifest, key, trace, opening.
func (s *Store) removeVersion(ctx context.Context, image string, n chunked.Name) error {
	return s.deleteInOrder(ctx, chunked.ManifestKey(image, n), chunked.KeysKey(image, n), chunked.TraceKey(image, n), chunked.OpeningKey(image, n))
}

// deadManifests are those that can never be published any more: the head does
// not list them, and its sequence has reached theirs.
func (s *Store) deadManifests(ctx context.Context, image string, head *chunked.Head) ([]chunked.Name, error) {
	found, err := s.list(ctx, chunked.ManifestsFolder(image))
	if err != nil {
		return nil, err
	}
	var dead []chunked.Name
	for _, key := range sortedKeys(found) {
		_, rest, _ := imageOf(key)
		n, ok := named(rest, "manifests")
		if !ok || lists(head, n) {
			continue
		}
		m, err := s.anyManifest(ctx, image, n)
		if errors.Is(err, upload.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m.Sequence <= head.Sequence {
			dead = append(dead, n)
		}
	}
	return dead, nil
}

// exists tells whether anything is stored under prefix.
func (s *Store) exists(ctx context.Context, prefix string) (bool, error) {
	for _, err := range s.objects.List(ctx, prefix) {
		return err == nil, err
	}
	return false, nil
}

func union(a, b []chunked.Name) []chunked.Name {
	for _, n := range b {
		if !slices.Contains(a, n) {
			a = append(a, n)
		}
	}
	return a
}
