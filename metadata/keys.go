package metadata

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Minter makes temporary credentials by an STS. Package sts has one.
type Minter interface {
	// Mint assumes the role; session names the session where the record
	// does not. The keys it returns have an expiration.
	Mint(ctx context.Context, s *STS, session string) (StaticKeys, error)
}

// ErrExpired is the error of credentials whose end has come.
var ErrExpired = errors.New("the credentials have expired")

// KeyRing finds the credentials that records ask for and keeps minted ones
// until they need renewal: when a quarter of their life is left, or as much
// as SDKs begin to renew at, 15 minutes, if that is less than half. Old ones
// are given out while the STS is down, as long as they are valid.
type KeyRing struct {
	mint Minter

	mu    sync.Mutex
	slots map[*Credentials]*slot
}

// maxSlots bounds a KeyRing; beyond it, keys are simply found out again.
const maxSlots = 1 << 15

// slot is one place credentials come from. Its mutex is held while they are
// found out, so that a crowd of requests makes one call.
type slot struct {
	mu     sync.Mutex
	keys   StaticKeys
	minted time.Time
	retry  time.Time // no further attempt before, after a failure
	err    error
	stat   os.FileInfo // of a file's keys
	roll   bool        // the file names no end: always six hours from now
}

// NewKeyRing returns an empty ring; mint may be nil if no record names an STS.
func NewKeyRing(mint Minter) *KeyRing {
	return &KeyRing{mint: mint, slots: make(map[*Credentials]*slot)}
}

// Get returns the credentials c names, valid at now.
func (r *KeyRing) Get(ctx context.Context, session string, c *Credentials, now time.Time) (StaticKeys, time.Time, error) {
	if s := c.Static; s != nil {
		k := *s
		if k.Expiration.IsZero() {
			k.Expiration = now.Add(6 * time.Hour).Truncate(time.Second)
		}
		if !k.Expiration.After(now) {
			return k, now, ErrExpired
		}
		return k, now, nil
	}
	r.mu.Lock()
	s := r.slots[c]
	if s == nil {
		if len(r.slots) >= maxSlots {
			clear(r.slots) // those of records that were replaced
		}
		s = new(slot)
		r.slots[c] = s
	}
	r.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.File != "":
		s.readFile(c.File, now)
	case c.STS != nil && r.mint == nil:
		s.err = errors.New("the server was started without an STS client")
	case c.STS != nil:
		s.renew(ctx, r.mint, c.STS, session, now)
	}
	if s.keys.Expiration.After(now) {
		return s.keys, s.minted, nil
	}
	if s.err == nil {
		s.err = ErrExpired
	}
	return StaticKeys{}, time.Time{}, s.err
}

func (s *slot) renew(ctx context.Context, mint Minter, from *STS, session string, now time.Time) {
	life := s.keys.Expiration.Sub(s.minted)
	left := s.keys.Expiration.Sub(now)
	if left > max(life/4, min(15*time.Minute, life/2)) || now.Before(s.retry) {
		return
	}
	// The first caller's patience must not end what the others wait for.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if from.SessionName != "" {
		session = from.SessionName
	}
	k, err := mint.Mint(ctx, from, session)
	if err == nil && !k.Expiration.After(now) {
		err = ErrExpired
	}
	if err != nil {
		s.err, s.retry = err, now.Add(2*time.Second)
		return
	}
	s.keys, s.minted, s.err = k, now, nil
}

// readFile reads the file again if it is another one than last time.
func (s *slot) readFile(name string, now time.Time) {
	defer func() {
		if s.roll {
			s.keys.Expiration = now.Add(6 * time.Hour)
		}
	}()
	st, err := os.Stat(name)
	if err != nil {
		s.err = fmt.Errorf("reading credentials: %w", err)
		return
	}
	if s.stat != nil && os.SameFile(s.stat, st) && s.stat.ModTime().Equal(st.ModTime()) && s.stat.Size() == st.Size() {
		return
	}
	if st.Size() > 64<<10 {
		s.err = fmt.Errorf("reading credentials: %s has %d bytes, more than 65536", name, st.Size())
		return
	}
	b, err := os.ReadFile(name)
	if err != nil {
		s.err = fmt.Errorf("reading credentials: %w", err)
		return
	}
	var j struct {
		AccessKeyID     string `json:"AccessKeyId"`
		SecretAccessKey string
		Token           string
		Expiration      time.Time
	}
	if err := json.Unmarshal(b, &j); err != nil || j.AccessKeyID == "" || j.SecretAccessKey == "" {
		s.err = fmt.Errorf("reading credentials: %s is not JSON with AccessKeyId, SecretAccessKey and Expiration", name)
		return
	}
	s.roll = j.Expiration.IsZero()
	s.keys = StaticKeys{j.AccessKeyID, j.SecretAccessKey, j.Token, j.Expiration}
	s.minted, s.stat, s.err = st.ModTime(), st, nil
}

// JSON returns the credentials the way the metadata service answers them.
func (r *KeyRing) JSON(ctx context.Context, session string, c *Credentials, now time.Time) (string, error) {
	k, minted, err := r.Get(ctx, session, c, now)
	if err != nil {
		return "", err
	}
	return object("Code", "Success", "LastUpdated", stamp(minted), "Type", "AWS-HMAC",
		"AccessKeyId", k.AccessKeyID, "SecretAccessKey", k.SecretAccessKey, "Token", k.Token, "Expiration", stamp(k.Expiration)), nil
}
