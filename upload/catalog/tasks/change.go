package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/instar-image/instar/upload"
)

// Keep is how long a task that has ended, or expired, is remembered.
const Keep = 7 * 24 * time.Hour

func (q *Queue) put(ctx context.Context, t *Task, o upload.PutOptions) (etag string, err error) {
	data, err := json.Marshal(&t.Status)
	if err != nil {
		return "", err
	}
	o.ContentType = "application/json"
	put, err := upload.PutBytes(ctx, q.o.Store, statusKey(t.Instance, t.ID), data, o)
	if err != nil {
		return "", err
	}
	if put.ETag == "" {
		put, err = q.o.Store.Stat(ctx, statusKey(t.Instance, t.ID))
	}
	return put.ETag, err
}

// Waiting returns an instance's tasks that nobody took yet and that are not
// expired, verified, oldest first. It costs a LIST and two reads a task.
// What is not to be followed is left out and told in refused, one error each.
func (q *Queue) Waiting(ctx context.Context, instance string) (tasks []Task, refused []error, err error) {
	if q.o.Signers == nil {
		return nil, nil, errors.New("looking for tasks: nobody is trusted to give any")
	}
	ids, err := q.ids(ctx, instance)
	if err != nil {
		return nil, nil, err
	}
	for _, i := range ids[:min(len(ids), maxWaiting)] {
		t, err := q.get(ctx, i[0], i[1])
		switch {
		case errors.Is(err, ErrNotFound):
		case errors.Is(err, ErrRequest), errors.Is(err, ErrStatus):
			refused = append(refused, fmt.Errorf("task %s: %w", i[1], err))
		case err != nil:
			return nil, refused, fmt.Errorf("reading task %s of %s: %w", i[1], i[0], err)
		case t.State == Pending && q.o.Now().Before(t.Expires) && i[0] == instance:
			tasks = append(tasks, t)
		}
	}
	slices.SortFunc(tasks, func(a, b Task) int { return a.Created.Compare(b.Created) })
	return tasks, refused, nil
}

// Take makes a waiting task the agent's own: its state is Bundling then. Of
// several who try, one gets it; the others get ErrTaken.
func (q *Queue) Take(ctx context.Context, t Task, agent string) (Task, error) {
	now := q.o.Now().UTC().Truncate(time.Millisecond)
	if t.State != Pending || !now.Before(t.Expires) {
		return t, fmt.Errorf("taking task %s, which is %s and expires at %s: %w", t.ID, t.State, t.Expires.Format(time.RFC3339), ErrTaken)
	}
	t.Status = Status{State: Bundling, Agent: agent, Started: now, Updated: now}
	etag, err := q.put(ctx, &t, upload.PutOptions{IfMatch: t.etag})
	if errors.Is(err, upload.ErrExist) || errors.Is(err, upload.ErrNotExist) {
		return t, fmt.Errorf("taking task %s: %w", t.ID, ErrTaken)
	} else if err != nil {
		return t, fmt.Errorf("taking task %s: %w", t.ID, err)
	}
	t.etag = etag
	return t, nil
}

// Update says how a task goes that the agent took; Agent, Started and Updated
// are set here. When the server asked to cancel it, a change to a state that is
// not the last is refused with ErrCancel; the agent stops and updates to
// Cancelled. ErrEnded and ErrTaken mean that the task is no longer the agent's.
func (q *Queue) Update(ctx context.Context, t Task, s Status) (Task, error) {
	next, err := q.change(ctx, t, func(now Status) (Status, error) {
		switch {
		case now.State.Ended():
			return now, ErrEnded
		case now.Agent != t.Agent:
			return now, ErrTaken
		case now.State == Cancelling && !s.State.Ended():
			return now, ErrCancel
		}
		s.Agent, s.Started = now.Agent, now.Started
		return s, nil
	})
	if err != nil {
		return next, fmt.Errorf("updating task %s: %w", t.ID, err)
	}
	return next, nil
}

// Cancel asks for a task to be cancelled. One that nobody took is cancelled at
// once. One that has ended is ErrEnded.
func (q *Queue) Cancel(ctx context.Context, t Task) (Task, error) {
	next, err := q.change(ctx, t, func(now Status) (Status, error) {
		switch {
		case now.State.Ended():
			return now, ErrEnded
		case now.State == Pending:
			now.State, now.Code, now.Message = Cancelled, "Client.Cancelled", "cancelled before an agent took it"
		default:
			now.State = Cancelling
		}
		return now, nil
	})
	if err != nil {
		return next, fmt.Errorf("cancelling task %s: %w", t.ID, err)
	}
	return next, nil
}

// changeTries bounds how often a lost race is run again.
const changeTries = 20

func (q *Queue) change(ctx context.Context, t Task, f func(Status) (Status, error)) (Task, error) {
	for range changeTries {
		now, etag, err := q.status(ctx, t.Instance, t.ID)
		if err != nil {
			return t, err
		}
		if t.Status, err = f(now); err != nil {
			t.etag = etag
			return t, err
		}
		t.Updated = q.o.Now().UTC().Truncate(time.Millisecond)
		next, err := q.put(ctx, &t, upload.PutOptions{IfMatch: etag})
		if err == nil {
			t.etag = next
			return t, nil
		}
		if !errors.Is(err, upload.ErrExist) {
			return t, err
		}
	}
	return t, errors.New("others keep changing it")
}

// Forget removes tasks that ended, or expired, longer than Keep ago, and
// returns how many. One whose status cannot be read is taken for expired at its
// time.
func (q *Queue) Forget(ctx context.Context) (int, error) {
	all, broken, err := q.list(ctx, "")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, t := range append(all, broken...) {
		last := t.Updated
		if !t.State.Ended() && t.Expires.After(last) {
			last = t.Expires
		}
		if q.o.Now().Sub(last) < Keep {
			continue
		}
		// The request first: without it there is no task.
		if err := q.o.Store.Delete(ctx, requestKey(t.Instance, t.ID)); err != nil {
			return n, fmt.Errorf("forgetting task %s: %w", t.ID, err)
		}
		if err := q.o.Store.Delete(ctx, statusKey(t.Instance, t.ID)); err != nil {
			return n, fmt.Errorf("forgetting task %s: %w", t.ID, err)
		}
		n++
	}
	return n, nil
}
