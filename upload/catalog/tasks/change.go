package tasks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
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
// are set here, and Message is cut to what is read back. When the server asked to
// cancel it, a change to a state that is neither Cancelling nor the last is refused
// with ErrCancel; the agent stops and updates to Cancelled. ErrEnded, ErrTaken and
// ErrNotFound mean that the task is no longer the agent's.
func (q *Queue) Update(ctx context.Context, t Task, s Status) (Task, error) {
	next, err := q.change(ctx, t, func(now Status) (Status, error) {
		switch {
		case now.State.Ended():
			return now, ErrEnded
		case now.Agent != t.Agent:
			return now, ErrTaken
		case now.State == Cancelling && s.State != Cancelling && !s.State.Ended():
			return now, ErrCancel
		}
		s.Agent, s.Started, s.Message = now.Agent, now.Started, clip(s.Message)
		return s, nil
	})
	if err != nil {
		return next, fmt.Errorf("updating task %s: %w", t.ID, err)
	}
	return next, nil
}

// Refuse ends a task that waits with the reason why its instance will not do it:
// a code of one word and a message for people. Of several who try, and of those
// who take it, one gets through; the others get ErrTaken.
func (q *Queue) Refuse(ctx context.Context, t Task, agent, code, message string) error {
	if t.State != Pending {
		return fmt.Errorf("refusing task %s, which is %s: %w", t.ID, t.State, ErrTaken)
	}
	now := q.o.Now().UTC().Truncate(time.Millisecond)
	t.Status = Status{State: Failed, Agent: agent, Updated: now, Code: code, Message: clip(message)}
	_, err := q.put(ctx, &t, upload.PutOptions{IfMatch: t.etag})
	if errors.Is(err, upload.ErrExist) || errors.Is(err, upload.ErrNotExist) {
		err = ErrTaken
	}
	if err != nil {
		return fmt.Errorf("refusing task %s: %w", t.ID, err)
	}
	return nil
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

// Lapse ends a task that nobody will bring to its end: one that no agent took
// before it expired fails, and one whose agent said nothing for [Silence], which
// is cancelled if that was asked for. Any other is returned as it is.
func (q *Queue) Lapse(ctx context.Context, t Task) (Task, error) {
	if _, lapsed := t.lapsed(q.o.Now()); !lapsed {
		return t, nil
	}
	next, err := q.change(ctx, t, func(now Status) (Status, error) {
		seen := t
		seen.Status = now
		s, lapsed := seen.lapsed(q.o.Now())
		if !lapsed {
			return now, errAlive
		}
		return s, nil
	})
	if err != nil && !errors.Is(err, errAlive) {
		return next, fmt.Errorf("ending task %s, which has lapsed: %w", t.ID, err)
	}
	return next, nil
}

// errAlive ends a change that has nothing to do.
var errAlive = errors.New("somebody is at it")

// lapsed is how a task stands that nobody will bring to its end.
func (t *Task) lapsed(now time.Time) (Status, bool) {
	s := t.Status
	switch {
	case s.State.Ended():
		return s, false
	case s.State == Pending && !now.Before(t.Expires):
		s.State, s.Code = Failed, CodeUnreachable
		s.Message = fmt.Sprintf("no agent of the instance took the task by %s", t.Expires.UTC().Format(time.RFC3339))
		return s, true
	case s.State == Pending || now.Sub(s.Updated) <= Silence:
		return s, false
	}
	message := fmt.Sprintf("the instance's agent has said nothing since %s", s.Updated.UTC().Format(time.RFC3339))
	if s.State == Cancelling {
		s.State, s.Code, s.Message = Cancelled, "Client.Cancelled", "cancelled; "+message
		return s, true
	}
	s.State, s.Code, s.Message = Failed, CodeSilent, message+": whether anything was stored is not known"
	return s, true
}

// clip makes a text one that is read back as it was written.
func clip(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxText)], "")
}

// Forget removes tasks that ended, or expired, longer than Keep ago, and
// returns how many. One whose status cannot be read is taken for expired at its
// time. What a server that was killed had begun to submit goes as well.
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
	return n, q.forgetHalves(ctx)
}

// forgetHalves removes statuses that have no request: the status is put first,
// and the request may have been lost.
func (q *Queue) forgetHalves(ctx context.Context) error {
	halves := make(map[string]time.Time)
	for o, err := range q.o.Store.List(ctx, Prefix) {
		if err != nil {
			return fmt.Errorf("listing tasks: %w", err)
		}
		if place, ok := strings.CutSuffix(o.Key, "/request"); ok { // which is listed before its status
			halves[place+"/status"] = time.Time{}
		} else if _, whole := halves[o.Key]; !whole && strings.HasSuffix(o.Key, "/status") {
			halves[o.Key] = o.Modified
		}
	}
	for key, at := range halves {
		if at.IsZero() || q.o.Now().Sub(at) < Keep {
			continue
		}
		if err := q.o.Store.Delete(ctx, key); err != nil {
			return fmt.Errorf("forgetting what was never a task: %w", err)
		}
	}
	return nil
}
