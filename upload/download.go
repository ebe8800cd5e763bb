package upload

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Fetch is an object to be stored as a local file.
type Fetch struct {
	Key  string
	Name string // of the file, within the directory; subdirectories must exist

	// Size in bytes and Sum by Hash are what the content must be; zero (0 and
	// nil) where not known. Without Sum the object's MD5 is used, if the
	// store tells it.
	Size int64
	Sum  []byte
	Hash func() hash.Hash
}

// corruptTries is how often an object with the wrong digest is fetched anew: a
// fault on the way passes, rot in the store does not.
const corruptTries = 3

// Download fetches objects into a directory, several at a time, and skips those
// whose file is there with the right digest. Each arrives in a temporary file
// beside its place (".NAME.ETAG.instar-part"), which a later call for the same
// object continues if this one is killed (or fails, with KeepPartial); it gets its name once it is complete, verified and on disk.
// Content that stays wrong is [ErrCorrupt], and no file has it. Names cannot
// leave the directory. Failure is handled as by Upload.
func Download(ctx context.Context, s Store, dir string, fetches []Fetch, o TransferOptions) (Result, error) {
	o = o.withDefaults()
	var res Result
	var mu sync.Mutex // covers res
	root, err := os.OpenRoot(dir)
	if err != nil {
		return res, fmt.Errorf("download: %w", err)
	}
	defer root.Close()
	total := int64(0)
	for _, f := range fetches {
		total += f.Size
	}
	o.Progress.Start(len(fetches), total)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Parallel)
	for _, f := range fetches {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if gctx.Err() != nil {
				return nil
			}
			size, skipped, err := fetchFile(gctx, s, root, f, o)
			if err != nil {
				return err
			}
			mu.Lock()
			res.add(size, skipped)
			mu.Unlock()
			o.Progress.Done(f.Key, size, skipped)
			return nil
		})
	}
	err = g.Wait()
	if err == nil && ctx.Err() != nil {
		err = newError("download", s.String(), "", nil, context.Cause(ctx))
	}
	return res, err
}

// intact tells whether a complete file is there. Without a digest given it is
// never taken for what the store has.
func (f Fetch) intact(ctx context.Context, root *os.Root) (int64, bool) {
	if f.Sum == nil {
		return 0, false
	}
	file, err := root.OpenFile(f.Name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, false
	}
	defer file.Close()
	fi, err := file.Stat()
	if err != nil || !fi.Mode().IsRegular() || f.Size != 0 && fi.Size() != f.Size {
		return 0, false
	}
	sum, err := sumOf(ctx, f.Hash(), file, fi.Size())
	return fi.Size(), err == nil && string(sum) == string(f.Sum)
}

func fetchFile(ctx context.Context, s Store, root *os.Root, f Fetch, o TransferOptions) (size int64, skipped bool, err error) {
	if !o.Force {
		if n, ok := f.intact(ctx, root); ok {
			return n, true, nil
		}
	}
	for try := 1; ; try++ {
		size, err := fetchObject(ctx, s, root, f, o, try == 1)
		again := errors.Is(err, ErrChanged) || errors.Is(err, ErrCorrupt)
		if !again || try == corruptTries || ctx.Err() != nil {
			return size, false, err
		}
	}
}

// fetchObject fetches what the object is now: ErrChanged if it is replaced
// meanwhile, ErrCorrupt if it is not what it should be.
func fetchObject(ctx context.Context, s Store, root *os.Root, f Fetch, o TransferOptions, first bool) (size int64, err error) {
	obj, err := s.Stat(ctx, f.Key)
	if err != nil {
		return 0, err
	}
	if f.Size != 0 && obj.Size != f.Size {
		return 0, newError("download", s.String(), f.Key, ErrCorrupt, fmt.Errorf("it has %d bytes, should have %d", obj.Size, f.Size))
	}
	if f.Size == 0 && first {
		o.Progress.Start(0, obj.Size)
	}
	if f.Sum == nil && obj.MD5 != nil {
		f.Sum, f.Hash = obj.MD5, md5.New
	}
	tag := md5.Sum([]byte(obj.ETag))
	temp := tempName(f.Name, hex.EncodeToString(tag[:6]))
	file, err := root.OpenFile(temp, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return 0, fmt.Errorf("download: %w", err)
	}
	defer file.Close()
	// Two downloads of one object into one directory would mix.
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return 0, fmt.Errorf("download: %s is being written by another process: %w", temp, err)
	}
	defer func() {
		// What failed its digest, or is no longer stored, is of no use.
		if err != nil && (!o.KeepPartial || errors.Is(err, ErrCorrupt) || errors.Is(err, ErrChanged)) {
			root.Remove(temp)
		}
	}()
	if fi, err := file.Stat(); err != nil || !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("download: %s is not a regular file", temp)
	}
	if err := fill(ctx, s, file, f, obj, o); err != nil {
		return 0, err
	}
	if err := file.Chmod(0o644); err != nil {
		return 0, fmt.Errorf("download: %w", err)
	}
	if err := file.Sync(); err != nil {
		return 0, fmt.Errorf("download: %s: %w", temp, err)
	}
	if err := root.Rename(temp, f.Name); err != nil {
		return 0, fmt.Errorf("download: %w", err)
	}
	return obj.Size, syncParent(root, f.Name)
}

// tempName is the name of an unfinished file.
func tempName(name, tag string) string {
	dir, base := "", name
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			dir, base = name[:i+1], name[i+1:]
			break
		}
	}
	const rest = len("..") + 12 + len(".instar-part")
	if len(base) > maxSegment-rest {
		base = base[:maxSegment-rest]
	}
	return dir + "." + base + "." + tag + ".instar-part"
}

func syncParent(root *os.Root, name string) error {
	dir := "."
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			dir = name[:i]
			break
		}
	}
	d, err := root.Open(dir)
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, fs.ErrInvalid) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("download: fsync of %s: %w", dir, err)
	}
	return nil
}

// fill completes file to obj's content and verifies it.
func fill(ctx context.Context, s Store, file *os.File, f Fetch, obj Object, o TransferOptions) error {
	at, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	// Without a digest nobody could tell whether what is there survived a
	// power cut.
	if at > obj.Size || f.Sum == nil {
		at = 0
		if err := file.Truncate(0); err != nil {
			return fmt.Errorf("download: %w", err)
		}
	}
	h := hash.Hash(md5.New())
	if f.Sum != nil {
		h = f.Hash()
	}
	if _, err := sumOf(ctx, h, file, at); err != nil {
		return fmt.Errorf("download: reading %s: %w", file.Name(), err)
	}
	got := at
	o.Progress.Add(at)
	if at < obj.Size {
		r, now, err := s.Get(ctx, f.Key, GetOptions{Offset: at, IfMatch: obj.ETag})
		if err != nil {
			o.Progress.Add(-got)
			return err
		}
		defer r.Close()
		if now.Size != obj.Size {
			o.Progress.Add(-got)
			return newError("download", s.String(), f.Key, ErrChanged, nil)
		}
		if _, err := file.Seek(at, io.SeekStart); err != nil {
			return fmt.Errorf("download: %w", err)
		}
		var werr error
		buf := make([]byte, 256<<10)
		for werr == nil {
			n, rerr := r.Read(buf)
			if n > 0 {
				h.Write(buf[:n])
				_, werr = file.Write(buf[:n])
				got += int64(n)
				o.Progress.Add(int64(n))
			}
			if rerr == io.EOF {
				break
			}
			if rerr != nil {
				o.Progress.Add(-got)
				return rerr // the next call continues at what was written
			}
		}
		if werr != nil {
			o.Progress.Add(-got)
			return fmt.Errorf("download: writing %s: %w", file.Name(), werr)
		}
	}
	if got != obj.Size || f.Sum != nil && string(h.Sum(nil)) != string(f.Sum) {
		o.Progress.Add(-got)
		return newError("download", s.String(), f.Key, ErrCorrupt, fmt.Errorf("digest is %x, should be %x", h.Sum(nil), f.Sum))
	}
	return nil
}
