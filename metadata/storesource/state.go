package storesource

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"filippo.io/age"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/upload"
)

// Objects of the state: the token key, sealed to the servers, and one object
// per instance, authenticated with a key derived from it.
const (
	keyObject  = "state/token-key"
	livePrefix = "state/live/"
)

// State is shared by all servers of a store. It is made by [OpenState].
type State struct {
	store upload.Store
	keys  []metadata.TokenKey
	auth  [32]byte // authenticates live objects
	mu    sync.Mutex
	live  atomic.Pointer[map[string]metadata.Live]
}

var _ metadata.State = (*State)(nil)

// OpenState reads the token key, or makes it where there is none yet: of
// several servers that start at once, one makes it and all use it. It is
// sealed to the recipients and opened with the identities.
func OpenState(ctx context.Context, store upload.Store, identities []age.Identity, recipients []age.Recipient) (*State, error) {
	s := &State{store: store}
	s.live.Store(&map[string]metadata.Live{})
	sealed, _, err := upload.GetBytes(ctx, store, keyObject, maxObject)
	if errors.Is(err, upload.ErrNotExist) {
		fresh := metadata.NewTokenKey(0)
		var b bytes.Buffer
		w, serr := age.Encrypt(&b, recipients...)
		if serr == nil {
			_, serr = w.Write(fresh.Secret[:])
		}
		if serr == nil {
			serr = w.Close()
		}
		if serr != nil {
			return nil, fmt.Errorf("sealing the token key: %w", serr)
		}
		_, perr := upload.PutBytes(ctx, store, keyObject, b.Bytes(), upload.PutOptions{IfNoneMatch: true})
		if perr != nil && !errors.Is(perr, upload.ErrExist) {
			return nil, fmt.Errorf("keeping the token key: %w", perr)
		}
		sealed, _, err = upload.GetBytes(ctx, store, keyObject, maxObject)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the token key: %w", err)
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), identities...)
	if err != nil {
		return nil, fmt.Errorf("opening the token key: %w", err)
	}
	var k metadata.TokenKey
	if _, err := io.ReadFull(r, k.Secret[:]); err != nil {
		return nil, fmt.Errorf("opening the token key: %w", err)
	}
	s.keys = []metadata.TokenKey{k}
	h := hmac.New(sha256.New, k.Secret[:])
	h.Write([]byte("instar metadata state"))
	h.Sum(s.auth[:0])
	return s, s.Refresh(ctx)
}

// TokenKeys returns the key all servers share.
func (s *State) TokenKeys() []metadata.TokenKey { return s.keys }

// Live returns what was known at the last refresh or update.
func (s *State) Live(id string) metadata.Live { return (*s.live.Load())[id] }

// sealedLive is an object: the state and its tag over id and state.
type sealedLive struct {
	State json.RawMessage `json:"state"`
	Tag   []byte          `json:"tag"`
}

func (s *State) tag(id string, state []byte) []byte {
	h := hmac.New(sha256.New, s.auth[:])
	fmt.Fprintf(h, "%d:%s", len(id), id)
	h.Write(state)
	return h.Sum(nil)
}

// load reads an instance's object; etag is "" if there is none.
func (s *State) load(ctx context.Context, id string) (l metadata.Live, etag string, err error) {
	b, o, err := upload.GetBytes(ctx, s.store, livePrefix+id, maxObject)
	if errors.Is(err, upload.ErrNotExist) {
		return l, "", nil
	} else if err != nil {
		return l, "", fmt.Errorf("reading the state of instance %s: %w", id, err)
	}
	var sealed sealedLive
	if err := json.Unmarshal(b, &sealed); err != nil || !hmac.Equal(sealed.Tag, s.tag(id, sealed.State)) {
		return l, "", fmt.Errorf("the state of instance %s in the store is not by a server of this store", id)
	}
	return l, o.ETag, json.Unmarshal(sealed.State, &l)
}

// Update changes an instance's object by conditional PUT: of two servers that
// change it at once, the second begins again with what the first made.
func (s *State) Update(ctx context.Context, id string, change func(*metadata.Live) error) error {
	for attempt := 0; ; attempt++ {
		l, etag, err := s.load(ctx, id)
		if err != nil {
			return err
		}
		if err := change(&l); err != nil {
			return err
		}
		state, err := json.Marshal(l)
		if err != nil {
			return fmt.Errorf("keeping the state of instance %s: %w", id, err)
		}
		b, err := json.Marshal(sealedLive{state, s.tag(id, state)})
		if err != nil {
			return fmt.Errorf("keeping the state of instance %s: %w", id, err)
		}
		o := upload.PutOptions{IfMatch: etag, IfNoneMatch: etag == ""}
		_, err = upload.PutBytes(ctx, s.store, livePrefix+id, b, o)
		if err == nil {
			s.set(id, l)
			return nil
		}
		if !errors.Is(err, upload.ErrExist) || attempt == 20 {
			return fmt.Errorf("keeping the state of instance %s: %w", id, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(attempt) * 10 * time.Millisecond):
		}
	}
}

func (s *State) set(id string, l metadata.Live) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(*s.live.Load())
	next[id] = l
	s.live.Store(&next)
}

// Refresh reads what other servers changed. Objects that are not by a server
// of this store are left alone and named in the error.
func (s *State) Refresh(ctx context.Context) error {
	var errs []error
	for o, err := range s.store.List(ctx, livePrefix) {
		if err != nil {
			return fmt.Errorf("listing the instances' state: %w", err)
		}
		id := strings.TrimPrefix(o.Key, livePrefix)
		l, etag, err := s.load(ctx, id)
		if err != nil {
			errs = append(errs, err)
		} else if etag != "" {
			s.set(id, l)
		}
	}
	return errors.Join(errs...)
}

// Watch refreshes again and again until ctx ends; after is told of failures.
func (s *State) Watch(ctx context.Context, every time.Duration, after func(error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := s.Refresh(ctx); err != nil && ctx.Err() == nil {
				after(err)
			}
		}
	}
}
