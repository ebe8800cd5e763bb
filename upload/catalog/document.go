package catalog

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
)

// Keys of objects and limits of FORMAT.md, in bytes.
const (
	HeadKey  = "catalog/head"
	DataFold = "catalog/data/" // roots and pages, each under its name

	Namespace = "instar-catalog" // of the head's signature

	maxHead    = 4 << 10
	maxRoot    = 32 << 20
	maxPage    = 8 << 20
	maxNumber  = 1<<53 - 1
	pageFull   = 64 << 10 // a page with more bytes is split
	maxEntry   = 1 << 20
	keptIDs    = 128 // commits that a root remembers
	keptStates = 16  // states before this one whose objects are not deleted yet
)

const (
	formatHead = "instar-catalog"
	formatRoot = "instar-catalog-root"
	formatPage = "instar-catalog-page"
	version    = 1
)

// head is the one object that changes in place: it says which root is the
// newest (FORMAT.md §2).
type head struct {
	Format   string       `json:"format"`
	Version  int          `json:"version"`
	Region   string       `json:"region"`
	Sequence int64        `json:"sequence"`
	Root     chunked.Name `json:"root"`
	Size     int64        `json:"size"` // of the root, bytes
	Created  time.Time    `json:"created"`
	Expires  time.Time    `json:"expires,omitzero"`
}

// root lists the pages of a state (FORMAT.md §3).
type root struct {
	Format   string           `json:"format"`
	Version  int              `json:"version"`
	Region   string           `json:"region"`
	Sequence int64            `json:"sequence"`
	Commits  []string         `json:"commits"` // IDs of the newest changes, this one's last
	Retired  [][]chunked.Name `json:"retired"` // objects of states before this one that it does not use, oldest state first
	Pages    []pageRef        `json:"pages"`
}

// pageRef is a page in its root: it holds the entries from First up to the
// next page's.
type pageRef struct {
	First   string       `json:"first"`
	Name    chunked.Name `json:"name"`
	Size    int64        `json:"size"`
	Entries int          `json:"entries"`
}

// page holds entries by key (FORMAT.md §4).
type page struct {
	Format  string  `json:"format"`
	Version int     `json:"version"`
	Salt    string  `json:"salt"` // no page's name ever comes to life again
	Entries []entry `json:"entries"`
}

// entry is a key and its one value.
type entry struct {
	Key     string   `json:"key"`
	Image   *Image   `json:"image,omitempty"`
	KeyPair *KeyPair `json:"key_pair,omitempty"`
	Account *Account `json:"account,omitempty"`
	Token   *Token   `json:"token,omitempty"`
	Claim   *Claim   `json:"claim,omitempty"`
	Ref     string   `json:"ref,omitempty"`

	StoreTask *StoreTask `json:"store_task,omitempty"`
}

// encodeJSON gives the one form of a document: no blanks, fields in their
// order, no escapes but JSON's own.
func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// decodeJSON reads a document and accepts only what encodeJSON gives.
func decodeJSON(what string, b []byte, limit int, v any, format func() (string, int)) error {
	if len(b) > limit {
		return fmt.Errorf("%s: %w: %d bytes are more than %d", what, ErrFormat, len(b), limit)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w: %w", what, ErrFormat, err)
	}
	name, ver := format()
	switch {
	case name != what:
		return fmt.Errorf("%s: %w: its format is %.40q", what, ErrFormat, name)
	case ver != version:
		return fmt.Errorf("%s: %w: version %d, this program knows version %d", what, ErrVersion, ver, version)
	}
	again, err := encodeJSON(v)
	if err != nil || !bytes.Equal(again, b) {
		return fmt.Errorf("%s: %w: it is not in the one form that is allowed", what, ErrFormat)
	}
	return nil
}

// sign gives the signed head.
func (h *head) sign(ctx context.Context, s keys.Signer) ([]byte, error) {
	h.Format, h.Version = formatHead, version
	doc, err := encodeJSON(h)
	if err != nil {
		return nil, err
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	return chunked.Sign(ctx, doc, Namespace, s)
}

// openHead verifies a head and reads it. region is the principal; "" takes the
// one the document names, if its signer may speak for that.
func openHead(object []byte, trust *keys.AllowedSigners, region string) (*head, string, error) {
	if len(object) > maxHead+keys.MaxSignature {
		return nil, "", fmt.Errorf("head: %w: it has %d bytes", ErrFormat, len(object))
	}
	doc, _, err := chunked.Split(object)
	if err != nil {
		return nil, "", fmt.Errorf("head: %w", err)
	}
	h := &head{}
	parsed := decodeJSON(formatHead, doc, maxHead, h, func() (string, int) { return h.Format, h.Version })
	if parsed == nil {
		parsed = h.check()
	}
	principal := region
	if principal == "" {
		if parsed != nil {
			return nil, "", parsed
		}
		principal = h.Region
	}
	v, err := chunked.Verify(object, Namespace, trust, principal)
	if err != nil {
		return nil, "", err
	}
	if parsed != nil {
		return nil, "", parsed
	}
	if h.Region != principal {
		return nil, "", fmt.Errorf("head: %w: of region %q, not of %q", ErrOther, h.Region, principal)
	}
	if err := v.At(h.Created); err != nil {
		return nil, "", fmt.Errorf("head of %q: %w", principal, err)
	}
	return h, keys.Fingerprint(v.Key), nil
}

func (h *head) check() error {
	if err := CheckRegion(h.Region); err != nil {
		return fmt.Errorf("head: %w: %w", ErrFormat, err)
	}
	if h.Sequence < 1 || h.Sequence > maxNumber || h.Size < 1 || h.Size > maxRoot {
		return fmt.Errorf("head: %w: sequence %d, root of %d bytes", ErrFormat, h.Sequence, h.Size)
	}
	if err := checkTime("created", h.Created); err != nil {
		return fmt.Errorf("head: %w: %w", ErrFormat, err)
	}
	if !h.Expires.IsZero() {
		if err := checkTime("expires", h.Expires); err != nil || !h.Expires.After(h.Created) {
			return fmt.Errorf("head: %w: it expires at %s, created %s", ErrFormat, h.Expires, h.Created)
		}
	}
	return nil
}

func (r *root) encode() ([]byte, error) {
	r.Format, r.Version = formatRoot, version
	return encodeJSON(r)
}

// openRoot reads the root that h names.
func openRoot(h *head, b []byte) (*root, error) {
	if int64(len(b)) != h.Size || chunked.NameOf(b) != h.Root {
		return nil, fmt.Errorf("root %s: %w", h.Root, ErrDamaged)
	}
	r := &root{}
	if err := decodeJSON(formatRoot, b, maxRoot, r, func() (string, int) { return r.Format, r.Version }); err != nil {
		return nil, err
	}
	if r.Region != h.Region || r.Sequence != h.Sequence {
		return nil, fmt.Errorf("root %s: %w: of region %q, sequence %d; the head says %q, %d", h.Root, ErrOther, r.Region, r.Sequence, h.Region, h.Sequence)
	}
	if len(r.Commits) == 0 || len(r.Commits) > keptIDs || len(r.Retired) > keptStates {
		return nil, fmt.Errorf("root %s: %w: %d commits, %d states", h.Root, ErrFormat, len(r.Commits), len(r.Retired))
	}
	for _, c := range r.Commits {
		if !isNonce(c) {
			return nil, fmt.Errorf("root %s: %w: a commit's ID", h.Root, ErrFormat)
		}
	}
	for i, p := range r.Pages {
		if p.Size < 1 || p.Size > maxPage || p.Entries < 1 || i > 0 && p.First <= r.Pages[i-1].First {
			return nil, fmt.Errorf("root %s: %w: page %d", h.Root, ErrFormat, i)
		}
	}
	return r, nil
}

func (p *page) encode() ([]byte, error) {
	p.Format, p.Version = formatPage, version
	return encodeJSON(p)
}

// openPage reads the page that ref names. Its keys are below next, if that is
// not "".
func openPage(ref pageRef, next string, b []byte) (*page, error) {
	fail := func(err error, format string, a ...any) (*page, error) {
		return nil, fmt.Errorf("page %s: %w: %s", ref.Name, err, fmt.Sprintf(format, a...))
	}
	if int64(len(b)) != ref.Size || chunked.NameOf(b) != ref.Name {
		return nil, fmt.Errorf("page %s: %w", ref.Name, ErrDamaged)
	}
	p := &page{}
	if err := decodeJSON(formatPage, b, maxPage, p, func() (string, int) { return p.Format, p.Version }); err != nil {
		return nil, err
	}
	if len(p.Entries) != ref.Entries || !isNonce(p.Salt) {
		return fail(ErrFormat, "%d entries, the root says %d", len(p.Entries), ref.Entries)
	}
	for i := range p.Entries {
		e := &p.Entries[i]
		switch {
		case i == 0 && e.Key != ref.First, i > 0 && e.Key <= p.Entries[i-1].Key, next != "" && e.Key >= next:
			return fail(ErrFormat, "key %q in a wrong place", e.Key)
		}
		if err := e.check(); err != nil {
			return fail(ErrFormat, "%q: %v", e.Key, err)
		}
		if e.Image != nil {
			e.Image.share()
		}
	}
	return p, nil
}

// newNonce draws 16 bytes, in hex.
func newNonce() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("draw an ID: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

func isNonce(s string) bool { return isHex(s, 32) }

// isHex says whether s is n lower-case hex digits.
func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func digestOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}
