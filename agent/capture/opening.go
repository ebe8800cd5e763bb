package capture

import (
	"context"
	"fmt"
	"iter"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// storeOpening puts what who mounts an image reads first into one object, and counts
// it. It is a hint: that it could not be stored is no reason to fail.
func storeOpening(ctx context.Context, s *images.Store, res *ImageResult, key chunked.Key, first iter.Seq[chunked.Range], r Reporter) {
	n, err := s.PutOpening(ctx, res.Published, key, first)
	if err != nil {
		r.Note(fmt.Sprintf("the image is published; who mounts it will need more requests (%v)", err))
		return
	}
	res.BytesAdded += n
}

// lookups yields where on the disk lies what the kernel reads to find its files.
func (v *Volume) lookups() iter.Seq[chunked.Range] {
	start, _ := v.Disk.Partition()
	head, _ := v.Disk.Tables()
	return func(yield func(chunked.Range) bool) {
		if len(head) > 0 && !yield(chunked.Range{Length: int64(len(head))}) {
			return
		}
		for e := range v.Plan.Lookups() {
			if !yield(chunked.Range{Position: start + e.Off, Length: e.Len}) {
				return
			}
		}
	}
}

// beginning is what is read first of a disk of which nothing is known.
func beginning(yield func(chunked.Range) bool) { yield(chunked.Range{Length: frontSize}) }
