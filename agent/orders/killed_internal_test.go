package orders

import (
	"context"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// errDied is what a process dies of.
type errDied struct{}

// mortal counts what is asked of a store and an agent, and dies before or after
// one of them.
type mortal struct {
	upload.Store
	agent Agent
	at    int // 2n-1: before the nth, 2n: after it
	n     int
}

func (m *mortal) op(do func()) {
	m.n++
	if m.at == 2*m.n-1 {
		panic(errDied{})
	}
	do()
	if m.at == 2*m.n {
		panic(errDied{})
	}
}

func (m *mortal) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (out upload.Object, err error) {
	m.op(func() { out, err = m.Store.Put(ctx, key, body, size, o) })
	return out, err
}

func (m *mortal) Get(ctx context.Context, key string, o upload.GetOptions) (r io.ReadCloser, out upload.Object, err error) {
	m.op(func() { r, out, err = m.Store.Get(ctx, key, o) })
	return r, out, err
}

func (m *mortal) List(ctx context.Context, prefix string) (s iter.Seq2[upload.Object, error]) {
	m.op(func() { s = m.Store.List(ctx, prefix) })
	return s
}

func (m *mortal) Start(ctx context.Context, r task.Request) (t task.Task, err error) {
	m.op(func() { t, err = m.agent.Start(ctx, r) })
	return t, err
}

func (m *mortal) Show(ctx context.Context, id string) (t task.Task, err error) {
	m.op(func() { t, err = m.agent.Show(ctx, id) })
	return t, err
}

func (m *mortal) Cancel(ctx context.Context, id string) (err error) {
	m.op(func() { err = m.agent.Cancel(ctx, id) })
	return err
}

// lives runs until it dies, or ten steps.
func (m *mortal) lives(w *world) (died bool) {
	defer func() {
		switch r := recover(); r.(type) {
		case nil:
		case errDied:
			died = true
		default:
			panic(r)
		}
	}()
	w.steps(w.taker(w.queue(m), m), 10)
	return false
}

// TestKilledAnywhere kills what takes tasks before and after each of the things it
// asks of the store and of the agent: the next one brings every request to its
// end, and none is done twice. Its files change as a whole, between those.
func TestKilledAnywhere(t *testing.T) {
	memory := loopfs.Tmpfs(t, 256<<20) // where a sync costs nothing
	for at := 1; ; at++ {
		w := newWorldIn(t, filepath.Join(memory, fmt.Sprint(at)))
		w.agent.auto = true
		var asked []tasks.Task
		for _, r := range []tasks.Request{bundle, image} {
			asked = append(asked, w.submit(r))
			w.now = w.now.Add(time.Second)
		}
		m := &mortal{Store: w.store, agent: w.agent, at: at}
		died := m.lives(w)
		if !died {
			if at < 40 {
				t.Errorf("only %d places to die at", at-1)
			}
			t.Logf("%d places to die at", at-1)
			return
		}
		w.steps(w.taker(w.queue(w.store), w.agent), 10)
		if n := w.agent.count(); n != len(asked) {
			t.Errorf("dead at %d: the agent had %d tasks, want %d", at, n, len(asked))
		}
		for _, a := range asked {
			if s := w.status(a); s.State != tasks.Complete {
				t.Errorf("dead at %d: %s is %+v", at, a.Kind, s)
			}
		}
	}
}
