package orders

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/test/loopfs"
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

var (
	bundle = tasks.Request{Kind: tasks.BundleInstance, Instance: "i-1", Account: "111122223333", Bucket: "images", Prefix: "web-1"}
	image  = tasks.Request{Kind: tasks.CreateImage, Instance: "i-1", Account: "111122223333", ImageID: "ami-0123456789abcdef0", Name: "i-1", Description: "of a\nmachine"}
)

// TestToTheEnd: a bundle and an image, one after the other, and what is said of
// them meanwhile.
func TestToTheEnd(t *testing.T) {
	w := newWorld(t)
	first := w.submit(bundle)
	w.now = w.now.Add(time.Second)
	second := w.submit(image)
	k := w.taker(w.queue(w.store), w.agent)
	w.steps(k, 1)
	if s := w.status(first); s.State != tasks.Bundling || !strings.HasPrefix(s.Agent, "web1/") {
		t.Errorf("the first is %+v", s)
	}
	if s := w.status(second); s.State != tasks.Pending {
		t.Errorf("the second is %s while the first goes on", s.State)
	}
	w.agent.set(t, func(x *task.Task) {
		if x.Request.Kind != task.Bundle || x.Request.Name != "web-1" || x.Request.Store != "images" || x.Request.ClientToken != "catalog:"+first.ID {
			t.Errorf("the agent is asked for %+v", x.Request)
		}
		x.State, x.Progress.Percent = task.Bundling, 40
	})
	w.steps(k, 1)
	if s := w.status(first); s.State != tasks.Bundling || s.Progress != 40 {
		t.Errorf("at 40%% it is %+v", s)
	}
	w.agent.set(t, func(x *task.Task) { x.State, x.Progress.Percent = task.Storing, 95 })
	w.steps(k, 1)
	if s := w.status(first); s.State != tasks.Storing || s.Progress != 95 {
		t.Errorf("at 95%% it is %+v", s)
	}
	w.agent.set(t, func(x *task.Task) { x.State, x.Result = task.Complete, &task.Result{Changed: true} })
	w.steps(k, 2)
	if s := w.status(first); s.State != tasks.Complete || s.Progress != 100 || s.Manifest != "images/web-1.manifest.xml" || s.Message == "" {
		t.Errorf("at the end it is %+v", s)
	}
	if s := w.status(second); s.State != tasks.Bundling {
		t.Errorf("then the second is %+v", s)
	}
	w.agent.auto = true
	w.steps(k, 2)
	if s := w.status(second); s.State != tasks.Complete || s.Manifest != "i-1@"+strings.Repeat("ab", 32) || s.Digest != strings.Repeat("ab", 32) {
		t.Errorf("the image is %+v", s)
	}
	for _, x := range w.agent.tasks {
		if r := x.Request; r.Kind == task.CreateImage && (r.Store != "s3://images/fleet" || r.Name != "i-1" || r.Description != "of a machine") {
			t.Errorf("the agent is asked for %+v", r)
		}
	}
	// What is remembered goes when nobody could put it back any more.
	w.now = w.now.Add(tasks.Lifetime + after)
	w.steps(k, 1)
	if left, err := os.ReadDir(w.dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

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

// TestTwoAgents: of two agents of one instance, each request is done by one.
func TestTwoAgents(t *testing.T) {
	w := newWorld(t)
	const n = 12
	var asked []tasks.Task
	for i := range n {
		r := bundle
		r.Prefix = fmt.Sprintf("web-%d", i)
		asked = append(asked, w.submit(r))
	}
	agents := []*fakeAgent{newAgent(), newAgent()}
	var wg sync.WaitGroup
	for _, a := range agents {
		a.auto = true
		k, err := Open(Options{Queue: w.queue(w.store), Instance: "i-1", Rules: w.rules, Agent: a, Dir: t.TempDir(), Now: w.clock})
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for range 4 * n {
				if _, err := k.step(context.Background()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if a, b := agents[0].count(), agents[1].count(); a+b != n {
		t.Errorf("they did %d and %d, want %d in all", a, b, n)
	}
	for _, a := range asked {
		if s := w.status(a); s.State != tasks.Complete {
			t.Errorf("%s is %+v", a.ID, s)
		}
	}
}

// TestSameDiskTwice: a machine that is a copy of another, with what that one
// remembers, does not take for its own what the other takes after.
func TestSameDiskTwice(t *testing.T) {
	w := newWorld(t)
	first := w.taker(w.queue(w.store), w.agent)
	asked := w.submit(bundle)
	w.steps(first, 1)
	other := newAgent()
	w.dir = t.TempDir()
	w.steps(w.taker(w.queue(w.store), other), 3)
	if other.count() != 0 || w.agent.count() != 1 || w.status(asked).State != tasks.Bundling {
		t.Errorf("the copy did %d, the other %d; %+v", other.count(), w.agent.count(), w.status(asked))
	}
}

func TestCancelled(t *testing.T) {
	w := newWorld(t)
	k := w.taker(w.queue(w.store), w.agent)
	early := w.submit(bundle)
	if _, err := w.server.Cancel(t.Context(), early); err != nil {
		t.Fatal(err)
	}
	w.steps(k, 1)
	if w.agent.count() != 0 {
		t.Fatal("what was cancelled before is begun")
	}
	asked := w.submit(bundle)
	w.steps(k, 2)
	if _, err := w.server.Cancel(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	w.steps(k, 1)
	w.agent.set(t, func(x *task.Task) {
		if x.State != task.Cancelling {
			t.Errorf("the agent's task is %s", x.State)
		}
		x.Progress.Percent = 50
	})
	w.steps(k, 1)
	if s := w.status(asked); s.State != tasks.Cancelling || s.Progress != 50 {
		t.Errorf("while it is cancelled: %+v", s)
	}
	w.agent.set(t, func(x *task.Task) { x.State = task.Cancelled })
	w.steps(k, 1)
	if s := w.status(asked); s.State != tasks.Cancelled || s.Code != "Client.Cancelled" {
		t.Errorf("at the end: %+v", s)
	}

	// An agent that was away while its task was cancelled does not begin it.
	w = newWorld(t)
	asked = w.submit(bundle)
	m := &mortal{Store: w.store, agent: w.agent}
	dead := w.taker(w.queue(m), m)
	m.at = -1
	w.agent.refuse = errors.New("away")
	if _, err := dead.step(t.Context()); err == nil {
		t.Fatal("an agent that is away took it")
	}
	if _, err := w.server.Cancel(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	w.agent.refuse = nil
	w.steps(w.taker(w.queue(w.store), w.agent), 1)
	if s := w.status(asked); s.State != tasks.Cancelled || w.agent.count() != 0 {
		t.Errorf("%+v, and the agent has %d tasks", s, w.agent.count())
	}
}

// TestGivenUp: a task that the servers gave up, or that others took by force, is
// ended here too.
func TestGivenUp(t *testing.T) {
	for name, give := range map[string]func(w *world, of tasks.Task){
		"lapsed": func(w *world, of tasks.Task) {
			w.now = w.now.Add(2 * tasks.Silence)
			now, err := w.server.Get(context.Background(), of.Instance, of.ID)
			if err == nil {
				now, err = w.server.Lapse(context.Background(), now)
			}
			if err != nil || now.State != tasks.Failed || now.Code != tasks.CodeSilent {
				w.t.Fatalf("%+v, %v", now.Status, err)
			}
		},
		"another's": func(w *world, of tasks.Task) {
			w.put(of, "status", `{"state":"bundling","agent":"somebody","updated":"2026-11-22T12:00:00Z"}`)
		},
		"removed": func(w *world, of tasks.Task) {
			if err := w.store.Delete(context.Background(), tasks.Prefix+"i-1/"+of.ID+"/request", tasks.Prefix+"i-1/"+of.ID+"/status"); err != nil {
				w.t.Fatal(err)
			}
		},
	} {
		w := newWorld(t)
		k := w.taker(w.queue(w.store), w.agent)
		asked := w.submit(bundle)
		w.steps(k, 1)
		give(w, asked)
		w.steps(k, 1)
		w.agent.set(t, func(x *task.Task) {
			if x.State != task.Cancelling {
				t.Errorf("%s: the agent's task is %s", name, x.State)
			}
		})
		if busy, err := k.step(t.Context()); busy || err != nil {
			t.Errorf("%s: something is still under way: %v", name, err)
		}
	}
}

// TestEnds: how tasks end is told, whatever the end is.
func TestEnds(t *testing.T) {
	for _, c := range []struct {
		how  func(a *fakeAgent, x *task.Task)
		want tasks.Status
	}{
		{func(_ *fakeAgent, x *task.Task) {
			x.State, x.Error = task.Failed, &task.Failure{Code: task.CodeCapture, Message: "no room\nin the store", Hint: "Make some."}
		}, tasks.Status{State: tasks.Failed, Code: "Server.CaptureFailed", Message: "no room in the store Make some."}},
		{func(a *fakeAgent, x *task.Task) { delete(a.tasks, x.ID) }, tasks.Status{State: tasks.Failed, Code: "Server.Interrupted", Message: "the instance's agent has forgotten the task"}},
		{func(_ *fakeAgent, x *task.Task) { x.State = task.Cancelled }, tasks.Status{State: tasks.Cancelled, Code: "Client.Cancelled", Message: "cancelled"}},
	} {
		w := newWorld(t)
		k := w.taker(w.queue(w.store), w.agent)
		asked := w.submit(image)
		w.steps(k, 1)
		w.agent.set(t, func(x *task.Task) { c.how(w.agent, x) })
		w.steps(k, 1)
		if s := w.status(asked); s.State != c.want.State || s.Code != c.want.Code || s.Message != c.want.Message {
			t.Errorf("%+v, want %+v", s, c.want)
		}
	}
	w := newWorld(t)
	w.agent.refuse = fmt.Errorf("%w: no", ErrRefused)
	asked := w.submit(image)
	w.steps(w.taker(w.queue(w.store), w.agent), 1)
	if s := w.status(asked); s.State != tasks.Failed || s.Code != task.CodeLaunch {
		t.Errorf("refused by the agent: %+v", s)
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

// TestPutBack: a request that was done is not done again, put back with the status
// it once had; not by the agent that did it, nor by the next one over its files.
func TestPutBack(t *testing.T) {
	w := newWorld(t)
	w.agent.auto = true
	asked := w.submit(bundle)
	pending := w.get(asked, "status")
	k := w.taker(w.queue(w.store), w.agent)
	w.steps(k, 4)
	if s := w.status(asked); s.State != tasks.Complete {
		t.Fatalf("it is %+v", s)
	}
	for range 2 {
		w.events = nil
		w.put(asked, "status", pending)
		w.steps(k, 3)
		if w.agent.count() != 1 || w.status(asked).State != tasks.Pending {
			t.Errorf("put back it is %+v, and the agent has %d tasks", w.status(asked), w.agent.count())
		}
		if len(w.events) != 1 || w.events[0].Order != asked.ID || w.events[0].Err == nil {
			t.Errorf("told was %v", w.events)
		}
		k = w.taker(w.queue(w.store), w.agent)
	}
}

// TestHostile: what is not allowed is refused and told in the store; what is not
// the server's word is told here alone; nothing reaches the agent.
func TestHostile(t *testing.T) {
	with := func(f func(*tasks.Request)) tasks.Request {
		r := bundle
		f(&r)
		return r
	}
	for name, c := range map[string]struct {
		r    tasks.Request
		code string
	}{
		"another bucket":       {with(func(r *tasks.Request) { r.Bucket = "other" }), CodeNotPermitted},
		"another prefix":       {with(func(r *tasks.Request) { r.Prefix = "db-1" }), CodeNotPermitted},
		"a folder more":        {with(func(r *tasks.Request) { r.Prefix = "web-1/x" }), CodeNotPermitted},
		"upwards":              {with(func(r *tasks.Request) { r.Prefix = "web-1/../../etc" }), CodeRequest},
		"absolute":             {with(func(r *tasks.Request) { r.Prefix = "/etc/web-1" }), CodeRequest},
		"no name":              {with(func(r *tasks.Request) { r.Prefix = "web-1/" }), CodeRequest},
		"an option":            {with(func(r *tasks.Request) { r.Prefix = "--volume=x" }), CodeRequest},
		"a line break":         {with(func(r *tasks.Request) { r.Prefix = "web-1\nx" }), CodeRequest},
		"long":                 {with(func(r *tasks.Request) { r.Prefix = "web-" + strings.Repeat("x", 20000) }), CodeRequest},
		"a bucket that is up":  {with(func(r *tasks.Request) { r.Bucket = ".." }), CodeRequest},
		"a bucket with dots":   {with(func(r *tasks.Request) { r.Bucket = "a..b" }), CodeRequest},
		"a URL":                {with(func(r *tasks.Request) { r.Bucket = "file:" }), CodeRequest},
		"another's name":       {tasks.Request{Kind: tasks.CreateImage, Instance: "i-1", ImageID: "ami-1", Name: "db"}, CodeNotPermitted},
		"another account":      {with(func(r *tasks.Request) { r.Account = "999999999999" }), CodeNotPermitted},
		"words without an end": {with(func(r *tasks.Request) { r.Bucket, r.Prefix = "backup", "i-1/"+strings.Repeat("a/", 300)+"w" }), CodeRequest},
	} {
		w := newWorld(t)
		w.rules.Accounts = []string{"111122223333"}
		if c.r.Account == "" {
			c.r.Account = "111122223333"
		}
		asked := w.submit(c.r)
		w.now = w.now.Add(time.Second)
		good := w.submit(bundle)
		w.steps(w.taker(w.queue(w.store), w.agent), 2)
		if s := w.status(asked); s.State != tasks.Failed || s.Code != c.code || s.Message == "" {
			t.Errorf("%s: %+v, want %s", name, s, c.code)
		}
		if s := w.status(good); s.State != tasks.Bundling || w.agent.count() != 1 {
			t.Errorf("%s: the request after it is %+v", name, s)
		}
	}

	w := newWorld(t)
	other, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	stranger := tasks.Open(tasks.Options{Store: w.store, Signer: other, Now: w.clock})
	strange, err := stranger.Submit(t.Context(), bundle)
	if err != nil {
		t.Fatal(err)
	}
	changed, huge, moved := w.submit(bundle), w.submit(bundle), w.submit(tasks.Request{Kind: tasks.BundleInstance, Instance: "i-2", Bucket: "images", Prefix: "web-1"})
	w.put(changed, "request", strings.Replace(w.get(changed, "request"), `"web-1"`, `"web-2"`, 1))
	w.put(huge, "request", strings.Repeat("x", 1<<20))
	here := moved
	here.Instance = "i-1"
	w.put(here, "request", w.get(moved, "request"))
	w.put(here, "status", w.get(moved, "status"))
	w.steps(w.taker(w.queue(w.store), w.agent), 3)
	if w.agent.count() != 0 {
		t.Errorf("the agent has %d tasks", w.agent.count())
	}
	if len(w.events) != 4 { // each once, however often it is looked
		t.Errorf("told was %v", w.events)
	}
	for _, x := range []tasks.Task{strange, changed, huge, moved, here} {
		if s := w.get(x, "status"); !strings.Contains(s, `"pending"`) {
			t.Errorf("the status of what nobody signed was changed: %s", s)
		}
	}
}

// TestRulesAreChecked: what lets nothing, or cannot be meant, is told at once.
func TestRulesAreChecked(t *testing.T) {
	for _, r := range []Rules{
		{},
		{BundleTo: []string{"images"}},
		{BundleTo: []string{"/images/x"}},
		{BundleTo: []string{"images/[x"}},
		{BundleTo: []string{"images/*/"}},
		{CreateImage: true, Accounts: []string{"me"}},
	} {
		if r.Check() == nil {
			t.Errorf("%+v is taken", r)
		}
	}
}

// FuzzBundle: wherever a bundle is let go to, it is a place that the rules allow, by
// a plain name of a bucket and a path that goes only down.
func FuzzBundle(f *testing.F) {
	for _, s := range [][2]string{{"images", "web-1"}, {"backup", "i-1/a/b"}, {"..", "web-1"}, {"images", "../web-1"}, {"backup", "i-1//x"}, {"file:", "/x"}, {"images", "web-1\x00"}} {
		f.Add(s[0], s[1])
	}
	rules := Rules{BundleTo: []string{"images/web-*", "backup/i-1/", "*/any"}, Volume: "/srv"}
	f.Fuzz(func(t *testing.T, to, prefix string) {
		r, err := rules.Request(&tasks.Request{Kind: tasks.BundleInstance, ID: "bun-00000000000000000", Instance: "i-1", Bucket: to, Prefix: prefix})
		if err != nil {
			return
		}
		place := r.Store + "/" + r.Name
		if place != to+"/"+prefix || upload.CheckKey(place) != nil || strings.ContainsAny(place, ":\\\x00\n ") || strings.HasPrefix(place, "-") || strings.HasPrefix(place, ".") {
			t.Errorf("%q and %q give %q", to, prefix, place)
		}
		if b, p, err := upload.SplitLocation(r.Store); err != nil || b != to || p+"/"+r.Name != prefix && r.Name != prefix {
			t.Errorf("%q is read as %q and %q: %v", r.Store, b, p, err)
		}
		if !strings.HasPrefix(place, "images/web-") && !strings.HasPrefix(place, "backup/i-1/") && strings.Count(place, "/") != 1 {
			t.Errorf("%q is allowed", place)
		}
		if r.Volume != "/srv" || r.Kind != task.Bundle || r.Replace {
			t.Errorf("%+v", r)
		}
	})
}

// TestWait: while something is under way, what fails is tried again long before the
// server takes the agent for silent, however long the interval is.
func TestWait(t *testing.T) {
	w := newWorld(t)
	k := w.taker(w.queue(w.store), w.agent)
	k.o.Interval = MaxInterval
	fault := errors.New("the store is away")
	between := func(name string, busy bool, err error, least, most time.Duration) {
		t.Helper()
		for range 100 {
			if got := k.wait(busy, err); got < least || got > most {
				t.Fatalf("%s: %s, want %s to %s", name, got, least, most)
			}
		}
	}
	between("idle", false, nil, 48*time.Minute, 72*time.Minute)
	between("idle, after an error", false, fault, 48*time.Minute, 72*time.Minute)
	w.submit(bundle)
	w.steps(k, 1)
	between("under way", true, nil, look, look)
	between("under way, after an error", true, fault, look, time.Minute)
	between("under way, after an error before that is known", false, fault, look, time.Minute)
	k.o.Interval = MinInterval
	between("a short interval", true, fault, 800*time.Millisecond, 1200*time.Millisecond)
	between("a short interval, under way", true, nil, MinInterval, MinInterval)
}

// TestRun: it looks by itself, and ends with its context.
func TestRun(t *testing.T) {
	w := newWorld(t)
	w.now = time.Now()
	w.agent.auto = true
	k, err := Open(Options{
		Queue:    tasks.Open(tasks.Options{Store: w.store, Signers: keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: w.signer.Public()})}),
		Instance: "i-1", Rules: w.rules, Agent: w.agent, Dir: w.dir, Interval: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	asked := w.submit(bundle)
	for deadline := time.Now().Add(time.Minute); w.status(asked).State != tasks.Complete; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is not taken")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
