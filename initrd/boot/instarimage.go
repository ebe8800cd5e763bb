package boot

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/initrd/eager"
	"github.com/instar-image/instar/metadata/ticket"
)

// SignersFile is whose images an initrd starts: OpenSSH's allowed_signers. A
// ticket can narrow it.
const SignersFile = "/etc/instar/allowed_signers"

const (
	// restoreWorkers fetch at a time: each holds a range of up to 4 MiB.
	restoreWorkers = 4
	// flushEvery bounds what a power cut takes back, in bytes.
	flushEvery = 64 << 20
)

// instarImage is an Instar image: chunks in any order, each with its digest.
type instarImage struct {
	name     string
	manifest chunked.Name
	key      chunked.Key        // of the index
	root     chunked.ObjectSize // of the index
	// rootObject is the index's root as it is stored.
	rootObject []byte
	stream     *chunked.Stream
	say        func(format string, args ...any)
}

// openInstar reads and checks the manifest and the index that a ticket names.
func openInstar(ctx context.Context, t *ticket.Ticket, signers string, f *fetcher) (*instarImage, error) {
	bad := func(format string, args ...any) (*instarImage, error) {
		return nil, final(fmt.Errorf("launch ticket: "+format, args...))
	}
	i := &instarImage{name: path.Base(path.Dir(path.Dir(t.Manifest))), say: f.say}
	n, err := chunked.ParseName(strings.ToLower(t.ManifestSHA256))
	if err != nil || t.Manifest != chunked.ManifestKey(i.name, n) {
		return bad("its manifest is %q with SHA-256 %q, not %s", t.Manifest, t.ManifestSHA256, chunked.ManifestKey("NAME", n))
	}
	i.manifest = n
	trust, err := trusted(signers, t.Signers)
	if err != nil {
		return bad("%w", err)
	}
	ids, err := keys.ParseIdentities([]byte(t.IndexKey))
	if err != nil {
		return bad("its index-key: %w", err)
	}
	object, err := f.object(ctx, "manifest", t.Manifest, chunked.MaxSigned, func(b []byte) bool { return chunked.NameOf(b) == n })
	if err != nil {
		return nil, err
	}
	var m *chunked.Manifest
	for _, list := range trust {
		if m, _, err = chunked.OpenManifest(object, list, i.name); err != nil {
			return nil, final(fmt.Errorf("image %s: %w", i.name, err))
		}
	}
	any := func([]byte) bool { return true }
	object, err = f.object(ctx, "index key", chunked.KeysKey(i.name, n), chunked.MaxRecipientsText, any)
	if err != nil {
		return nil, err
	}
	list, err := chunked.ParseKeysObject(object)
	if err != nil {
		return nil, final(fmt.Errorf("image %s: %w", i.name, err))
	}
	root := m.Index.Root
	if i.key, err = list.IndexKey(root.Name, ids...); err != nil {
		return nil, final(fmt.Errorf("image %s: %w", i.name, err))
	}
	i.root = root
	if i.rootObject, err = (&packSource{f: f}).ReadIndex(ctx, root.Name, root.Size); err != nil {
		return nil, fmt.Errorf("image %s: %w", i.name, err)
	}
	source := &packSource{f: f, kept: map[chunked.Name][]byte{root.Name: i.rootObject}}
	index, err := chunked.OpenIndex(ctx, source, root.Name, root.Size, i.key)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", i.name, err)
	}
	if i.stream, err = index.Stream(chunked.StreamDisk); err != nil {
		return nil, final(fmt.Errorf("image %s: %w", i.name, err))
	}
	return i, nil
}

// trusted are the lists of signers that a manifest must satisfy, each of them:
// the initrd's own and the ticket's. Either will do alone.
func trusted(file, ticket string) ([]*keys.AllowedSigners, error) {
	own, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return trustedBy(own, ticket)
}

// trustedBy is trusted with the initrd's own signers in memory, nil for none.
func trustedBy(own []byte, ticket string) ([]*keys.AllowedSigners, error) {
	var lists []*keys.AllowedSigners
	if own != nil {
		l, err := keys.ParseAllowedSigners(own)
		if err != nil {
			return nil, fmt.Errorf("the initrd's signers: %w", err)
		}
		lists = append(lists, l)
	}
	if ticket != "" {
		l, err := keys.ParseAllowedSigners([]byte(ticket))
		if err != nil {
			return nil, fmt.Errorf("its signers: %w", err)
		}
		lists = append(lists, l)
	}
	if len(lists) == 0 {
		return nil, errors.New("neither it nor the initrd says whose images are started")
	}
	return lists, nil
}

func (i *instarImage) about() string {
	return fmt.Sprintf("%s %s, %d MiB", i.name, hex.EncodeToString(i.manifest[:4]), i.stream.Size()>>20)
}

func (i *instarImage) identity(instance string) eager.Image {
	return eager.Image{Manifest: i.manifest, Size: i.stream.Size(), Instance: instance, Secret: i.key[:]}
}

// Fill writes the image. What a former attempt wrote is found by its digest,
// wherever it ended.
func (i *instarImage) Fill(ctx context.Context, t *eager.Target) error {
	var here map[int64]bool
	if t.Again() {
		var total int64
		var err error
		if here, total, err = i.present(ctx, t); err != nil {
			return err
		}
		i.say("root: resuming: %d KiB are on the disk already", total>>10)
	}
	var mu sync.Mutex // of a flush
	var written, flushed atomic.Int64
	var flushErr error
	err := chunked.Restore(ctx, i.stream, t, chunked.RestoreOptions{
		Workers: restoreWorkers,
		Have:    func(off, _ int64) bool { return here[off] },
		Zero:    func(_ context.Context, off, n int64) error { return t.Zero(off, n) },
		Progress: func(n int64) {
			if written.Add(n)-flushed.Load() < flushEvery || !mu.TryLock() {
				return
			}
			defer mu.Unlock()
			flushed.Store(written.Load())
			if err := t.Flush(); err != nil {
				flushErr = err
			}
			i.say("root: %d MiB written", written.Load()>>20)
		},
	})
	if err == nil {
		err = flushErr
	}
	if err == nil {
		i.say("root: %d KiB written, all", written.Load()>>10)
	}
	return err
}

// present tells, by position, which extents the disk has already: those of
// whole chunks, whose digests tell, outside what is written last.
func (i *instarImage) present(ctx context.Context, t *eager.Target) (map[int64]bool, int64, error) {
	here := make(map[int64]bool)
	total := int64(0)
	buf := make([]byte, chunked.MaxChunk)
	for e, err := range i.stream.Extents(ctx, 0, i.stream.Size()) {
		if err != nil {
			return nil, 0, err
		}
		if e.Start != 0 || e.Length != int64(e.Chunk.Size) || e.Pos < eager.HeadSize {
			continue
		}
		p := buf[:e.Length]
		if _, err := t.ReadAt(p, e.Pos); err == nil && chunked.DigestOf(p) == e.Chunk.Digest {
			here[e.Pos] = true
			total += e.Length
		}
	}
	return here, total, nil
}

// packSource reads an image's objects for bundle/chunked, which verifies them.
type packSource struct {
	f    *fetcher
	kept map[chunked.Name][]byte // index objects that need not be fetched

	mu     sync.Mutex
	moved  map[chunked.Name]fate
	asking map[chunked.Name]chan struct{} // closed when the store has answered
}

// fate is what became of a pack.
type fate struct {
	moved *chunked.Moved // nil: nothing was known
	asked time.Time
}

// unknownTime is how long it is not asked again what became of a pack of which
// nothing was known: a root may lie on it for days.
const unknownTime = time.Minute

// ReadPack reads a range of a pack.
func (s *packSource) ReadPack(ctx context.Context, n chunked.Name, off int64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	s.mu.Lock()
	gone := s.moved[n].moved != nil
	s.mu.Unlock()
	if gone {
		return fmt.Errorf("pack %s was moved: %w", n, chunked.ErrMissing)
	}
	return missing(s.f.piece(ctx, "pack "+n.String()[:8], chunked.PackKey(n), off, p))
}

// ReadIndex reads an index object.
func (s *packSource) ReadIndex(ctx context.Context, n chunked.Name, size int64) ([]byte, error) {
	if data, ok := s.kept[n]; ok {
		return bytes.Clone(data), nil // it is opened in its place
	}
	data, err := s.f.object(ctx, "index "+n.String()[:8], chunked.IndexObjectKey(n), size, func(b []byte) bool { return chunked.NameOf(b) == n })
	return data, missing(err)
}

// Moved tells where garbage collection has put a chunk since the manifest was made.
func (s *packSource) Moved(ctx context.Context, at chunked.Location) (chunked.Location, error) {
	m, err := s.became(ctx, at.Pack)
	if errors.Is(err, errWithheld) {
		// Nor was the pack given: but that may pass, and is not remembered.
		return chunked.Location{}, fmt.Errorf("what was at %d of pack %s: %w (%w)", at.Offset, at.Pack, chunked.ErrNotMoved, err)
	}
	if err != nil {
		return chunked.Location{}, err
	}
	if m != nil {
		if to, ok := m.Lookup(at.Offset); ok {
			return to, nil
		}
	}
	return chunked.Location{}, fmt.Errorf("what was at %d of pack %s: %w", at.Offset, at.Pack, chunked.ErrNotMoved)
}

// became tells what became of a pack: nil if nothing is known of it. The store is
// asked once, and others read on meanwhile.
func (s *packSource) became(ctx context.Context, pack chunked.Name) (m *chunked.Moved, err error) {
	asked := make(chan struct{})
	for {
		s.mu.Lock()
		last, known := s.moved[pack]
		known = known && (last.moved != nil || time.Since(last.asked) < unknownTime)
		busy := s.asking[pack]
		mine := !known && busy == nil
		if mine {
			if s.moved == nil {
				s.moved, s.asking = make(map[chunked.Name]fate), make(map[chunked.Name]chan struct{})
			}
			s.asking[pack] = asked
		}
		s.mu.Unlock()
		if known {
			return last.moved, nil
		}
		if mine {
			break
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.asking, pack)
		if err == nil {
			s.moved[pack] = fate{m, time.Now()}
		}
		close(asked)
	}()
	data, err := s.f.object(ctx, "what became of pack "+pack.String()[:8], chunked.MovedKey(pack), chunked.MaxMoved, func([]byte) bool { return true })
	switch {
	case errors.Is(err, errNoURL) && notThere(err):
		s.f.say("root: warning: pack %s is gone or wrong, and the ticket has no URL for what became of it. If it was repacked, the metadata server must be let list the store's %s, or the record give launch.credentials.sts", pack.String()[:8], chunked.MovedFolder)
		return nil, nil
	case errors.Is(err, errWithheld):
		return nil, err
	case notThere(err):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return chunked.DecodeMoved(pack, data)
}

// missing says in chunked's words that an object is not there.
func missing(err error) error {
	if notThere(err) {
		return fmt.Errorf("%w: %w", chunked.ErrMissing, err)
	}
	return err
}
