package images

import (
	"context"
	"slices"
	"strings"

	"github.com/instar-image/instar/bundle/chunked"
)

// spans finds the ranges that damaged segments and chunks leave without content.
func (v *verifier) spans(ctx context.Context, p *part, missing map[chunked.Name]error, add func(string, error, ...Span)) error {
	needed := map[chunked.Name]bool{}
	for _, st := range p.index.Root().Streams {
		for _, ref := range st.Segments {
			if err := p.segments[ref.Name]; err != nil {
				add(chunked.IndexObjectKey(ref.Name), err, Span{st.Name, ref.Pos, ref.Pos + ref.Length})
				continue
			}
			seg, err := p.index.Segment(ctx, ref)
			if err != nil {
				return err
			}
			broken := map[uint32]error{}
			for i := range seg.Chunks {
				c := seg.Chunk(uint32(i))
				err, read := v.bad[c.At], v.o.ReadData
				if gone := missing[c.At.Pack]; err == nil && gone != nil && !read {
					// Not read: it is lost unless it moved.
					if found, ferr := v.chunkMoved(ctx, c.At, 0); ferr != nil {
						return ferr
					} else if !found {
						err = gone
					}
				}
				if err != nil {
					broken[uint32(i)] = err
					needed[c.At.Pack] = true
				}
			}
			for _, e := range seg.Extents {
				if err := broken[e.Chunk]; err != nil {
					key := chunked.PackKey(seg.Chunk(e.Chunk).At.Pack)
					add(key, err, Span{st.Name, ref.Pos + e.Pos, ref.Pos + e.Pos + int64(e.Length)})
				}
			}
		}
	}
	// A pack with a wrong size is damaged even if what this version has of it
	// can be read.
	for n, err := range missing {
		if _, there := v.seen.objects[chunked.PackKey(n)]; there && !needed[n] {
			add(chunked.PackKey(n), err)
		}
	}
	return nil
}

// chunkMoved tells whether a chunk of a pack that is gone is in one that is
// there.
func (v *verifier) chunkMoved(ctx context.Context, at chunked.Location, hops int) (bool, error) {
	if hops >= maxHops {
		return false, nil
	}
	to, err := v.src.Moved(ctx, at)
	if err != nil {
		return false, fatal(ctx, err)
	}
	if o, ok := v.seen.objects[chunked.PackKey(to.Pack)]; ok && o.Size >= to.Offset+int64(to.Sealed) {
		return true, nil
	}
	return v.chunkMoved(ctx, to, hops+1)
}

// merge joins ranges that meet or overlap.
func merge(l []Span) []Span {
	slices.SortFunc(l, func(a, b Span) int {
		if a.Stream != b.Stream {
			return strings.Compare(a.Stream, b.Stream)
		}
		return int(a.From - b.From)
	})
	var out []Span
	for _, s := range l {
		if n := len(out); n > 0 && out[n-1].Stream == s.Stream && out[n-1].To >= s.From {
			out[n-1].To = max(out[n-1].To, s.To)
			continue
		}
		out = append(out, s)
	}
	return out
}
