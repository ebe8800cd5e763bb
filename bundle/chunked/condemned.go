package chunked

import (
	"strings"
	"time"
)

// MaxCondemned is the most bytes that a list of condemned objects has.
const MaxCondemned = 64 << 20

// Condemned lists objects that are to be deleted (SPEC.md §12.2).
type Condemned struct {
	Created time.Time `json:"created"` // UTC, whole seconds
	Objects []string  `json:"objects"` // keys under packs/, index/ and moved/, and of manifests' keys and traces; ascending
}

// ParseCondemned reads a list of condemned objects.
func ParseCondemned(doc []byte) (*Condemned, error) {
	c := &Condemned{}
	if err := decode(c, doc); err != nil {
		return nil, err
	}
	return c, nil
}

// Document gives the list's one encoding. ErrUsage if a field is not as it
// must be.
func (c *Condemned) Document() ([]byte, error) { return encode(c) }

func (c *Condemned) format() string { return "instar-condemned" }
func (c *Condemned) limit() int     { return MaxCondemned }

func (c *Condemned) fields(f *form) {
	f.time("created", &c.Created)
	elements(f, "objects", &c.Objects, f.quoted)
}

func (c *Condemned) check() error {
	if err := checkTime("created", c.Created); err != nil {
		return err
	}
	if len(c.Objects) == 0 {
		return wrong("it lists nothing")
	}
	for i, o := range c.Objects {
		if i > 0 && o <= c.Objects[i-1] {
			return wrong("objects do not ascend at %q", clip(o))
		}
		if !isCollectable(o) {
			return wrong("object %q is not one that is collected", clip(o))
		}
	}
	return nil
}

func isCollectable(key string) bool {
	for _, folder := range []string{PacksFolder, IndexFolder, MovedFolder} {
		if _, err := ParseFanned(folder, key); err == nil {
			return true
		}
	}
	part := strings.Split(key, "/")
	if len(part) != 4 || CheckImageName(part[1]) != nil {
		return false
	}
	n, err := ParseName(part[3])
	return err == nil && (key == KeysKey(part[1], n) || key == TraceKey(part[1], n) || key == OpeningKey(part[1], n))
}

// MaxRun is the most bytes that a run's document has.
const MaxRun = 4 << 10

// RunDoc says that a capture is under way (SPEC.md §12.1).
type RunDoc struct {
	Name    string    `json:"name"`             // of the image
	Started time.Time `json:"started,omitzero"` // by the store's clock, whole seconds; zero in the first put
}

// ParseRun reads a run's document.
func ParseRun(doc []byte) (*RunDoc, error) {
	r := &RunDoc{}
	if err := decode(r, doc); err != nil {
		return nil, err
	}
	return r, nil
}

// Document gives the document's one encoding. ErrUsage if a field is not as it
// must be.
func (r *RunDoc) Document() ([]byte, error) { return encode(r) }

func (r *RunDoc) format() string { return "instar-run" }
func (r *RunDoc) limit() int     { return MaxRun }

func (r *RunDoc) fields(f *form) {
	f.text("name", &r.Name)
	f.optionalTime("started", &r.Started)
}

func (r *RunDoc) check() error {
	if err := CheckImageName(r.Name); err != nil {
		return err
	}
	if r.Started.IsZero() {
		return nil
	}
	return checkTime("started", r.Started)
}
