// Package images keeps Instar images in an [upload.Store]: it finds and checks
// them, publishes and deletes them, verifies and repairs them, and collects
// the garbage they leave. The format is bundle/chunked's; this package owns
// the order in which objects are written and removed (SPEC.md §11 and §12).
//
// What goes in: an open store, whom to trust, and the keys of this machine.
// What comes out: verified manifests and indexes, sources and sinks for
// bundle/chunked, and reports. It touches that store, and under
// [Options.State] the files that remember what was seen.
//
// Nobody holds a lock. A capture begins with [Store.Begin] and ends with
// [Run.Publish], which publishes all or nothing; everything else may go on at
// the same time, on any number of machines, and stop dead at any point.
//
// The package does not log. Its methods may be called concurrently.
package images

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// What a caller may branch on, with errors.Is. Errors of the store are in the
// chain as package upload has them, those of documents and chunks as
// bundle/chunked and bundle/keys have them: chunked.ErrRollback, ErrForked and
// ErrStale of a head that is not fresh, chunked.ErrDeleted of an image that is
// no more, chunked.ErrOther of a document in another's place.
var (
	ErrNoImage   = errors.New("no such image")                                // or no such version of it
	ErrNoTrust   = errors.New("nobody is trusted")                            // Options.Trust is missing
	ErrUnfit     = errors.New("the image is not what was asked for")          // another architecture
	ErrLabel     = errors.New("the domain has another secret than before")    // SPEC.md §8
	ErrCollected = errors.New("garbage collection came between")              // run the capture again: what is stored is found
	ErrDamaged   = errors.New("damaged")                                      // not the bytes its name says
	ErrLast      = errors.New("nobody could open it any more")                // the last recipient or creator was to be removed
	ErrBusy      = errors.New("others keep changing it")                      // a conditional put lost too often
	ErrBlocked   = errors.New("nothing is deleted while this cannot be read") // garbage collection met a broken object
)

// Store is a store of images.
type Store struct {
	objects upload.Store
	opt     Options
	memory  *memory
}

// Options says whom to trust and what to read with. The zero value can scrub
// and collect garbage, no more.
type Options struct {
	// Trust says whose signatures count. Without it nothing that is signed is
	// used: [ErrNoTrust].
	Trust *keys.AllowedSigners

	// Identities open the images' indexes and the domains' secrets.
	Identities []*keys.Identity

	// State is a directory, made if it is missing, that remembers the newest
	// head seen of each image, each domain's label and the footers of packs.
	// It may be shared between processes. "" remembers nothing, which
	// [Image.Freshness] then says.
	State string

	// Claim, if it is set, is asked before versions are deleted: an error keeps
	// them, as of one that a catalog has registered. release is called when
	// the deletion has ended, well or not.
	Claim func(ctx context.Context, image string, versions []chunked.Name) (release func(context.Context) error, err error)

	// Remember has State also remember manifests, index objects and wrapped keys
	// that were read, at most some hundred, so that they are not asked for again. A
	// version that is gone from the store may be found all the same.
	Remember bool

	// Now is the store's clock. nil asks the store itself, which must be an
	// [upload.Clock].
	Now func(context.Context) (time.Time, error)

	// Local is this machine's clock; nil is time.Now. It dates documents, and
	// age limits are held against the later of the two.
	Local func() time.Time

	// Parallel is how many requests are under way at once; 0 means 16.
	Parallel int
}

// Open opens the images of a store. It asks the store nothing yet. The caller
// closes objects when it is done with both.
func Open(objects upload.Store, o Options) (*Store, error) {
	if o.Local == nil {
		o.Local = time.Now
	}
	if o.Parallel <= 0 {
		o.Parallel = 16
	}
	s := &Store{objects: objects, opt: o}
	if o.Now == nil {
		clock, ok := objects.(upload.Clock)
		if !ok {
			return nil, fmt.Errorf("open the images of %s: the store has no clock and Options.Now is missing", objects)
		}
		s.opt.Now = clock.ServerTime
	}
	place := objects.String()
	if p, ok := objects.(upload.Placer); ok {
		place = p.Place()
	}
	m, err := openMemory(o.State, place)
	if err != nil {
		return nil, fmt.Errorf("open the images of %s: %w", objects, err)
	}
	s.memory = m
	return s, nil
}

// String is the store's URL.
func (s *Store) String() string { return s.objects.String() }

// Objects is the store beneath.
func (s *Store) Objects() upload.Store { return s.objects }

// now is the store's time.
func (s *Store) now(ctx context.Context) (time.Time, error) {
	t, err := s.opt.Now(ctx)
	if err != nil {
		return time.Time{}, fmt.Errorf("ask for the store's time: %w", err)
	}
	return t, nil
}

// stamp is the time a new document says it was made.
func (s *Store) stamp() time.Time { return s.opt.Local().UTC().Truncate(time.Second) }

// newID draws the ID of a run or list.
func newID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("draw an ID: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

func isID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && hex.EncodeToString(b) == s
}
