package chunked

import (
	"context"
	"errors"
	"fmt"
	"io"
)

func isCancelled(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// read gets one chunk: from where it is said to be, or from where it was moved.
// sealed and dst are memory to use, if large enough.
func (x *Index) read(ctx context.Context, c Chunk, sealed, dst []byte) ([]byte, error) {
	var first error
	at := c.At
	for range 1 + maxHops {
		p, err := x.readAt(ctx, c, at, sealed, dst)
		if err == nil {
			return p, nil
		}
		if again, ok := x.src.(Rereader); ok && ctx.Err() == nil && errors.Is(err, ErrCorrupt) {
			if p, rerr := x.readBy(ctx, again.RereadPack, c, at, sealed, dst); rerr == nil {
				return p, nil
			}
		}
		if ctx.Err() != nil {
			return nil, err
		}
		if first == nil {
			first = err
		}
		m, ok := x.src.(Mover)
		if !ok {
			return nil, first
		}
		if at, err = m.Moved(ctx, at); err != nil {
			if ctx.Err() != nil || !errors.Is(err, ErrNotMoved) {
				return nil, fmt.Errorf("%w; where it was moved: %w", first, err)
			}
			return nil, first
		}
	}
	return nil, fmt.Errorf("%w; it was moved more than %d times", first, maxHops)
}

func (x *Index) readAt(ctx context.Context, c Chunk, at Location, sealed, dst []byte) ([]byte, error) {
	return x.readBy(ctx, x.src.ReadPack, c, at, sealed, dst)
}

// readBy reads and opens one chunk, whose bytes get gives.
func (x *Index) readBy(ctx context.Context, get func(context.Context, Name, int64, []byte) error, c Chunk, at Location, sealed, dst []byte) ([]byte, error) {
	c.At = at
	if err := c.check(); err != nil {
		return nil, err
	}
	if cap(sealed) < at.Sealed {
		sealed = make([]byte, at.Sealed)
	}
	sealed = sealed[:at.Sealed]
	if err := get(ctx, at.Pack, at.Offset, sealed); err != nil {
		return nil, fmt.Errorf("read %s: %w", chunkObject(c.Digest, at), err)
	}
	return x.u.open(&c, sealed, dst)
}

// ReadChunk gives the verified plaintext of a chunk of this index.
func (x *Index) ReadChunk(ctx context.Context, c Chunk) ([]byte, error) {
	return x.read(ctx, c, nil, nil)
}

// ReaderAt reads any part of the stream. Every byte is verified before it is
// given. It keeps up to cacheBytes of chunks and reads each once however many
// ask for it; it may be used concurrently. Its calls fail once ctx has ended.
func (s *Stream) ReaderAt(ctx context.Context, cacheBytes int64) io.ReaderAt {
	return &readerAt{ctx: ctx, s: s, chunks: newCache[Digest, []byte](cacheBytes)}
}

type readerAt struct {
	ctx    context.Context //nolint:containedctx // io.ReaderAt has no place for one
	s      *Stream
	chunks *cache[Digest, []byte]
}

// readsAtOnce is how many chunks one ReadAt fetches at a time.
const readsAtOnce = 8

func (r *readerAt) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: reading stream %q at %d", ErrUsage, r.s.st.Name, off)
	}
	short := false
	if rest := max(0, r.s.st.Size-off); int64(len(p)) > rest {
		p, short = p[:rest], true
	}
	if n, err := r.fill(p, off); err != nil {
		return n, err
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// fill reads all of p. It returns how much of its beginning is right.
func (r *readerAt) fill(p []byte, off int64) (int, error) {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	type part struct {
		pos  int64
		done chan error
	}
	var parts []part
	await := func(keep int) (int, error) {
		for len(parts) > keep {
			x := parts[0]
			parts = parts[1:]
			if err := <-x.done; err != nil {
				return int(x.pos - off), err
			}
		}
		return 0, nil
	}
	// Nobody writes to p behind the caller's back, also after an error.
	defer func() {
		cancel()
		for _, x := range parts {
			<-x.done
		}
	}()
	end := off
	for e, err := range r.s.Extents(ctx, off, off+int64(len(p))) {
		if err != nil {
			if n, first := await(0); first != nil {
				return n, first
			}
			return int(end - off), err
		}
		clear(p[end-off : e.Pos-off])
		end = e.Pos + e.Length
		dst := p[e.Pos-off : end-off]
		x := part{e.Pos, make(chan error, 1)}
		get := func() error {
			b, err := r.chunk(ctx, e.Chunk)
			if err == nil {
				copy(dst, b[e.Start:])
			}
			return err
		}
		if int64(len(dst)) == int64(len(p)) {
			return 0, get()
		}
		if n, err := await(readsAtOnce - 1); err != nil {
			return n, err
		}
		parts = append(parts, x)
		go func() { x.done <- get() }()
	}
	clear(p[end-off:])
	if n, err := await(0); err != nil {
		return n, err
	}
	return len(p), nil
}

func (r *readerAt) chunk(ctx context.Context, c Chunk) ([]byte, error) {
	b, err := r.chunks.get(ctx, c.Digest, func() ([]byte, int64, error) {
		b, err := r.s.x.read(ctx, c, nil, nil)
		// What was stored as it is lies in memory with a few more bytes.
		return b, int64(cap(b)), err
	})
	if err == nil && len(b) != c.Size {
		return nil, bad(ErrFormat, chunkObject(c.Digest, c.At), "it has %d bytes here and %d elsewhere in the index", c.Size, len(b))
	}
	return b, err
}
