package boot

import (
	"context"
	"iter"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/initrd/lazyroot"
)

// metadataFirst is what of a root's disk comes before the rest: where its filesystem
// keeps its metadata, for whoever looks for a file waits for that first. It is a
// hint, read from the disk as the guest has it by now: a disk with partitions,
// another filesystem or a store that does not answer have none.
func metadataFirst(ctx context.Context, dev *lazyroot.Device) iter.Seq[chunked.Range] {
	ranges, err := ext4.MetadataRanges(deviceReader{ctx, dev}, dev.Size())
	if err != nil {
		return nil
	}
	return func(yield func(chunked.Range) bool) {
		for _, e := range ranges {
			if !yield(chunked.Range{Position: e.Off, Length: e.Len}) {
				return
			}
		}
	}
}

// deviceReader is a device as an io.ReaderAt.
type deviceReader struct {
	ctx context.Context
	dev *lazyroot.Device
}

func (r deviceReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.dev.ReadAt(r.ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}
