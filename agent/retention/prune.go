package retention

import (
	"context"
	"errors"
	"fmt"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/images"
)

// Images is what pruning needs of a store; *[images.Store] is one.
type Images interface {
	// List gives the images whose names, with a slash behind them, begin with
	// prefix.
	List(ctx context.Context, prefix string) ([]images.Listed, error)
	// Delete removes the version that ref, NAME@VERSION, says in full.
	Delete(ctx context.Context, ref string, signer keys.Signer) (*images.Deleted, error)
}

// PruneOptions of [Prune].
type PruneOptions struct {
	// DryRun decides and removes nothing. That a catalog holds on to a version
	// only shows when it is to be removed.
	DryRun bool
	// Pinned says why a version is to be kept whatever the policy says, "" if
	// nothing keeps it. May be nil.
	Pinned func(images.Version) string
	// Report is told each decision after it is carried out. May be nil.
	Report func(Decision)
}

// Pruned is what [Prune] did, or with DryRun would do.
type Pruned struct {
	Image     string
	Decisions []Decision // newest first
	Removed   int
	Kept      int
}

// Prune removes those versions of an image that the policy does not keep, the
// oldest first. What they alone used is garbage that "instar gc" collects. It
// removes nothing of an image whose head or one of whose manifests cannot be
// verified: what the policy would be applied to is then not known. It may be
// interrupted anywhere and run again.
func Prune(ctx context.Context, s Images, image string, p Policy, signer keys.Signer, o PruneOptions) (*Pruned, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	list, err := s.List(ctx, image+"/")
	if err != nil {
		return nil, fmt.Errorf("retention of image %s: %w", image, err)
	}
	out := &Pruned{Image: image}
	for _, l := range list {
		if l.Image != image || l.Deleted {
			continue
		}
		if l.Err != nil {
			return nil, fmt.Errorf("retention of image %s: nothing is removed while its head cannot be verified: %w", image, l.Err)
		}
		versions, err := candidates(l, o.Pinned)
		if err != nil {
			return nil, fmt.Errorf("retention of image %s: %w", image, err)
		}
		out.Decisions = p.Apply(versions)
	}
	var errs []error
	for i := len(out.Decisions) - 1; i >= 0; i-- {
		d := out.Decisions[i]
		if !d.Removed() {
			out.Kept++
		} else {
			if err := ctx.Err(); err != nil {
				return out, err
			}
			if !o.DryRun {
				_, err := s.Delete(ctx, image+"@"+d.ID, signer)
				if errors.Is(err, images.ErrNoImage) {
					err = nil // another machine was quicker
				}
				if errors.Is(err, catalog.ErrRegistered) {
					d.Reasons = append(d.Reasons, "registered in a catalog")
					out.Decisions[i] = d
					out.Kept++
					if o.Report != nil {
						o.Report(d)
					}
					continue
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("retention: %w", err))
					continue
				}
			}
			out.Removed++
		}
		if o.Report != nil {
			o.Report(d)
		}
	}
	return out, errors.Join(errs...)
}

// candidates are the published versions of an image.
func candidates(l images.Listed, pinned func(images.Version) string) ([]Version, error) {
	var all []Version
	for _, v := range l.Versions {
		if v.Unpublished {
			continue // being published, or garbage collection's
		}
		if v.Err != nil {
			return nil, fmt.Errorf("nothing is removed while version %s cannot be verified: %w", v.Name, v.Err)
		}
		c := Version{ID: v.Name.String(), Sequence: v.Manifest.Sequence, Created: v.Manifest.Created, Description: v.Manifest.Description}
		if pinned != nil {
			c.Pinned = pinned(v)
		}
		all = append(all, c)
	}
	return all, nil
}
