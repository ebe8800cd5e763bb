// Package orders takes what a catalog asks of this machine, bundles and images of
// it, and has the machine's agent do it.
//
// In go a queue of signed requests in a store, the machine's own rules, and an
// agent. Out come the agent's tasks, one at a time, and what becomes of them, told
// in the store. The package touches a directory in which it remembers what it
// took, the objects of its instance in the queue, and the agent.
//
// A request is done at most once, whoever is killed when: it is written down
// before it is taken and remembered until it has long expired, and it is taken
// under a name that was never used before, so that of several agents of one
// instance only the one that took it knows itself to be it.
package orders

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// Agent does tasks. Errors of Start that wrap [ErrRefused] are its last word; a
// task that Show or Cancel do not know is [task.ErrNotFound].
type Agent interface {
	// Start starts a task, or finds the one with the same client token.
	Start(ctx context.Context, r task.Request) (task.Task, error)
	Show(ctx context.Context, id string) (task.Task, error)
	// Cancel ends a task. That it has ended is no error.
	Cancel(ctx context.Context, id string) error
}

// ErrRefused says that an agent will not start a task, however often it is asked.
var ErrRefused = errors.New("the agent refuses the task")

// Bounds of the time between two looks for requests.
const (
	DefaultInterval = 30 * time.Second
	MinInterval     = time.Second
	MaxInterval     = time.Hour
)

// Options say what to take. Queue, Instance, Agent and Dir are required.
type Options struct {
	Queue    *tasks.Queue // that verifies requests
	Instance string
	Rules    Rules
	Agent    Agent
	// Dir is where it is remembered what was taken. Nobody else uses it.
	Dir string
	// Host is what the agent calls itself in the store, beside what makes each
	// taking another.
	Host string
	// Interval is between two looks while there is nothing to do, a fifth more
	// or less by chance; default DefaultInterval.
	Interval time.Duration
	// Report is told what happens; nil for nobody.
	Report func(Event)
	// Now is the clock; default time.Now.
	Now func() time.Time
}

// Event is something worth a line in a log.
type Event struct {
	Order string // the task's id in the catalog; "" for what concerns all
	Task  string // the agent's; "" if there is none
	Text  string
	Err   error // what went wrong; nil for news that are good
}

// Taker takes requests.
type Taker struct {
	o       Options
	journal journal
	watch   *tasks.Watch
	records map[string]*record

	said    map[string]saying // of requests under way
	told    map[string]bool   // what was reported of requests and will not be again
	trouble string            // likewise, of everything
}

// saying is what was said of a task last, and when.
type saying struct {
	tasks.Status
	at time.Time
}

// Open reads what was taken before.
func Open(o Options) (*Taker, error) {
	if !tasks.ValidInstance(o.Instance) {
		return nil, fmt.Errorf("taking a catalog's tasks: %q is no instance's id", o.Instance)
	}
	if err := o.Rules.Check(); err != nil {
		return nil, err
	}
	if o.Interval == 0 {
		o.Interval = DefaultInterval
	}
	if o.Interval < MinInterval || o.Interval > MaxInterval {
		return nil, fmt.Errorf("taking a catalog's tasks: an interval of %s: %s to %s", o.Interval, MinInterval, MaxInterval)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Report == nil {
		o.Report = func(Event) {}
	}
	j, err := openJournal(o.Dir)
	if err != nil {
		return nil, err
	}
	t := &Taker{o: o, journal: j, watch: o.Queue.Watch(o.Instance), said: make(map[string]saying), told: make(map[string]bool)}
	t.records, err = j.load()
	return t, err
}

// Times of a Taker's own.
const (
	look  = 2 * time.Second // between looks at a task under way, unless the interval is shorter
	again = time.Minute     // at most, until what failed of a task under way is tried again
	limit = 2 * time.Minute // for all that one step asks of the store and the agent
	after = 24 * time.Hour  // that a request is remembered after it has expired
)

// Run takes requests until ctx ends, and returns nil then. What it cannot do it
// tries again.
func (t *Taker) Run(ctx context.Context) error {
	for {
		busy, err := t.step(ctx)
		if ctx.Err() != nil {
			return nil
		}
		t.complain(err)
		wait := t.wait(busy, err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// wait is how long until the next step. While something is under way an error makes
// it no longer than a minute: the server would take the agent for silent.
func (t *Taker) wait(busy bool, err error) time.Duration {
	if busy && err == nil {
		return min(look, t.o.Interval)
	}
	wait := t.o.Interval*4/5 + mathrand.N(t.o.Interval*2/5)
	if busy || len(t.underWay()) > 0 {
		wait = min(wait, again)
	}
	return wait
}

// complain reports what goes wrong, once until it is something else.
func (t *Taker) complain(err error) {
	switch {
	case err == nil && t.trouble != "":
		t.trouble = ""
		t.o.Report(Event{Text: "the catalog's tasks can be seen to again"})
	case err != nil && err.Error() != t.trouble:
		t.trouble = err.Error()
		t.o.Report(Event{Text: "this is tried again", Err: err})
	}
}

// once reports something about a request, once.
func (t *Taker) once(e Event) {
	key := e.Order + " " + e.Text
	if e.Err != nil {
		key += e.Err.Error()
	}
	if len(t.told) >= 10000 { // whoever writes the bucket may have us complain without end
		clear(t.told)
	}
	if !t.told[key] {
		t.told[key] = true
		t.o.Report(e)
	}
}

// step sees to what was taken and, if nothing is under way, takes the next. busy
// says that something is under way.
func (t *Taker) step(ctx context.Context) (busy bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, r := range t.underWay() {
		if err := t.advance(ctx, r); err != nil {
			return true, err
		}
	}
	if err := t.forget(); err != nil {
		return false, err
	}
	if len(t.underWay()) == 0 {
		if err := t.next(ctx); err != nil {
			return false, err
		}
	}
	return len(t.underWay()) > 0, nil
}

// underWay are the requests that are not done with, oldest first.
func (t *Taker) underWay() []*record {
	var all []*record
	for _, r := range t.records {
		if r.Stage != told {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b *record) int { return a.Order.Created.Compare(b.Order.Created) })
	return all
}

// forget forgets requests that no one follows any more.
func (t *Taker) forget() error {
	for id, r := range t.records {
		if r.Stage == told && t.o.Now().Sub(r.Order.Expires) > after {
			if err := t.journal.remove(id); err != nil {
				return err
			}
			delete(t.records, id)
		}
	}
	return nil
}

// next takes the oldest request that waits and is allowed, and refuses those before
// it that are not.
func (t *Taker) next(ctx context.Context) error {
	waiting, refused, err := t.watch.Look(ctx)
	for _, err := range refused {
		t.once(Event{Text: "not followed", Err: err})
	}
	if err != nil {
		return err
	}
	for _, w := range waiting {
		if r := t.records[w.ID]; r != nil {
			t.once(Event{Order: w.ID, Task: r.Task, Text: "not followed", Err: errors.New("it was taken before, and somebody put it back")})
			continue
		}
		name, err := t.name()
		if err != nil {
			return err
		}
		request, err := t.o.Rules.Request(&w.Request)
		if no := (*refusal)(nil); errors.As(err, &no) {
			err := t.o.Queue.Refuse(ctx, w, name, no.code, no.message)
			if err != nil && !errors.Is(err, tasks.ErrTaken) {
				return err
			}
			t.once(Event{Order: w.ID, Text: fmt.Sprintf("refused to account %s", w.Account), Err: no})
			continue
		} else if err != nil {
			return err
		}
		r := &record{Version: 1, Order: w.Request, Agent: name, Request: request, Stage: taking}
		if err := t.save(r); err != nil {
			return err
		}
		if err := t.advance(ctx, r); err != nil || t.records[w.ID] != nil {
			return err
		}
	}
	return nil
}

var hostName = regexp.MustCompile(`[^A-Za-z0-9.-]`)

// name is what a task is taken by, never used before.
func (t *Taker) name() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("taking a task: %w", err)
	}
	host := hostName.ReplaceAllString(t.o.Host, "")
	return host[:min(len(host), 64)] + "/" + hex.EncodeToString(b[:]), nil
}

func (t *Taker) save(r *record) error {
	if err := t.journal.save(r); err != nil {
		return err
	}
	t.records[r.Order.ID] = r
	return nil
}

// to puts a request's next stage on disk; only then it counts.
func (t *Taker) to(r *record, change func(*record)) error {
	next := *r
	change(&next)
	if err := t.journal.save(&next); err != nil {
		return err
	}
	*r = next
	return nil
}

// drop forgets a request that was not taken.
func (t *Taker) drop(r *record) error {
	delete(t.records, r.Order.ID)
	return t.journal.remove(r.Order.ID)
}

// advance does what is to be done next for a request.
func (t *Taker) advance(ctx context.Context, r *record) error {
	if r.Stage == taking {
		if err := t.take(ctx, r); err != nil || r.Stage == taking {
			return err
		}
	}
	if r.Stage == taken && r.Task == "" {
		if err := t.start(ctx, r); err != nil {
			return err
		}
	}
	if r.Stage == taken {
		if err := t.follow(ctx, r); err != nil {
			return err
		}
	}
	if r.Stage == ended {
		return t.tell(ctx, r)
	}
	return nil
}

// take makes a request this agent's, or finds out that it is, or is not.
func (t *Taker) take(ctx context.Context, r *record) error {
	now, err := t.o.Queue.Get(ctx, t.o.Instance, r.Order.ID)
	switch {
	case errors.Is(err, tasks.ErrNotFound), errors.Is(err, tasks.ErrRequest), errors.Is(err, tasks.ErrStatus):
		return t.drop(r)
	case err != nil:
		return err
	case now.Agent == r.Agent && now.State.Ended():
		return t.to(r, func(r *record) { r.Stage = told })
	case now.Agent == r.Agent: // the answer was lost, or this agent was killed
		return t.to(r, func(r *record) { r.Stage = taken })
	case now.State != tasks.Pending || !t.o.Now().Before(now.Expires):
		return t.drop(r)
	}
	if _, err := t.o.Queue.Take(ctx, now, r.Agent); err != nil {
		if errors.Is(err, tasks.ErrTaken) {
			return nil // whose it is now is looked at next time
		}
		return err
	}
	if err := t.to(r, func(r *record) { r.Stage = taken }); err != nil {
		return err
	}
	t.said[r.Order.ID] = saying{tasks.Status{State: tasks.Bundling}, t.o.Now()}
	return nil
}

// start gives the agent its task.
func (t *Taker) start(ctx context.Context, r *record) error {
	if _, fresh := t.said[r.Order.ID]; !fresh { // it was taken long ago, maybe, by this agent before it was killed
		_, err := t.o.Queue.Update(ctx, r.order(), tasks.Status{State: tasks.Bundling})
		switch {
		case gone(err):
			return t.to(r, func(r *record) { r.Stage = told })
		case errors.Is(err, tasks.ErrCancel):
			return t.to(r, func(r *record) {
				r.Stage, r.Last = ended, &tasks.Status{State: tasks.Cancelled, Code: task.CodeCancelled, Message: "cancelled before it began"}
			})
		case err != nil && !errors.Is(err, tasks.ErrStatus):
			return err
		}
	}
	made, err := t.o.Agent.Start(ctx, r.Request)
	if errors.Is(err, ErrRefused) {
		t.o.Report(Event{Order: r.Order.ID, Text: "not begun", Err: err})
		return t.to(r, func(r *record) {
			r.Stage, r.Last = ended, &tasks.Status{State: tasks.Failed, Code: task.CodeLaunch, Message: err.Error()}
		})
	}
	if err != nil {
		return fmt.Errorf("giving the agent the catalog's task %s: %w", r.Order.ID, err)
	}
	if err := t.to(r, func(r *record) { r.Task = made.ID }); err != nil {
		return err
	}
	t.o.Report(Event{Order: r.Order.ID, Task: made.ID, Text: fmt.Sprintf("taken: %s for account %s", r.Order.Kind, r.Order.Account)})
	return nil
}

// order is a request as the queue knows it.
func (r *record) order() tasks.Task {
	return tasks.Task{Request: r.Order, Status: tasks.Status{Agent: r.Agent}}
}

// follow says how the agent's task goes, and hears whether it is to go on.
func (t *Taker) follow(ctx context.Context, r *record) error {
	now, err := t.o.Agent.Show(ctx, r.Task)
	if errors.Is(err, task.ErrNotFound) {
		return t.to(r, func(r *record) {
			r.Stage, r.Last = ended, &tasks.Status{State: tasks.Failed, Code: task.CodeInterrupted, Message: "the instance's agent has forgotten the task"}
		})
	}
	if err != nil {
		return fmt.Errorf("asking the agent for task %s: %w", r.Task, err)
	}
	if now.State.Ended() {
		return t.to(r, func(r *record) { r.Stage, r.Last = ended, last(&r.Order, &now) })
	}
	before := t.said[r.Order.ID]
	s := tasks.Status{State: tasks.Bundling, Progress: now.Progress.Percent}
	switch {
	case before.State == tasks.Cancelling:
		s.State = tasks.Cancelling
	case now.State == task.Storing:
		s.State = tasks.Storing
	}
	if s.State == before.State && t.o.Now().Sub(before.at) < min(t.o.Interval, tasks.Beat) {
		return nil
	}
	_, err = t.o.Queue.Update(ctx, r.order(), s)
	switch {
	case errors.Is(err, tasks.ErrCancel):
		if err := t.o.Agent.Cancel(ctx, r.Task); err != nil {
			return fmt.Errorf("cancelling task %s: %w", r.Task, err)
		}
		s.State = tasks.Cancelling
		t.o.Report(Event{Order: r.Order.ID, Task: r.Task, Text: "is to be cancelled"})
	case gone(err):
		if cerr := t.o.Agent.Cancel(ctx, r.Task); cerr != nil && !errors.Is(cerr, task.ErrNotFound) {
			return fmt.Errorf("cancelling task %s: %w", r.Task, cerr)
		}
		t.o.Report(Event{Order: r.Order.ID, Task: r.Task, Text: "given up: the catalog waits for it no more", Err: err})
		delete(t.said, r.Order.ID)
		return t.to(r, func(r *record) { r.Stage = told })
	case errors.Is(err, tasks.ErrStatus): // put there by somebody else; the work goes on
		t.once(Event{Order: r.Order.ID, Task: r.Task, Text: "how it goes cannot be told", Err: err})
	case err != nil:
		return err
	}
	t.said[r.Order.ID] = saying{s, t.o.Now()}
	return nil
}

// gone says that a task is this agent's no more.
func gone(err error) bool {
	return errors.Is(err, tasks.ErrEnded) || errors.Is(err, tasks.ErrTaken) || errors.Is(err, tasks.ErrNotFound)
}

// tell says how a request ended.
func (t *Taker) tell(ctx context.Context, r *record) error {
	_, err := t.o.Queue.Update(ctx, r.order(), *r.Last)
	if err != nil && !gone(err) && !errors.Is(err, tasks.ErrStatus) {
		return err
	}
	e := Event{Order: r.Order.ID, Task: r.Task, Text: string(r.Last.State)}
	if err != nil {
		e.Text, e.Err = "is "+e.Text+", which cannot be told", err
	}
	if err := t.to(r, func(r *record) { r.Stage = told }); err != nil {
		return err
	}
	delete(t.said, r.Order.ID)
	t.o.Report(e)
	return nil
}

// last is what is said of a task that has ended.
func last(order *tasks.Request, t *task.Task) *tasks.Status {
	s := &tasks.Status{Progress: t.Progress.Percent}
	switch t.State {
	case task.Complete:
		s.State, s.Progress = tasks.Complete, 100
		switch order.Kind {
		case tasks.CreateImage:
			s.Manifest, s.Digest = order.Name+"@"+t.Result.Manifest, t.Result.Manifest
		case tasks.BundleInstance:
			s.Manifest = order.Bucket + "/" + order.Prefix + ".manifest.xml"
		}
		if t.Result.Changed {
			s.Message = "files changed while they were read"
		}
	case task.Cancelled:
		s.State, s.Code, s.Message = tasks.Cancelled, task.CodeCancelled, "cancelled"
	default:
		s.State, s.Code, s.Message = tasks.Failed, task.CodeCapture, "the capture failed"
		if f := t.Error; f != nil {
			s.Code = f.Code
			s.Message = strings.Join(strings.Fields(strings.TrimSpace(f.Message+" "+f.Hint)), " ")
		}
	}
	return s
}
