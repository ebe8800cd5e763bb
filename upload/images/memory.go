package images

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
	"github.com/instar-image/instar/internal/durable"
)

// memory is what this machine remembers of a store, in a directory of its own
// below Options.State: heads/IMAGE, labels/DOMAIN and footers/. Without a
// directory it lasts as long as the process.
type memory struct {
	dir string // "" in memory only

	mu     sync.Mutex
	heads  map[string]seenHeads // if dir is ""
	labels map[string]string
}

// seenHeads are the newest heads seen of an image, one for each key that signed
// any.
type seenHeads struct {
	Image string         `json:"image"`
	Seen  []chunked.Seen `json:"seen"`
}

type seenLabel struct {
	Domain string `json:"domain"`
	Label  string `json:"label"`
}

func openMemory(state, store string) (*memory, error) {
	m := &memory{heads: map[string]seenHeads{}, labels: map[string]string{}}
	if state == "" {
		return m, nil
	}
	sum := sha256.Sum256([]byte(store))
	m.dir = filepath.Join(state, "stores", hex.EncodeToString(sum[:16]))
	for _, d := range []string{"heads", "labels", "footers"} {
		if err := os.MkdirAll(filepath.Join(m.dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("make the directory that remembers what was seen: %w", err)
		}
	}
	// For people: the directory's name is a hash.
	name := filepath.Join(m.dir, "store")
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		if err := writeDurable(name, []byte(store+"\n")); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// seen is what is remembered of an image's head.
func (m *memory) seen(image string) ([]chunked.Seen, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.readSeen(image)
}

func (m *memory) readSeen(image string) ([]chunked.Seen, error) {
	if m.dir == "" {
		return m.heads[image].Seen, nil
	}
	var h seenHeads
	name := filepath.Join(m.dir, "heads", image)
	ok, err := readJSON(name, &h)
	if ok && h.Image != image {
		err = fmt.Errorf("%s is of image %q: remove it if that is meant", name, h.Image)
	}
	return h.Seen, err
}

// see remembers a head that was verified and found not to be older than what
// is remembered.
func (m *memory) see(h *chunked.Head, signer string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dir != "" {
		unlock, err := lockFile(filepath.Join(m.dir, "heads", ".lock"))
		if err != nil {
			return err
		}
		defer unlock()
	}
	seen, err := m.readSeen(h.Name)
	if err != nil {
		return err
	}
	now := chunked.Seen{Sequence: h.Sequence, Manifest: h.Manifest, Signer: signer}
	i := slices.IndexFunc(seen, func(s chunked.Seen) bool { return s.Signer == signer })
	switch {
	case i < 0:
		seen = append(seen, now)
	case seen[i].Sequence >= h.Sequence:
		return nil // another reader was faster
	default:
		seen = slices.Clone(seen)
		seen[i] = now
	}
	all := seenHeads{h.Name, seen}
	if m.dir == "" {
		m.heads[h.Name] = all
		return nil
	}
	return writeJSON(filepath.Join(m.dir, "heads", h.Name), all)
}

// forget drops what is remembered of an image's head.
func (m *memory) forget(image string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.heads, image)
	if m.dir == "" {
		return nil
	}
	if err := os.Remove(filepath.Join(m.dir, "heads", image)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the head of image %q: %w", image, err)
	}
	return nil
}

// label holds a domain's label against the one remembered.
func (m *memory) label(domain string, l chunked.Label) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	have, ok, err := m.readLabel(domain)
	switch {
	case err != nil:
		return err
	case ok && have != l.String():
		return fmt.Errorf("domain %q: %w: its label is %s, was %s", domain, ErrLabel, l, have)
	case ok:
		return nil
	case m.dir == "":
		m.labels[domain] = l.String()
		return nil
	}
	return writeJSON(filepath.Join(m.dir, "labels", domain), seenLabel{domain, l.String()})
}

// seenLabel is the label remembered of a domain.
func (m *memory) seenLabel(domain string) (string, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.readLabel(domain)
}

func (m *memory) readLabel(domain string) (string, bool, error) {
	if m.dir == "" {
		l, ok := m.labels[domain]
		return l, ok, nil
	}
	var seen seenLabel
	ok, err := readJSON(filepath.Join(m.dir, "labels", domain), &seen)
	return seen.Label, ok, err
}

// readJSON reports whether the file is there.
func readJSON(name string, v any) (bool, error) {
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return false, fmt.Errorf("read what is remembered in %s: %w", name, err)
	}
	return true, nil
}

func writeJSON(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeDurable(name, append(b, '\n'))
}

// writeDurable replaces a file.
func writeDurable(name string, data []byte) error {
	if err := durable.Replace(name, 0o600, data); err != nil {
		return fmt.Errorf("remember in %s: %w", name, err)
	}
	return nil
}

// lockFile excludes other processes until unlock is called.
func lockFile(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock what is remembered: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}
