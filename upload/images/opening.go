package images

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
)

// ErrNoOpening says that a version has no opening.
var ErrNoOpening = errors.New("the image has no opening")

// An opening has at most openingBytes, and no more than an openingShare of what its
// version added to the store, but openingLeast in any case: what hardly changed costs
// hardly anything.
const (
	openingBytes = 1 << 20
	openingShare = 8
	openingLeast = 32 << 10
	openingRow   = 32 + 2*binary.MaxVarintLen32 // what it says of each range or object, at most
)

// PutOpening stores copies of what a reader of a version that was just published
// wants first, in one object: the index, and what first names of the disk,
// what is wanted sooner before what comes after it, up to 1 MiB or, if that is less, an
// eighth of what the version added. It is only ever a hint; the number of its bytes is returned.
func (s *Store) PutOpening(ctx context.Context, p *Published, key chunked.Key, first iter.Seq[chunked.Range]) (int64, error) {
	img := &Image{Name: p.Name, Size: p.Size, Manifest: p.Manifest, s: s}
	object, err := img.makeOpening(ctx, key, first)
	if err == nil && object != nil {
		_, err = upload.PutBytes(ctx, s.objects, chunked.OpeningKey(p.Manifest.Name, p.Name), object, upload.PutOptions{})
	}
	if err != nil {
		return 0, fmt.Errorf("store the opening of image %s: %w", img.ref(), err)
	}
	return int64(len(object)), nil
}

func (i *Image) makeOpening(ctx context.Context, key chunked.Key, first iter.Seq[chunked.Range]) ([]byte, error) {
	src := &readOnce{Source: i.s.Source(), got: map[chunked.Name][]byte{}}
	x, err := i.openIndex(ctx, src, key)
	if err != nil {
		return nil, err
	}
	disk, err := x.Stream(chunked.StreamDisk)
	if err != nil {
		return nil, err
	}
	c := &choice{
		room:  min(max(i.Manifest.Added/openingShare, openingLeast), openingBytes),
		index: map[chunked.Name]int64{}, chunks: map[chunked.Location]bool{},
	}
	if !c.object(i.Manifest.Index.Root) {
		return nil, nil // of a very large image: so is all else
	}
	var refs []chunked.SegmentRef
	all := int64(0)
	for _, st := range x.Root().Streams {
		if st.Name == disk.Name() {
			refs = st.Segments
		}
	}
	for _, r := range refs {
		all += int64(r.Stored)
	}
	// All segments of the disk if they leave half of the room, else those that are
	// needed for the rest.
	if all <= c.room/2 {
		for _, r := range refs {
			c.object(chunked.ObjectSize{Name: r.Name, Size: int64(r.Stored)})
		}
		// Together, for those below are asked for one after the other.
		if err := each(ctx, i.s.opt.Parallel, refs, func(ctx context.Context, r chunked.SegmentRef) error {
			_, err := src.ReadIndex(ctx, r.Name, int64(r.Stored))
			return err
		}); err != nil {
			return nil, err
		}
	}
	for r := range first {
		full, err := c.add(ctx, disk, refs, r)
		if err != nil {
			return nil, err
		}
		if full {
			break
		}
	}
	o, err := c.copy(ctx, i.s.opt.Parallel, src)
	if err != nil {
		return nil, err
	}
	return o.Encode()
}

// readOnce is a source that asks for no index object again.
type readOnce struct {
	chunked.Source
	mu  sync.Mutex
	got map[chunked.Name][]byte
}

func (s *readOnce) ReadIndex(ctx context.Context, n chunked.Name, size int64) ([]byte, error) {
	s.mu.Lock()
	b, ok := s.got[n]
	s.mu.Unlock()
	if ok {
		return bytes.Clone(b), nil
	}
	b, err := s.Source.ReadIndex(ctx, n, size)
	if err == nil {
		s.mu.Lock()
		s.got[n] = bytes.Clone(b)
		s.mu.Unlock()
	}
	return b, err
}

// choice is what goes into an opening.
type choice struct {
	room   int64                  // bytes that are left
	index  map[chunked.Name]int64 // sizes
	chunks map[chunked.Location]bool
}

// object takes an index object; false if there is no room for it.
func (c *choice) object(o chunked.ObjectSize) bool {
	if _, ok := c.index[o.Name]; ok {
		return true
	}
	need := o.Size + openingRow
	if need > c.room {
		return false
	}
	c.index[o.Name] = o.Size
	c.room -= need
	return true
}

// add takes what a range of the disk needs, unless there is no room for it.
func (c *choice) add(ctx context.Context, disk *chunked.Stream, refs []chunked.SegmentRef, r chunked.Range) (full bool, err error) {
	end := min(r.Position+r.Length, disk.Size())
	n, _ := slices.BinarySearchFunc(refs, r.Position, func(s chunked.SegmentRef, pos int64) int { return cmp.Compare(s.Pos+s.Length, pos+1) })
	for ; n < len(refs) && refs[n].Pos < end; n++ {
		ref := refs[n]
		if !c.object(chunked.ObjectSize{Name: ref.Name, Size: int64(ref.Stored)}) {
			return true, nil
		}
		for e, err := range disk.Extents(ctx, max(r.Position, ref.Pos), min(end, ref.Pos+ref.Length)) {
			if err != nil {
				return false, err
			}
			at := e.Chunk.At
			if c.chunks[at] {
				continue
			}
			need := int64(at.Sealed) + openingRow
			if need > c.room {
				return true, nil
			}
			c.chunks[at] = true
			c.room -= need
		}
	}
	return false, nil
}

// copy reads what was taken. What a pack does not have where the index says, for it
// was moved or is damaged, is left out.
func (c *choice) copy(ctx context.Context, parallel int, src chunked.Source) (*chunked.Opening, error) {
	o := &chunked.Opening{}
	for n := range c.index {
		o.Objects = append(o.Objects, chunked.OpeningObject{Name: n})
	}
	slices.SortFunc(o.Objects, func(a, b chunked.OpeningObject) int { return a.Name.Compare(b.Name) })
	var list []chunked.Location
	for at := range c.chunks {
		list = append(list, at)
	}
	slices.SortFunc(list, func(a, b chunked.Location) int {
		return cmp.Or(a.Pack.Compare(b.Pack), cmp.Compare(a.Offset, b.Offset))
	})
	for _, at := range list {
		if n := len(o.Ranges); n > 0 {
			if r := &o.Ranges[n-1]; r.Pack == at.Pack && r.Offset+int64(len(r.Bytes)) == at.Offset {
				r.Bytes = append(r.Bytes, make([]byte, at.Sealed)...)
				continue
			}
		}
		o.Ranges = append(o.Ranges, chunked.OpeningRange{Pack: at.Pack, Offset: at.Offset, Bytes: make([]byte, at.Sealed)})
	}
	reads := make([]func(context.Context) error, 0, len(o.Objects)+len(o.Ranges))
	for n := range o.Objects {
		x := &o.Objects[n]
		reads = append(reads, func(ctx context.Context) (err error) {
			x.Bytes, err = src.ReadIndex(ctx, x.Name, c.index[x.Name])
			return err
		})
	}
	for n := range o.Ranges {
		r := &o.Ranges[n]
		reads = append(reads, func(ctx context.Context) error {
			err := src.ReadPack(ctx, r.Pack, r.Offset, r.Bytes)
			if errors.Is(err, chunked.ErrMissing) || errors.Is(err, chunked.ErrCorrupt) {
				r.Bytes, err = nil, nil
			}
			return err
		})
	}
	err := each(ctx, parallel, reads, func(ctx context.Context, read func(context.Context) error) error { return read(ctx) })
	o.Ranges = slices.DeleteFunc(o.Ranges, func(r chunked.OpeningRange) bool { return r.Bytes == nil })
	return o, err
}

// Opening reads the version's opening: [ErrNoOpening] if it has none. Nobody
// vouches for it: what is read by way of it is verified like what the store gives.
func (i *Image) Opening(ctx context.Context) (*chunked.Opening, error) {
	o, err := i.opening(ctx)
	if err != nil {
		return nil, fmt.Errorf("opening of image %s: %w", i.ref(), err)
	}
	return o, nil
}

func (i *Image) opening(ctx context.Context) (o *chunked.Opening, err error) {
	key := chunked.OpeningKey(i.Manifest.Name, i.Name)
	if b, ok := i.s.recalled(key, func(b []byte) bool {
		o, err = chunked.DecodeOpening(b)
		return err == nil || len(b) == 0
	}); ok {
		if len(b) == 0 {
			return nil, ErrNoOpening
		}
		return o, nil
	}
	b, _, err := i.s.get(ctx, key, chunked.MaxOpening)
	if errors.Is(err, upload.ErrNotExist) {
		i.s.keep(key, nil) // it is stored with the version, or never
		return nil, ErrNoOpening
	}
	if err != nil {
		return nil, err
	}
	if o, err = chunked.DecodeOpening(b); err == nil {
		i.s.keep(key, b)
	}
	return o, err
}

// OpenFirst opens the index for who is to read a little of the image: what its
// opening has is not asked for anew, also when the index is read by later. It tells the
// index's key, too, for what is bound to the image. That an opening cannot be read
// is told to trouble, and no reason to fail.
func (i *Image) OpenFirst(ctx context.Context, src chunked.Source, trouble func(error)) (*chunked.Index, chunked.Key, error) {
	var o *chunked.Opening
	var bad error
	var asked sync.WaitGroup
	asking, stop := context.WithCancel(ctx)
	defer stop()
	asked.Go(func() { o, bad = i.Opening(asking) })
	key, err := i.recalledKey()
	if err != nil {
		key, err = i.IndexKey(ctx)
	}
	if err != nil {
		stop() // an opening is of no use to who has no key
	}
	asked.Wait()
	if err != nil {
		return nil, chunked.Key{}, err
	}
	switch {
	case bad == nil:
		src = o.Before(src)
	case ctx.Err() == nil && !errors.Is(bad, ErrNoOpening):
		trouble(bad)
	}
	x, err := i.openIndex(ctx, src, key)
	return x, key, err
}
