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
	"math/rand/v2"
	"slices"
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
	auth  [32]byte                         // authenticates live objects
	mu    sync.Mutex                       // held by who replaces the map
	live  atomic.Pointer[map[string]known] // copied on write
}

// known is an instance's object as it was last seen.
type known struct {
	live metadata.Live
	seq  uint64 // counts its changes; 0: there is no object
	etag string
}

var _ metadata.State = (*State)(nil)

// OpenState reads the token key, or makes it where there is none yet: of
// several servers that start at once, one makes it and all use it. It is
// sealed to the recipients and opened with the identities.
func OpenState(ctx context.Context, store upload.Store, identities []age.Identity, recipients []age.Recipient) (*State, error) {
	s := &State{store: store}
	s.live.Store(&map[string]known{})
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
func (s *State) Live(id string) metadata.Live { return (*s.live.Load())[id].live }

// sealedLive is an object: the state, how often it was changed, a random
// number that makes every write another one, and the tag over all of it and
// the id.
type sealedLive struct {
	State json.RawMessage `json:"state"`
	Seq   uint64          `json:"seq"`
	Nonce uint64          `json:"nonce"`
	Tag   []byte          `json:"tag"`
}

func (s *State) tag(id string, l *sealedLive) []byte {
	h := hmac.New(sha256.New, s.auth[:])
	fmt.Fprintf(h, "%d:%s,%d,%d,", len(id), id, l.Seq, l.Nonce)
	h.Write(l.State)
	return h.Sum(nil)
}

// load reads an instance's object. One that is older than before, or gone, was
// put back by somebody: a withdrawn ticket would be good again.
func (s *State) load(ctx context.Context, id string, before known) (k known, err error) {
	b, o, err := upload.GetBytes(ctx, s.store, livePrefix+id, maxObject)
	switch {
	case errors.Is(err, upload.ErrNotExist):
	case err != nil:
		return k, fmt.Errorf("reading the state of instance %s: %w", id, err)
	default:
		var sealed sealedLive
		if err := json.Unmarshal(b, &sealed); err != nil || !hmac.Equal(sealed.Tag, s.tag(id, &sealed)) {
			return k, fmt.Errorf("the state of instance %s in the store is not by a server of this store", id)
		}
		k.seq, k.etag = sealed.Seq, o.ETag
		if err := json.Unmarshal(sealed.State, &k.live); err != nil {
			return k, fmt.Errorf("reading the state of instance %s: %w", id, err)
		}
	}
	if k.seq < before.seq {
		return k, fmt.Errorf("the state of instance %s in the store is older (%d) than it was (%d): an old version was put back, or it was deleted; restart the servers if that was you", id, k.seq, before.seq)
	}
	return k, nil
}

// Update changes an instance's object by conditional PUT: of two servers that
// change it at once, the second begins again with what the first made.
func (s *State) Update(ctx context.Context, id string, change func(*metadata.Live) error) error {
	for attempt := 0; ; attempt++ {
		k, err := s.load(ctx, id, (*s.live.Load())[id])
		if err != nil {
			return err
		}
		if err := change(&k.live); err != nil {
			return err
		}
		k.seq++
		etag := k.etag
		b, err := s.seal(id, k)
		if err != nil {
			return fmt.Errorf("keeping the state of instance %s: %w", id, err)
		}
		o, err := upload.PutBytes(ctx, s.store, livePrefix+id, b, upload.PutOptions{IfMatch: etag, IfNoneMatch: etag == ""})
		if err == nil {
			k.etag = o.ETag
			s.learn(map[string]known{id: k})
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

func (s *State) seal(id string, k known) ([]byte, error) {
	state, err := json.Marshal(k.live)
	if err != nil {
		return nil, err
	}
	l := sealedLive{State: state, Seq: k.seq, Nonce: rand.Uint64()}
	l.Tag = s.tag(id, &l)
	return json.Marshal(l)
}

// learn takes up what is newer than what is known.
func (s *State) learn(news map[string]known) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := maps.Clone(*s.live.Load())
	for id, k := range news {
		if k.seq >= next[id].seq {
			next[id] = k
		}
	}
	s.live.Store(&next)
}

// Refresh reads what other servers changed. Objects that are not by a server
// of this store, or older than they were, are left alone and named in the
// error.
func (s *State) Refresh(ctx context.Context) error {
	before := *s.live.Load()
	gone := maps.Clone(before)
	var changed []string
	for o, err := range s.store.List(ctx, livePrefix) {
		if err != nil {
			return fmt.Errorf("listing the instances' state: %w", err)
		}
		id := strings.TrimPrefix(o.Key, livePrefix)
		delete(gone, id)
		if o.ETag == "" || o.ETag != before[id].etag {
			changed = append(changed, id)
		}
	}
	changed = slices.AppendSeq(changed, maps.Keys(gone)) // perhaps only missed by the listing
	read := make([]known, len(changed))
	errs := make([]error, len(changed))
	each(len(changed), func(i int) { read[i], errs[i] = s.load(ctx, changed[i], before[changed[i]]) })
	news := make(map[string]known, len(changed))
	for i, id := range changed {
		if errs[i] == nil && read[i].seq > 0 {
			news[id] = read[i]
		}
	}
	if len(news) > 0 {
		s.learn(news)
	}
	return some(errs)
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
