package tasks

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Waiting returns an instance's tasks that nobody took yet and that are not
// expired, verified, oldest first. It costs a LIST and two reads a task.
// What is not to be followed is left out and told in refused, one error each.
func (q *Queue) Waiting(ctx context.Context, instance string) (tasks []Task, refused []error, err error) {
	return q.Watch(instance).Look(ctx)
}

// Watch looks for the tasks of one instance again and again. It remembers what it
// has read: a look that finds nothing new costs a LIST. It is for one goroutine.
type Watch struct {
	q        *Queue
	instance string
	known    map[string]etags // of tasks that do not wait, or are not to be followed
}

// etags are those of a task's two objects, as a list has them.
type etags struct{ request, status string }

// settles says that there is nothing more to be read of a task, of which err was
// said, until its objects change. A request that is not to be followed, or that no
// status goes with, needs no second object: one that comes changes the pair.
func (e etags) settles(err error) bool {
	if errors.Is(err, ErrRequest) || errors.Is(err, ErrNotFound) {
		return e.request != ""
	}
	return e.request != "" && e.status != ""
}

// Watch makes a Watch. It asks the store nothing.
func (q *Queue) Watch(instance string) *Watch {
	return &Watch{q: q, instance: instance, known: make(map[string]etags)}
}

// Look is [Queue.Waiting]; what was told in refused is told again only when its
// objects have changed.
func (w *Watch) Look(ctx context.Context) (tasks []Task, refused []error, err error) {
	if w.q.o.Signers == nil {
		return nil, nil, errors.New("looking for tasks: nobody is trusted to give any")
	}
	found, more, err := w.list(ctx)
	if err != nil {
		return nil, nil, err
	}
	if more {
		refused = append(refused, fmt.Errorf("%w: there are more than %d of them; the others are not looked at", ErrRequest, maxWaiting))
	}
	for id := range w.known {
		if _, there := found[id]; !there {
			delete(w.known, id)
		}
	}
	for id, now := range found {
		if before, known := w.known[id]; known && before == now {
			continue
		}
		t, _, err := w.q.get(ctx, w.instance, id)
		waits := err == nil && t.State == Pending && w.q.o.Now().Before(t.Expires)
		switch {
		case errors.Is(err, ErrNotFound):
		case errors.Is(err, ErrRequest), errors.Is(err, ErrStatus):
			refused = append(refused, fmt.Errorf("task %s: %w", id, err))
		case err != nil:
			return nil, refused, fmt.Errorf("reading task %s of %s: %w", id, w.instance, err)
		case waits:
			tasks = append(tasks, t)
		}
		if delete(w.known, id); !waits && now.settles(err) {
			w.known[id] = now
		}
	}
	slices.SortFunc(tasks, byAge)
	return tasks, refused, nil
}

// list lists the ids of tasks that have a request; more says that there are others.
func (w *Watch) list(ctx context.Context) (found map[string]etags, more bool, err error) {
	if !ValidInstance(w.instance) {
		return nil, false, fmt.Errorf("looking for tasks: %q is no instance's id", w.instance)
	}
	prefix := Prefix + w.instance + "/"
	found = make(map[string]etags)
	objects := 0
	for o, err := range w.q.o.Store.List(ctx, prefix) {
		if err != nil {
			return nil, false, fmt.Errorf("looking for tasks: %w", err)
		}
		if objects++; objects > 10*maxWaiting { // whoever may write the bucket can put anything there
			return found, true, nil
		}
		id, name, ok := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		if !ok || !taskID.MatchString(id) {
			continue
		}
		e, known := found[id]
		switch name { // "request" is listed before "status"
		case "request":
			if len(found) == maxWaiting {
				return found, true, nil
			}
			e.request = o.ETag
		case "status":
			if !known {
				continue
			}
			e.status = o.ETag
		default:
			continue
		}
		found[id] = e
	}
	return found, false, nil
}

func byAge(a, b Task) int {
	if c := a.Created.Compare(b.Created); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}
