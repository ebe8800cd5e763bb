package restore

import (
	"context"
	"io"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/sparse"
)

// ForBundle gives a stream of an image, read with cacheBytes of memory, as
// something to make an EC2 bundle of. The caller names it.
func ForBundle(ctx context.Context, s *chunked.Stream, made time.Time, cacheBytes int64) (ec2.Image, error) {
	m, err := s.Map(ctx)
	if err != nil {
		return ec2.Image{}, err
	}
	if m == nil {
		m = sparse.Map{} // nothing but zeros, which is not the same as no map
	}
	return ec2.Image{
		Size: s.Size(), Map: m, Mtime: made, Mode: 0o644,
		Write: func(ctx context.Context, w io.Writer) error {
			_, err := io.CopyBuffer(struct{ io.Writer }{w}, sparse.NewReader(s.ReaderAt(ctx, cacheBytes), m), make([]byte, 1<<20))
			return err
		},
	}, nil
}
