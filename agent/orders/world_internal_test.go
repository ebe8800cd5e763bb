package orders

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// fakeAgent is an agent whose tasks end when the test says so.
type fakeAgent struct {
	mu      sync.Mutex
	tasks   map[string]*task.Task
	byToken map[string]string
	refuse  error
	auto    bool // tasks complete when they are looked at the second time
	looks   map[string]int
}

func newAgent() *fakeAgent {
	return &fakeAgent{tasks: map[string]*task.Task{}, byToken: map[string]string{}, looks: map[string]int{}}
}

func (a *fakeAgent) Start(_ context.Context, r task.Request) (task.Task, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refuse != nil {
		return task.Task{}, a.refuse
	}
	if err := r.Check(); err != nil {
		return task.Task{}, err
	}
	if id, ok := a.byToken[r.ClientToken]; ok {
		return *a.tasks[id], nil
	}
	t := &task.Task{ID: fmt.Sprintf("bun-%017x", len(a.tasks)+1), Request: r, State: task.Pending}
	a.tasks[t.ID], a.byToken[r.ClientToken] = t, t.ID
	return *t, nil
}

func (a *fakeAgent) Show(_ context.Context, id string) (task.Task, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tasks[id]
	if t == nil {
		return task.Task{}, task.ErrNotFound
	}
	if a.looks[id]++; a.auto && a.looks[id] > 1 && !t.State.Ended() {
		t.State, t.Result = task.Complete, &task.Result{Manifest: strings.Repeat("ab", 32)}
	}
	return *t, nil
}

func (a *fakeAgent) Cancel(_ context.Context, id string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if t := a.tasks[id]; t == nil {
		return task.ErrNotFound
	} else if !t.State.Ended() {
		t.State = task.Cancelling
	}
	return nil
}

// set changes the only task.
func (a *fakeAgent) set(t *testing.T, f func(*task.Task)) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.tasks) != 1 {
		t.Fatalf("the agent has %d tasks, want 1", len(a.tasks))
	}
	for _, x := range a.tasks {
		f(x)
	}
}

func (a *fakeAgent) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.tasks)
}

type world struct {
	t      testing.TB
	store  upload.Store
	signer keys.Signer
	now    time.Time
	server *tasks.Queue
	agent  *fakeAgent
	dir    string
	rules  Rules
	events []Event
}

func newWorld(t testing.TB) *world { return newWorldIn(t, t.TempDir()) }

func newWorldIn(t testing.TB, root string) *world {
	t.Helper()
	at := func(name string) string {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	store, err := upload.OpenDir(at("store"), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	signer, err := keys.WriteSigningKey(filepath.Join(root, "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: store, signer: signer, now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC), agent: newAgent(), dir: at("dir")}
	w.rules = Rules{BundleTo: []string{"images/web-*", "backup/i-1/"}, CreateImage: true, Store: "s3://images/fleet"}
	w.server = tasks.Open(tasks.Options{Store: store, Signer: signer, Now: w.clock})
	return w
}

func (w *world) clock() time.Time { return w.now }

// queue is the store's as agents see it.
func (w *world) queue(s upload.Store) *tasks.Queue {
	return tasks.Open(tasks.Options{Store: s, Now: w.clock, Signers: keys.NewAllowedSigners(keys.AllowedSigner{
		Principals: "i-*", Namespaces: tasks.Namespace, Key: w.signer.Public(),
	})})
}

// taker opens one over what was taken before.
func (w *world) taker(q *tasks.Queue, a Agent) *Taker {
	w.t.Helper()
	t, err := Open(Options{Queue: q, Instance: "i-1", Rules: w.rules, Agent: a, Dir: w.dir, Host: "web 1", Now: w.clock, Report: func(e Event) { w.events = append(w.events, e) }})
	if err != nil {
		w.t.Fatal(err)
	}
	return t
}

func (w *world) submit(r tasks.Request) tasks.Task {
	w.t.Helper()
	t, err := w.server.Submit(context.Background(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	return t
}

func (w *world) status(of tasks.Task) tasks.Status {
	w.t.Helper()
	t, err := w.server.Get(context.Background(), of.Instance, of.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	return t.Status
}

// steps has a taker look, after each time that passes.
func (w *world) steps(t *Taker, n int) {
	w.t.Helper()
	for range n {
		if _, err := t.step(context.Background()); err != nil {
			w.t.Fatal(err)
		}
		w.now = w.now.Add(DefaultInterval)
	}
}

// put writes what anybody can who may write the bucket.
func (w *world) put(of tasks.Task, object, data string) {
	w.t.Helper()
	if _, err := upload.PutBytes(context.Background(), w.store, tasks.Prefix+of.Instance+"/"+of.ID+"/"+object, []byte(data), upload.PutOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) get(of tasks.Task, object string) string {
	w.t.Helper()
	data, _, err := upload.GetBytes(context.Background(), w.store, tasks.Prefix+of.Instance+"/"+of.ID+"/"+object, 1<<20)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(data)
}
