package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/bundle/ext4"
	"github.com/instar-image/instar/bundle/filetree"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/images"
)

// ImageOptions say what to capture into which image of which store.
type ImageOptions struct {
	Volume VolumeOptions // FS must be ext4
	Store  *images.Store
	Name   string // of the image
	Domain string // whose stored chunks are shared; made if it does not exist
	// Owner is known to this machine alone: by it the machine knows its own packs.
	Owner      chunked.Key
	Signer     keys.Signer
	Recipients []*keys.Recipient // who can open the image; the first is this machine
	// AllCreators shares what other creators of the domain have stored, who then
	// are trusted not to have spoiled it.
	AllCreators bool
	// Expires is how long readers take this version for the newest; 0: for ever.
	Expires     time.Duration
	Description string
	// Level of compression; nil: much new data fast, little well.
	Level *chunked.Level
	// VerifyContent reads files that look unchanged, too.
	VerifyContent bool
	// Full takes no parent.
	Full bool
	// BootTrace is an image of Store whose boot trace tells what is laid out
	// together; the new image gets it for its own. "" for none.
	BootTrace string
	Boot      BootOptions
	// Architecture as the manifest has it; "" is that of the root's programs, or
	// this machine's if they do not tell.
	Architecture string
	Mappings     []chunked.Mapping
	Tool         string // "instar VERSION"
	// Planned, if not nil, is called once the volume is planned, of which data
	// bytes are to be in the image: what lives in memory from then on is the plan,
	// and a fixed sum beside it.
	Planned func(data int64)
}

// LevelOf is for ImageOptions.Level.
func LevelOf(l chunked.Level) *chunked.Level { return &l }

// ImageResult is a published image and what it took.
type ImageResult struct {
	Published *images.Published
	Manifest  *chunked.Manifest
	Parent    *chunked.Name // whose unchanged files were taken, or nil
	Size      int64         // of the disk, bytes
	Kernel    string        // release of the kernel in the image, "" for none

	Files, FilesUnchanged, FilesRead int64 // regular files
	BytesRead                        int64 // of them
	BytesAdded                       int64 // objects stored: packs, index, manifest, key
	BytesReused                      int64 // of the image's data: in the store before
	Traced                           int64 // bytes laid out by the boot trace, which the image has now, too
	PacksAdded, IndexAdded           int   // objects
	Flawed                           int   // files that are not in the image as they are; each was warned of
}

// collectedTries is how often a capture is begun that garbage collection gets
// the better of. The last time it builds on nothing: a parent that is damaged
// looks the same.
const collectedTries = 3

// CreateImage captures a volume and publishes it as the newest version of an
// image, all or nothing. What a capture that failed has stored is found and
// used by the next one.
func CreateImage(ctx context.Context, o ImageOptions, r Reporter) (*ImageResult, error) {
	if o.Volume.scratched() {
		return nil, fmt.Errorf("%w: images are ext4, not %s", ErrOption, o.Volume.FS)
	}
	for try := 1; ; try++ {
		res, err := createImage(ctx, o, r)
		if err == nil || try == collectedTries || !errors.Is(err, images.ErrCollected) {
			return res, err
		}
		r.Note(fmt.Sprintf("garbage collection removed what this capture wanted to use: once more from the beginning (%v)", err))
		o.Full = o.Full || try+1 == collectedTries
	}
}

// creation is one capture of an image.
type creation struct {
	o      ImageOptions
	r      Reporter
	run    *images.Run
	domain *images.Domain
	parent *parent
	volume *Volume
	sink   countingSink
	res    *ImageResult

	traced    *traced              // nil: nothing is known of boots
	firstOnly map[filetree.ID]bool // files of the parent's of which only what a boot reads is read again
	known     chunked.Known        // what is stored
	unsure    map[filetree.ID]bool // files that Emit reported
	matches   *ext4.Matches
	fresh     int    // files that are read, for the layout has to vouch for them anew
	skip      []bool // files that are taken from the parent, by ID
}

// parent is the version before this one, as far as it can be read.
type parent struct {
	image  *images.Image
	index  *chunked.Index
	layout *ext4.Layout
	disk   *chunked.Stream
	start  int64 // of the filesystem in disk
}

func createImage(ctx context.Context, o ImageOptions, r Reporter) (res *ImageResult, err error) {
	c := &creation{o: o, r: r, res: &ImageResult{}, unsure: map[filetree.ID]bool{}, firstOnly: map[filetree.ID]bool{}}
	r.Phase("looking at "+o.Store.String(), 0)
	c.domain, err = o.Store.Domain(ctx, o.Domain, images.DomainOptions{Create: true, Creators: o.Recipients[:1], Signer: o.Signer})
	if err != nil {
		return nil, err
	}
	c.run, err = o.Store.Begin(ctx, images.RunOptions{Image: o.Name, Domain: c.domain, Owner: o.Owner, AllCreators: o.AllCreators})
	if err != nil {
		return nil, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		if cerr := c.run.Close(clean); cerr != nil && err != nil {
			err = errors.Join(err, cerr)
		}
	}()
	now := time.Now()
	started := filetree.Time{Sec: now.Unix(), Nsec: uint32(now.Nanosecond())}
	if err := c.plan(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.volume.Close()) }()
	if o.Planned != nil {
		o.Planned(c.volume.Disk.Map().Bytes())
	}
	written, m, err := c.write(ctx, started)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.Phase("publishing "+o.Name, 0)
	c.res.Published, err = c.run.Publish(ctx, images.PublishOptions{
		Manifest: *m, IndexKey: written.IndexKey, Recipients: o.Recipients, Signer: o.Signer, Expires: o.Expires,
	})
	if err != nil {
		return nil, err
	}
	c.res.Manifest = c.res.Published.Manifest
	c.storeTrace(ctx)
	storeOpening(ctx, o.Store, c.res, written.IndexKey, c.volume.lookups(), r)
	c.res.BytesAdded += c.res.Published.Size + c.res.Published.KeysSize
	c.res.Flawed = c.volume.Flawed() + len(c.volume.Root.Problems) + len(c.volume.Changes())
	return c.res, nil
}

// plan scans the volume while the version before, and what else is stored, is
// found and read, and plans the image when both are done.
func (c *creation) plan(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	read := make(chan error, 1)
	var note string
	go func() {
		var err error
		if note, err = c.openParent(ctx); err == nil {
			c.traced, err = c.openTrace(ctx)
		}
		if err == nil {
			c.known, err = c.run.Known(ctx)
		}
		if err != nil {
			stop(err) // there is no use in scanning to the end
		}
		read <- err
	}()
	wait := sync.OnceValue(func() error { return <-read })
	o := c.o.Volume
	o.Parent = func() (*ext4.Layout, error) {
		if err := wait(); err != nil {
			return nil, err
		}
		if note != "" {
			c.r.Note(note)
		}
		if c.parent == nil {
			return nil, nil
		}
		return c.parent.layout, nil
	}
	var err error
	c.volume, err = PlanVolume(ctx, o, c.r)
	stop(err)
	wait()
	if err != nil {
		return context.Cause(ctx) // the first of the two that failed
	}
	return nil
}

// openParent finds the version before. That there is none, or that this
// machine cannot read it, makes the image a full one; that it is not
// authentic, or shows an older state than was seen before, is an error.
//
// It returns what an operator should know.
func (c *creation) openParent(ctx context.Context) (note string, err error) {
	if c.o.Full {
		return "", nil
	}
	image, err := c.run.Parent(ctx, "")
	if err != nil {
		return "", err
	}
	if image == nil {
		return fmt.Sprintf("%s has no image %q yet: this is a full one", c.o.Store, c.o.Name), nil
	}
	p := &parent{image: image, start: disk.Kind(image.Manifest.Partition).Start()}
	if err := c.readParent(ctx, p); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return fmt.Sprintf("the image before this one cannot be built upon: every file is read, and compared with what this machine has stored (%v)", err), nil
	}
	c.parent = p
	c.res.Parent = &image.Name
	return "", nil
}

// layoutCache is the memory for reading a layout, in bytes: it is read once,
// from its beginning to its end.
const layoutCache = 4 << 20

func (c *creation) readParent(ctx context.Context, p *parent) (err error) {
	if p.image.Manifest.Domain != c.o.Domain {
		return fmt.Errorf("it is in the domain %q", p.image.Manifest.Domain)
	}
	if p.index, err = p.image.Open(ctx); err != nil {
		return err
	}
	if p.disk, err = p.index.Stream(chunked.StreamDisk); err != nil {
		return err
	}
	s, err := p.index.Stream(chunked.StreamLayout)
	if err != nil {
		return err
	}
	p.layout, err = ext4.ReadLayout(io.NewSectionReader(s.ReaderAt(ctx, layoutCache), 0, s.Size()))
	return err
}
