package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/upload"
)

// memory is a store's objects, which several memStores show.
type objectsInMemory struct {
	mu   sync.Mutex
	m    map[string]memObject
	made int
}

type memObject struct {
	data []byte
	etag string
}

// memStore is one client's way to a store in memory. fault is asked before and
// after each request (done); an error before means it was not carried out, one
// after that the reply was lost.
type memStore struct {
	*objectsInMemory
	fault func(op, key string, done bool) error
}

func newMemory() *objectsInMemory { return &objectsInMemory{m: map[string]memObject{}} }

func (o *objectsInMemory) client(fault func(op, key string, done bool) error) *memStore {
	return &memStore{o, fault}
}

// snapshot copies all objects.
func (o *objectsInMemory) snapshot() map[string]memObject {
	o.mu.Lock()
	defer o.mu.Unlock()
	return maps.Clone(o.m)
}

func (o *objectsInMemory) restore(m map[string]memObject) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.m = maps.Clone(m)
}

func (o *objectsInMemory) set(key string, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.made++
	o.m[key] = memObject{data, fmt.Sprint(o.made)}
}

// spoil changes a byte of an object that is no mere word.
func (o *objectsInMemory) spoil(key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if x, ok := o.m[key]; ok && len(x.data) > 100 {
		data := bytes.Clone(x.data)
		data[50] ^= 1
		o.m[key] = memObject{data, x.etag + "x"}
	}
}

var errFault = errors.New("a fault of the store")

func (s *memStore) do(op, key string, f func() error) error {
	if s.fault != nil {
		if err := s.fault(op, key, false); err != nil {
			return &upload.Error{Op: op, Store: "mem", Key: key, Kind: upload.ErrUnreachable, Err: err}
		}
	}
	s.mu.Lock()
	err := f()
	s.mu.Unlock()
	if s.fault != nil && err == nil {
		if ferr := s.fault(op, key, true); ferr != nil {
			return &upload.Error{Op: op, Store: "mem", Key: key, Kind: upload.ErrUnreachable, Err: ferr}
		}
	}
	return err
}

func memError(op, key string, kind error) error {
	return &upload.Error{Op: op, Store: "mem", Key: key, Kind: kind}
}

func (s *memStore) String() string { return "s3://mem" }

func (s *memStore) Bucket() string                                { return "mem" }
func (s *memStore) Location(context.Context) (string, error)      { return "", nil }
func (s *memStore) CreateBucket(context.Context, string) error    { return nil }
func (s *memStore) DeleteBucket(context.Context) error            { return nil }
func (s *memStore) ServerTime(context.Context) (time.Time, error) { return time.Now(), nil }
func (s *memStore) Close() error                                  { return nil }

func (s *memStore) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (upload.Object, error) {
	data := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(body, 0, size), data); err != nil {
		return upload.Object{}, err
	}
	var obj upload.Object
	err := s.do("put", key, func() error {
		old, ok := s.m[key]
		if o.IfNoneMatch && ok || o.IfMatch != "" && old.etag != o.IfMatch {
			return memError("put", key, upload.ErrExist)
		}
		s.made++
		s.m[key] = memObject{data, fmt.Sprint(s.made)}
		obj = upload.Object{Key: key, Size: size, ETag: s.m[key].etag, Modified: time.Now()}
		return nil
	})
	return obj, err
}

func (s *memStore) PutStream(ctx context.Context, key string, r io.Reader, o upload.PutOptions) (upload.Object, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return upload.Object{}, err
	}
	return s.Put(ctx, key, bytes.NewReader(data), int64(len(data)), o)
}

func (s *memStore) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	var have memObject
	err := s.do("get", key, func() error {
		var ok bool
		if have, ok = s.m[key]; !ok {
			return memError("get", key, upload.ErrNotExist)
		}
		return nil
	})
	if err != nil {
		return nil, upload.Object{}, err
	}
	data := have.data[min(o.Offset, int64(len(have.data))):]
	if o.Length > 0 {
		data = data[:min(o.Length, int64(len(data)))]
	}
	return io.NopCloser(bytes.NewReader(data)), upload.Object{Key: key, Size: int64(len(have.data)), ETag: have.etag, Modified: time.Now()}, nil
}

func (s *memStore) Stat(ctx context.Context, key string) (upload.Object, error) {
	var obj upload.Object
	err := s.do("stat", key, func() error {
		have, ok := s.m[key]
		if !ok {
			return memError("stat", key, upload.ErrNotExist)
		}
		obj = upload.Object{Key: key, Size: int64(len(have.data)), ETag: have.etag, Modified: time.Now()}
		return nil
	})
	return obj, err
}

func (s *memStore) List(ctx context.Context, prefix string) iter.Seq2[upload.Object, error] {
	var l []upload.Object
	err := s.do("list", prefix, func() error {
		for _, k := range slices.Sorted(maps.Keys(s.m)) {
			if strings.HasPrefix(k, prefix) {
				l = append(l, upload.Object{Key: k, Size: int64(len(s.m[k].data)), ETag: s.m[k].etag, Modified: time.Now()})
			}
		}
		return nil
	})
	return func(yield func(upload.Object, error) bool) {
		if err != nil {
			yield(upload.Object{}, err)
			return
		}
		for _, o := range l {
			if !yield(o, nil) {
				return
			}
		}
	}
}

func (s *memStore) Delete(ctx context.Context, keys ...string) error {
	return s.do("delete", strings.Join(keys, " "), func() error {
		for _, k := range keys {
			delete(s.m, k)
		}
		return nil
	})
}

func (s *memStore) Copy(ctx context.Context, dst, src string, o upload.PutOptions) (upload.Object, error) {
	r, obj, err := s.Get(ctx, src, upload.GetOptions{})
	if err != nil {
		return obj, err
	}
	return s.PutStream(ctx, dst, r, o)
}
