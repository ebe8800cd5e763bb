package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// RepairOptions says where what is lost may be found.
type RepairOptions struct {
	// Domain and Owner make new packs of chunks that are found. Without a
	// domain only whole objects are put back, from other stores.
	Domain *Domain
	Owner  chunked.Key

	// Stores may have the same objects, or the same chunks: copies of this one,
	// or where other machines of the domain keep their images.
	Stores []*Store

	// Candidates may have the content: a copy of the disk, the machine that was
	// captured.
	Candidates []Candidate
}

// Candidate has content that may be what was lost. Nothing it gives is used
// unless it has the digest of what is looked for.
type Candidate interface {
	// At fills p with what it has at pos of a stream of a version. An error
	// means that it has nothing there.
	At(ctx context.Context, m *chunked.Manifest, stream string, pos int64, p []byte) error
	// Pieces yields pieces that may be whole chunks, cut as the capture cuts.
	// The memory is its own again when the loop goes on.
	Pieces(ctx context.Context) iter.Seq2[[]byte, error]
}

// Disk is a raw copy of a disk as a candidate: of any version of any image.
type Disk struct{ io.ReaderAt }

// At reads the disk.
func (d Disk) At(_ context.Context, _ *chunked.Manifest, stream string, pos int64, p []byte) error {
	if stream != chunked.StreamDisk {
		return fmt.Errorf("stream %q: %w", stream, chunked.ErrMissing)
	}
	n, err := d.ReadAt(p, pos)
	if n == len(p) {
		return nil
	}
	return err
}

// Pieces has none: where they are cut the index says.
func (Disk) Pieces(context.Context) iter.Seq2[[]byte, error] {
	return func(func([]byte, error) bool) {}
}

// RepairReport is what a repair found and did.
type RepairReport struct {
	Damages     []Damage   // as the scrub found them
	Restored    []string   // keys of objects that were put back whole
	Moved       []Mended   // packs whose chunks were saved
	Quarantined []string   // keys of damaged objects that were set aside, under quarantine/
	Unopened    []string   // versions that are hurt and that no identity opens: what they need is not known
	Lost        []Verified // versions that still are not whole, with the ranges they lack
}

// Mended is a damaged pack.
type Mended struct {
	Pack   chunked.Name
	Chunks int                  // that images use
	Saved  int                  // of them
	Into   []chunked.ObjectSize // where they are now
}

// Quarantine is the folder damaged objects are set aside in: their key follows.
const Quarantine = "quarantine/"

// staleList is how old a list of condemned objects must be before one that
// cannot be read is set aside: whoever was at work on it is done.
const staleList = 7 * 24 * time.Hour

// Repair scrubs the store and mends what it can: objects that another store has
// whole are put back; chunks of damaged packs are taken from what is left of
// them, from other packs, other stores and candidates, verified, stored in new
// packs, and announced as moved. What may be good is never deleted, and what is
// damaged is copied to quarantine/ before it is replaced or removed. What cannot
// be saved is reported: which versions, and which ranges of them.
func (s *Store) Repair(ctx context.Context, o RepairOptions) (*RepairReport, error) {
	r := &repairer{s: s, o: o, report: &RepairReport{}}
	if err := r.run(ctx); err != nil {
		return r.report, fmt.Errorf("repair %s: %w", s, err)
	}
	return r.report, nil
}

type repairer struct {
	s      *Store
	o      RepairOptions
	report *RepairReport
	found  *scrub
}

func (r *repairer) scrub(ctx context.Context) error {
	r.found = &scrub{s: r.s, report: &ScrubReport{Hurt: map[string][]string{}}, bad: map[string]error{}}
	return r.found.run(ctx)
}

func (r *repairer) run(ctx context.Context) error {
	if err := r.scrub(ctx); err != nil {
		return err
	}
	r.report.Damages = r.found.report.Damages
	// Manifests say what else is missing: until nothing more is put back.
	for {
		n := len(r.report.Restored)
		if err := r.putBack(ctx); err != nil {
			return err
		}
		if len(r.report.Restored) == n {
			break
		}
		if err := r.scrub(ctx); err != nil {
			return err
		}
	}
	if err := r.setAside(ctx); err != nil {
		return err
	}
	if err := r.mend(ctx); err != nil {
		return err
	}
	if len(r.report.Damages) == 0 && len(r.report.Moved) == 0 {
		return nil
	}
	return r.judge(ctx)
}

// putBack replaces damaged objects by whole ones of the same name.
func (r *repairer) putBack(ctx context.Context) error {
	for _, key := range sortedKeys(r.found.bad) {
		// One that is whole, and only not by anybody trusted, or that was put
		// back and is damaged again, would go round for ever.
		if slices.Contains(r.report.Restored, key) || r.whole(key) {
			continue
		}
		data, err := r.elsewhere(ctx, key)
		if err != nil {
			return err
		}
		if data == nil {
			continue
		}
		if err := r.quarantine(ctx, key); err != nil {
			return err
		}
		sum := chunked.NameOf(data)
		if _, err := upload.PutBytes(ctx, r.s.objects, key, data, upload.PutOptions{SHA256: sum[:]}); err != nil {
			return err
		}
		r.report.Restored = append(r.report.Restored, key)
	}
	return nil
}

// whole tells whether a key is that of a manifest that could be read.
func (r *repairer) whole(key string) bool {
	return slices.ContainsFunc(r.found.manifests, func(d *marked) bool { return chunked.ManifestKey(d.image, d.name) == key })
}

// elsewhere finds an object in the other stores; nil if none has it whole.
func (r *repairer) elsewhere(ctx context.Context, key string) ([]byte, error) {
	check, limit := r.checker(key)
	if check == nil {
		return nil, nil
	}
	for _, other := range r.o.Stores {
		data, _, err := other.get(ctx, key, limit)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		// A store that is out of reach is one that has it not.
		if err == nil && check(data) == nil {
			return data, nil
		}
	}
	return nil, nil
}

// checker tells how to know that an object from elsewhere is the right one; nil
// if nobody can tell.
func (r *repairer) checker(key string) (func([]byte) error, int64) {
	same := func(n chunked.Name) func([]byte) error {
		return func(b []byte) error {
			if chunked.NameOf(b) != n {
				return ErrDamaged
			}
			return nil
		}
	}
	if n, err := chunked.ParseFanned(chunked.PacksFolder, key); err == nil {
		return same(n), chunked.MaxPack
	}
	if n, err := chunked.ParseFanned(chunked.IndexFolder, key); err == nil {
		return same(n), maxIndex
	}
	image, rest, ok := imageOf(key)
	if !ok {
		return nil, 0
	}
	if n, ok := named(rest, "manifests"); ok {
		return same(n), maxManifest
	}
	if n, ok := named(rest, "keys"); ok {
		i := slices.IndexFunc(r.found.manifests, func(d *marked) bool { return d.image == image && d.name == n })
		if i < 0 {
			return nil, 0
		}
		root := r.found.manifests[i].doc.Index.Root.Name
		return func(b []byte) error {
			doc, err := chunked.ParseKeysObject(b)
			if err == nil && len(r.s.opt.Identities) > 0 {
				_, err = doc.IndexKey(root, r.s.opt.Identities...)
			}
			return err
		}, chunked.MaxRecipientsText
	}
	if rest == "head" && r.s.opt.Trust != nil {
		return func(b []byte) error {
			h, _, err := chunked.OpenHead(b, r.s.opt.Trust, image)
			if err != nil {
				return err
			}
			seen, err := r.s.memory.seen(image)
			if err != nil {
				return err
			}
			return h.CheckFresh(chunked.Freshness{Seen: chunked.Current(seen, r.s.opt.Trust, image)})
		}, maxHead
	}
	return nil, 0
}

// quarantine copies what is stored under a key, if anything, so that it can be
// replaced or removed.
func (r *repairer) quarantine(ctx context.Context, key string) error {
	_, err := r.s.objects.Copy(ctx, Quarantine+key, key, upload.PutOptions{})
	if errors.Is(err, upload.ErrNotExist) {
		return nil
	}
	if err == nil {
		r.report.Quarantined = append(r.report.Quarantined, key)
	}
	return err
}

// setAside removes, with a copy in quarantine, what cannot be read and only
// stands in the way: manifests that no head lists, moved objects, and lists of
// condemned objects of which nobody can make use any more.
func (r *repairer) setAside(ctx context.Context) error {
	now, err := r.s.now(ctx)
	if err != nil {
		return err
	}
	for _, key := range sortedKeys(r.found.bad) {
		o, there := r.found.there[key]
		if !there {
			continue
		}
		useless := strings.HasPrefix(key, chunked.MovedFolder)
		if strings.HasPrefix(key, chunked.GCFolder) {
			useless = now.Sub(o.Modified) > staleList
		}
		if image, rest, ok := imageOf(key); ok {
			// One that is only not signed by anybody trusted is no damage.
			n, ok := named(rest, "manifests")
			h := r.found.heads[image]
			useless = ok && !r.whole(key) && h != nil && !lists(h, n)
		}
		if !useless {
			continue
		}
		if err := r.quarantine(ctx, key); err != nil {
			return err
		}
		if err := r.s.objects.Delete(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// judge verifies the versions that were hurt, once more.
func (r *repairer) judge(ctx context.Context) error {
	if r.s.opt.Trust == nil {
		return nil
	}
	rep, err := r.s.Verify(ctx, VerifyOptions{ReadData: true})
	if err != nil {
		return err
	}
	for _, v := range rep.Images {
		if len(v.Damages) > 0 {
			r.report.Lost = append(r.report.Lost, v)
		}
	}
	return nil
}
