package chunked

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/instar-image/instar/bundle/sparse"
)

// RestoreOptions of [Restore]. The zero value is usable. The functions are
// called from several goroutines at a time.
type RestoreOptions struct {
	// Workers is how many ranges are fetched at a time; 0: one a core, 8 at least.
	Workers int
	// Have reports that a range is right already; it is neither fetched nor written.
	Have func(off, length int64) bool
	// Zero makes a range zero, where the stream is: for an output that may hold
	// something else. nil: it is zero already.
	Zero func(ctx context.Context, off, length int64) error
	// Progress is told of bytes that were written.
	Progress func(n int64)
	// Damaged is told which extent cannot be had, and why. If it returns nil the
	// others are restored nevertheless. nil: the first such extent ends it.
	Damaged func(e Extent, err error) error
}

// Limits of what Restore does at a time.
const (
	restoreWindow  = 400_000   // extents, 24 bytes each and 140 for each chunk
	restoreMemory  = 32 << 20  // bytes of ranges being fetched
	restoreRange   = 4 << 20   // bytes fetched in one range, at most
	restoreSkip    = 64 << 10  // bytes nobody wants in a range, at once
	restoreWorkers = 8         // at least
	leastRange     = 512 << 10 // bytes
)

// Restore writes what is not zero of a stream to out, in no order, from several
// goroutines. It reads pack by pack, each chunk once in large ranges, and writes
// only what it has verified. Without out it only verifies.
func Restore(ctx context.Context, s *Stream, out io.WriterAt, o RestoreOptions) error {
	if o.Workers <= 0 {
		o.Workers = max(restoreWorkers, runtime.GOMAXPROCS(0))
	}
	r := &restorer{s: s, out: out, o: o, span: int64(min(restoreRange, max(leastRange, restoreMemory/o.Workers)))}
	for from := int64(0); from < s.Size(); {
		to, err := r.collect(ctx, from)
		if err == nil {
			err = r.fetch(ctx)
		}
		if err != nil {
			return fmt.Errorf("restore stream %q: %w", s.Name(), err)
		}
		from = to
	}
	return nil
}

type restorer struct {
	s    *Stream
	out  io.WriterAt
	o    RestoreOptions
	span int64

	wants   []want
	targets []target
	byID    map[Digest]uint32 // in wants
}

// want is a chunk and, as a list, where its bytes go.
type want struct {
	c           Chunk
	first, last uint32 // in targets, from 1 on
}

type target struct {
	pos    int64
	length int32
	start  int32
	next   uint32
}

// collect gathers a window's extents and makes what is between them zero. It
// tells where the window ends.
func (r *restorer) collect(ctx context.Context, from int64) (int64, error) {
	r.wants, r.targets, r.byID = r.wants[:0], r.targets[:0], map[Digest]uint32{}
	end := from
	for e, err := range r.s.Extents(ctx, from, r.s.Size()) {
		if err != nil {
			return 0, err
		}
		if len(r.targets) == restoreWindow {
			return end, nil
		}
		if err := r.zero(ctx, end, e.Pos); err != nil {
			return 0, err
		}
		end = e.Pos + e.Length
		if r.o.Have == nil || !r.o.Have(e.Pos, e.Length) {
			r.add(e)
		}
	}
	if err := r.zero(ctx, end, r.s.Size()); err != nil {
		return 0, err
	}
	return r.s.Size(), nil
}

func (r *restorer) zero(ctx context.Context, from, to int64) error {
	if r.o.Zero == nil || from == to {
		return nil
	}
	if err := r.o.Zero(ctx, from, to-from); err != nil {
		return fmt.Errorf("make %d bytes at %d zero: %w", to-from, from, err)
	}
	return nil
}

func (r *restorer) add(e Extent) {
	r.targets = append(r.targets, target{pos: e.Pos, length: int32(e.Length), start: int32(e.Start)})
	n := uint32(len(r.targets))
	i, ok := r.byID[e.Chunk.Digest]
	// Two segments may know a chunk at two places: one of them will do. Who says
	// another length is wrong, and is told so on his own.
	if ok && r.wants[i].c.Size == e.Chunk.Size {
		w := &r.wants[i]
		r.targets[w.last-1].next, w.last = n, n
		return
	}
	r.byID[e.Chunk.Digest] = uint32(len(r.wants))
	r.wants = append(r.wants, want{c: e.Chunk, first: n, last: n})
}

// fetch restores what was collected: packs in the order in which the stream
// needs them first, and each from its beginning on.
func (r *restorer) fetch(ctx context.Context) error {
	rank := map[Name]int{}
	for i := range r.wants {
		if n := r.wants[i].c.At.Pack; rank[n] == 0 {
			rank[n] = len(rank) + 1
		}
	}
	slices.SortFunc(r.wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(rank[a.c.At.Pack], rank[b.c.At.Pack]), cmp.Compare(a.c.At.Offset, b.c.At.Offset))
	})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	batches := make(chan []want)
	var all sync.WaitGroup
	for range r.o.Workers {
		all.Go(func() {
			f := &fetcher{r: r}
			for b := range batches {
				if err := f.batch(ctx, b); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	for rest := r.wants; len(rest) > 0; {
		n := r.coalesce(rest)
		select {
		case batches <- rest[:n]:
			rest = rest[n:]
		case <-ctx.Done():
			rest = nil
		}
	}
	close(batches)
	all.Wait()
	return context.Cause(ctx)
}

// coalesce tells how many of the chunks are fetched in one range.
func (r *restorer) coalesce(list []want) int {
	first := list[0].c.At
	end := first.Offset + int64(first.Sealed)
	n := 1
	for ; n < len(list); n++ {
		at := list[n].c.At
		last := at.Offset + int64(at.Sealed)
		if at.Pack != first.Pack || at.Offset < end || at.Offset-end > restoreSkip || last-first.Offset > r.span {
			break
		}
		end = last
	}
	return n
}

// fetcher is one worker's memory.
type fetcher struct {
	r             *restorer
	sealed, plain []byte
}

// batch restores chunks that lie in one range of a pack.
func (f *fetcher) batch(ctx context.Context, list []want) error {
	x := f.r.s.x
	first, last := list[0].c.At, list[len(list)-1].c.At
	size := int(last.Offset + int64(last.Sealed) - first.Offset)
	if cap(f.sealed) < size {
		f.sealed = make([]byte, size)
	}
	buf := f.sealed[:size]
	err := x.src.ReadPack(ctx, first.Pack, first.Offset, buf)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for i := range list {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		w := &list[i]
		if cap(f.plain) < w.c.Size {
			f.plain = make([]byte, max(w.c.Size, BufferSize))
		}
		var p []byte
		failed := err
		if failed == nil {
			off := w.c.At.Offset - first.Offset
			p, failed = x.u.open(&w.c, buf[off:off+int64(w.c.At.Sealed)], f.plain)
		}
		if failed != nil {
			// On its own it is read again, and where it was moved.
			p, failed = x.read(ctx, w.c, nil, f.plain)
		}
		if err := f.write(ctx, w, p, failed); err != nil {
			return err
		}
	}
	return nil
}

// write puts a chunk's bytes, which are verified, where they go.
func (f *fetcher) write(ctx context.Context, w *want, p []byte, failed error) error {
	r := f.r
	for i := w.first; i != 0; {
		t := r.targets[i-1]
		i = t.next
		switch {
		case failed != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case failed != nil && r.o.Damaged == nil:
			return failed
		case failed != nil:
			if err := r.o.Damaged(Extent{Pos: t.pos, Length: int64(t.length), Chunk: w.c, Start: int64(t.start)}, failed); err != nil {
				return err
			}
			continue
		}
		if r.out != nil {
			if _, err := r.out.WriteAt(p[t.start:t.start+t.length], t.pos); err != nil {
				return fmt.Errorf("write %d bytes at %d: %w", t.length, t.pos, err)
			}
		}
		if r.o.Progress != nil {
			r.o.Progress(int64(t.length))
		}
	}
	return nil
}

// Map tells which parts of the stream are not zero.
func (s *Stream) Map(ctx context.Context) (sparse.Map, error) {
	var m sparse.Map
	for e, err := range s.Extents(ctx, 0, s.st.Size) {
		if err != nil {
			return nil, err
		}
		m = m.Append(sparse.Extent{Off: e.Pos, Len: e.Length})
	}
	return m, nil
}
