package catalog

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/internal/durable"
)

// memory is what this machine remembers of a catalog: the newest state seen,
// one for each key that signed any. It is the file catalog in the directory
// that package images keeps for the same store.
type memory struct {
	dir string // "" in memory only

	mu   sync.Mutex
	last seen
}

// seen is what is remembered.
type seen struct {
	Region string      `json:"region"`
	Seen   []seenState `json:"seen"`
}

type seenState struct {
	Sequence int64        `json:"sequence"`
	Root     chunked.Name `json:"root"`
	Signer   string       `json:"signer"` // fingerprint, as keys.Fingerprint has it
}

func openMemory(state, store string) (*memory, error) {
	if state == "" {
		return &memory{}, nil
	}
	sum := sha256.Sum256([]byte(store))
	m := &memory{dir: filepath.Join(state, "stores", hex.EncodeToString(sum[:16]))}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory that remembers what was seen: %w", err)
	}
	return m, nil
}

func (m *memory) file() string { return filepath.Join(m.dir, "catalog") }

// read gives what is remembered; m.mu is held.
func (m *memory) read() (seen, error) {
	if m.dir == "" {
		return m.last, nil
	}
	var s seen
	b, err := os.ReadFile(m.file())
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("read what is remembered in %s: %w", m.file(), err)
	}
	return s, nil
}

// current is what is remembered of keys that may still sign for the region: the
// others' heads are refused anyway.
func (m *memory) current(trust *keys.AllowedSigners) (seen, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.read()
	if err != nil {
		return s, err
	}
	s.Seen = slices.DeleteFunc(slices.Clone(s.Seen), func(x seenState) bool {
		return !trust.Knows(x.Signer, s.Region, Namespace)
	})
	return s, nil
}

// fresh says why h is not the newest state as far as s tells.
func (s seen) fresh(h *head) error {
	if len(s.Seen) > 0 && s.Region != h.Region {
		return fmt.Errorf("head: %w: of region %q, was of %q", ErrOther, h.Region, s.Region)
	}
	for _, x := range s.Seen {
		switch {
		case h.Sequence < x.Sequence:
			return fmt.Errorf("head %d of the catalog of %q: %w: sequence %d was there before", h.Sequence, h.Region, ErrRollback, x.Sequence)
		case h.Sequence == x.Sequence && h.Root != x.Root:
			return fmt.Errorf("head %d of the catalog of %q: %w: it names root %s, and named %s before", h.Sequence, h.Region, ErrForked, h.Root, x.Root)
		}
	}
	return nil
}

// see remembers a head that was found fresh.
func (m *memory) see(h *head, signer string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dir != "" {
		unlock, err := m.lock()
		if err != nil {
			return err
		}
		defer unlock()
	}
	s, err := m.read()
	if err != nil {
		return err
	}
	if s.Region != h.Region {
		s = seen{Region: h.Region}
	}
	now := seenState{h.Sequence, h.Root, signer}
	i := slices.IndexFunc(s.Seen, func(x seenState) bool { return x.Signer == signer })
	switch {
	case i < 0:
		s.Seen = append(slices.Clone(s.Seen), now)
	case s.Seen[i].Sequence >= h.Sequence:
		return nil // another reader was faster
	default:
		s.Seen = slices.Clone(s.Seen)
		s.Seen[i] = now
	}
	if m.dir == "" {
		m.last = s
		return nil
	}
	return m.write(s)
}

func (m *memory) forget() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = seen{}
	if m.dir == "" {
		return nil
	}
	if err := os.Remove(m.file()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the catalog: %w", err)
	}
	return nil
}

// write replaces the file.
func (m *memory) write(s seen) error {
	b, err := json.Marshal(s)
	if err == nil {
		err = durable.Replace(m.file(), 0o600, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("remember in %s: %w", m.file(), err)
	}
	return nil
}

// lock excludes other processes until unlock is called.
func (m *memory) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(m.dir, ".catalog.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock what is remembered: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock what is remembered in %s: %w", m.dir, err)
	}
	return func() { f.Close() }, nil
}
