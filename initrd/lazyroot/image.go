package lazyroot

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
)

// ErrStore is wrapped by errors about stores that did not give what is needed
// for as long as [ImageOptions.Patience] allows.
var ErrStore = errors.New("no store gave it in time")

// NamedSource is a source with a name for messages.
type NamedSource struct {
	Name   string
	Source chunked.Source
	// Hint: it has copies of what another source has. What it lacks, or does not
	// answer for, says nothing of whether the image has it.
	Hint bool
}

// Alarm is that something stored is not what it must be, or is not there.
type Alarm struct {
	Source string // of those of the image
	Err    error
	// Final: no source has it, and whoever asked was given an error.
	Final bool
}

// ImageOptions of [NewImage].
type ImageOptions struct {
	// Stream is the index's stream; "" is its disk.
	Stream string
	// Sources are asked in this order: what one does not give, or gives wrong, the
	// next is asked for. Renewing credentials is a source's own matter. None: the
	// index's own. Not all may be hints, and those come first.
	Sources []NamedSource
	// Patience is how long a read waits for stores that cannot be reached or
	// fail, before it fails itself with [ErrStore]; 0 is 15 minutes.
	Patience time.Duration
	// Pause is waited before all sources are asked again; it doubles up to 20
	// times its length. 0 is 250 ms.
	Pause time.Duration
	// Alarm, if it is not nil, is told of what is damaged or missing. It is
	// called from several goroutines.
	Alarm func(Alarm)
	// Memory is how many bytes of chunks are kept once they were read; 0 is 8 MiB.
	Memory int64
	// Around is how many bytes of a pack are read with what is asked for, if the
	// image has need of them too; 0 reads what is asked for. It is for stores far
	// away: more bytes for fewer requests.
	Around int64
}

// Image is what a device shows where nobody wrote: the verified bytes of one
// stream. Its methods may be called concurrently.
type Image struct {
	views []view
	o     ImageOptions
	size  int64
}

type view struct {
	name   string
	hint   bool
	index  *chunked.Index
	stream *chunked.Stream
}

// NewImage is the stream of an index.
func NewImage(x *chunked.Index, o ImageOptions) (*Image, error) {
	if o.Stream == "" {
		o.Stream = chunked.StreamDisk
	}
	if o.Patience == 0 {
		o.Patience = 15 * time.Minute
	}
	if o.Pause == 0 {
		o.Pause = 250 * time.Millisecond
	}
	if o.Memory == 0 {
		o.Memory = 8 << 20
	}
	if o.Alarm == nil {
		o.Alarm = func(Alarm) {}
	}
	i := &Image{o: o, views: make([]view, max(1, len(o.Sources)))}
	i.views[0].index, i.views[0].name = x, "the store"
	own := len(o.Sources) == 0
	for n, s := range o.Sources {
		i.views[n] = view{name: s.Name, hint: s.Hint, index: x.With(s.Source)}
		own = own || !s.Hint
	}
	if !own {
		return nil, errors.New("open an image: of its sources none is more than a hint")
	}
	for n := range i.views {
		s, err := i.views[n].index.Stream(o.Stream)
		if err != nil {
			return nil, err
		}
		i.views[n].stream, i.size = s, s.Size()
	}
	return i, nil
}

// Size in bytes.
func (i *Image) Size() int64 { return i.size }

// lost tells whether an error is about the bytes, not about reaching them.
func lost(err error) bool {
	for _, class := range []error{chunked.ErrCorrupt, chunked.ErrMissing, chunked.ErrFormat, chunked.ErrVersion, chunked.ErrLimit, chunked.ErrForeign} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// lostTries is how often all sources are asked for what none has right: once
// more than what a line that garbles bytes now and then may spoil.
const lostTries = 3

// trial is the asking of all sources, again and again.
type trial struct {
	i     *Image
	ends  time.Time
	pause time.Duration
	lost  int // rounds in which all sources had it wrong
}

func (i *Image) trial() *trial {
	return &trial{i: i, ends: time.Now().Add(i.o.Patience), pause: i.o.Pause}
}

// again waits before the next round, or says why there is none. all tells
// whether all sources had it wrong; err is the last error.
func (t *trial) again(ctx context.Context, all bool, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if all {
		if t.lost++; t.lost >= lostTries {
			t.i.o.Alarm(Alarm{Source: "every source", Err: err, Final: true})
			return err
		}
	}
	left := time.Until(t.ends)
	if left <= 0 {
		return fmt.Errorf("%w: tried for %v, at last: %w", ErrStore, t.i.o.Patience, err)
	}
	wait := min(t.pause/2+rand.N(t.pause), left)
	t.pause = min(2*t.pause, 20*t.i.o.Pause)
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(wait):
		return nil
	}
}

// extents gives what is not zero from position from up to to.
func (i *Image) extents(ctx context.Context, from, to int64) ([]chunked.Extent, error) {
	t := i.trial()
	for {
		var last error
		all := true
		for n := range i.views {
			v := &i.views[n]
			var list []chunked.Extent
			var err error
			for e, eerr := range v.stream.Extents(ctx, max(from, 0), min(to, i.size)) {
				if err = eerr; err != nil {
					break
				}
				list = append(list, e)
			}
			if err == nil {
				return list, nil
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			last = i.blame(v, err)
			all = all && (v.hint || lost(err))
		}
		if err := t.again(ctx, all, last); err != nil {
			return nil, err
		}
	}
}

// held tells whether a chunk is at hand: reading it asks no store.
func (i *Image) held(c *chunked.Chunk) bool { return i.views[0].index.Holds(c) }

// blame tells of an error of a source if it is about the bytes.
func (i *Image) blame(v *view, err error) error {
	err = fmt.Errorf("%s: %w", v.name, err)
	if lost(err) && !(v.hint && errors.Is(err, chunked.ErrMissing)) {
		i.o.Alarm(Alarm{Source: v.name, Err: err})
	}
	return err
}

// read reads chunks that lie in one pack, by ascending offset, and calls give
// once for each, in no order.
func (i *Image) read(ctx context.Context, list []chunked.Chunk, give func(n int, p []byte, err error)) {
	at := make([]int, len(list)) // in the caller's list
	for n := range at {
		at[n] = n
	}
	t := i.trial()
	for {
		errs := make([]error, len(list))
		wrong := make([]bool, len(list)) // at every source
		for n := range wrong {
			wrong[n] = true
		}
		for n := range i.views {
			v := &i.views[n]
			var restList []chunked.Chunk
			var restAt []int
			var restErrs []error
			var restWrong []bool
			v.index.ReadChunks(ctx, list, func(k int, p []byte, err error) {
				if err == nil {
					give(at[k], p, nil)
					return
				}
				if ctx.Err() == nil {
					err = i.blame(v, err)
				}
				restList, restAt = append(restList, list[k]), append(restAt, at[k])
				restErrs, restWrong = append(restErrs, err), append(restWrong, wrong[k] && (v.hint || lost(err)))
			})
			list, at, errs, wrong = restList, restAt, restErrs, restWrong
			if len(list) == 0 {
				return
			}
			if ctx.Err() != nil {
				break
			}
		}
		// Those that are wrong everywhere end sooner than those that only wait.
		all := true
		for n := range list {
			all = all && wrong[n]
		}
		if err := t.again(ctx, all, errs[0]); err != nil {
			for n := range list {
				if all && lost(err) {
					give(at[n], nil, errs[n])
					continue
				}
				give(at[n], nil, err)
			}
			return
		}
	}
}
