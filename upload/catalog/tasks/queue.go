package tasks

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// Options say where tasks are and who signs them. Store is required, and
// Signer or Signers with it.
type Options struct {
	Store upload.Store
	// Signer signs the requests of a catalog's server.
	Signer keys.Signer
	// Signers are whom an agent obeys.
	Signers *keys.AllowedSigners
	// Now is the clock; default time.Now.
	Now func() time.Time
	// NewID draws an id of the prefix it is given, "bun-" or "img-", and 17 hex
	// digits; default at random.
	NewID func(prefix string) string
}

// Queue is the tasks of a store. Its methods may be called concurrently, by
// any number of servers and agents.
type Queue struct{ o Options }

// Open returns the tasks of a store. It asks the store nothing.
func Open(o Options) *Queue {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NewID == nil {
		o.NewID = randomID
	}
	return &Queue{o}
}

// Lifetime is how long after it was made a request may be begun.
const Lifetime = 24 * time.Hour

// Submit stores a request and returns the task, which is pending. It sets
// Version, ID, Created and Expires, which an earlier one of the request's own
// stays.
func (q *Queue) Submit(ctx context.Context, r Request) (Task, error) {
	if q.o.Signer == nil {
		return Task{}, errors.New("submitting a task: no key to sign it with")
	}
	now := q.o.Now().UTC().Truncate(time.Millisecond)
	r.Version, r.ID, r.Created = 1, q.newID(r.Kind), now
	if end := now.Add(Lifetime); r.Expires.IsZero() || end.Before(r.Expires) {
		r.Expires = end
	}
	if err := r.check(); err != nil {
		return Task{}, fmt.Errorf("submitting a task: %w", err)
	}
	doc, err := json.Marshal(&r)
	if err != nil {
		return Task{}, fmt.Errorf("submitting a task: %w", err)
	}
	sig, err := q.o.Signer.Sign(ctx, Namespace, doc)
	if err != nil {
		return Task{}, fmt.Errorf("signing task %s: %w", r.ID, err)
	}
	sig = append(bytes.TrimRight(sig, "\n"), "\n\n"...)
	t := Task{Request: r, Status: Status{State: Pending, Updated: now}}
	// The status first: an agent sees a task by its request.
	if t.etag, err = q.put(ctx, &t, upload.PutOptions{IfNoneMatch: true}); err != nil {
		return Task{}, fmt.Errorf("submitting task %s: %w", r.ID, err)
	}
	if _, err := upload.PutBytes(ctx, q.o.Store, requestKey(r.Instance, r.ID), append(sig, doc...), upload.PutOptions{IfNoneMatch: true, ContentType: "text/plain"}); err != nil {
		return Task{}, fmt.Errorf("submitting task %s: %w", r.ID, err)
	}
	return t, nil
}

func (q *Queue) newID(k Kind) string {
	if k == CreateImage {
		return q.o.NewID("img-")
	}
	return q.o.NewID("bun-")
}

// randomID draws 68 bits.
func randomID(prefix string) string {
	var b [9]byte
	rand.Read(b[:]) // never fails
	return prefix + hex.EncodeToString(b[:])[:17]
}

func requestKey(instance, id string) string { return Prefix + instance + "/" + id + "/request" }
func statusKey(instance, id string) string  { return Prefix + instance + "/" + id + "/status" }

// Get returns a task, or ErrNotFound. The request's signature is checked where
// Options.Signers is set.
func (q *Queue) Get(ctx context.Context, instance, id string) (Task, error) {
	if !ValidInstance(instance) || !taskID.MatchString(id) {
		return Task{}, fmt.Errorf("task %q of %q: %w", id, instance, ErrNotFound)
	}
	t, err := q.get(ctx, instance, id)
	if err != nil {
		return Task{}, fmt.Errorf("reading task %s of %s: %w", id, instance, err)
	}
	return t, nil
}

func (q *Queue) get(ctx context.Context, instance, id string) (t Task, err error) {
	object, _, err := upload.GetBytes(ctx, q.o.Store, requestKey(instance, id), maxObject)
	switch {
	case errors.Is(err, upload.ErrNotExist):
		return t, ErrNotFound
	case errors.Is(err, upload.ErrTooLarge):
		return t, fmt.Errorf("%w: %w", ErrRequest, err)
	case err != nil:
		return t, err
	}
	if t.Request, err = q.open(object, instance, id); err != nil {
		return t, err
	}
	t.Status, t.etag, err = q.status(ctx, instance, id)
	return t, err
}

func (q *Queue) status(ctx context.Context, instance, id string) (s Status, etag string, err error) {
	data, o, err := upload.GetBytes(ctx, q.o.Store, statusKey(instance, id), maxObject)
	switch {
	case errors.Is(err, upload.ErrNotExist):
		return s, "", ErrNotFound
	case errors.Is(err, upload.ErrTooLarge):
		return s, "", fmt.Errorf("%w: %w", ErrStatus, err)
	case err != nil:
		return s, "", err
	}
	return parseStatus(data, o.ETag)
}

func parseStatus(data []byte, etag string) (s Status, _ string, err error) {
	if err := json.Unmarshal(data, &s); err != nil {
		return Status{}, "", fmt.Errorf("%w: %w", ErrStatus, err)
	}
	if !s.State.known() {
		return Status{}, "", fmt.Errorf("%w: state %q is not known", ErrStatus, s.State)
	}
	s.Progress = min(max(s.Progress, 0), 100)
	s.Message = strings.ToValidUTF8(s.Message[:min(len(s.Message), maxText)], "")
	if !statusCode.MatchString(s.Code) {
		s.Code = ""
	}
	return s, etag, nil
}

// open checks a request's object.
func (q *Queue) open(object []byte, instance, id string) (r Request, err error) {
	const end = "-----END SSH SIGNATURE-----\n"
	i := bytes.Index(object, []byte(end+"\n"))
	if i < 0 {
		return r, fmt.Errorf("%w: it carries no signature", ErrRequest)
	}
	armor, doc := object[:i+len(end)], object[i+len(end)+1:]
	if q.o.Signers != nil {
		if err := q.verify(armor, doc, instance); err != nil {
			return r, fmt.Errorf("%w: %w", ErrRequest, err)
		}
	}
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields() // an agent that does half of what was asked does harm
	if err := dec.Decode(&r); err != nil || dec.More() {
		return Request{}, fmt.Errorf("%w: it is no JSON of this version", ErrRequest)
	}
	if err := r.check(); err != nil {
		return Request{}, err
	}
	if r.Instance != instance || r.ID != id {
		return Request{}, fmt.Errorf("%w: it is %s's %s, put in another's place", ErrRequest, r.Instance, r.ID)
	}
	return r, nil
}

func (q *Queue) verify(armor, doc []byte, instance string) error {
	sig, err := keys.ParseSignature(armor)
	if err != nil {
		return err
	}
	grant, err := q.o.Signers.Check(sig.Key(), instance, Namespace)
	if err != nil {
		return err
	}
	if err := grant.At(q.o.Now()); err != nil {
		return err
	}
	return sig.Verify(doc, Namespace)
}

// List returns the tasks of an instance, of all if instance is "", oldest
// first. Objects that are no task, and tasks whose status is none, are left out.
func (q *Queue) List(ctx context.Context, instance string) ([]Task, error) {
	out, _, err := q.list(ctx, instance)
	return out, err
}

// list is List; broken are the tasks that have no status to be read.
func (q *Queue) list(ctx context.Context, instance string) (out, broken []Task, err error) {
	ids, err := q.ids(ctx, instance)
	if err != nil {
		return nil, nil, err
	}
	for _, i := range ids {
		t, err := q.get(ctx, i[0], i[1])
		switch {
		case errors.Is(err, ErrNotFound), errors.Is(err, ErrRequest):
			continue
		case errors.Is(err, ErrStatus):
			broken = append(broken, t)
			continue
		case err != nil:
			return nil, nil, fmt.Errorf("reading task %s of %s: %w", i[1], i[0], err)
		}
		out = append(out, t)
	}
	slices.SortFunc(out, byAge)
	return out, broken, nil
}

// ids lists instance and id of tasks that have a request.
func (q *Queue) ids(ctx context.Context, instance string) (ids [][2]string, err error) {
	prefix := Prefix
	if instance != "" {
		if !ValidInstance(instance) {
			return nil, nil
		}
		prefix += instance + "/"
	}
	for o, err := range q.o.Store.List(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("listing tasks: %w", err)
		}
		w := strings.Split(strings.TrimPrefix(o.Key, Prefix), "/")
		if len(w) == 3 && w[2] == "request" && ValidInstance(w[0]) && taskID.MatchString(w[1]) {
			ids = append(ids, [2]string{w[0], w[1]})
		}
	}
	return ids, nil
}
