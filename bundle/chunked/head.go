package chunked

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

// What a head or a manifest may be although its signature is right.
var (
	ErrOther    = errors.New("of another name")              // a right document in another's place
	ErrRollback = errors.New("older than one seen before")   // or than was asked for
	ErrForked   = errors.New("contradicts one seen before")  // the same sequence, another manifest
	ErrStale    = errors.New("too old to be taken as fresh") // expired, or beyond the age asked for
	ErrDeleted  = errors.New("the image was deleted")        // its head says so
)

// MaxHead is the most bytes that a head's document has.
const MaxHead = 1 << 20

// MaxVersions is how many older versions a head lists at most.
const MaxVersions = 10_000

// Head says which manifest of an image is the newest (SPEC.md §9).
type Head struct {
	Name     string    `json:"name"`
	Sequence int64     `json:"sequence"`
	Manifest Name      `json:"manifest,omitzero"` // zero: the image was deleted
	Versions []Name    `json:"versions"`          // older ones that are kept, newest first
	Created  time.Time `json:"created"`           // UTC, whole seconds
	Expires  time.Time `json:"expires,omitzero"`  // likewise, zero: it does not
}

// OpenHead verifies the head of an image and reads it. Nothing of it is used
// before. Whether it is fresh is [Head.CheckFresh]'s to say.
func OpenHead(object []byte, trust *keys.AllowedSigners, image string) (*Head, *Verified, error) {
	h := &Head{}
	v, err := open(h, object, trust, image)
	if err != nil {
		return nil, nil, err
	}
	return h, v, nil
}

// ParseHead reads a head's document, without its signature.
func ParseHead(doc []byte) (*Head, error) {
	h := &Head{}
	if err := decode(h, doc); err != nil {
		return nil, err
	}
	return h, nil
}

// ReadHeadUnverified reads a signed head without asking who signed it: for
// garbage collection, which keeps what anybody refers to.
func ReadHeadUnverified(object []byte) (*Head, error) {
	h := &Head{}
	if err := readUnverified(h, object); err != nil {
		return nil, err
	}
	return h, nil
}

// Document gives the head's one encoding. ErrUsage if a field is not as it
// must be.
func (h *Head) Document() ([]byte, error) { return encode(h) }

// Sign gives the signed head.
func (h *Head) Sign(ctx context.Context, s keys.Signer) ([]byte, error) { return sign(ctx, h, s) }

// Deleted says whether the image was deleted.
func (h *Head) Deleted() bool { return h.Manifest == Name{} }

// Check makes sure that m, the manifest called n, is the one the head means:
// the newest version, of the head's image and published with it.
func (h *Head) Check(m *Manifest, n Name) error {
	switch {
	case h.Deleted():
		return fmt.Errorf("image %q: %w", h.Name, ErrDeleted)
	case h.Manifest != n || m.Name != h.Name:
		return &Error{Class: ErrOther, Object: "manifest " + n.String(), Detail: fmt.Sprintf("the head of %q names %s", h.Name, h.Manifest)}
	case m.Sequence > h.Sequence:
		return bad(ErrOther, "manifest "+n.String(), "it is for sequence %d, the head of %q has %d", m.Sequence, h.Name, h.Sequence)
	}
	return nil
}

// Seen is what a reader remembers of the newest head of an image that it saw.
type Seen struct {
	Sequence int64  `json:"sequence"`
	Manifest Name   `json:"manifest"` // zero: deleted
	Signer   string `json:"signer"`   // fingerprint of its key, as keys.Fingerprint has it
}

// Freshness is what a reader knows or demands about an image's head.
type Freshness struct {
	// Seen are the newest heads seen before, one for each key that has signed
	// any. Those of keys no longer allowed are to be left out by [Current]:
	// else who steals a key can end an image for ever by a huge sequence.
	Seen    []Seen
	AtLeast int64         // least sequence, 0: any
	MaxAge  time.Duration // between creation and Now, 0: any
	Now     time.Time     // the store's clock
}

// Current are those of seen whose keys may still sign heads of image: the
// others' heads are refused anyway.
func Current(seen []Seen, trust *keys.AllowedSigners, image string) []Seen {
	var still []Seen
	for _, s := range seen {
		if trust.Knows(s.Signer, image, NamespaceHead) {
			still = append(still, s)
		}
	}
	return still
}

// CheckFresh says why the head is not the newest as far as f tells: ErrRollback,
// ErrForked or ErrStale. Without memory and demands it proves nothing.
func (h *Head) CheckFresh(f Freshness) error {
	object := fmt.Sprintf("head %d of %q", h.Sequence, h.Name)
	for _, s := range f.Seen {
		switch {
		case h.Sequence < s.Sequence:
			return bad(ErrRollback, object, "sequence %d was there before", s.Sequence)
		case h.Sequence == s.Sequence && h.Manifest != s.Manifest:
			return bad(ErrForked, object, "it names manifest %s, and named %s before", h.Manifest, s.Manifest)
		}
	}
	switch {
	case h.Sequence < f.AtLeast:
		return bad(ErrRollback, object, "sequence %d and up is asked for", f.AtLeast)
	case !h.Expires.IsZero() && f.Now.After(h.Expires):
		return bad(ErrStale, object, "it expired at %s, and it is %s", h.Expires.Format(stampLayout), f.Now.UTC().Format(stampLayout))
	case f.MaxAge > 0 && f.Now.Sub(h.Created) > f.MaxAge:
		return bad(ErrStale, object, "it is of %s, older than %s", h.Created.Format(stampLayout), f.MaxAge)
	}
	return nil
}

func (h *Head) format() string             { return NamespaceHead }
func (h *Head) limit() int                 { return MaxHead }
func (h *Head) about() (string, time.Time) { return h.Name, h.Created }

func (h *Head) fields(f *form) {
	f.text("name", &h.Name)
	f.number("sequence", &h.Sequence)
	f.key("manifest")
	if deleted := `""`; f.reading && f.ahead(deleted) || !f.reading && h.Deleted() {
		f.literal(deleted)
	} else {
		f.quotedName(&h.Manifest)
	}
	elements(f, "versions", &h.Versions, f.quotedName)
	f.time("created", &h.Created)
	f.optionalTime("expires", &h.Expires)
}

func (h *Head) check() error {
	if err := errors.Join(CheckImageName(h.Name), checkTime("created", h.Created)); err != nil {
		return err
	}
	if err := checkNumber("sequence", h.Sequence, 1, maxNumber); err != nil {
		return err
	}
	if !h.Expires.IsZero() {
		if err := checkTime("expires", h.Expires); err != nil {
			return err
		}
		if !h.Expires.After(h.Created) {
			return wrong("it expires before it is created")
		}
	}
	if len(h.Versions) > MaxVersions {
		return wrong("%d versions are more than %d", len(h.Versions), MaxVersions)
	}
	if h.Deleted() && len(h.Versions) > 0 {
		return wrong("the image was deleted, but has versions")
	}
	listed := map[Name]struct{}{h.Manifest: {}}
	for _, v := range h.Versions {
		if _, twice := listed[v]; twice {
			return wrong("version %s is listed twice", v)
		}
		listed[v] = struct{}{}
	}
	return nil
}
