package tasks_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// TestLapse: what nobody will bring to its end is ended, and nothing else.
func TestLapse(t *testing.T) {
	for name, c := range map[string]struct {
		state tasks.State // reported by an agent; "" if none took it
		pass  time.Duration
		want  tasks.State
		code  string
	}{
		"waits":               {"", tasks.Lifetime - time.Second, tasks.Pending, ""},
		"expired":             {"", tasks.Lifetime, tasks.Failed, tasks.CodeUnreachable},
		"heard of":            {tasks.Storing, tasks.Silence, tasks.Storing, ""},
		"silent":              {tasks.Storing, tasks.Silence + time.Second, tasks.Failed, tasks.CodeSilent},
		"silent, asked to":    {tasks.Cancelling, tasks.Silence + time.Second, tasks.Cancelled, "Client.Cancelled"},
		"ended":               {tasks.Complete, 2 * tasks.Lifetime, tasks.Complete, ""},
		"long, but heard of":  {tasks.Bundling, tasks.Silence / 2, tasks.Bundling, ""},
		"expired when it ran": {tasks.Bundling, tasks.Lifetime, tasks.Failed, tasks.CodeSilent},
	} {
		w, ctx := newWorld(t), t.Context()
		asked := w.submit(t, bundle)
		if c.state != "" {
			mine, err := w.agent.Take(ctx, asked, "a")
			if err == nil {
				_, err = w.agent.Update(ctx, mine, tasks.Status{State: c.state})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		w.now = w.now.Add(c.pass)
		now, err := w.server.Get(ctx, "i-1", asked.ID)
		if err == nil {
			now, err = w.server.Lapse(ctx, now)
		}
		if err != nil || now.State != c.want || now.Code != c.code {
			t.Errorf("%s: %+v, %v; want %s %s", name, now.Status, err, c.want, c.code)
		}
		if kept, err := w.server.Get(ctx, "i-1", asked.ID); err != nil || kept.State != c.want {
			t.Errorf("%s: in the store it is %+v, %v", name, kept.Status, err)
		}
	}

	// One who looked before the agent was heard of ends nothing.
	w, ctx := newWorld(t), t.Context()
	mine, err := w.agent.Take(ctx, w.submit(t, bundle), "a")
	if err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(2 * tasks.Silence)
	old := mine
	if _, err := w.agent.Update(ctx, mine, tasks.Status{State: tasks.Bundling, Progress: 7}); err != nil {
		t.Fatal(err)
	}
	if now, err := w.server.Lapse(ctx, old); err != nil || now.State != tasks.Bundling || now.Progress != 7 {
		t.Errorf("%+v, %v", now.Status, err)
	}
}

// TestRefuse: an agent ends what it will not do, unless it was taken meanwhile.
func TestRefuse(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	asked := w.submit(t, bundle)
	if err := w.agent.Refuse(ctx, asked, "a", "Client.NotPermitted", strings.Repeat("ä", 1000)); err != nil {
		t.Fatal(err)
	}
	now, err := w.server.Get(ctx, "i-1", asked.ID)
	if err != nil || now.State != tasks.Failed || now.Code != "Client.NotPermitted" || len(now.Message) < 1000 || now.Agent != "a" {
		t.Errorf("%+v, %v", now.Status, err)
	}
	if _, err := w.agent.Take(ctx, asked, "b"); !errors.Is(err, tasks.ErrTaken) {
		t.Errorf("it is taken after: %v", err)
	}
	asked = w.submit(t, bundle)
	if _, err := w.agent.Take(ctx, asked, "b"); err != nil {
		t.Fatal(err)
	}
	if err := w.agent.Refuse(ctx, asked, "a", "Client.NotPermitted", "no"); !errors.Is(err, tasks.ErrTaken) {
		t.Errorf("it is refused after it was taken: %v", err)
	}
}

// TestCancellingIsHeardOf: an agent that cancels says so until it has.
func TestCancellingIsHeardOf(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	mine, err := w.agent.Take(ctx, w.submit(t, bundle), "a")
	if err == nil {
		_, err = w.server.Cancel(ctx, mine)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.now = w.now.Add(time.Minute)
	now, err := w.agent.Update(ctx, mine, tasks.Status{State: tasks.Cancelling, Progress: 3})
	if err != nil || now.State != tasks.Cancelling || !now.Updated.Equal(w.now) {
		t.Errorf("%+v, %v", now.Status, err)
	}
}

// counted counts what a store is asked for.
type counted struct {
	upload.Store
	mu          sync.Mutex
	gets, lists int
}

func (c *counted) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	c.mu.Lock()
	c.gets++
	c.mu.Unlock()
	return c.Store.Get(ctx, key, o)
}

func (c *counted) List(ctx context.Context, prefix string) iter.Seq2[upload.Object, error] {
	c.lists++
	return c.Store.List(ctx, prefix)
}

// TestWatchIsCheap: a look that finds nothing new is one LIST, whatever lies there;
// what changes is seen.
func TestWatchIsCheap(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	store := &counted{Store: w.store}
	q := tasks.Open(tasks.Options{Store: store, Now: func() time.Time { return w.now }, Signers: w.signers()})
	watch := q.Watch("i-1")
	look := func(waiting, refused int) {
		t.Helper()
		l, bad, err := watch.Look(ctx)
		if err != nil || len(l) != waiting || len(bad) != refused {
			t.Fatalf("%d wait, %d refused, %v; want %d and %d", len(l), len(bad), err, waiting, refused)
		}
	}
	ended := w.submit(t, bundle)
	if _, err := w.server.Cancel(ctx, ended); err != nil {
		t.Fatal(err)
	}
	forged := w.submit(t, bundle)
	key := tasks.Prefix + "i-1/" + forged.ID
	if _, err := upload.PutBytes(ctx, w.store, key+"/request", []byte("{}"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	// Whoever may write the bucket puts a request without a status, forged or not.
	alone := tasks.Prefix + "i-1/bun-0123456789abcdef0/request"
	if _, err := upload.PutBytes(ctx, w.store, alone, []byte("{}"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	hidden := w.submit(t, bundle)
	at := tasks.Prefix + "i-1/" + hidden.ID + "/status"
	kept, _, err := upload.GetBytes(ctx, w.store, at, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Delete(ctx, at); err != nil {
		t.Fatal(err)
	}
	look(0, 2)
	store.gets, store.lists = 0, 0
	for range 5 {
		look(0, 0)
	}
	if store.gets != 0 || store.lists != 5 {
		t.Errorf("five looks are %d reads and %d lists", store.gets, store.lists)
	}
	// A status that comes is seen, and a request that is replaced.
	if _, err := upload.PutBytes(ctx, w.store, at, kept, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	look(1, 0)
	if err := w.store.Delete(ctx, at); err != nil {
		t.Fatal(err)
	}
	if _, err := upload.PutBytes(ctx, w.store, alone, []byte("{ }"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	look(0, 1)
	w.submit(t, bundle)
	look(1, 0)
	if _, err := upload.PutBytes(ctx, w.store, key+"/request", []byte("{ }"), upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	look(1, 1)
	// A status that is put back is seen.
	status, _, err := upload.GetBytes(ctx, w.store, key+"/status", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := upload.PutBytes(ctx, w.store, tasks.Prefix+"i-1/"+ended.ID+"/status", status, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	look(2, 0)
	if _, _, err := q.Watch("../i-1").Look(ctx); err == nil {
		t.Error("what is no instance is looked for")
	}
}

// TestListIsCheap: tasks that did not change are not read again, by a queue that lists
// them again; what changed is, and what is gone is gone.
func TestListIsCheap(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	store := &counted{Store: w.store}
	until := w.now.Add(time.Hour)
	q := tasks.Open(tasks.Options{Store: store, Now: func() time.Time { return w.now }, Signers: keys.NewAllowedSigners(keys.AllowedSigner{
		Principals: "i-*", Namespaces: tasks.Namespace, Key: w.signer.Public(), ValidBefore: until,
	})})
	var all []tasks.Task
	for i := range 40 {
		r := bundle
		r.Instance = fmt.Sprintf("i-%d", i)
		all = append(all, w.submit(t, r))
	}
	list := func(instance string, tasks, reads int) []tasks.Task {
		t.Helper()
		store.gets, store.lists = 0, 0
		l, err := q.List(ctx, instance)
		if err != nil || len(l) != tasks || store.gets != reads || store.lists != 1 {
			t.Fatalf("%d tasks by %d reads and %d lists (%v), want %d by %d", len(l), store.gets, store.lists, err, tasks, reads)
		}
		return l
	}
	list("i-3", 1, 2)
	list("", 40, 78)
	list("", 40, 0)
	if _, err := w.server.Cancel(ctx, all[7]); err != nil {
		t.Fatal(err)
	}
	if l := list("", 40, 2); !slices.ContainsFunc(l, func(x tasks.Task) bool { return x.ID == all[7].ID && x.State == tasks.Cancelled }) {
		t.Error("what was cancelled is not")
	}
	// What is given out can be changed by its etag.
	if _, err := w.agent.Take(ctx, list("i-9", 1, 0)[0], "agent"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"request", "status"} {
		if err := w.store.Delete(ctx, tasks.Prefix+"i-3/"+all[3].ID+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	list("", 39, 2)
	list("", 39, 0)
	w.now = until.Add(time.Second) // the signer is none any more
	list("", 0, 0)
}

// TestHalves: what a server that was killed began to submit is no task, and goes
// in time.
func TestHalves(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	whole, half := w.submit(t, bundle), w.submit(t, bundle)
	at := tasks.Prefix + "i-1/" + half.ID
	if err := w.store.Delete(ctx, at+"/request"); err != nil {
		t.Fatal(err)
	}
	put, err := w.store.Stat(ctx, at+"/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		at   time.Time
		left bool
	}{{put.Modified.Add(tasks.Keep - time.Minute), true}, {put.Modified.Add(tasks.Keep + time.Minute), false}} {
		w.now = c.at
		if _, err := w.server.Forget(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := w.store.Stat(ctx, at+"/status"); (err == nil) != c.left {
			t.Errorf("it is there: %v, want %t", err, c.left)
		}
	}
	if l, err := w.server.List(ctx, "i-1"); err != nil || len(l) > 1 || len(l) == 1 && l[0].ID != whole.ID {
		t.Errorf("%v, %v", l, err)
	}
}

// TestExpiresEarlier: a request may end before others do, not after.
func TestExpiresEarlier(t *testing.T) {
	w := newWorld(t)
	r := bundle
	r.Expires = w.now.Add(time.Minute)
	if got := w.submit(t, r); !got.Expires.Equal(w.now.Add(time.Minute)) {
		t.Errorf("it expires at %s", got.Expires)
	}
	r.Expires = w.now.Add(100 * tasks.Lifetime)
	if got := w.submit(t, r); !got.Expires.Equal(w.now.Add(tasks.Lifetime)) {
		t.Errorf("it expires at %s", got.Expires)
	}
	r.Expires = w.now.Add(-time.Minute)
	if _, err := w.server.Submit(t.Context(), r); !errors.Is(err, tasks.ErrRequest) {
		t.Errorf("one that has expired: %v", err)
	}
}
