package tasks_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

type world struct {
	store  upload.Store
	signer keys.Signer
	now    time.Time
	server *tasks.Queue
	agent  *tasks.Queue
}

func newWorld(t *testing.T) *world {
	t.Helper()
	store, err := upload.OpenDir(t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	signer, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{store: store, signer: signer, now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}
	clock := func() time.Time { return w.now }
	w.server = tasks.Open(tasks.Options{Store: store, Signer: signer, Now: clock})
	w.agent = tasks.Open(tasks.Options{Store: store, Now: clock, Signers: w.signers()})
	return w
}

// signers are whom agents obey.
func (w *world) signers() *keys.AllowedSigners {
	return keys.NewAllowedSigners(keys.AllowedSigner{Principals: "i-*", Namespaces: tasks.Namespace, Key: w.signer.Public()})
}

var bundle = tasks.Request{Kind: tasks.BundleInstance, Instance: "i-1", Account: "111122223333", Bucket: "b", Prefix: "p"}

func (w *world) submit(t *testing.T, r tasks.Request) tasks.Task {
	t.Helper()
	task, err := w.server.Submit(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func (w *world) waiting(t *testing.T, instance string) ([]tasks.Task, []error) {
	t.Helper()
	l, refused, err := w.agent.Waiting(t.Context(), instance)
	if err != nil {
		t.Fatal(err)
	}
	return l, refused
}

func TestTaskRunsToItsEnd(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	asked := w.submit(t, bundle)
	if l, _ := w.waiting(t, "i-2"); len(l) != 0 {
		t.Errorf("another instance's agent sees %v", l)
	}
	l, refused := w.waiting(t, "i-1")
	if len(l) != 1 || len(refused) != 0 || l[0].Request != asked.Request {
		t.Fatalf("waiting are %v, refused %v, want %v", l, refused, asked)
	}
	mine, err := w.agent.Take(ctx, l[0], "agent-1")
	if err != nil || mine.State != tasks.Bundling {
		t.Fatalf("taken: %v, %v", mine, err)
	}
	if _, err := w.agent.Take(ctx, l[0], "agent-2"); !errors.Is(err, tasks.ErrTaken) {
		t.Errorf("taking it again: %v, want ErrTaken", err)
	}
	if l, _ := w.waiting(t, "i-1"); len(l) != 0 {
		t.Errorf("a taken task waits: %v", l)
	}
	if mine, err = w.agent.Update(ctx, mine, tasks.Status{State: tasks.Storing, Progress: 70}); err != nil {
		t.Fatal(err)
	}
	if mine, err = w.agent.Update(ctx, mine, tasks.Status{State: tasks.Complete, Progress: 100, Manifest: "b/p.manifest.xml"}); err != nil {
		t.Fatal(err)
	}
	got, err := w.server.Get(ctx, "i-1", asked.ID)
	if err != nil || got.State != tasks.Complete || got.Manifest != "b/p.manifest.xml" || got.Agent != "agent-1" || got.Started.IsZero() {
		t.Errorf("the server sees %+v, %v", got, err)
	}
	if _, err := w.server.Cancel(ctx, got); !errors.Is(err, tasks.ErrEnded) {
		t.Errorf("cancelling what is complete: %v, want ErrEnded", err)
	}
	if _, err := w.agent.Update(ctx, mine, tasks.Status{State: tasks.Bundling}); !errors.Is(err, tasks.ErrEnded) {
		t.Errorf("updating what is complete: %v, want ErrEnded", err)
	}
}

func TestCancel(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	early := w.submit(t, bundle)
	if c, err := w.server.Cancel(ctx, early); err != nil || c.State != tasks.Cancelled {
		t.Errorf("cancelling a pending task: %v, %v", c.State, err)
	}
	if _, err := w.agent.Take(ctx, early, "a"); !errors.Is(err, tasks.ErrTaken) {
		t.Errorf("taking a cancelled task: %v, want ErrTaken", err)
	}
	late, err := w.agent.Take(ctx, w.submit(t, bundle), "a")
	if err != nil {
		t.Fatal(err)
	}
	if c, err := w.server.Cancel(ctx, late); err != nil || c.State != tasks.Cancelling {
		t.Errorf("cancelling a running task: %v, %v", c.State, err)
	}
	if _, err := w.agent.Update(ctx, late, tasks.Status{State: tasks.Storing}); !errors.Is(err, tasks.ErrCancel) {
		t.Errorf("the agent hears %v, want ErrCancel", err)
	}
	if c, err := w.agent.Update(ctx, late, tasks.Status{State: tasks.Cancelled}); err != nil || c.State != tasks.Cancelled {
		t.Errorf("the agent's last word: %v, %v", c.State, err)
	}
}

func TestOneAgentTakesIt(t *testing.T) {
	w := newWorld(t)
	task := w.submit(t, bundle)
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := 0
	for n := range 16 {
		wg.Go(func() {
			if _, err := w.agent.Take(context.Background(), task, fmt.Sprint("agent-", n)); err == nil {
				mu.Lock()
				defer mu.Unlock()
				got++
			} else if !errors.Is(err, tasks.ErrTaken) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got != 1 {
		t.Errorf("%d agents have the task, want 1", got)
	}
}

// TestForged changes every byte of a request, moves it, and lets it be old: no
// agent follows it.
func TestForged(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	task := w.submit(t, bundle)
	key := tasks.Prefix + "i-1/" + task.ID + "/request"
	object, _, err := upload.GetBytes(ctx, w.store, key, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string, data []byte) {
		t.Helper()
		if _, err := upload.PutBytes(ctx, w.store, key, data, upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range object {
		bad := bytes.Clone(object)
		bad[i] ^= 1
		put(key, bad)
		if l, refused := w.waiting(t, "i-1"); len(l) != 0 || len(refused) != 1 {
			t.Fatalf("byte %d changed: %d followed, %d refused", i, len(l), len(refused))
		}
	}
	put(key, object)
	if l, _ := w.waiting(t, "i-1"); len(l) != 1 {
		t.Fatal("the request itself is not followed")
	}
	status, _, err := upload.GetBytes(ctx, w.store, tasks.Prefix+"i-1/"+task.ID+"/status", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, place := range []string{"i-2/" + task.ID, "i-1/bun-00000000000000000"} {
		put(tasks.Prefix+place+"/request", object)
		put(tasks.Prefix+place+"/status", status)
	}
	if l, _ := w.waiting(t, "i-2"); len(l) != 0 {
		t.Error("a request for i-1 is followed by i-2")
	}
	if l, refused := w.waiting(t, "i-1"); len(l) != 1 || len(refused) != 1 {
		t.Errorf("%d followed, %d refused; want the one in its own place", len(l), len(refused))
	}
	w.now = w.now.Add(tasks.Lifetime)
	if l, _ := w.waiting(t, "i-1"); len(l) != 0 {
		t.Error("an expired request is followed")
	}
	if _, err := w.agent.Take(ctx, task, "a"); !errors.Is(err, tasks.ErrTaken) {
		t.Errorf("taking an expired task: %v, want ErrTaken", err)
	}
	other, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	stranger := tasks.Open(tasks.Options{Store: w.store, Signer: other, Now: func() time.Time { return w.now }})
	if _, err := stranger.Submit(ctx, tasks.Request{Kind: tasks.BundleInstance, Instance: "i-3", Bucket: "b", Prefix: "p"}); err != nil {
		t.Fatal(err)
	}
	if l, refused := w.waiting(t, "i-3"); len(l) != 0 || len(refused) != 1 || !errors.Is(refused[0], keys.ErrUntrusted) {
		t.Errorf("a stranger's request: %v, %v", l, refused)
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	w := newWorld(t)
	for _, r := range []tasks.Request{
		{},
		{Kind: "reboot", Instance: "i-1"},
		{Kind: tasks.BundleInstance, Instance: "i-1", Bucket: "b"},
		{Kind: tasks.BundleInstance, Instance: "../x", Bucket: "b", Prefix: "p"},
		{Kind: tasks.BundleInstance, Instance: "i..1", Bucket: "b", Prefix: "p"},
		{Kind: tasks.BundleInstance, Instance: "i-1", Bucket: "b/c", Prefix: "p"},
		{Kind: tasks.CreateImage, Instance: "i-1", Name: "n"},
	} {
		if _, err := w.server.Submit(t.Context(), r); !errors.Is(err, tasks.ErrRequest) {
			t.Errorf("%+v: %v, want ErrRequest", r, err)
		}
	}
}

// TestBrokenStatus: whoever may write the bucket puts nonsense in the place of a
// status. The other tasks go on, and the one is forgotten at its time.
func TestBrokenStatus(t *testing.T) {
	for name, status := range map[string]string{
		"no JSON": "{", "no state": "{}", "a state nobody knows": `{"state":"asleep"}`, "too large": `{"state":"pending"}` + strings.Repeat(" ", 1<<17),
	} {
		w, ctx := newWorld(t), t.Context()
		bad := w.submit(t, bundle)
		good := w.submit(t, bundle)
		if _, err := upload.PutBytes(ctx, w.store, tasks.Prefix+"i-1/"+bad.ID+"/status", []byte(status), upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		if l, err := w.server.List(ctx, ""); err != nil || len(l) != 1 || l[0].ID != good.ID {
			t.Errorf("%s: listed are %v, %v", name, l, err)
		}
		if l, refused := w.waiting(t, "i-1"); len(l) != 1 || len(refused) != 1 || !errors.Is(refused[0], tasks.ErrStatus) {
			t.Errorf("%s: %d wait, refused %v", name, len(l), refused)
		}
		w.now = w.now.Add(tasks.Keep + tasks.Lifetime)
		if n, err := w.server.Forget(ctx); n != 2 || err != nil {
			t.Errorf("%s: %d forgotten, %v", name, n, err)
		}
	}
	w, ctx := newWorld(t), t.Context()
	task := w.submit(t, bundle)
	for code, want := range map[string]string{"Server.Full": "Server.Full", "two words": "", strings.Repeat("a", 65): ""} {
		if _, err := upload.PutBytes(ctx, w.store, tasks.Prefix+"i-1/"+task.ID+"/status", fmt.Appendf(nil, `{"state":"failed","code":%q}`, code), upload.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		if got, err := w.server.Get(ctx, "i-1", task.ID); err != nil || got.Code != want {
			t.Errorf("the code %q is %q, %v", code, got.Code, err)
		}
	}
}

func TestForget(t *testing.T) {
	w, ctx := newWorld(t), t.Context()
	ended := w.submit(t, bundle)
	if _, err := w.server.Cancel(ctx, ended); err != nil {
		t.Fatal(err)
	}
	w.submit(t, bundle)
	for _, step := range []struct {
		pass time.Duration
		want int
	}{{tasks.Keep - time.Hour, 2}, {time.Hour, 1}, {tasks.Lifetime, 0}} {
		w.now = w.now.Add(step.pass)
		if _, err := w.server.Forget(ctx); err != nil {
			t.Fatal(err)
		}
		l, err := w.server.List(ctx, "")
		if err != nil || len(l) != step.want {
			t.Errorf("%d tasks are left, want %d (%v)", len(l), step.want, err)
		}
	}
}
