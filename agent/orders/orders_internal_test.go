package orders

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

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
