package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

// AdoptOptions says how an image is taken over from another store.
type AdoptOptions struct {
	// Signer signs the image's head in this store.
	Signer keys.Signer

	// Recipients are added to those that the image has where it comes from.
	// An identity of that store's has to open it then.
	Recipients []*keys.Recipient

	// Behind has the version listed behind all that the image has here, so that
	// what its name stands for stays as it is. An image that is not here yet
	// begins with it; one that was deleted here stays so: [chunked.ErrDeleted].
	Behind bool

	// Progress, if set, is told how many bytes of how many are here and
	// verified. It may be called concurrently.
	Progress func(done, total int64)
}

// Adopted says what Adopt did.
type Adopted struct {
	Name     chunked.Name // of the manifest, the same as where it came from
	Sequence int64        // of the head here
	Copied   Tally        // objects that were copied; the others were here
	Verified Tally        // objects read back, or hashed on their way
	Beside   error        // why what lies beside the version, of which nothing depends, was not copied; nil if it was
}

// Adopt makes a version of an image from another store one of this store's: its
// packs, index, key and manifest, byte for byte, in the order of SPEC.md §11,
// the head last, and then what lies beside the version, boot trace and opening, if it is
// there: [Adopted.Beside]. Every object's digest is compared with its name: on its way, or
// where the server copied it or it was here before, read back from here. Only
// what is missing is copied, so the same call goes on after an interruption.
// With [ErrCollected] garbage collection came between: call it again.
func (s *Store) Adopt(ctx context.Context, img *Image, o AdoptOptions) (*Adopted, error) {
	a, err := s.adopt(ctx, img, o)
	if err != nil {
		return nil, fmt.Errorf("copy image %s from %s to %s: %w", img.ref(), img.s, s, err)
	}
	return a, nil
}

type adoption struct {
	*Run
	from  *Store
	img   *Image
	o     AdoptOptions
	mu    sync.Mutex
	out   Adopted
	done  int64
	total int64
}

func (s *Store) adopt(ctx context.Context, img *Image, o AdoptOptions) (_ *Adopted, err error) {
	m := img.Manifest
	if o.Signer == nil {
		return nil, errors.New("no key to sign with")
	}
	run, err := s.Begin(ctx, RunOptions{Image: m.Name, Domain: &Domain{Name: m.Domain}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, run.Close(ctx)) }()
	a := &adoption{Run: run, from: img.s, img: img, o: o, out: Adopted{Name: img.Name}}
	if old, err := s.head(ctx, m.Name); err != nil {
		return nil, err
	} else if err := a.withdrawn(old); err != nil {
		return nil, err // before anything is copied
	}
	keysObject, err := a.keysObject(ctx)
	if err != nil {
		return nil, err
	}
	object, err := a.from.getNamed(ctx, chunked.ManifestKey(m.Name, img.Name), img.Name, img.Size, maxManifest)
	if err != nil {
		return nil, err
	}
	// This store's readers must believe it too.
	if _, _, err := chunked.OpenManifest(object, s.opt.Trust, m.Name); err != nil {
		return nil, fmt.Errorf("the manifest is not one that is trusted here: %w", err)
	}
	packs, err := a.packs(ctx)
	if err != nil {
		return nil, err
	}
	index := append(slices.Clone(m.Index.Segments), m.Index.Root)
	for _, l := range [][]chunked.ObjectSize{packs, index} {
		for _, p := range l {
			a.total += p.Size
		}
	}
	if err := each(ctx, max(1, s.opt.Parallel/2), packs, func(ctx context.Context, p chunked.ObjectSize) error {
		return a.object(ctx, chunked.PackKey(p.Name), p)
	}); err != nil {
		return nil, err
	}
	if err := each(ctx, s.opt.Parallel, index, func(ctx context.Context, p chunked.ObjectSize) error {
		return a.object(ctx, chunked.IndexObjectKey(p.Name), p)
	}); err != nil {
		return nil, err
	}
	for range maxTries {
		ok, err := a.publish(ctx, object, keysObject)
		if err != nil {
			return nil, err
		}
		if ok {
			a.out.Beside = a.hints(ctx)
			return &a.out, nil
		}
	}
	return nil, fmt.Errorf("%w: its head", ErrBusy)
}

// keysObject is the key's object as it is to be here.
func (a *adoption) keysObject(ctx context.Context) ([]byte, error) {
	doc, _, err := a.img.keysObject(ctx)
	if err != nil {
		return nil, err
	}
	root := a.img.Manifest.Index.Root.Name
	for _, r := range a.o.Recipients {
		if has(doc.Recipients, r.String()) {
			continue
		}
		key, err := doc.IndexKey(root, a.from.opt.Identities...)
		if err != nil {
			return nil, err
		}
		w, err := chunked.WrapIndexKey(root, key, r, r.Comment())
		if err != nil {
			return nil, err
		}
		doc.Recipients = append(doc.Recipients, w)
	}
	return doc.Document()
}

// packs are those that the image needs here: its own, or where one was moved,
// those it was moved to. The moved/ objects themselves are put on the way.
func (a *adoption) packs(ctx context.Context) ([]chunked.ObjectSize, error) {
	there, err := a.from.list(ctx, chunked.PacksFolder)
	if err != nil {
		return nil, err
	}
	seen := map[chunked.Name]bool{}
	var need []chunked.ObjectSize
	var add func(p chunked.ObjectSize, hops int) error
	add = func(p chunked.ObjectSize, hops int) error {
		if seen[p.Name] {
			return nil
		}
		seen[p.Name] = true
		key := chunked.PackKey(p.Name)
		if o, ok := there[key]; ok && o.Size == p.Size || a.start.hasSize(key, p.Size) {
			need = append(need, p)
			return nil
		}
		moved, _, err := a.from.readMoved(ctx, p.Name)
		if err != nil {
			return err
		}
		if moved == nil || hops == maxHops {
			return fmt.Errorf("%w: pack %s is not in %s", ErrDamaged, p.Name, a.from)
		}
		if err := a.copyMoved(ctx, p.Name); err != nil {
			return err
		}
		a.Run.mu.Lock()
		a.taken[p.Name] = true
		a.Run.mu.Unlock()
		for _, t := range moved.Packs {
			if err := add(t, hops+1); err != nil {
				return err
			}
		}
		return nil
	}
	for _, p := range a.img.Manifest.Packs {
		if err := add(p, 0); err != nil {
			return nil, err
		}
	}
	return need, nil
}

// copyMoved puts the moved/ object of a pack, unless one is here.
func (a *adoption) copyMoved(ctx context.Context, pack chunked.Name) error {
	key := chunked.MovedKey(pack)
	b, _, err := a.from.get(ctx, key, chunked.MaxMoved)
	if err != nil {
		return err
	}
	err = a.s.putIf(ctx, key, b, "")
	if errors.Is(err, upload.ErrExist) {
		return nil
	}
	return err
}

// object makes sure that an object is here, with the bytes that its name says.
func (a *adoption) object(ctx context.Context, key string, p chunked.ObjectSize) error {
	here := a.start.hasSize(key, p.Size)
	if here {
		err := a.readBack(ctx, key, p)
		if err != nil && !errors.Is(err, ErrDamaged) {
			return err
		}
		if here = err == nil; here {
			return a.count(p, false)
		}
	}
	o := upload.PutOptions{SHA256: p.Name[:]}
	if _, err := upload.Copy(ctx, a.s.objects, key, a.from.objects, key, o); err != nil {
		return err
	}
	// Whoever copied it: what counts is what is here now.
	if err := a.readBack(ctx, key, p); err != nil {
		return err
	}
	return a.count(p, true)
}

// readBack compares an object's bytes here with its name.
func (a *adoption) readBack(ctx context.Context, key string, p chunked.ObjectSize) error {
	r, obj, err := a.s.objects.Get(ctx, key, upload.GetOptions{})
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return err
	}
	if n != p.Size || obj.Size != p.Size || chunked.Name(h.Sum(nil)) != p.Name {
		return fmt.Errorf("%s/%s: %w: it has %d bytes with SHA-256 %x", a.s, key, ErrDamaged, n, h.Sum(nil))
	}
	return nil
}

func (a *adoption) count(p chunked.ObjectSize, copied bool) error {
	a.mu.Lock()
	if copied {
		a.out.Copied.add(p.Size)
	}
	a.out.Verified.add(p.Size)
	a.done += p.Size
	done := a.done
	a.mu.Unlock()
	if a.o.Progress != nil {
		a.o.Progress(done, a.total)
	}
	return nil
}

// publish puts key, manifest and head; false if another changed the head first.
func (a *adoption) publish(ctx context.Context, object, keysObject []byte) (bool, error) {
	s, m, name := a.s, a.img.Manifest, a.img.Name
	old, err := s.head(ctx, m.Name)
	if err != nil {
		return false, err
	}
	if old != nil && lists(old.doc, name) {
		a.out.Sequence = old.doc.Sequence
		return true, a.addRecipients(ctx)
	}
	if err := a.withdrawn(old); err != nil {
		return false, err
	}
	h := &chunked.Head{Name: m.Name, Sequence: m.Sequence, Manifest: name, Created: s.stamp()}
	etag := ""
	if old != nil {
		etag, h.Expires = old.etag, old.doc.Expires
		if !h.Expires.IsZero() && !h.Expires.After(h.Created) {
			h.Expires = time.Time{}
		}
		h.Sequence = max(m.Sequence, old.doc.Sequence+1)
		if err := a.place(ctx, h, versions(old.doc)); err != nil {
			return false, err
		}
	}
	head, err := h.Sign(ctx, a.o.Signer)
	if err != nil {
		return false, err
	}
	if _, _, err := chunked.OpenHead(head, s.opt.Trust, m.Name); err != nil {
		return false, fmt.Errorf("the signing key is not one this machine trusts for the image: %w", err)
	}
	keysKey := chunked.KeysKey(m.Name, name)
	left := s.putIf(ctx, keysKey, keysObject, "") // by an attempt that was interrupted
	if left != nil && !errors.Is(left, upload.ErrExist) {
		return false, left
	}
	if err := s.putNamed(ctx, chunked.ManifestKey(m.Name, name), name, object); err != nil {
		return false, err
	}
	if _, err := s.getNamed(ctx, chunked.ManifestKey(m.Name, name), name, int64(len(object)), maxManifest); err != nil {
		return false, err
	}
	if err := a.confirmKeys(ctx, keysKey, keysObject, left != nil); err != nil {
		return false, err
	}
	if err := a.check(ctx, m, keysKey); err != nil {
		return false, err // garbage collection finds what is left
	}
	err = s.putIf(ctx, chunked.HeadKey(m.Name), head, etag)
	if errors.Is(err, upload.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_ = s.memory.see(h, keys.Fingerprint(a.o.Signer.Public()))
	a.out.Sequence = h.Sequence
	if left != nil {
		return true, a.addRecipients(ctx)
	}
	return true, nil
}

// hints copies what lies beside the version: its boot trace, if readers here believe
// who signed it, and its opening. What is here already stays.
func (a *adoption) hints(ctx context.Context) (failed error) {
	image, n := a.img.Manifest.Name, a.img.Name
	for _, hint := range []struct {
		key   string
		limit int64
		good  func([]byte) error
	}{
		{chunked.TraceKey(image, n), maxTrace, func(b []byte) error {
			_, _, err := chunked.OpenTrace(b, a.s.opt.Trust, image, n)
			return err
		}},
		{chunked.OpeningKey(image, n), chunked.MaxOpening, func(b []byte) error {
			_, err := chunked.DecodeOpening(b)
			return err
		}},
	} {
		b, _, err := a.from.get(ctx, hint.key, hint.limit)
		if errors.Is(err, upload.ErrNotExist) {
			continue
		}
		if err == nil {
			if err = hint.good(b); err != nil {
				err = fmt.Errorf("%s/%s: %w", a.from, hint.key, err)
			}
		}
		if err == nil {
			err = a.s.putIf(ctx, hint.key, b, "")
		}
		if err != nil && !errors.Is(err, upload.ErrExist) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// withdrawn refuses to go behind versions of which none is left: the version
// would be what the image's name stands for.
func (a *adoption) withdrawn(old *storedHead) error {
	if a.o.Behind && old != nil && len(versions(old.doc)) == 0 {
		return fmt.Errorf("image %q: %w", a.img.Manifest.Name, chunked.ErrDeleted)
	}
	return nil
}

// confirmKeys reads the key's object back. One that was left may have other
// recipients; if it is none, it is put again.
func (a *adoption) confirmKeys(ctx context.Context, key string, object []byte, left bool) error {
	for {
		have, _, err := a.s.get(ctx, key, chunked.MaxRecipientsText)
		if err != nil {
			return err
		}
		if bytes.Equal(have, object) {
			return nil
		}
		if !left {
			return fmt.Errorf("%s/%s: %w: it is not what was put", a.s, key, ErrDamaged)
		}
		if _, err := chunked.ParseKeysObject(have); err == nil {
			return nil
		}
		if _, err := upload.PutBytes(ctx, a.s.objects, key, object, upload.PutOptions{}); err != nil {
			return err
		}
		left = false
	}
}

// addRecipients brings a version that is here already to the recipients asked
// for.
func (a *adoption) addRecipients(ctx context.Context) error {
	if len(a.o.Recipients) == 0 {
		return nil
	}
	here, err := a.s.Resolve(ctx, a.img.Manifest.Name+"@"+a.img.Name.String(), ResolveOptions{})
	if err != nil {
		return err
	}
	for _, r := range a.o.Recipients {
		if err := here.AddRecipient(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// place puts the version among those that are here, by sequence, newest first; or
// behind them.
func (a *adoption) place(ctx context.Context, h *chunked.Head, have []chunked.Name) error {
	at := len(have)
	for i, n := range have {
		if a.o.Behind {
			break
		}
		img := &Image{}
		if err := a.s.readManifest(ctx, a.img.Manifest.Name, n, img); err != nil {
			return err
		}
		if img.Manifest.Sequence <= a.img.Manifest.Sequence {
			at = i
			break
		}
	}
	all := slices.Insert(slices.Clone(have), at, a.img.Name)
	h.Manifest, h.Versions = all[0], all[1:]
	return nil
}
