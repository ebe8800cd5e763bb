package tasks

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

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
// any number of servers and agents. It remembers the tasks that it has listed: to
// list them again costs a LIST, and reads of what changed.
type Queue struct {
	o Options

	mu    sync.Mutex
	known map[place]listed
}

// place is where a task is.
type place struct{ instance, id string }

// listed is a task as it was when its objects had these etags.
type listed struct {
	etags  etags
	task   Task
	signer ssh.PublicKey // nil if nobody asked
}

// maxKnown is how many tasks are remembered at most.
const maxKnown = 1 << 16

// readsAtOnce is how many tasks are read at a time.
const readsAtOnce = 16

// Open returns the tasks of a store. It asks the store nothing.
func Open(o Options) *Queue {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NewID == nil {
		o.NewID = randomID
	}
	return &Queue{o: o, known: make(map[place]listed)}
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
	t, _, err := q.get(ctx, instance, id)
	if err != nil {
		return Task{}, fmt.Errorf("reading task %s of %s: %w", id, instance, err)
	}
	return t, nil
}

func (q *Queue) get(ctx context.Context, instance, id string) (t Task, signer ssh.PublicKey, err error) {
	object, _, err := upload.GetBytes(ctx, q.o.Store, requestKey(instance, id), maxObject)
	switch {
	case errors.Is(err, upload.ErrNotExist):
		return t, nil, ErrNotFound
	case errors.Is(err, upload.ErrTooLarge):
		return t, nil, fmt.Errorf("%w: %w", ErrRequest, err)
	case err != nil:
		return t, nil, err
	}
	if t.Request, signer, err = q.open(object, instance, id); err != nil {
		return t, nil, err
	}
	t.Status, t.etag, err = q.status(ctx, instance, id)
	return t, signer, err
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

// open checks a request's object, and tells who signed it, where that counts.
func (q *Queue) open(object []byte, instance, id string) (r Request, signer ssh.PublicKey, err error) {
	const end = "-----END SSH SIGNATURE-----\n"
	i := bytes.Index(object, []byte(end+"\n"))
	if i < 0 {
		return r, nil, fmt.Errorf("%w: it carries no signature", ErrRequest)
	}
	armor, doc := object[:i+len(end)], object[i+len(end)+1:]
	if q.o.Signers != nil {
		if signer, err = q.verify(armor, doc, instance); err != nil {
			return r, nil, fmt.Errorf("%w: %w", ErrRequest, err)
		}
	}
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields() // an agent that does half of what was asked does harm
	if err := dec.Decode(&r); err != nil || dec.More() {
		return Request{}, nil, fmt.Errorf("%w: it is no JSON of this version", ErrRequest)
	}
	if err := r.check(); err != nil {
		return Request{}, nil, err
	}
	if r.Instance != instance || r.ID != id {
		return Request{}, nil, fmt.Errorf("%w: it is %s's %s, put in another's place", ErrRequest, r.Instance, r.ID)
	}
	return r, signer, nil
}

func (q *Queue) verify(armor, doc []byte, instance string) (ssh.PublicKey, error) {
	sig, err := keys.ParseSignature(armor)
	if err != nil {
		return nil, err
	}
	if err := q.granted(sig.Key(), instance); err != nil {
		return nil, err
	}
	return sig.Key(), sig.Verify(doc, Namespace)
}

// granted tells whether a key may sign requests to an instance now.
func (q *Queue) granted(key ssh.PublicKey, instance string) error {
	grant, err := q.o.Signers.Check(key, instance, Namespace)
	if err != nil {
		return err
	}
	return grant.At(q.o.Now())
}

// List returns the tasks of an instance, of all if instance is "", oldest
// first. Objects that are no task, and tasks whose status is none, are left out.
func (q *Queue) List(ctx context.Context, instance string) ([]Task, error) {
	out, _, err := q.list(ctx, instance)
	return out, err
}

// list is List; broken are the tasks that have no status to be read.
func (q *Queue) list(ctx context.Context, instance string) (out, broken []Task, err error) {
	found, err := q.places(ctx, instance)
	if err != nil {
		return nil, nil, err
	}
	out, fresh := q.remembered(found, instance == "")
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(readsAtOnce)
	for _, p := range fresh {
		g.Go(func() error {
			t, signer, err := q.get(ctx, p.instance, p.id)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, ErrNotFound), errors.Is(err, ErrRequest):
			case errors.Is(err, ErrStatus):
				broken = append(broken, t)
			case err != nil:
				return fmt.Errorf("reading task %s of %s: %w", p.id, p.instance, err)
			default:
				out = append(out, t)
				q.remember(p, listed{found[p], t, signer})
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	slices.SortFunc(out, byAge)
	return out, broken, nil
}

// remembered are the tasks that have not changed since they were read, and where those
// are that have. What is gone is forgotten, if found is all there is.
func (q *Queue) remembered(found map[place]etags, all bool) (out []Task, fresh []place) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if all {
		maps.DeleteFunc(q.known, func(p place, _ listed) bool { _, there := found[p]; return !there })
	}
	for p, e := range found {
		k, ok := q.known[p]
		if !ok || k.etags != e || e.request == "" || e.status == "" {
			fresh = append(fresh, p)
			continue
		}
		if k.signer != nil && q.granted(k.signer, p.instance) != nil {
			continue
		}
		out = append(out, k.task)
	}
	return out, fresh
}

func (q *Queue) remember(p place, l listed) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.known[p]; ok || len(q.known) < maxKnown {
		q.known[p] = l
	}
}

// places lists where tasks are that have a request, with the etags of their objects.
func (q *Queue) places(ctx context.Context, instance string) (map[place]etags, error) {
	prefix := Prefix
	if instance != "" {
		if !ValidInstance(instance) {
			return nil, nil
		}
		prefix += instance + "/"
	}
	found := make(map[place]etags)
	for o, err := range q.o.Store.List(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("listing tasks: %w", err)
		}
		w := strings.Split(strings.TrimPrefix(o.Key, Prefix), "/")
		if len(w) != 3 || !ValidInstance(w[0]) || !taskID.MatchString(w[1]) {
			continue
		}
		p := place{w[0], w[1]}
		e, known := found[p]
		switch w[2] { // "request" is listed before "status"
		case "request":
			e.request = o.ETag
		case "status":
			if !known {
				continue
			}
			e.status = o.ETag
		default:
			continue
		}
		found[p] = e
	}
	return found, nil
}
