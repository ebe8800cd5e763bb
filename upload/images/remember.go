package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/instar-image/instar/bundle/chunked"
)

// Limits of what is remembered of objects: bytes of one, and how many there are.
const (
	maxRecalled = 4 << 20
	maxRecall   = 512
)

// recall is where objects are remembered that have one content for ever, or that
// may be out of date without harm, so that they need not be asked for again
// ([Options.Remember]): what is read from there is verified like what the store gives.
func (s *Store) recall() string {
	if s.memory.dir == "" || !s.opt.Remember {
		return ""
	}
	return filepath.Join(s.memory.dir, "objects")
}

func recalledFile(dir, key string) string {
	n := chunked.Name(sha256.Sum256([]byte(key)))
	return filepath.Join(dir, n.String())
}

// recalled gives an object that is remembered and that good accepts.
func (s *Store) recalled(key string, good func([]byte) bool) ([]byte, bool) {
	dir := s.recall()
	if dir == "" {
		return nil, false
	}
	b, err := os.ReadFile(recalledFile(dir, key))
	return b, err == nil && good(b)
}

// keep remembers an object; that it cannot is no error. The oldest go when there are too many.
func (s *Store) keep(key string, b []byte) {
	dir := s.recall()
	if dir == "" || len(b) > maxRecalled {
		return
	}
	name := recalledFile(dir, key)
	if have, err := os.ReadFile(name); err == nil && bytes.Equal(have, b) {
		return
	}
	if os.MkdirAll(dir, 0o700) != nil || writeDurable(name, b) != nil {
		return
	}
	list, err := os.ReadDir(dir)
	if err != nil || len(list) <= maxRecall {
		return
	}
	age := make(map[string]int64, len(list))
	for _, e := range list {
		if i, err := e.Info(); err == nil {
			age[e.Name()] = i.ModTime().UnixNano()
		}
	}
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return int(min(1, max(-1, age[a.Name()]-age[b.Name()]))) })
	for _, e := range list[:len(list)-maxRecall/2] {
		os.Remove(filepath.Join(dir, e.Name()))
	}
}

// getRecalled is getNamed, asking the store only for what is not remembered.
func (s *Store) getRecalled(ctx context.Context, key string, n chunked.Name, size, limit int64) ([]byte, error) {
	if b, ok := s.recalled(key, func(b []byte) bool { return chunked.NameOf(b) == n && int64(len(b)) <= limit }); ok {
		return b, nil
	}
	b, err := s.getNamed(ctx, key, n, size, limit)
	if err == nil {
		s.keep(key, b)
	}
	return b, err
}

var errNotRecalled = errors.New("not remembered")

// recalledKey is the index's key out of what is remembered: a wrong one would
// open nothing.
func (i *Image) recalledKey() (key chunked.Key, err error) {
	err = errNotRecalled
	i.s.recalled(chunked.KeysKey(i.Manifest.Name, i.Name), func(b []byte) bool {
		doc, perr := chunked.ParseKeysObject(b)
		if perr == nil {
			key, err = doc.IndexKey(i.Manifest.Index.Root.Name, i.s.opt.Identities...)
		}
		return err == nil
	})
	return key, err
}
