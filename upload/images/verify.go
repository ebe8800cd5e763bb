package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
)

// VerifyOptions says what to verify, and how thoroughly.
type VerifyOptions struct {
	// Refs are the versions to verify; nil: all versions of all images.
	Refs []string

	// ReadData reads every chunk and checks it against its digest. Chunks that
	// versions share are read once. Without it, packs are only looked for.
	ReadData bool

	// Progress, if set, is told of bytes of packs as they are checked, and how
	// many there are. It may be called concurrently.
	Progress func(done, total int64)
}

// Report is what a verification found.
type Report struct {
	Images  []Verified // one for each version
	Objects Tally      // packs and index objects that were looked for
	Read    int64      // bytes of chunks that were read and checked, sealed
	Stray   []Damage   // damages of what belongs to no version that was verified
}

// Verified is a version that was verified.
type Verified struct {
	Image    string
	Name     chunked.Name
	Newest   bool
	Manifest *chunked.Manifest // nil if it could not be read
	Signer   string            // fingerprint
	// Opened tells whether an identity opened the index: only then chunks and
	// ranges are known.
	Opened  bool
	Damages []Damage
}

// Sound tells whether nothing is wrong with any version.
func (r *Report) Sound() bool {
	return len(r.Stray) == 0 && !slices.ContainsFunc(r.Images, func(v Verified) bool { return len(v.Damages) > 0 })
}

// Damage is one thing that is wrong.
type Damage struct {
	Key    string // of the object
	Err    error  // what is wrong with it
	Ranges []Span // what of the image cannot be read for it; empty where only the keys would tell, or nothing is hurt
}

func (d Damage) String() string { return d.Key + ": " + d.Err.Error() }

// Span is a range of a stream, in bytes.
type Span struct {
	Stream   string
	From, To int64
}

// Verify finds out whether versions can be restored: that heads, manifests and
// keys are there and authentic, that packs are there with their size, that the
// index opens where this machine may; with ReadData that every chunk is what was
// captured. It reports every version, and returns an error only if it could not
// find out.
func (s *Store) Verify(ctx context.Context, o VerifyOptions) (*Report, error) {
	v := &verifier{s: s, o: o, report: &Report{}, bad: map[chunked.Location]error{}, src: &source{s: s}}
	if err := v.run(ctx); err != nil {
		return v.report, fmt.Errorf("verify the images of %s: %w", s, err)
	}
	return v.report, nil
}

type verifier struct {
	s      *Store
	o      VerifyOptions
	report *Report
	seen   *inventory
	src    *source
	parts  []*part

	mu  sync.Mutex
	bad map[chunked.Location]error // chunks, as the indexes have them
}

// part is one version and what its index says.
type part struct {
	v        Verified
	index    *chunked.Index
	segments map[chunked.Name]error // that cannot be read
}

func (v *verifier) run(ctx context.Context) error {
	if v.s.opt.Trust == nil {
		return ErrNoTrust
	}
	if err := v.choose(ctx); err != nil {
		return err
	}
	var err error
	if v.seen, err = v.s.takeInventory(ctx); err != nil {
		return err
	}
	objects := map[string]int64{}
	for _, p := range v.parts {
		if m := p.v.Manifest; m != nil {
			for _, o := range m.Packs {
				objects[chunked.PackKey(o.Name)] = o.Size
			}
			for _, o := range append(slices.Clone(m.Index.Segments), m.Index.Root) {
				objects[chunked.IndexObjectKey(o.Name)] = o.Size
			}
		}
	}
	for _, size := range objects {
		v.report.Objects.add(size)
	}
	if err := v.open(ctx); err != nil {
		return err
	}
	if err := v.readChunks(ctx); err != nil {
		return err
	}
	for _, p := range v.parts {
		if err := v.judge(ctx, p); err != nil {
			return err
		}
		slices.SortFunc(p.v.Damages, func(a, b Damage) int { return strings.Compare(a.Key, b.Key) })
		v.report.Images = append(v.report.Images, p.v)
	}
	return nil
}

// choose finds the versions.
func (v *verifier) choose(ctx context.Context) error {
	if v.o.Refs != nil {
		for _, ref := range v.o.Refs {
			img, err := v.s.Resolve(ctx, ref, ResolveOptions{})
			if err := fatal(ctx, err); err != nil {
				return err
			}
			if err != nil {
				r, perr := ParseRef(ref)
				if perr != nil {
					return perr
				}
				v.parts = append(v.parts, &part{v: Verified{Image: r.Image, Damages: []Damage{{Key: chunked.ImageFolder(r.Image), Err: err}}}})
				continue
			}
			newest := img.Head != nil && img.Head.Manifest == img.Name
			v.parts = append(v.parts, &part{v: Verified{Image: img.Manifest.Name, Name: img.Name, Newest: newest, Manifest: img.Manifest, Signer: keys.Fingerprint(img.Signer)}})
		}
		return nil
	}
	all, err := v.s.List(ctx, "")
	if err != nil {
		return err
	}
	for _, l := range all {
		if l.Err != nil {
			v.report.Stray = append(v.report.Stray, Damage{Key: chunked.HeadKey(l.Image), Err: l.Err})
		}
		for _, version := range l.Versions {
			if version.Unpublished && l.Err == nil {
				continue
			}
			p := &part{v: Verified{Image: l.Image, Name: version.Name, Newest: version.Newest, Signer: version.Signer}}
			if version.Err != nil {
				p.v.Damages = append(p.v.Damages, Damage{Key: chunked.ManifestKey(l.Image, version.Name), Err: version.Err})
			}
			if version.Signer != "" {
				p.v.Manifest = version.Manifest
			}
			v.parts = append(v.parts, p)
		}
	}
	return nil
}

// open opens the indexes, and all their segments.
func (v *verifier) open(ctx context.Context) error {
	return each(ctx, max(1, v.s.opt.Parallel/4), v.parts, func(ctx context.Context, p *part) error {
		m := p.v.Manifest
		if m == nil {
			return nil
		}
		img := &Image{Name: p.v.Name, Manifest: m, s: v.s}
		key, err := img.IndexKey(ctx)
		if errors.Is(err, keys.ErrNoIdentity) {
			return nil
		}
		if f := fatal(ctx, err); f != nil {
			return f
		}
		if err != nil {
			p.v.Damages = append(p.v.Damages, Damage{Key: chunked.KeysKey(m.Name, p.v.Name), Err: err})
			return nil
		}
		p.segments = map[chunked.Name]error{}
		p.index, err = chunked.OpenIndex(ctx, v.src, m.Index.Root.Name, m.Index.Root.Size, key)
		if f := fatal(ctx, err); f != nil {
			return f
		}
		if err != nil {
			p.index = nil
			p.segments[m.Index.Root.Name] = err
			return nil
		}
		p.v.Opened = true
		for _, st := range p.index.Root().Streams {
			for _, ref := range st.Segments {
				_, err := p.index.Segment(ctx, ref)
				if f := fatal(ctx, err); f != nil {
					return f
				}
				if err != nil {
					p.segments[ref.Name] = err
				}
			}
		}
		return nil
	})
}

// readChunks checks every chunk of every open index once.
func (v *verifier) readChunks(ctx context.Context) error {
	packs := map[chunked.Name]map[chunked.Location]chunked.Chunk{}
	total := int64(0)
	var reader *chunked.Index
	for _, p := range v.parts {
		if p.index == nil {
			continue
		}
		reader = p.index
		err := p.chunks(ctx, func(_ string, _ chunked.SegmentRef, c chunked.Chunk) {
			if packs[c.At.Pack] == nil {
				packs[c.At.Pack] = map[chunked.Location]chunked.Chunk{}
			}
			if have, ok := packs[c.At.Pack][c.At]; ok {
				if have.Digest != c.Digest || have.Key != c.Key || have.Size != c.Size {
					// Two indexes contradict each other: one of them has it wrong.
					v.bad[c.At] = fmt.Errorf("%w: two indexes say different things about it", chunked.ErrCorrupt)
				}
				return
			}
			packs[c.At.Pack][c.At] = c
			total += int64(c.At.Sealed)
		})
		if err != nil {
			return err
		}
	}
	if !v.o.ReadData || reader == nil {
		return nil
	}
	done := int64(0)
	names := make([]chunked.Name, 0, len(packs))
	for n := range packs {
		names = append(names, n)
	}
	slices.SortFunc(names, chunked.Name.Compare)
	return each(ctx, v.s.opt.Parallel, names, func(ctx context.Context, n chunked.Name) error {
		list := make([]chunked.Chunk, 0, len(packs[n]))
		for _, c := range packs[n] {
			list = append(list, c)
		}
		slices.SortFunc(list, func(a, b chunked.Chunk) int { return int(a.At.Offset - b.At.Offset) })
		return v.readPack(ctx, reader, list, func(c chunked.Chunk, err error) {
			v.mu.Lock()
			defer v.mu.Unlock()
			done += int64(c.At.Sealed)
			v.report.Read += int64(c.At.Sealed)
			if err != nil {
				v.bad[c.At] = err
			}
			if v.o.Progress != nil {
				v.o.Progress(done, total)
			}
		})
	})
}

// maxRead is how many bytes of a pack are asked for at once.
const maxRead = 8 << 20

// readPack checks chunks of one pack, ascending by offset, in few reads.
func (v *verifier) readPack(ctx context.Context, x *chunked.Index, list []chunked.Chunk, found func(chunked.Chunk, error)) error {
	for len(list) > 0 {
		n, from, to := 0, list[0].At.Offset, int64(0)
		for n < len(list) && (n == 0 || list[n].At.Offset+int64(list[n].At.Sealed)-from <= maxRead && list[n].At.Offset-to < 256<<10) {
			to = max(to, list[n].At.Offset+int64(list[n].At.Sealed))
			n++
		}
		buf := make([]byte, to-from)
		err := v.src.ReadPack(ctx, list[0].At.Pack, from, buf)
		if f := fatal(ctx, err); f != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return f
		}
		for _, c := range list[:n] {
			if err == nil {
				if _, oerr := chunked.OpenChunk(c, slices.Clone(buf[c.At.Offset-from:c.At.Offset-from+int64(c.At.Sealed)])); oerr == nil {
					found(c, nil)
					continue
				}
			}
			// By itself, and wherever it may have moved.
			_, cerr := x.ReadChunk(ctx, c)
			if f := fatal(ctx, cerr); f != nil && !errors.Is(cerr, io.ErrUnexpectedEOF) {
				return f
			}
			found(c, cerr)
		}
		list = list[n:]
	}
	return nil
}

// chunks calls f for each chunk of each segment that can be read.
func (p *part) chunks(ctx context.Context, f func(stream string, ref chunked.SegmentRef, c chunked.Chunk)) error {
	for _, st := range p.index.Root().Streams {
		for _, ref := range st.Segments {
			if p.segments[ref.Name] != nil {
				continue
			}
			seg, err := p.index.Segment(ctx, ref)
			if err != nil {
				return err
			}
			for i := range seg.Chunks {
				f(st.Name, ref, seg.Chunk(uint32(i)))
			}
		}
	}
	return nil
}

// judge adds a version's damages: index objects, packs, chunks.
func (v *verifier) judge(ctx context.Context, p *part) error {
	m := p.v.Manifest
	if m == nil {
		return nil
	}
	lost := map[string]*Damage{}
	add := func(key string, err error, spans ...Span) {
		if lost[key] == nil {
			lost[key] = &Damage{Key: key, Err: err}
		}
		lost[key].Ranges = append(lost[key].Ranges, spans...)
	}
	for _, o := range append(slices.Clone(m.Index.Segments), m.Index.Root) {
		key := chunked.IndexObjectKey(o.Name)
		if err := p.segments[o.Name]; err != nil {
			add(key, err)
		} else if err := v.there(key, o.Size); err != nil {
			add(key, err)
		}
	}
	missing := map[chunked.Name]error{}
	for _, o := range m.Packs {
		if err := v.there(chunked.PackKey(o.Name), o.Size); err != nil {
			missing[o.Name] = err
		}
	}
	if p.index == nil {
		for n, err := range missing {
			if moved, merr := v.allMoved(ctx, n, 0); merr != nil {
				return merr
			} else if !moved {
				add(chunked.PackKey(n), err)
			}
		}
	} else if err := v.spans(ctx, p, missing, add); err != nil {
		return err
	}
	for _, d := range lost {
		d.Ranges = merge(d.Ranges)
		p.v.Damages = append(p.v.Damages, *d)
	}
	return nil
}

// there tells what is wrong with an object by its size.
func (v *verifier) there(key string, size int64) error {
	o, ok := v.seen.objects[key]
	switch {
	case !ok:
		return fmt.Errorf("%w: it is missing", ErrDamaged)
	case o.Size != size:
		return fmt.Errorf("%w: it has %d bytes, should have %d", ErrDamaged, o.Size, size)
	}
	return nil
}

// allMoved tells whether a pack that is gone was moved to packs that are there.
func (v *verifier) allMoved(ctx context.Context, n chunked.Name, hops int) (bool, error) {
	if _, ok := v.seen.objects[chunked.MovedKey(n)]; !ok || hops > maxHops {
		return false, nil
	}
	m, _, err := v.s.readMoved(ctx, n)
	if f := fatal(ctx, err); f != nil || err != nil || m == nil {
		return false, f
	}
	for _, t := range m.Packs {
		if v.there(chunked.PackKey(t.Name), t.Size) == nil {
			continue
		}
		if ok, err := v.allMoved(ctx, t.Name, hops+1); err != nil || !ok {
			return false, err
		}
	}
	return true, nil
}
