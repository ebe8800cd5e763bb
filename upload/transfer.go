package upload

import (
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Progress is told how a transfer goes. Its methods may be called concurrently
// and must not block for long.
type Progress interface {
	// Start adds to the objects and bytes there are in all. Sizes that are not
	// known beforehand are announced later.
	Start(objects int, bytes int64)
	// Add counts bytes as they move; negative when some will move again.
	Add(n int64)
	// Done tells that an object is complete; skipped if it was already there,
	// intact (its bytes were then not counted by Add).
	Done(key string, size int64, skipped bool)
}

// NoProgress ignores everything.
type NoProgress struct{}

// Start does nothing.
func (NoProgress) Start(int, int64) {}

// Add does nothing.
func (NoProgress) Add(int64) {}

// Done does nothing.
func (NoProgress) Done(string, int64, bool) {}

// TransferOptions rules Upload and Download; the zero value is usable.
type TransferOptions struct {
	Parallel int        // objects at a time; default 4
	Put      PutOptions // for Upload: ACL and content type of every object
	Force    bool       // move also what is there and intact

	// KeepPartial leaves what a failed Download has of an object in its
	// temporary file, for a later call to continue. Otherwise only a killed
	// process leaves such files.
	KeepPartial bool

	Progress Progress // default NoProgress
}

func (o TransferOptions) withDefaults() TransferOptions {
	if o.Parallel <= 0 {
		o.Parallel = defaultParallel
	}
	if o.Progress == nil {
		o.Progress = NoProgress{}
	}
	return o
}

// Result counts what a transfer did.
type Result struct {
	Moved, Skipped           int
	MovedBytes, SkippedBytes int64
}

func (r *Result) add(size int64, skipped bool) {
	if skipped {
		r.Skipped++
		r.SkippedBytes += size
		return
	}
	r.Moved++
	r.MovedBytes += size
}

// File is a local file to be stored.
type File struct {
	Key  string
	Path string
}

// Upload stores files, several at a time, beginning in their order, and skips
// those whose object has the same size and MD5. An ETag that is no MD5 (a
// multipart upload's, or an encrypted object's) is never taken as proof: such
// an object is stored again. Memory use does not depend on the files' sizes.
//
// After the first failure no further file is begun and those under way are
// given up; the result tells what had been done. Calling it again goes on from
// there. A file that must come last (a manifest) belongs in a call of its own.
func Upload(ctx context.Context, s Store, files []File, o TransferOptions) (Result, error) {
	o = o.withDefaults()
	var res Result
	var mu sync.Mutex // covers res
	sizes := make([]int64, len(files))
	total := int64(0)
	for i, f := range files {
		fi, err := os.Stat(f.Path)
		if err == nil && !fi.Mode().IsRegular() {
			err = fmt.Errorf("%s is not a regular file", f.Path)
		}
		if err != nil {
			return res, fmt.Errorf("upload: %w", err)
		}
		sizes[i] = fi.Size()
		total += fi.Size()
	}
	o.Progress.Start(len(files), total)
	have := map[string]Object{}
	if !o.Force {
		keys := make([]string, len(files))
		for i, f := range files {
			keys[i] = f.Key
		}
		for obj, err := range s.List(ctx, commonPrefix(keys)) {
			if err != nil {
				// Whoever may only put can go on without.
				if errors.Is(err, ErrAccess) {
					break
				}
				return res, err
			}
			have[obj.Key] = obj
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Parallel)
	for i, f := range files {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if gctx.Err() != nil {
				return nil // somebody else's failure is the one to report
			}
			obj, stored := have[f.Key]
			skipped, err := uploadFile(gctx, s, f, sizes[i], obj, stored, o)
			if err != nil {
				return err
			}
			mu.Lock()
			res.add(sizes[i], skipped)
			mu.Unlock()
			o.Progress.Done(f.Key, sizes[i], skipped)
			return nil
		})
	}
	err := g.Wait()
	if err == nil && ctx.Err() != nil {
		err = newError("upload", s.String(), "", nil, context.Cause(ctx))
	}
	return res, err
}

func uploadFile(ctx context.Context, s Store, f File, size int64, have Object, stored bool, o TransferOptions) (skipped bool, err error) {
	file, err := os.Open(f.Path)
	if err != nil {
		return false, fmt.Errorf("upload: %w", err)
	}
	defer file.Close()
	sum, err := sumOf(ctx, md5.New(), file, size)
	if err != nil {
		return false, fmt.Errorf("upload: reading %s: %w", f.Path, err)
	}
	if stored && have.Size == size {
		same, err := sameMD5(ctx, s, have, sum)
		if err != nil {
			return false, err
		}
		if same {
			return true, nil
		}
	}
	po := o.Put
	po.MD5, po.SHA256 = sum, nil
	po.Progress = o.Progress.Add
	_, err = s.Put(ctx, f.Key, file, size, po)
	return false, err
}

// sameMD5 tells whether a stored object's content has an MD5. Only a directory
// is read for that; a bucket has to say it by itself.
func sameMD5(ctx context.Context, s Store, have Object, sum []byte) (bool, error) {
	if have.MD5 != nil {
		return string(have.MD5) == string(sum), nil
	}
	if _, ok := s.(*dirStore); !ok {
		return false, nil
	}
	r, obj, err := s.Get(ctx, have.Key, GetOptions{})
	if errors.Is(err, ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer r.Close()
	h := md5.New()
	n, err := io.Copy(h, r)
	return err == nil && n == obj.Size && string(h.Sum(nil)) == string(sum), nil
}

func sumOf(ctx context.Context, h hash.Hash, r io.ReaderAt, size int64) ([]byte, error) {
	n, err := io.Copy(h, &countingReader{ctx: ctx, r: io.NewSectionReader(r, 0, size), add: func(int64) {}})
	if err == nil && n != size {
		err = fmt.Errorf("it became shorter: %w", io.ErrUnexpectedEOF)
	}
	return h.Sum(nil), err
}

// commonPrefix is what all keys begin with.
func commonPrefix(keys []string) string {
	if len(keys) == 0 {
		return ""
	}
	p := keys[0]
	for _, k := range keys[1:] {
		n := 0
		for n < len(p) && n < len(k) && p[n] == k[n] {
			n++
		}
		p = p[:n]
	}
	for len(p) > 0 && p[len(p)-1] >= 0x80 {
		p = p[:len(p)-1] // not in the middle of a character
	}
	return p
}
