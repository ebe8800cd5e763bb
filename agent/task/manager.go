package task

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Job is what a launcher starts.
type Job struct {
	ID          string
	Description string // for people
	Volume      string // the directory that is captured
	Limits      Limits // complete
}

// Launcher runs workers. A worker is a process that takes the task's lock with
// [Dir.Lock] before it does anything, and ends by [Dir.SaveResult].
// Its methods may be called concurrently, for different tasks.
type Launcher interface {
	// Launch starts a worker and returns when it has the task's lock. That the
	// task has a worker already is no error.
	Launch(ctx context.Context, j Job) error
	// Stop asks the worker to end, frozen or not, and does not wait for that.
	// One that does not end within minutes is killed. No worker is no error.
	Stop(ctx context.Context, id string) error
	// Freeze makes the worker and what it started stand still until Thaw.
	// Doing it twice is no error.
	Freeze(ctx context.Context, id string) error
	Thaw(ctx context.Context, id string) error
}

// Options say how a Manager works. Dir and Launcher are required.
type Options struct {
	Dir      Dir
	Launcher Launcher
	Limits   Limits        // of tasks that do not say otherwise
	Quiesce  *Quiesce      // likewise; nil for nothing
	Running  int           // tasks at once, default 1
	Waiting  int           // tasks that may wait, default 1000
	Keep     int           // ended tasks that are remembered, default 100
	Attempts int           // times a task is begun before it is given up, default 5
	Poll     time.Duration // between looks at what a worker does, default 1 s
	Delay    time.Duration // before a task that was cut short is begun again, default 5 s
	// Changed is told of every change of a task's state after it is on disk,
	// in order; it must neither block nor call the Manager.
	Changed func(Task)
	// Told is told what a worker warned of; the same holds.
	Told func(Task, Line)
	// Failed is told what could not be done and will be tried again.
	Failed func(id string, err error)
}

// Manager is the tasks of an agent. Its methods may be called concurrently.
type Manager struct {
	o    Options
	wake chan struct{}
	ping chan chan struct{}

	mu     sync.Mutex
	tasks  map[string]*entry
	order  []string        // oldest first
	active map[string]bool // a goroutine drives it
	news   chan struct{}   // closed and replaced at every change of any task
}

// entry is a task in memory.
type entry struct {
	t       Task
	changed chan struct{} // closed and replaced at every change
}

// Open reads the tasks there are. Files that cannot be understood are named in
// damaged, and left alone.
func Open(o Options) (m *Manager, damaged []error, err error) {
	set := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	set(&o.Running, 1)
	set(&o.Waiting, 1000)
	set(&o.Keep, 100)
	set(&o.Attempts, 5)
	if o.Poll <= 0 {
		o.Poll = time.Second
	}
	if o.Delay <= 0 {
		o.Delay = 5 * time.Second
	}
	o.Limits = o.Limits.Or(DefaultLimits())
	m = &Manager{o: o, wake: make(chan struct{}, 1), ping: make(chan chan struct{}), news: make(chan struct{}), tasks: map[string]*entry{}, active: map[string]bool{}}
	tasks, damaged, err := o.Dir.LoadAll()
	if err != nil {
		return nil, nil, err
	}
	for _, t := range tasks {
		m.tasks[t.ID] = &entry{t: *t, changed: make(chan struct{})}
		m.order = append(m.order, t.ID)
	}
	return m, damaged, nil
}

// Run drives the tasks until ctx ends. Workers go on after that: another Run,
// of this process or a later one, takes up where they are.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		for _, id := range m.due() {
			wg.Go(func() {
				m.drive(ctx, id)
				m.mu.Lock()
				delete(m.active, id)
				m.mu.Unlock()
				m.poke()
			})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		case answer := <-m.ping:
			close(answer)
		}
	}
}

// due picks the tasks to drive now, and notes that they are driven.
func (m *Manager) due() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []string
	for _, begun := range []bool{true, false} { // those under way come first, and are never too many
		for _, id := range m.order {
			t := &m.tasks[id].t
			if t.State.Ended() || m.active[id] || (t.State != Pending) != begun {
				continue
			}
			if !begun && (t.Paused || len(m.active) >= m.o.Running) {
				continue
			}
			m.active[id] = true
			ids = append(ids, id)
		}
	}
	return ids
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Ping returns when the Manager's loop has answered: it is alive then, and so
// are its locks.
func (m *Manager) Ping(ctx context.Context) error {
	answer := make(chan struct{})
	select {
	case m.ping <- answer:
	case <-ctx.Done():
		return fmt.Errorf("the tasks' loop does not answer: %w", ctx.Err())
	}
	<-answer
	m.mu.Lock()
	defer m.mu.Unlock()
	return nil
}

// Start takes a request. When it returns without an error the task is on disk;
// fresh is false if it is there because of an earlier request with the
// same client token.
func (m *Manager) Start(r Request, by Caller) (t Task, fresh bool, err error) {
	if err := r.Check(); err != nil {
		return Task{}, false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	waiting := 0
	for _, id := range m.order {
		old := &m.tasks[id].t
		if r.ClientToken != "" && old.Request.ClientToken == r.ClientToken && old.By.UID == by.UID {
			if !old.Request.same(&r) {
				return Task{}, false, fmt.Errorf("%w (task %s)", ErrToken, old.ID)
			}
			return *old, false, nil
		}
		if old.State == Pending {
			waiting++
		}
	}
	if waiting >= m.o.Waiting {
		return Task{}, false, fmt.Errorf("%w: %d", ErrFull, waiting)
	}
	now := time.Now().UTC()
	t = Task{ID: newID(), Request: r, State: Pending, By: by, Created: now, Updated: now}
	if err := m.o.Dir.Save(&t); err != nil {
		return Task{}, false, err
	}
	e := &entry{t: t, changed: make(chan struct{})}
	m.tasks[t.ID] = e
	m.order = append(m.order, t.ID)
	m.broadcast(e)
	m.tell(t)
	m.poke()
	return t, true, nil
}

func newID() string {
	var b [9]byte
	rand.Read(b[:])
	return "bun-" + hex.EncodeToString(b[:])[:17]
}

// List is all tasks, oldest first.
func (m *Manager) List() []Task {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Task, 0, len(m.order))
	for _, id := range m.order {
		all = append(all, m.tasks[id].t.copy())
	}
	return all
}

// Get is one task, and a channel that is closed when it changes.
func (m *Manager) Get(id string) (Task, <-chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.tasks[id]
	if e == nil {
		return Task{}, nil, fmt.Errorf("%w %q", ErrNotFound, id)
	}
	return e.t.copy(), e.changed, nil
}

// copy shares nothing that the Manager changes.
func (t *Task) copy() Task {
	c := *t
	c.Attempts = slices.Clone(t.Attempts)
	return c
}

// Cancel ends a task. It returns at once; the task's state is then cancelling
// or, if it had not begun, cancelled.
func (m *Manager) Cancel(id string) (Task, error) {
	t, err := m.update(id, func(t *Task) error {
		switch t.State {
		case Cancelling:
		case Pending:
			t.State = Cancelled
			t.Error = &Failure{Code: CodeCancelled, Message: "cancelled before it began"}
		case Bundling, Storing:
			t.State = Cancelling
		default:
			return fmt.Errorf("%w: task %s is %s", ErrState, id, t.State)
		}
		return nil
	})
	m.poke()
	return t, err
}

// Pause makes a task stand still until Resume. A request to the store that is
// under way may break off; it is made again after.
func (m *Manager) Pause(ctx context.Context, id string) (Task, error) {
	t, err := m.update(id, func(t *Task) error {
		switch {
		case t.State.Ended() || t.State == Cancelling:
			return fmt.Errorf("%w: task %s is %s", ErrState, id, t.State)
		case t.Progress.Quiesced:
			return fmt.Errorf("%w: units stand still for task %s: pausing it would keep them so", ErrState, id)
		}
		t.Paused = true
		return nil
	})
	if err != nil || t.State == Pending {
		return t, err
	}
	// Who asked may hang up: what is begun is brought to its end nevertheless.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), freezeTime)
	defer cancel()
	if err := m.o.Launcher.Freeze(ctx, id); err != nil {
		now, uerr := m.update(id, func(t *Task) error { t.Paused = false; return nil })
		if uerr != nil {
			m.failed(id, uerr)
		}
		// Some of the worker may stand still, or will in a moment.
		again, done := context.WithTimeout(context.WithoutCancel(ctx), freezeTime)
		defer done()
		return now, errors.Join(fmt.Errorf("pausing task %s: %w", id, err), m.thaw(again, id))
	}
	return t, nil
}

// freezeTime is how long freezing or thawing a worker may take.
const freezeTime = time.Minute

func (m *Manager) thaw(ctx context.Context, id string) error {
	if err := m.o.Launcher.Thaw(ctx, id); err != nil {
		return fmt.Errorf("resuming task %s: %w", id, err)
	}
	return nil
}

// Resume lets a paused task go on.
func (m *Manager) Resume(ctx context.Context, id string) (Task, error) {
	t, err := m.update(id, func(t *Task) error {
		if t.State.Ended() {
			return fmt.Errorf("%w: task %s is %s", ErrState, id, t.State)
		}
		t.Paused = false
		return nil
	})
	if err != nil {
		return t, err
	}
	m.poke()
	if t.State == Pending {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), freezeTime)
	defer cancel()
	return t, m.thaw(ctx, id)
}

// update changes a task, on disk first. What change makes of the task counts
// only if it returns no error and the disk takes it.
func (m *Manager) update(id string, change func(*Task) error) (Task, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.tasks[id]
	if e == nil {
		return Task{}, fmt.Errorf("%w %q", ErrNotFound, id)
	}
	t := e.t.copy()
	if err := change(&t); err != nil {
		return e.t.copy(), err
	}
	t.Updated = time.Now().UTC()
	if t.State.Ended() && t.Ended.IsZero() {
		t.Ended, t.Paused = t.Updated, false
		t.Progress.Quiesced, t.Progress.Rate, t.Progress.SecondsLeft = false, 0, 0
	}
	if err := m.o.Dir.Save(&t); err != nil {
		return e.t.copy(), err
	}
	e.t = t
	m.broadcast(e)
	m.tell(t)
	return t.copy(), nil
}

// see updates what is only in memory.
func (m *Manager) see(id string, change func(*Task)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.tasks[id]; e != nil {
		change(&e.t)
		m.broadcast(e)
	}
}

func (m *Manager) broadcast(e *entry) {
	close(e.changed)
	e.changed = make(chan struct{})
	close(m.news)
	m.news = make(chan struct{})
}

// News is a channel that is closed when any task changes.
func (m *Manager) News() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.news
}

func (m *Manager) tell(t Task) {
	if m.o.Changed != nil {
		m.o.Changed(t.copy())
	}
}

func (m *Manager) failed(id string, err error) {
	if m.o.Failed != nil {
		m.o.Failed(id, err)
	}
}

// forget removes the oldest of the ended tasks that are too many.
func (m *Manager) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	ended := 0
	for _, id := range m.order {
		if m.tasks[id].t.State.Ended() {
			ended++
		}
	}
	m.order = slices.DeleteFunc(m.order, func(id string) bool {
		e := m.tasks[id]
		if ended <= m.o.Keep || !e.t.State.Ended() || m.active[id] {
			return false
		}
		if err := m.o.Dir.Remove(id); err != nil {
			m.failed(id, err)
			return false
		}
		ended--
		delete(m.tasks, id)
		m.broadcast(e)
		return true
	})
}
