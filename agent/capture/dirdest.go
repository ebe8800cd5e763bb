package capture

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/internal/durable"
)

// Destination takes a bundle's parts and manifest. Prepare comes first, once,
// then parts, then either Commit or Abort. An implementation may also be an
// [ec2.PartRenamer].
type Destination interface {
	// Prepare makes sure that a bundle of this name can be put here.
	Prepare(ctx context.Context, bundle string) error
	// PutPart stores a part, durably; see [ec2.PartSink].
	ec2.PartSink
	// Commit makes the bundle visible, the manifest last, and returns where
	// the manifest is. Parts of an earlier bundle of that name are gone then.
	Commit(ctx context.Context, m *ec2.Manifest, doc []byte) (string, error)
	// Abort removes what was stored since Prepare, after a failed Commit too.
	Abort(ctx context.Context) error
}

// Dir is a directory as a [Destination]. Until it is complete a bundle lies in
// a hidden subdirectory, so a bundle of the same name stays whole until the
// new one replaces it.
type Dir struct {
	Path string

	bundle string
	work   string   // the hidden directory, "" when there is none
	lock   *os.File // of the hidden directory, open and locked
	moved  []string // parts that have their final names
}

// Prepare makes the hidden directory, and removes those of runs that were
// killed. One that is locked belongs to a run that goes on: [ErrOtherRun].
func (d *Dir) Prepare(_ context.Context, bundle string) (err error) {
	d.bundle = bundle
	if d.work, err = os.MkdirTemp(d.Path, "."+bundle+".partial-"); err != nil {
		return fmt.Errorf("making room for the bundle: %w", err)
	}
	defer func() {
		if err != nil {
			d.unlock()
			err = errors.Join(err, os.RemoveAll(d.work))
			d.work = ""
		}
	}()
	if d.lock, _, err = lockDir(d.work); err != nil {
		return fmt.Errorf("locking the directory the bundle is made in: %w", err)
	}
	old, err := filepath.Glob(filepath.Join(escape(d.Path), "."+escape(bundle)+".partial-*"))
	if err != nil {
		return fmt.Errorf("looking for what an earlier run left: %w", err)
	}
	for _, o := range old {
		if filepath.Base(o) == filepath.Base(d.work) {
			continue
		}
		f, busy, err := lockDir(o)
		switch {
		case busy:
			return fmt.Errorf("%s: %w", o, ErrOtherRun)
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return fmt.Errorf("looking at what an earlier run left: %w", err)
		}
		if err := errors.Join(os.RemoveAll(o), f.Close()); err != nil {
			return fmt.Errorf("removing what an earlier run left: %w", err)
		}
	}
	return nil
}

// lockDir opens a directory and locks it until it is closed, by the end of the
// process at the latest. busy: another process has it. A filesystem without
// locks counts as one where nobody has it.
func lockDir(path string) (f *os.File, busy bool, err error) {
	if f, err = os.Open(path); err != nil {
		return nil, false, err
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK {
		return nil, true, f.Close()
	}
	return f, false, nil
}

func (d *Dir) unlock() {
	if d.lock != nil {
		d.lock.Close()
		d.lock = nil
	}
}

func escape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// PutPart writes a part and its data to disk.
func (d *Dir) PutPart(_ context.Context, p ec2.Part) error {
	return writeSynced(filepath.Join(d.work, p.Name), p.Data)
}

// RenamePart gives a part its final number.
func (d *Dir) RenamePart(_ context.Context, from, to string) error {
	return os.Rename(filepath.Join(d.work, from), filepath.Join(d.work, to))
}

// Commit moves the parts to their names: the manifest of an earlier bundle
// goes first, the new one comes last.
func (d *Dir) Commit(_ context.Context, m *ec2.Manifest, doc []byte) (string, error) {
	name := ManifestName(d.bundle)
	final := filepath.Join(d.Path, name)
	if err := writeSynced(filepath.Join(d.work, name), doc); err != nil {
		return "", err
	}
	if err := durable.SyncDir(d.work); err != nil {
		return "", err
	}
	if err := os.Remove(final); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("removing the manifest of an earlier bundle: %w", err)
	}
	stale, err := partsIn(d.Path, d.bundle)
	if err != nil {
		return "", err
	}
	for _, p := range m.Parts {
		if err := os.Rename(filepath.Join(d.work, p.Filename), filepath.Join(d.Path, p.Filename)); err != nil {
			return "", fmt.Errorf("giving a part its name: %w", err)
		}
		d.moved = append(d.moved, p.Filename)
		delete(stale, p.Filename)
	}
	for p := range stale {
		if err := os.Remove(filepath.Join(d.Path, p)); err != nil {
			return "", fmt.Errorf("removing a part of an earlier bundle: %w", err)
		}
	}
	if err := durable.SyncDir(d.Path); err != nil {
		return "", err
	}
	if err := os.Rename(filepath.Join(d.work, name), final); err != nil {
		return "", fmt.Errorf("giving the manifest its name: %w", err)
	}
	if err := os.Remove(d.work); err != nil {
		return "", fmt.Errorf("removing the directory the bundle was made in: %w", err)
	}
	d.unlock()
	return final, durable.SyncDir(d.Path)
}

// Abort removes everything.
func (d *Dir) Abort(context.Context) error {
	if d.work == "" {
		return nil
	}
	defer d.unlock()
	var errs []error
	for _, p := range append(d.moved, ManifestName(d.bundle)) {
		if len(d.moved) == 0 {
			break // nothing had its name yet: what is there belongs to an earlier bundle
		}
		if err := os.Remove(filepath.Join(d.Path, p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(d.work))...)
}

// partsIn lists the files in dir that are called like parts of the bundle.
func partsIn(dir, bundle string) (map[string]bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for parts of an earlier bundle: %w", err)
	}
	found := map[string]bool{}
	for _, e := range entries {
		if IsPart(e.Name(), bundle) && e.Type().IsRegular() {
			found[e.Name()] = true
		}
	}
	return found, nil
}

// IsPart reports whether name is one that a part of the bundle can have.
func IsPart(name, bundle string) bool {
	number, ok := strings.CutPrefix(name, bundle+".part.")
	return ok && number != "" && strings.Trim(number, "0123456789") == ""
}

// writeSynced writes a new file and waits until it is on disk.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Both puts one bundle into two places.
type Both struct{ First, Second Destination }

// Prepare prepares both.
func (b *Both) Prepare(ctx context.Context, bundle string) error {
	if err := b.First.Prepare(ctx, bundle); err != nil {
		return err
	}
	if err := b.Second.Prepare(ctx, bundle); err != nil {
		return errors.Join(err, b.First.Abort(context.WithoutCancel(ctx)))
	}
	return nil
}

// PutPart stores the part in both, at the same time.
func (b *Both) PutPart(ctx context.Context, p ec2.Part) error {
	var wg sync.WaitGroup
	var first error
	wg.Go(func() { first = b.First.PutPart(ctx, p) })
	second := b.Second.PutPart(ctx, p)
	wg.Wait()
	return errors.Join(first, second)
}

// Commit commits the first, then the second, whose location it returns.
func (b *Both) Commit(ctx context.Context, m *ec2.Manifest, doc []byte) (string, error) {
	if _, err := b.First.Commit(ctx, m, doc); err != nil {
		return "", err
	}
	return b.Second.Commit(ctx, m, doc)
}

// Abort empties both.
func (b *Both) Abort(ctx context.Context) error {
	return errors.Join(b.First.Abort(ctx), b.Second.Abort(ctx))
}
