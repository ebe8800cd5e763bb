package images

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// ScrubReport is what a scrub found.
type ScrubReport struct {
	Objects Tally    // read
	Damages []Damage // ascending by key
	// Hurt are the versions that refer to something damaged, by reference, with
	// the keys of what is. Which files that are only their keys tell.
	Hurt map[string][]string
}

// Scrub reads every object of a store and checks what can be checked without a
// key: that packs, index objects and manifests have the SHA-256 their names
// say, that documents are well formed, and that everything manifests name is
// there. With [Options.Trust], signatures too. It returns an error only if it
// could not find out.
func (s *Store) Scrub(ctx context.Context, progress func(done, total int64)) (*ScrubReport, error) {
	c := &scrub{s: s, report: &ScrubReport{Hurt: map[string][]string{}}, bad: map[string]error{}, progress: progress}
	if err := c.run(ctx); err != nil {
		return c.report, fmt.Errorf("scrub %s: %w", s, err)
	}
	return c.report, nil
}

type scrub struct {
	s        *Store
	report   *ScrubReport
	progress func(done, total int64)

	mu          sync.Mutex
	bad         map[string]error
	there       map[string]upload.Object
	total, done int64
	manifests   []*marked
	heads       map[string]*chunked.Head
	moved       map[chunked.Name]*chunked.Moved
}

func (c *scrub) run(ctx context.Context) error {
	var err error
	if c.there, err = c.s.list(ctx, ""); err != nil {
		return err
	}
	c.moved, c.heads = map[chunked.Name]*chunked.Moved{}, map[string]*chunked.Head{}
	for _, o := range c.there {
		c.total += o.Size
	}
	err = each(ctx, c.s.opt.Parallel, sortedKeys(c.there), func(ctx context.Context, key string) error {
		err := c.check(ctx, key)
		if errors.Is(err, upload.ErrNotExist) {
			err = nil // deleted since it was listed
			c.mu.Lock()
			delete(c.there, key)
			c.mu.Unlock()
		}
		if f := fatal(ctx, err); f != nil {
			return f
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if err != nil {
			c.bad[key] = err
		}
		c.done += c.size(key)
		if c.progress != nil {
			c.progress(c.done, c.total)
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.references()
	for _, key := range sortedKeys(c.bad) {
		c.report.Damages = append(c.report.Damages, Damage{Key: key, Err: c.bad[key]})
	}
	return nil
}

func (c *scrub) size(key string) int64 { return c.there[key].Size }

// check reads one object as its key demands. Keys of other kinds are passed over.
func (c *scrub) check(ctx context.Context, key string) error {
	c.mu.Lock()
	o := c.there[key]
	c.mu.Unlock()
	count := func() {
		c.mu.Lock()
		c.report.Objects.add(o.Size)
		c.mu.Unlock()
	}
	for _, folder := range []string{chunked.PacksFolder, chunked.IndexFolder} {
		if n, err := chunked.ParseFanned(folder, key); err == nil {
			count()
			return c.digest(ctx, key, n)
		}
	}
	if n, err := chunked.ParseFanned(chunked.MovedFolder, key); err == nil {
		count()
		m, _, err := c.s.readMoved(ctx, n)
		if m != nil {
			c.mu.Lock()
			c.moved[n] = m
			c.mu.Unlock()
		}
		return err
	}
	if id, ok := strings.CutPrefix(key, chunked.GCFolder); ok && isID(id) {
		count()
		b, _, err := c.s.get(ctx, key, chunked.MaxCondemned)
		if err == nil {
			_, err = chunked.ParseCondemned(b)
		}
		return err
	}
	if name, ok := strings.CutPrefix(key, chunked.DomainsFolder); ok && chunked.CheckDomainName(name) == nil {
		count()
		b, _, err := c.s.get(ctx, key, maxDomain)
		if err != nil {
			return err
		}
		if c.s.opt.Trust != nil {
			_, _, err = chunked.OpenDomain(b, c.s.opt.Trust, name)
			return err
		}
		doc, _, err := chunked.Split(b)
		if err == nil {
			_, err = chunked.ParseDomain(doc)
		}
		return err
	}
	if image, rest, ok := imageOf(key); ok {
		return c.below(ctx, image, rest, key, count)
	}
	return nil
}

// below checks an object of an image.
func (c *scrub) below(ctx context.Context, image, rest, key string, count func()) error {
	if rest == "head" {
		count()
		b, _, err := c.s.get(ctx, key, maxHead)
		var h *chunked.Head
		if err == nil {
			if c.s.opt.Trust != nil {
				h, _, err = chunked.OpenHead(b, c.s.opt.Trust, image)
			} else {
				h, err = chunked.ReadHeadUnverified(b)
			}
		}
		if err == nil {
			c.mu.Lock()
			c.heads[image] = h
			c.mu.Unlock()
		}
		return err
	}
	if n, ok := named(rest, "manifests"); ok {
		count()
		m, err := c.s.anyManifest(ctx, image, n)
		if err != nil {
			return err
		}
		c.mu.Lock()
		c.manifests = append(c.manifests, &marked{image, n, m})
		c.mu.Unlock()
		if c.s.opt.Trust != nil {
			return c.s.readManifest(ctx, image, n, &Image{})
		}
		return nil
	}
	if _, ok := named(rest, "keys"); ok {
		count()
		b, _, err := c.s.get(ctx, key, chunked.MaxRecipientsText)
		if err == nil {
			_, err = chunked.ParseKeysObject(b)
		}
		return err
	}
	if n, ok := named(rest, "traces"); ok {
		count()
		b, _, err := c.s.get(ctx, key, chunked.MaxTrace+keys.MaxSignature)
		if err == nil && c.s.opt.Trust != nil {
			_, _, err = chunked.OpenTrace(b, c.s.opt.Trust, image, n)
		}
		return err
	}
	if _, ok := named(rest, "openings"); ok {
		count()
		b, _, err := c.s.get(ctx, key, chunked.MaxOpening)
		if err == nil {
			_, err = chunked.DecodeOpening(b)
		}
		return err
	}
	return nil
}

// digest reads an object through and compares its name.
func (c *scrub) digest(ctx context.Context, key string, n chunked.Name) error {
	r, o, err := c.s.objects.Get(ctx, key, upload.GetOptions{})
	if err != nil {
		return err
	}
	defer r.Close()
	if o.Size > chunked.MaxPack {
		return fmt.Errorf("%w: it has %d bytes, more than any pack", ErrDamaged, o.Size)
	}
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return fmt.Errorf("read %s/%s: %w", c.s, key, err)
	}
	if got := chunked.Name(h.Sum(nil)); got != n {
		return fmt.Errorf("%w: its SHA-256 is %s", ErrDamaged, got)
	}
	return nil
}

// references finds what manifests name that is not there, and whom each damage
// hurts.
func (c *scrub) references() {
	for _, d := range c.manifests {
		hurt := map[string]bool{}
		look := func(key string, size int64) bool {
			o, ok := c.there[key]
			switch {
			case !ok:
				c.bad[key] = fmt.Errorf("%w: it is missing", ErrDamaged)
			case o.Size != size && c.bad[key] == nil:
				c.bad[key] = fmt.Errorf("%w: it has %d bytes, should have %d", ErrDamaged, o.Size, size)
			case c.bad[key] == nil:
				return true
			}
			hurt[key] = true
			return false
		}
		for _, o := range append(slices.Clone(d.doc.Index.Segments), d.doc.Index.Root) {
			look(chunked.IndexObjectKey(o.Name), o.Size)
		}
		for _, o := range d.doc.Packs {
			key := chunked.PackKey(o.Name)
			if _, ok := c.there[key]; !ok && c.saved(o.Name, d, 0) {
				continue
			}
			look(key, o.Size)
		}
		if key := chunked.KeysKey(d.image, d.name); c.bad[key] != nil {
			hurt[key] = true
		} else if _, ok := c.there[key]; !ok {
			c.bad[key] = fmt.Errorf("%w: it is missing: nobody can read the image", ErrDamaged)
			hurt[key] = true
		}
		if c.bad[chunked.ManifestKey(d.image, d.name)] != nil {
			hurt[chunked.ManifestKey(d.image, d.name)] = true
		}
		if len(hurt) > 0 {
			c.report.Hurt[d.image+"@"+d.name.String()] = sortedKeys(hurt)
		}
	}
	for image, h := range c.heads {
		for _, n := range versions(h) {
			if key := chunked.ManifestKey(image, n); c.there[key].Key == "" {
				c.bad[key] = fmt.Errorf("%w: it is missing, and the head lists it", ErrDamaged)
			}
		}
	}
	for key := range c.bad {
		if image, rest, ok := imageOf(key); ok {
			if n, ok := named(rest, "manifests"); ok {
				ref := image + "@" + n.String()
				if !slices.Contains(c.report.Hurt[ref], key) {
					c.report.Hurt[ref] = append(c.report.Hurt[ref], key)
				}
			}
		}
	}
}

// saved tells whether a pack that is gone was moved, for this manifest, to packs
// that are whole. One that was put after the moved object may have been made
// when the pack was gone, by a creator who took from it only what had moved
// (SPEC.md §11): whether it was, only the image's key tells, and so does Verify.
func (c *scrub) saved(pack chunked.Name, d *marked, hops int) bool {
	m := c.moved[pack]
	if m == nil || hops > maxHops {
		return false
	}
	if !m.Serves(d.name) && c.there[chunked.ManifestKey(d.image, d.name)].Modified.Before(c.there[chunked.MovedKey(pack)].Modified) {
		return false
	}
	for _, t := range m.Packs {
		key := chunked.PackKey(t.Name)
		if o, ok := c.there[key]; ok && o.Size == t.Size && c.bad[key] == nil {
			continue
		}
		if !c.saved(t.Name, d, hops+1) {
			return false
		}
	}
	return true
}
