package chunked

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// Result is what a manifest says about an image's content.
type Result struct {
	Root     ObjectSize
	IndexKey Key
	Segments []ObjectSize   // ascending by name, none twice
	Packs    []ObjectSize   // likewise; of those not written here Size is 0
	Streams  []StreamResult // ascending by name
	Data     int64          // bytes of the streams that are not zero
	Added    int64          // bytes of packs that were stored
	Counters Counters
	// AddedIndex is how many bytes of index objects were stored, the root's too.
	AddedIndex int64
}

// StreamResult is a stream of a [Result], in bytes.
type StreamResult struct {
	Name string
	Size int64
	Data int64 // not zero
}

// Finish stores what is left, the index and its root. All calls of Add and Map
// have returned.
func (w *Writer) Finish(ctx context.Context) (*Result, error) {
	res, err := w.finish(ctx)
	if err != nil {
		w.fail(err)
		w.run.Wait()
		if cause := w.Err(); cause != nil && !errors.Is(err, cause) {
			return nil, cause // it came first
		}
		return nil, err
	}
	return res, nil
}

func (w *Writer) finish(ctx context.Context) (*Result, error) {
	if err := w.wait(&w.busy); err != nil {
		return nil, err
	}
	w.flush(ctx)
	if err := w.wait(&w.loose); err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.finished = true
	rest := w.waiting
	w.waiting = nil
	streams := make([]*StreamWriter, 0, len(w.streams))
	for _, s := range w.streams {
		if s.unsized {
			w.mu.Unlock()
			return nil, fmt.Errorf("%w: nobody said how long stream %q is", ErrUsage, s.name)
		}
		streams = append(streams, s)
		for _, b := range s.segments {
			rest = append(rest, b)
		}
		s.segments = nil
	}
	w.mu.Unlock()
	slices.SortFunc(streams, func(a, b *StreamWriter) int { return cmp.Compare(a.name, b.name) })
	slices.SortFunc(rest, func(a, b *segmentBuild) int {
		return cmp.Or(cmp.Compare(a.s.name, b.s.name), cmp.Compare(a.pos, b.pos))
	})
	if err := w.storeAll(ctx, rest); err != nil {
		return nil, err
	}
	return w.root(ctx, streams)
}

// storeAll stores segments, a few at a time.
func (w *Writer) storeAll(ctx context.Context, list []*segmentBuild) error {
	limit := make(chan struct{}, 8)
	var all sync.WaitGroup
	for _, b := range list {
		limit <- struct{}{}
		if w.Err() != nil {
			break
		}
		all.Go(func() {
			defer func() { <-limit }()
			if err := b.store(ctx); err != nil {
				w.fail(err)
			}
		})
	}
	all.Wait()
	return w.Err()
}

func (w *Writer) root(ctx context.Context, streams []*StreamWriter) (*Result, error) {
	res := &Result{Counters: w.Counters(), Added: w.fill.stored.Load()}
	r := &Root{}
	segments := map[Name]int64{}
	packs := map[Name]int64{}
	for _, s := range streams {
		st := RootStream{Name: s.name, Size: s.size}
		slices.SortFunc(s.refs, func(a, b placedRef) int { return cmp.Compare(a.Pos, b.Pos) })
		for _, ref := range s.refs {
			st.Segments = append(st.Segments, ref.SegmentRef)
			segments[ref.Name] = int64(ref.Stored)
			for _, p := range ref.packs {
				row := w.packs.row(p)
				packs[row.name] = row.size
			}
		}
		r.Streams = append(r.Streams, st)
		res.Streams = append(res.Streams, StreamResult{Name: s.name, Size: s.size, Data: s.data})
		res.Data += s.data
	}
	plain, err := r.Encode()
	if err != nil {
		return nil, err
	}
	if err := w.draw(res.IndexKey[:]); err != nil {
		return nil, err
	}
	n, object, err := SealRoot(res.IndexKey, plain, Default)
	if err != nil {
		return nil, err
	}
	if err := w.o.Sink.PutIndex(ctx, n, object); err != nil {
		return nil, fmt.Errorf("store index root %s, %d bytes: %w", n, len(object), err)
	}
	res.Root = ObjectSize{Name: n, Size: int64(len(object))}
	res.AddedIndex = w.fill.index.Load() + res.Root.Size
	res.Segments, res.Packs = sortedObjects(segments), sortedObjects(packs)
	return res, nil
}

func sortedObjects(m map[Name]int64) []ObjectSize {
	list := make([]ObjectSize, 0, len(m))
	for n, size := range m {
		list = append(list, ObjectSize{n, size})
	}
	slices.SortFunc(list, func(a, b ObjectSize) int { return a.Name.Compare(b.Name) })
	return list
}
