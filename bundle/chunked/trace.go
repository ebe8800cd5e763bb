package chunked

import (
	"context"
	"errors"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

// Limits of traces: ranges, and bytes of the document.
const (
	MaxRanges = 1 << 18
	MaxTrace  = 32 << 20
)

// Trace is what a boot of an image read first (SPEC.md §10). Only a hint.
type Trace struct {
	Name     string    `json:"name"`
	Manifest Name      `json:"manifest"`
	Created  time.Time `json:"created"` // UTC, whole seconds
	Ranges   []Range   `json:"ranges"`  // of the disk, in the order of reading
}

// Range is a range of bytes.
type Range struct {
	Position int64 `json:"position"`
	Length   int64 `json:"length"`
}

// OpenTrace verifies the trace of an image's manifest and reads it. Nothing of
// it is used before.
func OpenTrace(object []byte, trust *keys.AllowedSigners, image string, manifest Name) (*Trace, *Verified, error) {
	t := &Trace{}
	v, err := open(t, object, trust, image)
	if err != nil {
		return nil, nil, err
	}
	if t.Manifest != manifest {
		return nil, nil, bad(ErrOther, t.format()+" document", "it is of manifest %s, not of %s", t.Manifest, manifest)
	}
	return t, v, nil
}

// ParseTrace reads a trace's document, without its signature.
func ParseTrace(doc []byte) (*Trace, error) {
	t := &Trace{}
	if err := decode(t, doc); err != nil {
		return nil, err
	}
	return t, nil
}

// Document gives the trace's one encoding. ErrUsage if a field is not as it
// must be.
func (t *Trace) Document() ([]byte, error) { return encode(t) }

// Sign gives the signed trace.
func (t *Trace) Sign(ctx context.Context, s keys.Signer) ([]byte, error) { return sign(ctx, t, s) }

func (t *Trace) format() string             { return NamespaceTrace }
func (t *Trace) limit() int                 { return MaxTrace }
func (t *Trace) about() (string, time.Time) { return t.Name, t.Created }

func (t *Trace) fields(f *form) {
	f.text("name", &t.Name)
	f.name("manifest", &t.Manifest)
	f.time("created", &t.Created)
	elements(f, "ranges", &t.Ranges, func(r *Range) {
		f.begin('[')
		f.item()
		f.integer(&r.Position)
		f.item()
		f.integer(&r.Length)
		f.end(']')
	})
}

func (t *Trace) check() error {
	if err := errors.Join(CheckImageName(t.Name), checkTime("created", t.Created)); err != nil {
		return err
	}
	if len(t.Ranges) > MaxRanges {
		return wrong("%d ranges are more than %d", len(t.Ranges), MaxRanges)
	}
	for i, r := range t.Ranges {
		if r.Position < 0 || r.Length < 1 || r.Position > maxNumber-r.Length {
			return wrong("range %d has %d bytes at %d", i, r.Length, r.Position)
		}
	}
	return nil
}
