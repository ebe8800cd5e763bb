package metadata

import (
	"context"
	"crypto/rand"
	"maps"
	"sync"
	"sync/atomic"
)

// NewState returns a State in memory alone: a restart revokes every token and
// forgets events and withdrawals.
func NewState() State {
	s := &memoryState{keys: []TokenKey{NewTokenKey(0)}}
	s.live.Store(&map[string]Live{})
	return s
}

// NewTokenKey returns a random key.
func NewTokenKey(id byte) TokenKey {
	k := TokenKey{ID: id}
	rand.Read(k.Secret[:]) // never fails
	return k
}

type memoryState struct {
	keys []TokenKey
	mu   sync.Mutex                      // held by writers
	live atomic.Pointer[map[string]Live] // copied on write: changes are rare, reads are not
}

func (s *memoryState) TokenKeys() []TokenKey { return s.keys }

func (s *memoryState) Live(id string) Live { return (*s.live.Load())[id] }

func (s *memoryState) Update(_ context.Context, id string, change func(*Live) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := *s.live.Load()
	l := old[id]
	if err := change(&l); err != nil {
		return err
	}
	next := maps.Clone(old)
	next[id] = l
	s.live.Store(&next)
	return nil
}
