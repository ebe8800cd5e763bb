package images_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/upload"
)

// mem is a store in memory with a clock that the test sets.
type mem struct {
	mu      sync.Mutex
	objects map[string]memObject
	writes  int
	clock   time.Time
}

type memObject struct {
	data     []byte
	etag     string
	modified time.Time
}

var epoch = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func newMem() *mem { return &mem{objects: map[string]memObject{}, clock: epoch} }

func (m *mem) now() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.clock
}

func (m *mem) pass(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock = m.clock.Add(d)
}

// snapshot copies the store's state; restore puts it back.
func (m *mem) snapshot() map[string]memObject {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := make(map[string]memObject, len(m.objects))
	for k, o := range m.objects {
		c[k] = o
	}
	return c
}

func (m *mem) restore(c map[string]memObject) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.objects = map[string]memObject{}
	for k, o := range c {
		m.objects[k] = o
	}
}

func (m *mem) keys(prefix string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var l []string
	for k := range m.objects {
		if strings.HasPrefix(k, prefix) {
			l = append(l, k)
		}
	}
	slices.Sort(l)
	return l
}

// change replaces an object behind the store's back; nil removes it.
func (m *mem) change(key string, f func([]byte) []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.objects[key]
	d := f(bytes.Clone(o.data))
	if d == nil {
		delete(m.objects, key)
		return
	}
	m.writes++
	m.objects[key] = memObject{d, fmt.Sprint("e", m.writes), m.clock}
}

func (m *mem) put(key string, data []byte, o upload.PutOptions) (upload.Object, error) {
	if err := upload.CheckKey(key); err != nil {
		return upload.Object{}, failure("put", key, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old, ok := m.objects[key]
	if sum := sha256.Sum256(data); o.SHA256 != nil && !bytes.Equal(sum[:], o.SHA256) {
		return upload.Object{}, failure("put", key, upload.ErrCorrupt)
	}
	if o.IfNoneMatch && ok || o.IfMatch != "" && (!ok || old.etag != o.IfMatch) {
		return upload.Object{}, failure("put", key, upload.ErrExist)
	}
	m.writes++
	n := memObject{bytes.Clone(data), fmt.Sprint("e", m.writes), m.clock}
	m.objects[key] = n
	return n.object(key), nil
}

func (o memObject) object(key string) upload.Object {
	return upload.Object{Key: key, Size: int64(len(o.data)), ETag: o.etag, Modified: o.modified}
}

func failure(op, key string, kind error) error {
	return &upload.Error{Op: op, Store: "mem", Key: key, Kind: kind}
}

// op is one operation of an actor on the store.
type op struct {
	name, key string
}

// actor is a store as one machine sees it. before is asked in front of each
// operation, and fails it; after behind each, when it is done, and loses its
// answer. pages changes what lists say.
type actor struct {
	*mem
	before, after func(op) error
	pages         func(prefix string, l []upload.Object) []upload.Object
}

var errLost = errors.New("the answer was lost")

func (a *actor) around(name, key string, f func() error) error {
	o := op{name, key}
	if a.before != nil {
		if err := a.before(o); err != nil {
			return &upload.Error{Op: name, Store: "mem", Key: key, Err: err}
		}
	}
	err := f()
	if a.after != nil {
		if lost := a.after(o); lost != nil {
			return &upload.Error{Op: name, Store: "mem", Key: key, Err: lost}
		}
	}
	return err
}

func (a *actor) String() string { return "mem" }
func (a *actor) Close() error   { return nil }

func (a *actor) ServerTime(context.Context) (time.Time, error) { return a.now(), nil }

func (a *actor) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (obj upload.Object, err error) {
	if ctx.Err() != nil {
		return obj, failure("put", key, context.Cause(ctx))
	}
	data := make([]byte, size)
	if _, err := body.ReadAt(data, 0); err != nil && !errors.Is(err, io.EOF) {
		return obj, failure("put", key, err)
	}
	err = a.around("put", key, func() (err error) { obj, err = a.put(key, data, o); return err })
	return obj, err
}

func (a *actor) PutStream(ctx context.Context, key string, r io.Reader, o upload.PutOptions) (upload.Object, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return upload.Object{}, err
	}
	return a.Put(ctx, key, bytes.NewReader(data), int64(len(data)), o)
}

func (a *actor) Get(ctx context.Context, key string, o upload.GetOptions) (r io.ReadCloser, obj upload.Object, err error) {
	if ctx.Err() != nil {
		return nil, obj, failure("get", key, context.Cause(ctx))
	}
	err = a.around("get", key, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		m, ok := a.objects[key]
		if !ok {
			return failure("get", key, upload.ErrNotExist)
		}
		from := min(o.Offset, int64(len(m.data)))
		to := int64(len(m.data))
		if o.Length > 0 {
			to = min(to, from+o.Length)
		}
		r, obj = io.NopCloser(bytes.NewReader(m.data[from:to])), m.object(key)
		return nil
	})
	return r, obj, err
}

func (a *actor) Stat(ctx context.Context, key string) (obj upload.Object, err error) {
	if ctx.Err() != nil {
		return obj, failure("stat", key, context.Cause(ctx))
	}
	err = a.around("stat", key, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		m, ok := a.objects[key]
		if !ok {
			return failure("stat", key, upload.ErrNotExist)
		}
		obj = m.object(key)
		return nil
	})
	return obj, err
}

func (a *actor) List(ctx context.Context, prefix string) iter.Seq2[upload.Object, error] {
	return func(yield func(upload.Object, error) bool) {
		var l []upload.Object
		err := a.around("list", prefix, func() error {
			for _, k := range a.keys(prefix) {
				a.mu.Lock()
				l = append(l, a.objects[k].object(k))
				a.mu.Unlock()
			}
			return nil
		})
		if ctx.Err() != nil {
			err = failure("list", prefix, context.Cause(ctx))
		}
		if err != nil {
			yield(upload.Object{}, err)
			return
		}
		if a.pages != nil {
			l = a.pages(prefix, l)
		}
		for _, o := range l {
			if !yield(o, nil) {
				return
			}
		}
	}
}

func (a *actor) Delete(ctx context.Context, keys ...string) error {
	for _, k := range keys {
		if ctx.Err() != nil {
			return failure("delete", k, context.Cause(ctx))
		}
		err := a.around("delete", k, func() error {
			a.mu.Lock()
			defer a.mu.Unlock()
			delete(a.objects, k)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *actor) Copy(ctx context.Context, dst, src string, o upload.PutOptions) (upload.Object, error) {
	r, _, err := a.Get(ctx, src, upload.GetOptions{})
	if err != nil {
		return upload.Object{}, err
	}
	return a.PutStream(ctx, dst, r, o)
}
