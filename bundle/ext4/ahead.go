package ext4

import (
	"context"
	"io"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

const (
	aheadSize    = 64 << 10 // bytes, of files read before their turn
	aheadBatch   = 8        // files taken at a time: one costs less than handing it over
	aheadBatches = 6        // waiting for their turn at most
	aheadWorkers = 4
)

// ahead opens the regular files of a tree, and reads the small ones, before
// the stream comes to them: on a disk that is not cached most of the time is
// spent waiting for one small file after the other.
type ahead struct {
	cancel context.CancelFunc
	queue  chan *batch // in the tree's order
	now    []aheadFile // what is left of the batch at hand
}

type batch struct {
	files []aheadFile
	ready chan struct{} // closed when the files have been opened
}

// aheadFile is a file that was opened ahead. If it was read whole and had not
// changed after that it is closed already.
type aheadFile struct {
	id      filetree.ID
	openErr error
	file    filetree.File // nil if closed
	data    []byte        // the whole file, if read
	whole   bool
	changed bool
	err     error // of asking for changes
	closing error
	free    *buffers
}

// newAhead starts it; skip, if not nil, tells which files are not to be opened.
func newAhead(ctx context.Context, p *Plan, src filetree.Source, skip func(filetree.ID) bool) *ahead {
	ctx, cancel := context.WithCancel(ctx)
	a := &ahead{cancel: cancel, queue: make(chan *batch, aheadBatches)}
	work := make(chan *batch)
	for range aheadWorkers {
		go func() {
			for b := range work {
				for i := range b.files {
					f := &b.files[i]
					f.open(ctx, src, p.t.Size(f.id))
				}
				close(b.ready)
			}
		}()
	}
	go a.feed(ctx, p, skip, work)
	return a
}

// feed makes batches of the tree's files.
func (a *ahead) feed(ctx context.Context, p *Plan, skip func(filetree.ID) bool, work chan<- *batch) {
	defer close(a.queue)
	defer close(work)
	free := newBuffers(aheadSize, (aheadBatches+aheadWorkers)*aheadBatch)
	send := func(b *batch) bool {
		select {
		case a.queue <- b:
		case <-ctx.Done():
			return false
		}
		select {
		case work <- b:
			return true
		case <-ctx.Done():
			for i := range b.files {
				b.files[i].openErr = ctx.Err()
			}
			close(b.ready)
			return false
		}
	}
	var b *batch
	for i := range p.t.Len() {
		id := filetree.ID(i)
		if p.t.Mode(id)&unix.S_IFMT != unix.S_IFREG || p.t.Size(id) != p.fileSize(id) || skip != nil && skip(id) {
			continue
		}
		if b == nil {
			b = &batch{make([]aheadFile, 0, aheadBatch), make(chan struct{})}
		}
		b.files = append(b.files, aheadFile{id: id, free: free})
		if len(b.files) == aheadBatch {
			if !send(b) {
				return
			}
			b = nil
		}
	}
	if b != nil {
		send(b)
	}
}

// next waits for the next file of the tree, which the caller closes.
func (a *ahead) next(ctx context.Context) (*aheadFile, error) {
	if len(a.now) == 0 {
		b, ok := <-a.queue
		if !ok {
			return nil, context.Cause(ctx)
		}
		<-b.ready
		a.now = b.files
	}
	f := &a.now[0]
	a.now = a.now[1:]
	return f, f.openErr
}

// stop closes what was opened and not taken, and waits for who does it.
func (a *ahead) stop() {
	a.cancel()
	discard := func(files []aheadFile) {
		for i := range files {
			if f := &files[i]; f.openErr == nil {
				_ = f.Close() // nothing was made of it
			}
		}
	}
	discard(a.now)
	for b := range a.queue {
		<-b.ready
		discard(b.files)
	}
}

func (f *aheadFile) open(ctx context.Context, src filetree.Source, size int64) {
	if f.file, f.openErr = src.Open(ctx, f.id); f.openErr != nil || size > aheadSize {
		return
	}
	f.data = f.free.get()[:size]
	n := 0
	if size > 0 {
		n, _ = f.file.ReadAt(f.data, 0)
	}
	if int64(n) != size {
		return // what is wrong is found when it is this file's turn
	}
	f.whole = true
	f.changed, f.err = f.file.Changed()
	if !f.changed && f.err == nil {
		f.closing = f.file.Close()
		f.file = nil
	}
}

func (f *aheadFile) ReadAt(b []byte, off int64) (int, error) {
	switch end := off + int64(len(b)); {
	case f.whole && end <= int64(len(f.data)):
		return copy(b, f.data[off:]), nil
	case f.file != nil:
		return f.file.ReadAt(b, off)
	}
	return copy(b, f.data[min(off, int64(len(f.data))):]), io.EOF
}

func (f *aheadFile) Changed() (bool, error) {
	if f.whole {
		return f.changed, f.err
	}
	return f.file.Changed()
}

func (f *aheadFile) Close() error {
	if f.data != nil {
		f.free.put(f.data)
		f.data = nil
	}
	if f.file != nil {
		return f.file.Close()
	}
	return f.closing
}
