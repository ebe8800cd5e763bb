package images

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
)

// contents is which chunks images have, and where: what only their keys tell.
type contents struct {
	s        *Store
	src      chunked.Source
	segments map[chunked.Name][]chunked.Chunk // of segments that were read
	packs    map[chunked.Name]map[int64]chunked.Chunk
	images   map[chunked.Name]error // manifests taken in; nil: all of it
}

func (s *Store) newContents() *contents {
	return &contents{
		s: s, src: s.Source(), segments: map[chunked.Name][]chunked.Chunk{},
		packs: map[chunked.Name]map[int64]chunked.Chunk{}, images: map[chunked.Name]error{},
	}
}

// take reads the index of a manifest and adds its chunks. Segments that images
// share are read once. The error is kept, but for ctx's.
func (c *contents) take(ctx context.Context, d *marked) error {
	if err, ok := c.images[d.name]; ok {
		return err
	}
	err := c.read(ctx, d)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.images[d.name] = err
	return err
}

func (c *contents) read(ctx context.Context, d *marked) error {
	img := &Image{Name: d.name, Manifest: d.doc, s: c.s}
	x, err := img.OpenWith(ctx, c.src)
	if err != nil {
		return err
	}
	var bad error
	for _, st := range x.Root().Streams {
		for _, ref := range st.Segments {
			if _, ok := c.segments[ref.Name]; ok {
				continue
			}
			seg, err := x.Segment(ctx, ref)
			if err != nil {
				bad = errors.Join(bad, fmt.Errorf("image %s: %w", d.ref(), err))
				continue // what else there is counts all the same
			}
			list := make([]chunked.Chunk, len(seg.Chunks))
			for i := range list {
				list[i] = seg.Chunk(uint32(i))
				c.add(list[i])
			}
			c.segments[ref.Name] = list
		}
	}
	return bad
}

func (c *contents) add(k chunked.Chunk) {
	if c.packs[k.At.Pack] == nil {
		c.packs[k.At.Pack] = map[int64]chunked.Chunk{}
	}
	c.packs[k.At.Pack][k.At.Offset] = k
}

// follow adds, for all chunks of packs that were moved, the places they were
// moved to.
func (c *contents) follow(moved map[chunked.Name]*chunked.Moved) {
	for range maxHops {
		added := false
		for old, m := range moved {
			for off, k := range c.packs[old] {
				to, ok := m.Lookup(off)
				if !ok {
					continue
				}
				if _, have := c.packs[to.Pack][to.Offset]; !have {
					k.At = to
					c.add(k)
					added = true
				}
			}
		}
		if !added {
			return
		}
	}
}

// of gives the chunks of a pack by offset.
func (c *contents) of(pack chunked.Name) []chunked.Chunk {
	list := make([]chunked.Chunk, 0, len(c.packs[pack]))
	for _, k := range c.packs[pack] {
		list = append(list, k)
	}
	slices.SortFunc(list, func(a, b chunked.Chunk) int { return int(a.At.Offset - b.At.Offset) })
	return list
}
