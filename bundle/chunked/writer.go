package chunked

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
)

// Sink stores what a [Writer] makes. Its methods are called concurrently. One
// that returned nil has stored the object durably under its name; data is
// valid during the call only. Retrying is the Sink's affair: the first error
// ends the Writer.
type Sink interface {
	PutPack(ctx context.Context, n Name, data []byte) error
	PutIndex(ctx context.Context, n Name, data []byte) error
}

// Known tells which chunks the store has already, and which of them may be
// referred to. It is called concurrently and does not block for long.
type Known interface {
	Lookup(ID) (Location, bool)
}

// WriterOptions of [NewWriter]. Domain and Sink are required.
type WriterOptions struct {
	Domain *Domain
	Owner  Key // by it this creator knows its own packs again
	Sink   Sink
	Known  Known // nil: nothing is known

	Level Level
	// Small is the level of chunks that small files share, and of metadata, if it
	// is above Level: there is little of them, and they gain most.
	Small    Level
	PackSize int // bytes, 4.5 MiB to 256 MiB; 0: 16 MiB
	Workers  int // goroutines that compress; 0: one a core

	// Parent is the index of the image before this one, or nil: segments that say
	// the same are shared with it.
	Parent *Index
	// UsableIndex and UsablePack tell of the parent's objects whether they may be
	// referred to. nil: all may.
	UsableIndex, UsablePack func(Name) bool

	Random io.Reader // of salts and the index key; nil: crypto/rand
}

// Counters of a [Writer], in chunks and bytes of plaintext but for Sealed.
type Counters struct {
	Chunks, Bytes           int64 // given to Add
	KnownChunks, KnownBytes int64 // of them the store had
	TwiceChunks, TwiceBytes int64 // of them this writer had seen before
	NewChunks, NewBytes     int64 // of them were stored
	Sealed                  int64 // bytes of what was stored
}

// Writer makes chunks of what it is given, packs of chunks the store has not
// yet, and an index of it all. Compression, sealing and storing happen in the
// background, on every core and in bounded memory: a few MiB a worker and four
// packs. Its methods may be called concurrently unless they say otherwise.
type Writer struct {
	o      WriterOptions
	stop   context.CancelCauseFunc
	done   <-chan struct{}
	cause  func() error
	random struct {
		sync.Mutex
		io.Reader
	}

	packing struct {
		sync.Mutex
		z *packer // of segments
	}

	free  chan *buffer // of Buffer
	jobs  chan job
	busy  tally          // jobs
	loose tally          // packs that are not stored yet
	run   sync.WaitGroup // goroutines

	slots slots
	packs packTable

	fill struct {
		sync.Mutex              // held while waiting for room
		cur        *openPack    // nil: none
		room       chan []byte  // memory for packs
		made       int          // how much of it there is
		limit      int          // how much there may be
		stored     atomic.Int64 // bytes of packs
		index      atomic.Int64 // bytes of index objects
	}
	count struct {
		chunks, bytes, known, knownBytes, twice, twiceBytes, fresh, freshBytes, sealed atomic.Int64
	}

	mu       sync.Mutex // of the rest
	streams  map[string]*StreamWriter
	waiting  []*segmentBuild // settled, but in packs that are not stored yet
	finished bool
}

// BufferSize is how many bytes the memory of [Writer.Buffer] has.
const BufferSize = 1 << 20

type buffer struct {
	b       [BufferSize]byte
	release func()
}

type job struct {
	ref     Ref
	p       []byte
	release func()
	small   bool // compressed at WriterOptions.Small
}

// NewWriter starts a writer. Close ends it, also after Finish.
func NewWriter(ctx context.Context, o WriterOptions) (*Writer, error) {
	if o.PackSize == 0 {
		o.PackSize = 16 << 20
	}
	if o.Workers == 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	if o.Domain == nil || o.Sink == nil || o.Workers < 1 {
		return nil, fmt.Errorf("%w: a writer needs a domain, a sink and workers", ErrUsage)
	}
	if o.PackSize < packHeaderSize+maxSealedChunk+footerRoom(1) || o.PackSize > MaxPack {
		return nil, fmt.Errorf("%w: packs of %d bytes", ErrUsage, o.PackSize)
	}
	ctx, stop := context.WithCancelCause(ctx)
	w := &Writer{
		o: o, stop: stop, done: ctx.Done(), cause: func() error { return context.Cause(ctx) },
		free:    make(chan *buffer, 3*o.Workers+16),
		jobs:    make(chan job, o.Workers),
		streams: map[string]*StreamWriter{},
	}
	w.random.Reader = o.Random
	for range cap(w.free) {
		w.free <- nil // memory comes when it is needed
	}
	// A pack is filled while others are stored: 64 MiB of memory, more only if
	// packs are larger than half of it.
	w.fill.limit = max(2, min(8, 64<<20/o.PackSize))
	w.fill.room = make(chan []byte, w.fill.limit)
	o.Small = max(o.Small, o.Level)
	packers := make([]packers, o.Workers)
	for i := range packers {
		var err error
		if packers[i].level, err = newPacker(o.Level); err == nil {
			if packers[i].small = packers[i].level; o.Small != o.Level {
				packers[i].small, err = newPacker(o.Small)
			}
		}
		if err != nil {
			stop(err)
			return nil, err
		}
	}
	for _, z := range packers {
		w.run.Go(func() { w.worker(ctx, z) })
	}
	return w, nil
}

// packers are those of one worker.
type packers struct{ level, small *packer }

// errClosed is why a writer that was closed early does nothing any more.
var errClosed = errors.New("the writer was closed")

// Close ends the writer and waits until nothing of it runs. It may be called
// more than once. What Finish has not made durable is not part of any image.
func (w *Writer) Close() {
	w.stop(errClosed)
	w.run.Wait()
}

// Err is what ended the writer early, if anything.
func (w *Writer) Err() error { return w.cause() }

func (w *Writer) fail(err error) { w.stop(err) }

// Buffer gives memory of BufferSize bytes, with whatever it holds, and what
// gives it back: to be called once, or handed to Add with the memory. It blocks
// while all buffers are in use.
func (w *Writer) Buffer() (p []byte, release func()) {
	select {
	case b := <-w.free:
		if b == nil {
			b = &buffer{}
			b.release = func() { w.free <- b } // there is room for all
		}
		return b.b[:], b.release
	case <-w.done:
		return make([]byte, BufferSize), func() {}
	}
}

// Add makes a chunk of p: 1 to MaxChunk bytes, which belong to the writer
// until it calls release (if that is not nil), once, from another goroutine.
// It blocks while the workers are behind. Errors show in Finish.
func (w *Writer) Add(p []byte, release func()) Ref { return w.add(p, release, false) }

func (w *Writer) add(p []byte, release func(), small bool) Ref {
	if release == nil {
		release = func() {}
	}
	if len(p) < 1 || len(p) > MaxChunk {
		w.fail(fmt.Errorf("%w: a chunk has 1 to %d bytes, not %d", ErrUsage, MaxChunk, len(p)))
		release()
		return Ref{}
	}
	ref := w.slots.add(int32(len(p)))
	w.busy.add()
	select {
	case w.jobs <- job{ref, p, release, small}:
	case <-w.done:
		w.busy.done()
		release()
	}
	return ref
}

// knows reports whether Add of p would store nothing.
func (w *Writer) knows(p []byte) bool {
	d := DigestOf(p)
	if w.slots.has(d) {
		return true
	}
	if w.o.Known == nil {
		return false
	}
	_, ok := w.o.Known.Lookup(w.o.Domain.ID(d))
	return ok
}

// worker does jobs until there is nothing to do any more.
func (w *Writer) worker(ctx context.Context, z packers) {
	for {
		select {
		case j := <-w.jobs:
			if err := w.chunk(ctx, z, j); err != nil {
				w.fail(err)
			}
			j.release()
			w.busy.done()
		case <-w.done:
			return
		}
	}
}

// chunk finds out whether the store has a chunk, and stores it otherwise.
func (w *Writer) chunk(ctx context.Context, z packers, j job) error {
	size := int64(len(j.p))
	w.count.chunks.Add(1)
	w.count.bytes.Add(size)
	d := DigestOf(j.p)
	if !w.slots.claim(j.ref, d) {
		w.count.twice.Add(1)
		w.count.twiceBytes.Add(size)
		return nil
	}
	id := w.o.Domain.ID(d)
	if w.o.Known != nil {
		if at, ok := w.o.Known.Lookup(id); ok {
			w.count.known.Add(1)
			w.count.knownBytes.Add(size)
			c := Chunk{Digest: d, Size: len(j.p), At: at}
			if err := c.check(); err != nil {
				return fmt.Errorf("%w: what is known of a chunk: %w", ErrUsage, err)
			}
			w.slots.place(j.ref, w.packs.known(at.Pack), at)
			return nil
		}
	}
	c := z.level
	if j.small {
		c = z.small
	}
	codec, b := c.pack(j.p)
	sealed := len(b) + SealOverhead
	p, off, err := w.reserve(ctx, PackEntry{ID: id, Plain: len(j.p), Sealed: sealed})
	if err != nil {
		return err
	}
	AppendSeal(p.data[: off : off+sealed][:off], w.o.Domain.ChunkKey(d), TypeChunk, codec, b)
	w.slots.place(j.ref, p.number, Location{Offset: int64(off), Sealed: sealed})
	w.count.fresh.Add(1)
	w.count.freshBytes.Add(size)
	w.count.sealed.Add(int64(sealed))
	w.release(ctx, p)
	return nil
}

// Counters tells how much was done so far.
func (w *Writer) Counters() Counters {
	c := &w.count
	return Counters{
		Chunks: c.chunks.Load(), Bytes: c.bytes.Load(),
		KnownChunks: c.known.Load(), KnownBytes: c.knownBytes.Load(),
		TwiceChunks: c.twice.Load(), TwiceBytes: c.twiceBytes.Load(),
		NewChunks: c.fresh.Load(), NewBytes: c.freshBytes.Load(),
		Sealed: c.sealed.Load(),
	}
}

func (w *Writer) draw(p []byte) error {
	w.random.Lock()
	defer w.random.Unlock()
	if _, err := io.ReadFull(w.random.Reader, p); err != nil {
		return fmt.Errorf("draw a salt: %w", err)
	}
	return nil
}

// tally counts what is under way.
type tally struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n is 0 again
}

func (t *tally) add() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n++; t.n == 1 {
		t.none = make(chan struct{})
	}
}

func (t *tally) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n--; t.n == 0 {
		close(t.none)
	}
}

// wait returns when nothing is under way, or the writer has ended.
func (w *Writer) wait(t *tally) error {
	t.mu.Lock()
	none := t.none
	t.mu.Unlock()
	if none != nil {
		select {
		case <-none:
		case <-w.done:
		}
	}
	return w.Err()
}
