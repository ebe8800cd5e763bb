package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/upload/images"
)

// ImportOptions say what to make of a disk that exists, and in which store.
// The fields are those of ImageOptions.
type ImportOptions struct {
	Store        *images.Store
	Name, Domain string
	Owner        chunked.Key
	Signer       keys.Signer
	Recipients   []*keys.Recipient
	AllCreators  bool
	Expires      time.Duration
	Description  string
	Level        *chunked.Level // nil: the library's default
	Architecture string         // required
	Mappings     []chunked.Mapping
	Tool         string
}

// ImportDisk is a disk to import: its size in bytes and what gives its data, in
// order, to an [ec2.Output]; whether Fill calls Finish does not matter. Nothing is
// published unless Fill returned nil.
type ImportDisk struct {
	Size int64
	Fill func(ctx context.Context, out ec2.Output) error
}

// ReadDisk is a disk whose data, those of m, are read from r.
func ReadDisk(r io.ReaderAt, size int64, m sparse.Map) ImportDisk {
	return ImportDisk{Size: size, Fill: func(ctx context.Context, out ec2.Output) error {
		buf := make([]byte, 1<<20)
		at := int64(0)
		for _, e := range m {
			if err := out.Skip(e.Off - at); err != nil {
				return err
			}
			for at = e.Off; at < e.End(); {
				if err := ctx.Err(); err != nil {
					return err
				}
				p := buf[:min(int64(len(buf)), e.End()-at)]
				if n, err := r.ReadAt(p, at); n < len(p) {
					return fmt.Errorf("reading the disk at byte %d: %w", at+int64(n), noEOF(err))
				}
				if _, err := out.Write(p); err != nil {
					return err
				}
				at += int64(len(p))
			}
		}
		return out.Skip(size - at)
	}}
}

// OfImage is the disk of an image that could be bundled.
func OfImage(img ec2.Image) ImportDisk {
	m := img.Map
	if m == nil {
		m = sparse.Dense(img.Size)
	}
	return ImportDisk{Size: img.Size, Fill: func(ctx context.Context, out ec2.Output) error {
		w := &spread{out: out, m: m}
		if err := img.Write(ctx, w); err != nil {
			return err
		}
		return out.Skip(img.Size - w.at)
	}}
}

// spread puts the bytes of a map's data where they belong.
type spread struct {
	out ec2.Output
	m   sparse.Map
	at  int64
}

// Write takes the next bytes of the map's.
func (w *spread) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		for len(w.m) > 0 && w.m[0].End() <= w.at {
			w.m = w.m[1:]
		}
		if len(w.m) == 0 {
			return n, fmt.Errorf("%w: there is more data than its map tells", ErrImageSize)
		}
		if err := w.out.Skip(max(w.m[0].Off-w.at, 0)); err != nil {
			return n, err
		}
		w.at = max(w.at, w.m[0].Off)
		k, err := w.out.Write(p[n:min(len(p), n+int(w.m[0].End()-w.at))])
		n += k
		w.at += int64(k)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) || err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ImportImage makes an Instar image of a disk and publishes it as the newest
// version of an image, all or nothing. What the store has of it is not stored
// again. The image has no kernel and no list of files: lazy boot and comparing
// by files need a captured one.
func ImportImage(ctx context.Context, o ImportOptions, d ImportDisk, r Reporter) (*ImageResult, error) {
	if d.Size <= 0 {
		return nil, fmt.Errorf("%w: the disk is empty", ErrImageSize)
	}
	for try := 1; ; try++ {
		res, err := importImage(ctx, o, d, r)
		if err == nil || try == collectedTries || !errors.Is(err, images.ErrCollected) {
			return res, err
		}
		r.Note(fmt.Sprintf("garbage collection removed what this import wanted to use: once more from the beginning (%v)", err))
	}
}

func importImage(ctx context.Context, o ImportOptions, d ImportDisk, r Reporter) (_ *ImageResult, err error) {
	r.Phase("looking at "+o.Store.String(), 0)
	domain, err := o.Store.Domain(ctx, o.Domain, images.DomainOptions{Create: true, Creators: o.Recipients[:1], Signer: o.Signer})
	if err != nil {
		return nil, err
	}
	run, err := o.Store.Begin(ctx, images.RunOptions{Image: o.Name, Domain: domain, Owner: o.Owner, AllCreators: o.AllCreators})
	if err != nil {
		return nil, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		if cerr := run.Close(clean); cerr != nil && err != nil {
			err = errors.Join(err, cerr)
		}
	}()
	parent, err := openImported(ctx, run, o, r)
	if err != nil {
		return nil, err
	}
	known, err := run.Known(ctx)
	if err != nil {
		return nil, err
	}
	sink := &countingSink{Sink: run}
	wo := chunked.WriterOptions{
		Domain: domain.Domain, Owner: o.Owner, Sink: sink, Known: known, Parent: parent, UsableIndex: run.UsableIndex, UsablePack: run.UsablePack, Level: chunked.Default,
	}
	if o.Level != nil {
		wo.Level = *o.Level
	}
	if d.Size > muchData {
		wo.PackSize = largePack
	}
	w, err := chunked.NewWriter(ctx, wo)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	s, err := w.Stream(chunked.StreamDisk, d.Size)
	if err != nil {
		return nil, err
	}
	r.Phase("importing "+o.Name, d.Size)
	out := &cutOutput{cut: w.Cutter(ctx, s, chunked.CutterOptions{}), w: w, size: d.Size, r: r}
	if err := out.fill(ctx, d); err != nil {
		return nil, err
	}
	r.Phase("publishing "+o.Name, 0)
	written, err := w.Finish(ctx)
	if err != nil {
		return nil, err
	}
	m := &chunked.Manifest{
		Description: o.Description, Architecture: o.Architecture, BlockDeviceMapping: o.Mappings, Tool: o.Tool,
		Partition: string(tableOf(out.front)), Filesystem: filesystemOf(out.front),
	}
	if m.BlockDeviceMapping == nil {
		m.BlockDeviceMapping = []chunked.Mapping{}
	}
	for _, s := range written.Streams {
		m.Streams = append(m.Streams, chunked.Content{Name: s.Name, Size: s.Size})
	}
	m.Index = chunked.IndexRef{Root: written.Root, Segments: written.Segments}
	m.Packs, m.Data, m.Added = written.Packs, written.Data, written.Added
	res := &ImageResult{
		Size: d.Size, BytesRead: out.data, IndexAdded: int(sink.index.Load()), BytesAdded: written.Added + written.AddedIndex, BytesReused: max(written.Data-written.Counters.NewBytes, 0),
	}
	for _, p := range written.Packs {
		if p.Size != 0 { // those that were not written now have none
			res.PacksAdded++
		}
	}
	res.Published, err = run.Publish(ctx, images.PublishOptions{
		Manifest: *m, IndexKey: written.IndexKey, Recipients: o.Recipients, Signer: o.Signer, Expires: o.Expires,
	})
	if err != nil {
		return nil, err
	}
	res.Manifest = res.Published.Manifest
	storeOpening(ctx, o.Store, res, written.IndexKey, beginning, r)
	res.BytesAdded += res.Published.Size + res.Published.KeysSize
	return res, nil
}

// openImported opens the index of the version before: what did not change since
// has its index in common with it. nil if there is none, or none to be read.
func openImported(ctx context.Context, run *images.Run, o ImportOptions, r Reporter) (*chunked.Index, error) {
	p, err := run.Parent(ctx, "")
	if err != nil || p == nil || p.Manifest.Domain != o.Domain {
		return nil, err
	}
	x, err := p.Open(ctx)
	if err == nil {
		return x, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	r.Note(fmt.Sprintf("the version before cannot be read: this one shares no index with it (%v)", err))
	return nil, nil
}

// frontSize is how much of a disk's beginning tells what it is, in bytes: the
// magic of btrfs stands at 64 KiB and 64 bytes.
const frontSize = 68 << 10

// cutOutput cuts a disk that comes in order into chunks.
type cutOutput struct {
	cut   *chunked.Cutter
	w     *chunked.Writer
	r     Reporter
	size  int64
	at    int64
	data  int64
	front []byte // the disk's first bytes

	cell    []byte // what is not yet given to the cutter
	release func()
	from    int64 // position of cell
}

// cell is the unit in which data is given away, in bytes.
const cell = 512 << 10

func (o *cutOutput) fill(ctx context.Context, d ImportDisk) error {
	if err := o.cut.File("disk", d.Size); err != nil {
		return err
	}
	if err := d.Fill(ctx, o); err != nil {
		return err
	}
	if o.at != d.Size {
		return fmt.Errorf("%w: %d bytes, not %d", ErrImageSize, o.at, d.Size)
	}
	if err := o.flush(); err != nil {
		return err
	}
	return o.cut.Finish()
}

// Write takes data.
func (o *cutOutput) Write(p []byte) (int, error) {
	if int64(len(p)) > o.size-o.at {
		return 0, fmt.Errorf("%w: more than %d bytes", ErrImageSize, o.size)
	}
	n := 0
	for n < len(p) {
		if o.cell == nil {
			o.cell, o.release = o.w.Buffer()
			o.cell = o.cell[:0]
			o.from = o.at / blockBytes * blockBytes
			o.cell = append(o.cell, make([]byte, o.at-o.from)...)
		}
		room := int(cell - o.from%cell - int64(len(o.cell)))
		k := min(room, len(p)-n)
		o.cell = append(o.cell, p[n:n+k]...)
		o.keep(p[n : n+k])
		o.at += int64(k)
		o.data += int64(k)
		n += k
		if k == room {
			if err := o.flush(); err != nil {
				return n, err
			}
		}
	}
	o.r.Add(int64(n))
	return n, nil
}

// Skip leaves zeros.
func (o *cutOutput) Skip(n int64) error {
	if n < 0 || n > o.size-o.at {
		return fmt.Errorf("%w: more than %d bytes", ErrImageSize, o.size)
	}
	o.r.Add(n)
	if n == 0 {
		return nil
	}
	// The rest of a block that has begun belongs to it.
	if rest := (blockBytes - o.at%blockBytes) % blockBytes; o.cell != nil {
		k := min(rest, n)
		o.cell = append(o.cell, make([]byte, k)...)
		o.at += k
		n -= k
		if n == 0 && o.at%cell != 0 {
			return nil
		}
		if err := o.flush(); err != nil {
			return err
		}
	}
	o.at += n
	return nil
}

// Finish tells how much came; fill does what is left to do.
func (o *cutOutput) Finish() (int64, error) { return o.at, nil }

// keep keeps the disk's beginning.
func (o *cutOutput) keep(p []byte) {
	if o.at >= frontSize {
		return
	}
	if o.front == nil {
		o.front = make([]byte, frontSize)
	}
	copy(o.front[o.at:], p)
}

// blockBytes is the cutter's unit.
const blockBytes = 4096

func (o *cutOutput) flush() error {
	if o.cell == nil {
		return nil
	}
	p, release := o.cell, o.release
	o.cell, o.release = nil, nil
	if rest := len(p) % blockBytes; rest > 0 && o.from+int64(len(p)) < o.size {
		p = append(p, make([]byte, blockBytes-rest)...)
	}
	if len(p) == cell && hasZeros(p) {
		// The cutter keeps the zeros in cells it is given whole. Without them a
		// cell is the same whether the disk's map told of them or not.
		if err := o.cut.Data(o.from, o.from, p[:cell/2], func() {}); err != nil {
			release()
			return err
		}
		return o.cut.Data(o.from+cell/2, o.from+cell/2, p[cell/2:], release)
	}
	return o.cut.Data(o.from, o.from, p, release)
}

// hasZeros reports whether one of the blocks is all zero.
func hasZeros(p []byte) bool {
	var zero [blockBytes]byte
	for i := 0; i+blockBytes <= len(p); i += blockBytes {
		if bytes.Equal(p[i:i+blockBytes], zero[:]) {
			return true
		}
	}
	return false
}

// tableOf tells which partition table a disk begins with.
func tableOf(front []byte) disk.Kind {
	switch {
	case len(front) < 1024:
		return disk.None
	case string(front[512:520]) == "EFI PART":
		return disk.GPT
	case front[510] != 0x55 || front[511] != 0xaa:
		return disk.None
	}
	// The boot sector of a filesystem ends like that too; a table has entries
	// that begin with 0x00 or 0x80, and one at least that has a type.
	used := false
	for i := 446; i < 510; i += 16 {
		if front[i]&0x7f != 0 {
			return disk.None
		}
		used = used || front[i+4] != 0 && binary.LittleEndian.Uint32(front[i+12:]) != 0
	}
	if !used {
		return disk.None
	}
	return disk.MBR
}

// filesystemOf tells which filesystem a disk without partition table begins
// with: "unknown" if it is none of those that are known, or in a partition.
func filesystemOf(front []byte) string {
	at := func(off int, magic string) bool {
		return len(front) >= off+len(magic) && bytes.Equal(front[off:off+len(magic)], []byte(magic))
	}
	switch {
	case at(1080, "\x53\xef"):
		return "ext4"
	case at(0, "XFSB"):
		return "xfs"
	case at(65600, "_BHRfS_M"):
		return "btrfs"
	case at(1024, "\xe2\xe1\xf5\xe0"):
		return "erofs"
	case at(0, "hsqs"):
		return "squashfs"
	}
	return "unknown"
}
