package chunked

import (
	"bytes"
	"context"
	"io"
)

// parentCompare takes metadata that is new as a whole and finds the blocks in
// it that the parent has at the same position. The parent is read a few pieces
// ahead of the comparison.
type parentCompare struct {
	parent  *Stream
	s       *StreamWriter
	at      io.ReaderAt
	queue   []*comparison
	fresh   gather // blocks that are new
	unread  int
	because error
}

// comparison is a piece of metadata and what the parent has there.
type comparison struct {
	g    gather
	old  []byte
	done chan error
}

const (
	comparisons = 6        // under way at a time
	compareKeep = 12 << 20 // bytes of the parent's chunks that are kept
)

func newParentCompare(ctx context.Context, s *StreamWriter, parent *Stream) *parentCompare {
	return &parentCompare{parent: parent, s: s, at: parent.ReaderAt(ctx, compareKeep)}
}

// add begins to compare g, of which it becomes the owner.
func (p *parentCompare) add(c *Cutter, g gather) error {
	// The writer's buffers are few and large: others may wait for one.
	own := gather{b: bytes.Clone(g.b), runs: g.runs}
	g.release()
	x := &comparison{g: own, done: make(chan error, 1)}
	p.queue = append(p.queue, x)
	go func() { x.done <- x.read(p) }()
	if len(p.queue) >= comparisons {
		return p.next(c)
	}
	return nil
}

// read gets what the parent has where g lies.
func (x *comparison) read(p *parentCompare) error {
	x.old = make([]byte, len(x.g.b))
	for _, r := range x.g.runs {
		n := min(r.length, p.parent.Size()-r.pos)
		if n <= 0 {
			continue
		}
		if _, err := p.at.ReadAt(x.old[r.start:r.start+n], r.pos); err != nil {
			return err
		}
	}
	return nil
}

// next finishes the oldest comparison.
func (p *parentCompare) next(c *Cutter) error {
	x := p.queue[0]
	p.queue = p.queue[1:]
	if err := <-x.done; err != nil {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		// A parent that cannot be read is none: what it had is stored again.
		p.unread++
		if p.because == nil {
			p.because = err
		}
		clear(x.old)
	}
	for _, r := range x.g.runs {
		if err := p.compare(c, x, r); err != nil {
			return err
		}
	}
	return nil
}

// compare goes through a run of blocks, equal ones and others in turn.
func (p *parentCompare) compare(c *Cutter, x *comparison, r run) error {
	same := func(i int64) bool {
		return bytes.Equal(x.g.b[r.start+i:r.start+i+blockSize], x.old[r.start+i:r.start+i+blockSize])
	}
	for i := int64(0); i < r.length; {
		end := i + blockSize
		equal := same(i)
		for end < r.length && same(end) == equal {
			end += blockSize
		}
		if equal {
			ok, err := p.s.CanCopy(c.ctx, p.parent, r.pos+i, end-i)
			if err != nil {
				return err
			}
			if equal = ok; ok {
				if err := p.s.CopyFrom(c.ctx, p.parent, r.pos+i, r.pos+i, end-i); err != nil {
					return err
				}
			}
		}
		if !equal {
			for b := i; b < end; b += blockSize {
				if len(p.fresh.b) >= metaSize {
					if err := c.flush(&p.fresh); err != nil {
						return err
					}
				}
				p.fresh.append(c.w, r.pos+b, x.g.b[r.start+b:r.start+b+blockSize])
			}
		}
		i = end
	}
	return nil
}

func (p *parentCompare) finish(c *Cutter) error {
	for len(p.queue) > 0 {
		if err := p.next(c); err != nil {
			return err
		}
	}
	return c.flush(&p.fresh)
}

// ParentUnread tells how many pieces of the parent's metadata, of 128 KiB,
// could not be compared because they could not be read, and why the first.
func (c *Cutter) ParentUnread() (int, error) {
	if c.parent == nil {
		return 0, nil
	}
	return c.parent.unread, c.parent.because
}
