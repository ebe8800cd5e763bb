package images

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// Limits on what is read from a store, in bytes, by SPEC.md; and on how many
// objects a list may have before it is taken for one that never ends.
const (
	maxManifest = chunked.MaxSigned
	maxHead     = chunked.MaxHead + keys.MaxSignature
	maxDomain   = chunked.MaxDomain + keys.MaxSignature
	maxIndex    = 65 << 20
	maxObjects  = 20_000_000
)

// list gives the objects under prefix by key. Order and repetition are the
// server's business.
func (s *Store) list(ctx context.Context, prefix string) (map[string]upload.Object, error) {
	all := map[string]upload.Object{}
	n := 0
	for o, err := range s.objects.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		if n++; n > maxObjects {
			return nil, fmt.Errorf("list %s/%s: more than %d objects", s, prefix, maxObjects)
		}
		if strings.HasPrefix(o.Key, prefix) {
			all[o.Key] = o
		}
	}
	return all, nil
}

// sortedKeys gives a map's keys in order.
func sortedKeys[V any](m map[string]V) []string {
	l := make([]string, 0, len(m))
	for k := range m {
		l = append(l, k)
	}
	slices.Sort(l)
	return l
}

func (s *Store) get(ctx context.Context, key string, limit int64) ([]byte, upload.Object, error) {
	return upload.GetBytes(ctx, s.objects, key, limit)
}

// getNamed reads an object whose name says its digest. size is -1 if it is not
// known.
func (s *Store) getNamed(ctx context.Context, key string, n chunked.Name, size, limit int64) ([]byte, error) {
	if size > limit {
		return nil, fmt.Errorf("get %s/%s: %w: %d bytes, at most %d are read", s, key, upload.ErrTooLarge, size, limit)
	}
	if size >= 0 {
		limit = size
	}
	b, _, err := s.get(ctx, key, limit)
	if err != nil {
		return nil, err
	}
	if got := chunked.Name(sha256.Sum256(b)); got != n {
		return nil, fmt.Errorf("get %s/%s: %w: its SHA-256 is %s", s, key, ErrDamaged, got)
	}
	return b, nil
}

// putNamed stores an object under the key its digest makes.
func (s *Store) putNamed(ctx context.Context, key string, n chunked.Name, data []byte) error {
	_, err := upload.PutBytes(ctx, s.objects, key, data, upload.PutOptions{SHA256: n[:]})
	return err
}

// putFresh is putNamed for data that n was computed from just now.
func (s *Store) putFresh(ctx context.Context, key string, n chunked.Name, data []byte) error {
	_, err := upload.PutBytes(ctx, s.objects, key, data, upload.PutOptions{SHA256: n[:], Fresh: true})
	return err
}

// putIf replaces what has etag, or makes the object if etag is "". The error is
// [upload.ErrExist] if another was faster. An answer that was lost is found out.
func (s *Store) putIf(ctx context.Context, key string, data []byte, etag string) error {
	sum := sha256.Sum256(data)
	o := upload.PutOptions{SHA256: sum[:], IfMatch: etag, IfNoneMatch: etag == ""}
	_, err := upload.PutBytes(ctx, s.objects, key, data, o)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if have, _, gerr := s.get(ctx, key, int64(len(data))); gerr == nil && string(have) == string(data) {
		return nil
	}
	// On S3 If-Match on nothing is a 404.
	if etag != "" && errors.Is(err, upload.ErrNotExist) {
		return fmt.Errorf("%w: %w", upload.ErrExist, err)
	}
	return err
}

// each calls f for all items, several at once, and returns the first error.
func each[T any](ctx context.Context, parallel int, items []T, f func(context.Context, T) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, it := range items {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { return f(ctx, it) })
	}
	return g.Wait()
}

// deleteInOrder removes objects one after the other, in the order given: what comes
// later refers to nothing that went before.
func (s *Store) deleteInOrder(ctx context.Context, keys ...string) error {
	for _, k := range keys {
		if err := s.objects.Delete(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// imageOf takes a key under images/ apart: the image, and what follows it.
func imageOf(key string) (image, rest string, ok bool) {
	image, rest, ok = strings.Cut(strings.TrimPrefix(key, chunked.ImagesFolder), "/")
	return image, rest, ok && strings.HasPrefix(key, chunked.ImagesFolder) && chunked.CheckImageName(image) == nil
}

// named reads "FOLDER/NAME" below an image.
func named(rest, folder string) (chunked.Name, bool) {
	text, ok := strings.CutPrefix(rest, folder+"/")
	if !ok {
		return chunked.Name{}, false
	}
	n, err := chunked.ParseName(text)
	return n, err == nil
}

// group makes concurrent callers for one key wait for the first's answer, and
// keeps it.
type group[K comparable, V any] struct {
	mu sync.Mutex
	m  map[K]*answer[V]
}

type answer[V any] struct {
	done chan struct{}
	v    V
	err  error
}

// do returns f's answer for k. Errors are not kept.
func (g *group[K, V]) do(ctx context.Context, k K, f func() (V, error)) (V, error) {
	for {
		g.mu.Lock()
		if g.m == nil {
			g.m = map[K]*answer[V]{}
		}
		a, ok := g.m[k]
		if !ok {
			a = &answer[V]{done: make(chan struct{})}
			g.m[k] = a
			g.mu.Unlock()
			a.v, a.err = f()
			if a.err != nil {
				g.mu.Lock()
				delete(g.m, k)
				g.mu.Unlock()
			}
			close(a.done)
			return a.v, a.err
		}
		g.mu.Unlock()
		select {
		case <-a.done:
			if a.err == nil {
				return a.v, nil
			}
			if ctx.Err() != nil {
				return a.v, context.Cause(ctx)
			}
			if !errors.Is(a.err, context.Canceled) && !errors.Is(a.err, context.DeadlineExceeded) {
				return a.v, a.err
			}
			// The first caller gave up: that is no answer for this one.
		case <-ctx.Done():
			var none V
			return none, context.Cause(ctx)
		}
	}
}
