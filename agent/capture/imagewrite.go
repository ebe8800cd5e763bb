package capture

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
)

// Where the writer's policies change, in bytes.
const (
	littleData = 128 << 20 // of new data are worth better compression
	muchData   = 16 << 30  // of data make larger packs (SPEC §5)
	largePack  = 32 << 20
)

// write stores the image's content and returns what Publish needs.
func (c *creation) write(ctx context.Context, started filetree.Time) (*chunked.Result, *chunked.Manifest, error) {
	v, o := c.volume, &c.o
	if c.parent != nil {
		c.matches = v.Plan.Recognise(c.parent.layout)
	}
	toRead, err := c.choose(ctx)
	if err != nil {
		return nil, nil, err
	}
	c.sink.Sink = c.run
	wo := chunked.WriterOptions{
		Domain: c.domain.Domain, Owner: o.Owner, Sink: &c.sink, Known: c.known, Level: c.compression(toRead),
		UsableIndex: c.run.UsableIndex, UsablePack: c.run.UsablePack,
	}
	if o.Level == nil {
		wo.Small = chunked.Default
	}
	if c.parent != nil {
		wo.Parent = c.parent.index
	}
	if v.Disk.Map().Bytes() > muchData {
		wo.PackSize = largePack
	}
	w, err := chunked.NewWriter(ctx, wo)
	if err != nil {
		return nil, nil, err
	}
	defer w.Close()
	m := &chunked.Manifest{
		Description: o.Description, Architecture: o.Architecture, Partition: string(v.kind()), Filesystem: "ext4",
		BlockDeviceMapping: o.Mappings, Tool: o.Tool,
	}
	if m.BlockDeviceMapping == nil {
		m.BlockDeviceMapping = []chunked.Mapping{}
	}
	if err := c.boot(ctx, w, m); err != nil {
		return nil, nil, err
	}
	c.r.Phase("capturing "+v.Root.Volume(), toRead)
	if err := c.disk(ctx, w); err != nil {
		return nil, nil, err
	}
	if err := c.storeLayout(ctx, w, started); err != nil {
		return nil, nil, err
	}
	c.r.Phase("storing what is left", 0)
	res, err := w.Finish(ctx)
	if err != nil {
		return nil, nil, err
	}
	return res, m, c.describe(m, res)
}

// kind is the image's partition table.
func (v *Volume) kind() disk.Kind {
	if v.opts.Partition == "" {
		return disk.None
	}
	return v.opts.Partition
}

func (c *creation) compression(toRead int64) chunked.Level {
	switch {
	case c.o.Level != nil:
		return *c.o.Level
	case toRead <= littleData:
		return chunked.Default
	}
	return chunked.Fastest
}

// choose decides which files are taken from the parent, unread, and returns
// how many bytes are to be read.
func (c *creation) choose(ctx context.Context) (toRead int64, err error) {
	v := c.volume
	t := v.Root.Tree
	c.skip = make([]bool, t.Len())
	var early map[filetree.ID]bool
	if c.traced != nil {
		c.traced.carry(v)
		early = c.traced.files(v)
	}
	for i := range t.Len() {
		id := filetree.ID(i)
		if t.Mode(id)&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		c.res.Files++
		same := c.matches != nil && c.matches.Standing(id) == ext4.Same
		if same && !c.o.VerifyContent {
			if c.skip[i], err = c.usable(ctx, c.matches.Origin(id)); err != nil {
				return 0, err
			}
		}
		if c.skip[i] {
			c.res.FilesUnchanged++
			if !early[id] {
				continue
			}
			// What a boot reads of it is read, to lie with the like; the rest stays.
			c.skip[i], c.firstOnly[id] = false, true
			toRead += t.Data(id).Bytes()
			continue
		}
		c.res.FilesRead++
		if t.Size(id) > 0 && !same && !v.Root.Virtual(id) {
			c.fresh++
		}
		toRead += t.Data(id).Bytes()
	}
	return toRead, nil
}

// usable tells whether a file's data can be taken from where they are in the parent.
func (c *creation) usable(ctx context.Context, from []ext4.Origin) (bool, error) {
	for _, o := range from {
		for e, err := range c.parent.disk.Extents(ctx, c.parent.start+o.Pos, c.parent.start+o.Pos+o.Len) {
			if err != nil {
				return false, fmt.Errorf("reading the index of the image before: %w", err)
			}
			if !c.run.UsablePack(e.Chunk.At.Pack) {
				return false, nil
			}
		}
	}
	return true, nil
}

// disk stores the disk: files that did not change as the parent has them, the
// others as they are read, then metadata and partition table.
func (c *creation) disk(ctx context.Context, w *chunked.Writer) error {
	v := c.volume
	s, err := w.Stream(chunked.StreamDisk, v.Disk.Size())
	if err != nil {
		return err
	}
	var co chunked.CutterOptions
	if c.parent != nil {
		co.Parent = c.parent.disk
	}
	if c.traced != nil {
		co.First = c.traced.first
	}
	cut := w.Cutter(ctx, s, co)
	start, _ := v.Disk.Partition()
	if err := c.copyUnchanged(ctx, s, cut, start); err != nil {
		return err
	}
	head, tail := v.Disk.Tables()
	file := filetree.None
	var same *sameContent
	if c.traced == nil { // what a boot reads first is cut anew
		same = c.sameContent(ctx, s)
	}
	err = v.Plan.Emit(ctx, v.source(), ext4.EmitOptions{
		Skip: func(id filetree.ID) bool { return c.skip[id] },
		Report: func(ch ext4.Change) {
			c.unsure[ch.ID] = true
			v.changed(ch)
		},
	}, func(p ext4.Piece) error {
		if p.Kind == ext4.KindData {
			n := min(p.Len, v.Root.Tree.Size(p.ID)-p.Off)
			c.res.BytesRead += n
			c.r.Add(n)
			if c.firstOnly[p.ID] {
				defer p.Release()
				file = p.ID
				cut.FirstOf(start+p.Pos, p.Data)
				return ctx.Err()
			}
			if ok, err := same.take(ctx, p, start+p.Pos); ok || err != nil {
				p.Release()
				return err
			}
			if p.ID != file {
				file = p.ID
				if err := cut.File(v.Root.Tree.Path(file), v.Root.Tree.Size(file)); err != nil {
					return err
				}
			}
			return cut.Data(p.Off, start+p.Pos, p.Data, p.Release)
		}
		if len(head) > 0 {
			if err := cut.Metadata(0, head, nil); err != nil {
				return err
			}
			head = nil
		}
		return cut.Metadata(start+p.Pos, p.Data, p.Release)
	})
	if err != nil {
		return err
	}
	if len(tail) > 0 {
		if err := cut.Metadata(v.Disk.Size()-int64(len(tail)), tail, nil); err != nil {
			return err
		}
	}
	return cut.Finish()
}

// copyUnchanged maps the files that are not read to the parent's chunks, and
// those that are read for what a boot reads of them as far as it does not.
func (c *creation) copyUnchanged(ctx context.Context, s *chunked.StreamWriter, cut *chunked.Cutter, start int64) error {
	if c.parent == nil {
		return nil
	}
	last, origin := filetree.None, []ext4.Origin(nil)
	for seg := range c.volume.Plan.Data() {
		if !c.skip[seg.ID] && !c.firstOnly[seg.ID] {
			continue
		}
		if seg.ID != last {
			last, origin = seg.ID, c.matches.Origin(seg.ID)
		}
		for _, o := range origin {
			from, to := max(o.Off, seg.Off), min(o.Off+o.Len, seg.Off+seg.Len)
			for from < to {
				end := to
				if c.firstOnly[seg.ID] {
					if from, end = notFirst(cut, start+seg.Pos-seg.Off, from, to); from >= to {
						break
					}
				}
				err := s.CopyFrom(ctx, c.parent.disk, c.parent.start+o.Pos+from-o.Off, start+seg.Pos+from-seg.Off, end-from)
				if err != nil {
					return fmt.Errorf("taking %q from the image before: %w", c.volume.Root.Tree.Path(seg.ID), err)
				}
				from = end
			}
		}
	}
	return nil
}

// notFirst finds the next blocks from from to to that no boot reads; move is
// where the file would begin on the disk.
func notFirst(cut *chunked.Cutter, move, from, to int64) (int64, int64) {
	for from < to && cut.IsFirst(move+from) {
		from += ext4.BlockSize
	}
	end := from
	for end < to && !cut.IsFirst(move+end) {
		end += ext4.BlockSize
	}
	return from, min(end, to)
}

// storeLayout stores where everything lies now, for the next capture.
func (c *creation) storeLayout(ctx context.Context, w *chunked.Writer, started filetree.Time) error {
	s, err := w.Stream(chunked.StreamLayout, chunked.Unsized)
	if err != nil {
		return err
	}
	if c.parent != nil && c.fresh == 0 {
		// All that the layout vouches for was unchanged at the parent's time: nothing
		// of it says anything new.
		started = c.parent.layout.Started()
	}
	out := w.Cutter(ctx, s, chunked.CutterOptions{}).Records()
	err = c.volume.Plan.WriteLayout(out, ext4.LayoutOptions{Started: started, Unsure: func(id filetree.ID) bool {
		return c.unsure[id] || c.volume.Root.Virtual(id)
	}})
	return errors.Join(err, out.Close())
}

// boot stores the kernel of the captured root and an initrd that fits it.
func (c *creation) boot(ctx context.Context, w *chunked.Writer, m *chunked.Manifest) error {
	v, o := c.volume, &c.o.Boot
	root := filetree.FS(ctx, v.Root.Tree, v.Root.Source())
	if m.Architecture == "" {
		m.Architecture = architecture(root)
	}
	if m.Architecture == "" {
		m.Architecture = map[string]string{"amd64": "x86_64", "arm64": "arm64", "386": "i386"}[runtime.GOARCH]
	}
	if o.NoKernel {
		return nil
	}
	k, err := findKernel(root, o.Kernel)
	if err != nil {
		if o.Kernel != "" || !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: kernel %q: %w", ErrOption, o.Kernel, err)
		}
		c.r.Note("the captured root has no kernel: the image has none, and needs one from elsewhere to boot")
		return nil
	}
	data, err := fs.ReadFile(root, k.path)
	if err != nil {
		c.r.Warn(k.path, fmt.Sprintf("the kernel could not be read: the image has none (%v)", err))
		return nil
	}
	if err := c.storeWhole(ctx, w, m, chunked.StreamKernel, data); err != nil {
		return err
	}
	c.res.Kernel, m.Cmdline = k.release, commandLine(v.Root, root)
	switch arch, err := elfArchitecture(o.Init); {
	case o.Init == "":
		c.r.Note("this instar has no init for an initrd built in: the image has a kernel and no initrd")
		return nil
	case err != nil:
		return fmt.Errorf("%w: the initrd's init: %w", ErrOption, err)
	case arch != m.Architecture:
		c.r.Note(fmt.Sprintf("the initrd's init is for %s, the captured root for %s: the image has a kernel and no initrd", arch, m.Architecture))
		return nil
	}
	if k.modules == "" {
		c.r.Note(fmt.Sprintf("kernel %s has no modules in the captured root: the initrd has none", k.path))
	}
	var archive bytes.Buffer
	if _, err := buildInitrd(ctx, root, k, o.Init, &archive); err != nil {
		if ctx.Err() != nil {
			return err
		}
		c.r.Warn(k.modules, fmt.Sprintf("no initrd could be built of this kernel's modules: the image has none (%v)", err))
		return nil
	}
	return c.storeWhole(ctx, w, m, chunked.StreamInitrd, archive.Bytes())
}

// storeWhole stores a stream that is in memory, and notes its digest.
func (c *creation) storeWhole(ctx context.Context, w *chunked.Writer, m *chunked.Manifest, name string, data []byte) error {
	s, err := w.Stream(name, int64(len(data)))
	if err != nil {
		return err
	}
	cut := w.Cutter(ctx, s, chunked.CutterOptions{})
	if _, err := cut.Copy(bytes.NewReader(data)); err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	m.Streams = append(m.Streams, chunked.Content{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
	return cut.Finish()
}

// describe fills in what the manifest says of the content.
func (c *creation) describe(m *chunked.Manifest, w *chunked.Result) error {
	known := map[chunked.Name]int64{}
	if c.parent != nil {
		for _, p := range c.parent.image.Manifest.Packs {
			known[p.Name] = p.Size
		}
	}
	m.Packs = w.Packs
	for i, p := range m.Packs {
		if p.Size != 0 {
			c.res.PacksAdded++
			continue
		}
		size, ok := known[p.Name]
		if !ok {
			size, ok = c.run.PackSize(p.Name)
		}
		if !ok {
			return fmt.Errorf("the image refers to pack %s, whose size is not known", p.Name)
		}
		m.Packs[i].Size = size
	}
	digests := map[string]string{}
	for _, s := range m.Streams {
		digests[s.Name] = s.SHA256
	}
	m.Streams = nil
	for _, s := range w.Streams {
		m.Streams = append(m.Streams, chunked.Content{Name: s.Name, Size: s.Size, SHA256: digests[s.Name]})
	}
	m.Index = chunked.IndexRef{Root: w.Root, Segments: w.Segments}
	m.Data, m.Added = w.Data, w.Added
	r := c.res
	r.Size = c.volume.Disk.Size()
	r.BytesAdded = w.Added + w.AddedIndex
	r.BytesReused = w.Data - w.Counters.NewBytes
	r.IndexAdded = int(c.sink.index.Load())
	return nil
}

// countingSink counts what is stored.
type countingSink struct {
	chunked.Sink
	index atomic.Int64
}

func (s *countingSink) PutIndex(ctx context.Context, n chunked.Name, data []byte) error {
	err := s.Sink.PutIndex(ctx, n, data)
	if err == nil {
		s.index.Add(1)
	}
	return err
}
