package chunked

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// openPack is a pack being filled.
type openPack struct {
	number  uint32 // in the pack table
	data    []byte // of the full capacity; what lies behind used is free
	used    int
	entries []PackEntry
	holds   atomic.Int32 // chunks being sealed, and one until it is full
}

// reserve finds room for a sealed chunk. The caller fills it, then calls
// release.
func (w *Writer) reserve(ctx context.Context, e PackEntry) (*openPack, int, error) {
	f := &w.fill
	f.Lock()
	defer f.Unlock()
	if f.cur != nil && f.cur.used+e.Sealed+footerRoom(len(f.cur.entries)+1) > w.o.PackSize {
		w.release(ctx, f.cur)
		f.cur = nil
	}
	if f.cur == nil {
		data, err := w.room()
		if err != nil {
			return nil, 0, err
		}
		f.cur = &openPack{number: w.packs.open(), data: data}
		f.cur.used = len(appendPackHeader(data[:0]))
		f.cur.holds.Store(1)
		w.loose.add()
	}
	p := f.cur
	off := p.used
	p.used += e.Sealed
	p.entries = append(p.entries, e)
	p.holds.Add(1)
	return p, off, nil
}

// room gives memory for a pack, when there is some.
func (w *Writer) room() ([]byte, error) {
	f := &w.fill
	if f.made < f.limit {
		select {
		case b := <-f.room:
			return b, nil
		default:
			f.made++
			return make([]byte, w.o.PackSize), nil
		}
	}
	select {
	case b := <-f.room:
		return b, nil
	case <-w.done:
		return nil, w.cause()
	}
}

// release gives one hold on a pack up. Who gives the last up stores it.
func (w *Writer) release(ctx context.Context, p *openPack) {
	if p.holds.Add(-1) > 0 {
		return
	}
	w.run.Go(func() {
		defer w.loose.done()
		if err := w.store(ctx, p); err != nil {
			w.fail(err)
			return
		}
		w.fill.room <- p.data[:w.o.PackSize]
		if err := w.settle(ctx); err != nil {
			w.fail(err)
		}
	})
}

func (w *Writer) store(ctx context.Context, p *openPack) error {
	if err := w.cause(); err != nil {
		return err
	}
	var salt Salt
	if err := w.draw(salt[:]); err != nil {
		return err
	}
	data := appendPackEnd(p.data[:p.used], w.o.Domain, w.o.Owner, salt, p.entries)
	n := NameOf(data)
	if err := w.o.Sink.PutPack(ctx, n, data); err != nil {
		return fmt.Errorf("store %s, %d bytes: %w", packObject(n), len(data), err)
	}
	w.packs.stored(p.number, n, int64(len(data)))
	w.fill.stored.Add(int64(len(data)))
	return nil
}

// flush ends the pack that is being filled.
func (w *Writer) flush(ctx context.Context) {
	w.fill.Lock()
	defer w.fill.Unlock()
	if w.fill.cur != nil {
		w.release(ctx, w.fill.cur)
		w.fill.cur = nil
	}
}

// packTable numbers packs: those of this writer, whose names are known once
// they are stored, and those it refers to.
type packTable struct {
	mu     sync.Mutex
	list   []packRow
	byName map[Name]uint32
}

type packRow struct {
	name Name
	size int64 // 0: not this writer's, or not stored yet
	own  bool
	safe bool // in the store
}

// open adds a pack of this writer.
func (t *packTable) open() uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, packRow{own: true})
	return uint32(len(t.list) - 1)
}

// known gives the number of a pack that is in the store.
func (t *packTable) known(n Name) uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	i, ok := t.byName[n]
	if !ok {
		i = uint32(len(t.list))
		t.list = append(t.list, packRow{name: n, safe: true})
		if t.byName == nil {
			t.byName = map[Name]uint32{}
		}
		t.byName[n] = i
	}
	return i
}

func (t *packTable) stored(i uint32, n Name, size int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list[i].name, t.list[i].size, t.list[i].safe = n, size, true
}

func (t *packTable) row(i uint32) packRow {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.list[i]
}
