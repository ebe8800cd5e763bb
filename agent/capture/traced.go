package capture

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/upload/images"
)

// traced is a boot trace that is being carried over to a new image: what a boot
// of another version reads, by file, and by place where no file lies.
type traced struct {
	ref    string
	ranges []chunked.Range // of that version's disk, each byte once
	layout *ext4.Layout    // of that version
	start  int64           // of its filesystem

	first []chunked.Range // of the new disk, in the order of reading
}

// openTrace reads the trace of ImageOptions.BootTrace and where the files of
// its image lie.
func (c *creation) openTrace(ctx context.Context) (*traced, error) {
	if c.o.BootTrace == "" {
		return nil, nil
	}
	fail := func(err error) (*traced, error) {
		return nil, fmt.Errorf("the boot trace to lay out by: %w", err)
	}
	img, err := c.o.Store.Resolve(ctx, c.o.BootTrace, images.ResolveOptions{})
	if err != nil {
		return fail(err)
	}
	t, err := img.Trace(ctx)
	if err != nil {
		return fail(err)
	}
	x := &traced{ref: img.Manifest.Name + "@" + img.Name.String()[:12], start: disk.Kind(img.Manifest.Partition).Start()}
	if c.parent != nil && c.parent.image.Name == img.Name {
		x.layout = c.parent.layout
		x.ranges = images.FirstReads(t.Ranges, c.parent.disk.Size())
		return x, nil
	}
	index, err := img.Open(ctx)
	if err != nil {
		return fail(err)
	}
	d, err := index.Stream(chunked.StreamDisk)
	if err != nil {
		return fail(err)
	}
	s, err := index.Stream(chunked.StreamLayout)
	if err != nil {
		return fail(fmt.Errorf("image %s says not where its files lie: %w", x.ref, err))
	}
	if x.layout, err = ext4.ReadLayout(io.NewSectionReader(s.ReaderAt(ctx, layoutCache), 0, s.Size())); err != nil {
		return fail(err)
	}
	x.ranges = images.FirstReads(t.Ranges, d.Size())
	return x, nil
}

// read is a part of something that a boot reads, and when.
type read struct {
	from, to int64
	rank     int
}

// carry finds where the new image has what the trace names. Data that a file
// had are looked for in the file of that name; what is no file's, metadata, where
// it was.
func (x *traced) carry(v *Volume) {
	reads := make([]read, 0, len(x.ranges))
	for i, r := range x.ranges {
		reads = append(reads, read{r.Position - x.start, r.Position + r.Length - x.start, i})
	}
	slices.SortFunc(reads, func(a, b read) int { return cmp.Compare(a.from, b.from) })
	// within calls f for the parts of reads in a range.
	within := func(reads []read, from, to int64, f func(read)) {
		i, _ := slices.BinarySearchFunc(reads, from, func(r read, pos int64) int { return cmp.Compare(r.to, pos+1) })
		for ; i < len(reads) && reads[i].from < to; i++ {
			f(read{max(from, reads[i].from), min(to, reads[i].to), reads[i].rank})
		}
	}
	t := v.Root.Tree
	files := map[filetree.ID][]read{} // by offset in the file
	var ofFiles []read                // by position in the old image
	for f := range x.layout.Files() {
		for _, o := range f.Data {
			within(reads, o.Pos, o.Pos+o.Len, func(r read) {
				ofFiles = append(ofFiles, r)
				id := t.Find(f.Path)
				if id == filetree.None || t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
					return
				}
				files[id] = append(files[id], read{r.from - o.Pos + o.Off, r.to - o.Pos + o.Off, r.rank})
			})
		}
	}
	start, _ := v.Disk.Partition()
	var found []read // by position in the new disk
	for seg := range v.Plan.Data() {
		if list := files[seg.ID]; list != nil {
			within(list, seg.Off, seg.Off+seg.Len, func(r read) {
				move := start + seg.Pos - seg.Off
				found = append(found, read{r.from + move, r.to + move, r.rank})
			})
		}
	}
	slices.SortFunc(ofFiles, func(a, b read) int { return cmp.Compare(a.from, b.from) })
	for _, r := range reads {
		at := r.from
		within(ofFiles, r.from, r.to, func(f read) {
			if f.from > at {
				found = append(found, read{at + start, f.from + start, r.rank})
			}
			at = max(at, f.to)
		})
		if at < r.to {
			found = append(found, read{at + start, r.to + start, r.rank})
		}
	}
	slices.SortStableFunc(found, func(a, b read) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.from, b.from))
	})
	ranges := make([]chunked.Range, len(found))
	for i, r := range found {
		ranges[i] = chunked.Range{Position: r.from, Length: r.to - r.from}
	}
	x.first = images.FirstReads(ranges, v.Disk.Size())
}

// files are those of which a boot reads anything.
func (x *traced) files(v *Volume) map[filetree.ID]bool {
	if x == nil {
		return nil
	}
	start, _ := v.Disk.Partition()
	sorted := slices.Clone(x.first)
	slices.SortFunc(sorted, func(a, b chunked.Range) int { return cmp.Compare(a.Position, b.Position) })
	m := map[filetree.ID]bool{}
	for seg := range v.Plan.Data() {
		pos := start + seg.Pos
		i, _ := slices.BinarySearchFunc(sorted, pos, func(r chunked.Range, pos int64) int { return cmp.Compare(r.Position+r.Length, pos+1) })
		if i < len(sorted) && sorted[i].Position < pos+seg.Len {
			m[seg.ID] = true
		}
	}
	return m
}

// storeTrace gives the image that was published the trace it was laid out by. It
// is a hint: that it could not be stored is no reason to fail.
func (c *creation) storeTrace(ctx context.Context) {
	if c.traced == nil {
		return
	}
	img, err := c.o.Store.Resolve(ctx, c.o.Name+"@"+c.res.Published.Name.String(), images.ResolveOptions{})
	if err == nil {
		var t *images.Trace
		if t, err = img.PutTrace(ctx, c.traced.first, c.o.Signer); err == nil {
			c.res.Traced = t.Bytes
			c.res.BytesAdded += t.Size
			return
		}
	}
	c.r.Note(fmt.Sprintf("the image is published without the boot trace of %s (%v)", c.traced.ref, err))
}
