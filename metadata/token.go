package metadata

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"hash"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// A token is 42 bytes in unpadded URL-safe base64, 56 characters, and is kept
// nowhere: key id (1), expiry in Unix seconds (5, big-endian), nonce (12), and
// the first 24 bytes of HMAC-SHA256 over those 18 bytes, the instance's
// generation and launch time (8 each) and its id.
const (
	tokenHead  = 1 + 5 + 12
	tokenLen   = tokenHead + 24
	tokenChars = tokenLen * 4 / 3
)

// minter makes and checks tokens with pools of keyed hashes, which spare each
// request the key schedule.
type minter struct {
	last  atomic.Pointer[keyedPool] // the one used last: nearly always the one
	mu    sync.RWMutex
	pools map[TokenKey]*sync.Pool
}

// keyedPool is a pool and the key it is for.
type keyedPool struct {
	key  TokenKey
	pool *sync.Pool
}

func (m *minter) pool(k TokenKey) *sync.Pool {
	if l := m.last.Load(); l != nil && l.key == k {
		return l.pool
	}
	m.mu.RLock()
	p := m.pools[k]
	m.mu.RUnlock()
	if p != nil {
		m.last.Store(&keyedPool{k, p})
		return p
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pools == nil || len(m.pools) > 16 {
		m.pools = make(map[TokenKey]*sync.Pool)
	}
	p = &sync.Pool{New: func() any { return &mac{Hash: hmac.New(sha256.New, k.Secret[:])} }}
	m.pools[k] = p
	return p
}

type mac struct {
	hash.Hash
	in  []byte
	sum []byte
}

// tag computes the tag of a token's head for an instance. The result is valid
// until the mac is used again.
func (h *mac) tag(head []byte, in *Instance, generation uint64) []byte {
	h.Reset()
	h.in = append(h.in[:0], head...)
	h.in = binary.BigEndian.AppendUint64(h.in, generation)
	var launch int64
	if !in.LaunchTime.IsZero() {
		launch = in.LaunchTime.UnixNano()
	}
	h.in = binary.BigEndian.AppendUint64(h.in, uint64(launch))
	h.in = append(h.in, in.ID...)
	h.Write(h.in)
	h.sum = h.Sum(h.sum[:0])
	return h.sum[:tokenLen-tokenHead]
}

// mint makes a token for the instance that is good for ttl from now.
func (m *minter) mint(k TokenKey, in *Instance, generation uint64, now time.Time, ttl time.Duration) string {
	var t [tokenLen]byte
	t[0] = k.ID
	var expiry [8]byte
	binary.BigEndian.PutUint64(expiry[:], uint64(now.Add(ttl).Unix()))
	copy(t[1:6], expiry[3:])
	rand.Read(t[6:tokenHead]) // never fails
	pool := m.pool(k)
	h := pool.Get().(*mac)
	copy(t[tokenHead:], h.tag(t[:tokenHead], in, generation))
	pool.Put(h)
	return base64.RawURLEncoding.EncodeToString(t[:])
}

// valid reports whether a token is the instance's and has not expired.
func (m *minter) valid(keys []TokenKey, token string, in *Instance, generation uint64, now time.Time) bool {
	return now.Unix() < m.expiry(keys, token, in, generation)
}

// expiry returns when the instance's token expires, in Unix seconds; the
// beginning of time if it is not the instance's token.
func (m *minter) expiry(keys []TokenKey, token string, in *Instance, generation uint64) int64 {
	const never = math.MinInt64
	if len(token) != tokenChars {
		return never
	}
	var t [tokenLen]byte
	var chars [tokenChars]byte
	copy(chars[:], token)
	if _, err := base64.RawURLEncoding.Decode(t[:], chars[:]); err != nil {
		return never
	}
	for _, k := range keys {
		if k.ID != t[0] {
			continue
		}
		pool := m.pool(k)
		h := pool.Get().(*mac)
		ok := hmac.Equal(h.tag(t[:tokenHead], in, generation), t[tokenHead:])
		pool.Put(h)
		if ok {
			var expiry [8]byte
			copy(expiry[3:], t[1:6])
			return int64(binary.BigEndian.Uint64(expiry[:]))
		}
	}
	return never
}

// proven is a token that was found valid on a connection: while nothing it
// depends on changes, its next use there is not computed again.
type proven struct {
	token      string
	in         *Instance
	generation uint64
	keys       *TokenKey // the first of those it was checked with
	expiry     int64
}

// validOn is valid, with what c knows of its last token. A connection's
// requests come one after the other, so that c needs no lock.
func (m *minter) validOn(c *connection, keys []TokenKey, token string, in *Instance, generation uint64, now time.Time) bool {
	if c == nil {
		return m.valid(keys, token, in, generation, now)
	}
	p := &c.proven
	if p.in != in || p.generation != generation || p.keys != &keys[0] || p.token != token {
		*p = proven{token, in, generation, &keys[0], m.expiry(keys, token, in, generation)}
	}
	return now.Unix() < p.expiry
}
