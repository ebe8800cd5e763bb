// Package diff tells which files differ between two Instar images, and by how
// many bytes.
//
// In go two images: the layout each was captured with and its disk. Out come
// the differences, in the order of the paths. What the images have in common as
// stored is recognised by its digest; only content that is stored differently is
// fetched and compared. Memory does not depend on how many files there are. The
// package touches nothing.
package diff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ext4"
)

// Side is one of the two images.
type Side struct {
	Layout *ext4.Layout
	Disk   *chunked.Stream
	// Offset is where the filesystem begins on the disk, in bytes.
	Offset int64
}

// Kind says how a name differs.
type Kind string

// Kinds of difference.
const (
	Added   Kind = "added"
	Removed Kind = "removed"
	// Changed: another content, or another type of file.
	Changed Kind = "changed"
	// Touched: the content is the same; times or other attributes were changed.
	Touched Kind = "touched"
)

// Difference is a name that only one image has, or that differs.
type Difference struct {
	Path string
	Kind Kind
	Mode uint32 // type of the file, unix.S_IFMT; of one that was removed, the old one's
	// Was and Size are the sizes before and after, in bytes.
	Was, Size int64
	// Bytes of the second image's file that the first image's has not at the same
	// place.
	Bytes int64
}

// cacheBytes is how much of each image is kept while content is compared.
const cacheBytes = 16 << 20

// Images yields the differences between two images, directory by directory, each
// before those in it. It ends after the first error.
func Images(ctx context.Context, a, b Side) iter.Seq2[Difference, error] {
	return func(yield func(Difference, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		c := comparison{ctx: ctx, a: a, b: b, ra: a.Disk.ReaderAt(ctx, cacheBytes), rb: b.Disk.ReaderAt(ctx, cacheBytes)}
		nextA, stopA := iter.Pull(a.Layout.Files())
		defer stopA()
		nextB, stopB := iter.Pull(b.Layout.Files())
		defer stopB()
		fa, okA := nextA()
		fb, okB := nextB()
		for okA || okB {
			if err := ctx.Err(); err != nil {
				yield(Difference{}, err)
				return
			}
			order := 0
			switch {
			case !okA:
				order = 1
			case !okB:
				order = -1
			default:
				order = comparePaths(fa.Path, fb.Path)
			}
			var d Difference
			var differs bool
			var err error
			switch {
			case order < 0:
				d, differs = Difference{Path: fa.Path, Kind: Removed, Mode: fa.Mode, Was: fa.Size}, true
			case order > 0:
				d, differs = Difference{Path: fb.Path, Kind: Added, Mode: fb.Mode, Size: fb.Size, Bytes: dataOf(fb)}, true
			default:
				d, differs, err = c.files(fa, fb)
			}
			if err != nil {
				yield(Difference{}, fmt.Errorf("comparing %q: %w", fb.Path, err))
				return
			}
			if differs && !yield(d, nil) {
				return
			}
			if order <= 0 {
				fa, okA = nextA()
			}
			if order >= 0 {
				fb, okB = nextB()
			}
		}
	}
}

// comparePaths compares paths as layouts have them in order: by directory,
// each before those in it, then by name.
func comparePaths(a, b string) int {
	da, na := path.Split(a)
	db, nb := path.Split(b)
	for da != db {
		xa, ra, okA := strings.Cut(da, "/")
		xb, rb, okB := strings.Cut(db, "/")
		switch c := strings.Compare(xa, xb); {
		case !okA:
			return -1
		case !okB:
			return 1
		case c != 0:
			return c
		}
		da, db = ra, rb
	}
	return strings.Compare(na, nb)
}

// dataOf is how many bytes of a file are stored, as far as its size goes.
func dataOf(f ext4.LayoutFile) (n int64) {
	if f.Link {
		return 0
	}
	for _, o := range f.Data {
		n += min(o.Len, max(f.Size-o.Off, 0))
	}
	return n
}

type comparison struct {
	ctx    context.Context
	a, b   Side
	ra, rb io.ReaderAt
}

// files compares what stands under one name.
func (c *comparison) files(a, b ext4.LayoutFile) (Difference, bool, error) {
	d := Difference{Path: b.Path, Kind: Changed, Mode: b.Mode, Was: a.Size, Size: b.Size}
	if a.Mode != b.Mode || a.Link != b.Link {
		d.Bytes = dataOf(b)
		return d, true, nil
	}
	if b.Link || b.Mode&unix.S_IFMT != unix.S_IFREG {
		// That a directory was touched says what its names say; of links' targets
		// and devices the layout has nothing.
		return d, false, nil
	}
	n, err := c.content(a, b)
	if err != nil {
		return d, false, err
	}
	d.Bytes = n
	if n > 0 || a.Size != b.Size {
		return d, true, nil
	}
	d.Kind = Touched
	return d, a.Facts && b.Facts && (a.Mtime != b.Mtime || a.Ctime != b.Ctime), nil
}

// run is a piece of a file's content as it is stored; without a chunk it is zero.
type run struct {
	off, n int64
	chunk  chunked.Digest
	start  int64
	zero   bool
}

// content is how many bytes of b's content are not a's.
func (c *comparison) content(a, b ext4.LayoutFile) (int64, error) {
	ra, err := c.runs(c.a, a)
	if err != nil {
		return 0, err
	}
	rb, err := c.runs(c.b, b)
	if err != nil {
		return 0, err
	}
	var differ int64
	i := 0
	for _, y := range rb {
		for y.n > 0 {
			for i < len(ra) && ra[i].off+ra[i].n <= y.off {
				i++
			}
			n := y.n
			x := run{zero: true}
			var beyond bool // a ends before
			switch {
			case i == len(ra):
				beyond = true
			case ra[i].off > y.off:
				n = min(n, ra[i].off-y.off)
			default:
				x = ra[i]
				x.start += y.off - x.off
				n = min(n, x.off+x.n-y.off)
			}
			switch {
			case beyond:
				differ += n
			case x.zero && y.zero, !x.zero && !y.zero && x.chunk == y.chunk && x.start == y.start:
			default:
				k, err := c.compare(a, b, y.off, n)
				if err != nil {
					return 0, err
				}
				differ += k
			}
			y.off, y.n, y.start = y.off+n, y.n-n, y.start+n
		}
	}
	return differ, nil
}

// runs is a file's content as it is stored, without gaps up to its size.
func (c *comparison) runs(s Side, f ext4.LayoutFile) ([]run, error) {
	var out []run
	at := int64(0)
	add := func(r run) {
		if r.off > at {
			out = append(out, run{off: at, n: r.off - at, zero: true})
		}
		if r.n = min(r.n, f.Size-r.off); r.n > 0 {
			out = append(out, r)
			at = r.off + r.n
		}
	}
	for _, o := range f.Data {
		from := s.Offset + o.Pos
		for e, err := range s.Disk.Extents(c.ctx, from, from+o.Len) {
			if err != nil {
				return nil, err
			}
			add(run{off: o.Off + e.Pos - from, n: e.Length, chunk: e.Chunk.Digest, start: e.Start})
		}
	}
	if at < f.Size {
		out = append(out, run{off: at, n: f.Size - at, zero: true})
	}
	return out, nil
}

// compare reads both files' bytes and counts the blocks that differ, in bytes.
func (c *comparison) compare(a, b ext4.LayoutFile, off, n int64) (int64, error) {
	const step = 1 << 20
	var differ int64
	pa, pb := make([]byte, min(n, step)), make([]byte, min(n, step))
	for n > 0 {
		k := min(n, step)
		if err := errors.Join(read(c.ra, c.a.Offset, a, pa[:k], off), read(c.rb, c.b.Offset, b, pb[:k], off)); err != nil {
			return 0, err
		}
		for i := int64(0); i < k; i += ext4.BlockSize {
			end := min(i+ext4.BlockSize, k)
			if !bytes.Equal(pa[i:end], pb[i:end]) {
				differ += end - i
			}
		}
		off, n = off+k, n-k
	}
	return differ, nil
}

// read reads from a file of an image; what is past its end or in a hole is zero.
func read(r io.ReaderAt, base int64, f ext4.LayoutFile, p []byte, off int64) error {
	clear(p)
	for _, o := range f.Data {
		from, to := max(off, o.Off), min(off+int64(len(p)), o.Off+o.Len, f.Size)
		if from >= to {
			continue
		}
		if n, err := r.ReadAt(p[from-off:to-off], base+o.Pos+from-o.Off); n < int(to-from) {
			return err
		}
	}
	return nil
}
