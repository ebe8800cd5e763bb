package restore

import (
	"context"
	"io"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/sparse"
)

// Image is the Disk of an Instar image.
type Image struct {
	// Stream is the image's disk, or another of its streams.
	Stream *chunked.Stream
	// Name is the image's manifest.
	Name chunked.Name
	// Workers is how many ranges are fetched at a time; 0: as [chunked.Restore] has it.
	Workers int
}

// Size is the stream's.
func (d *Image) Size() int64 { return d.Stream.Size() }

// ID is the manifest's name and the stream's.
func (d *Image) ID() string { return d.Name.String() + "/" + d.Stream.Name() }

// Map is the stream's.
func (d *Image) Map(ctx context.Context) (sparse.Map, error) { return d.Stream.Map(ctx) }

// Copy restores the stream. A chunk that present has in full, by its digest, is
// not fetched.
func (d *Image) Copy(ctx context.Context, out io.WriterAt, present io.ReaderAt, report func(bytes int64)) error {
	o := chunked.RestoreOptions{Workers: d.Workers, Progress: report}
	if present != nil {
		o.Have = func(off, length int64) bool {
			if !d.has(ctx, present, off, length) {
				return false
			}
			report(length)
			return true
		}
	}
	return chunked.Restore(ctx, d.Stream, out, o)
}

// has reports whether a range is on the target, chunk by chunk.
func (d *Image) has(ctx context.Context, present io.ReaderAt, off, length int64) bool {
	var found int64
	for e, err := range d.Stream.Extents(ctx, off, off+length) {
		if err != nil || e.Start != 0 || e.Length != int64(e.Chunk.Size) {
			return false // of a part of a chunk nobody knows the digest
		}
		p := make([]byte, e.Length)
		if n, _ := present.ReadAt(p, e.Pos); n < len(p) || chunked.DigestOf(p) != e.Chunk.Digest {
			return false
		}
		found += e.Length
	}
	return found == length
}
