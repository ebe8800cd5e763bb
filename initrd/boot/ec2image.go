package boot

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/initrd/eager"
	"github.com/instar-image/instar/metadata/ticket"
)

// image is what a ticket names, checked and ready to be written.
type image interface {
	eager.Source
	// about says for the console what it is.
	about() string
	// identity is the image's, for the disk's record.
	identity(instance string) eager.Image
}

// ec2Image is an EC2 bundle: a stream in parts that is read in order.
type ec2Image struct {
	manifest *ec2.Manifest
	sha256   [sha256.Size]byte
	dir      string // of the manifest and the parts, below the store
	key, iv  ec2.BlockKey
	fetch    *fetcher
}

// openEC2 checks what the ticket says of an EC2 bundle. The manifest it keeps
// is the one whose signature verified.
func openEC2(t *ticket.Ticket) (*ec2Image, error) {
	bad := func(format string, args ...any) (*ec2Image, error) {
		return nil, fmt.Errorf("launch ticket: "+format, args...)
	}
	i := &ec2Image{dir: path.Dir(t.Manifest), sha256: sha256.Sum256(t.ManifestBytes)}
	switch {
	case len(t.ManifestBytes) == 0:
		return bad("it has no manifest")
	case len(t.Objects) == 0 && t.Credentials == nil:
		return bad("it has neither URLs of the image's parts nor credentials: give the metadata server's record launch.credentials")
	case !strings.EqualFold(hex.EncodeToString(i.sha256[:]), t.ManifestSHA256):
		return bad("its manifest has another SHA-256 than it says: %x", i.sha256)
	}
	cert, err := keys.ParseCertificate([]byte(t.Certificate))
	if err != nil {
		return bad("the bundler's certificate: %w", err)
	}
	pub, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return bad("the bundler's certificate has no RSA key")
	}
	if i.manifest, err = ec2.ParseManifest(t.ManifestBytes); err != nil {
		return bad("%w", err)
	}
	if _, err := i.manifest.CheckTrust(ec2.Trust{Keys: []*rsa.PublicKey{pub}}); err != nil {
		return bad("%w", err)
	}
	if i.key, err = ec2.ParseBlockKey(t.Key); err != nil {
		return bad("the bundle's key: %w", err)
	}
	if i.iv, err = ec2.ParseBlockKey(t.IV); err != nil {
		return bad("the bundle's initialisation vector: %w", err)
	}
	return i, nil
}

func (i *ec2Image) about() string {
	return fmt.Sprintf("%s, %d MiB in %d parts", i.manifest.Name, i.manifest.Size>>20, len(i.manifest.Parts))
}

func (i *ec2Image) identity(instance string) eager.Image {
	return eager.Image{Manifest: i.sha256, Size: i.manifest.Size, Instance: instance, Secret: append(i.key[:], i.iv[:]...)}
}

// Fill writes the image. Parts that the disk has from before are not fetched
// again; the stream they make is decoded from its beginning all the same.
func (i *ec2Image) Fill(ctx context.Context, t *eager.Target) error {
	spool, err := eager.NewSpool(t, len(i.manifest.Parts), i.manifest.BundledSize)
	if err != nil {
		return err
	}
	if n, bytes := spool.Stored(); n > 0 {
		i.fetch.say("root: resuming: %d KiB of %d, %d parts, are on the disk already", bytes>>10, i.manifest.BundledSize>>10, n)
	} else if t.Again() {
		i.fetch.say("root: resuming: nothing was spooled before")
	}
	r := i.reader(ctx, spool)
	defer r.Close()
	digest := i.manifest.Digest
	return ec2.UnbundleStream(ctx, ec2.StreamOptions{Key: i.key, IV: i.iv, Size: i.manifest.Size, SHA1: &digest}, r, eager.NewStream(t))
}

// part gets part n: from the disk, if it is there and what the manifest says,
// else from the store.
func (i *ec2Image) part(ctx context.Context, spool *eager.Spool, n int) (data []byte, local bool, err error) {
	p := i.manifest.Parts[n]
	if data := spool.Load(n); data != nil {
		if ec2.Sum(data) == p.SHA1 {
			return data, true, nil
		}
		i.fetch.say("root: part %s on the disk is not whole: it is fetched again", p.Filename)
	}
	good := func(data []byte) bool { return ec2.Sum(data) == p.SHA1 }
	data, err = i.fetch.object(ctx, "part "+p.Filename, path.Join(i.dir, p.Filename), ec2.MaxPartSize, good)
	if err != nil {
		return nil, false, err
	}
	return data, false, spool.Store(n, data)
}

// partsReader reads the parts of a bundle one after the other, some ahead.
type partsReader struct {
	image  *ec2Image
	queue  chan chan gotPart
	data   []byte
	cancel context.CancelFunc
	wait   sync.WaitGroup

	fetched, local int64
	told           time.Time
}

type gotPart struct {
	data  []byte
	local bool
	err   error
}

// reader starts fetching. Close ends it.
func (i *ec2Image) reader(ctx context.Context, spool *eager.Spool) *partsReader {
	ctx, cancel := context.WithCancel(ctx)
	// The one being read and the one being waited to be queued count too.
	r := &partsReader{image: i, queue: make(chan chan gotPart, fetchAhead-2), cancel: cancel, told: time.Now()}
	r.wait.Go(func() {
		defer close(r.queue)
		for n := range i.manifest.Parts {
			c := make(chan gotPart, 1)
			r.wait.Go(func() {
				data, local, err := i.part(ctx, spool, n)
				c <- gotPart{data, local, err}
			})
			select {
			case r.queue <- c:
			case <-ctx.Done():
				return
			}
		}
	})
	return r
}

func (r *partsReader) Read(p []byte) (int, error) {
	for len(r.data) == 0 {
		c, ok := <-r.queue
		if !ok {
			return 0, io.EOF
		}
		part := <-c
		if part.err != nil {
			return 0, part.err
		}
		r.data = part.data
		r.count(part)
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// count keeps the console told.
func (r *partsReader) count(p gotPart) {
	if p.local {
		r.local += int64(len(p.data))
	} else {
		r.fetched += int64(len(p.data))
	}
	total := r.image.manifest.BundledSize
	if time.Since(r.told) < 5*time.Second && r.local+r.fetched < total {
		return
	}
	r.told = time.Now()
	from := ""
	if r.local > 0 {
		from = fmt.Sprintf(", %d from the disk", r.local>>10)
	}
	r.image.fetch.say("root: %d of %d KiB fetched%s", r.fetched>>10, total>>10, from)
}

// Close stops what is under way.
func (r *partsReader) Close() error {
	r.cancel()
	r.wait.Wait()
	return nil
}

// openTicket checks what the ticket says before anything is done with it.
func openTicket(ctx context.Context, t *ticket.Ticket, id, signers string, fetch *fetcher) (image, error) {
	if t.InstanceID != id {
		return nil, final(fmt.Errorf("launch ticket: it is of instance %q, this is %s", t.InstanceID, id))
	}
	switch t.Format {
	case "ec2":
		i, err := openEC2(t)
		if err != nil {
			return nil, final(err)
		}
		i.fetch = fetch
		return i, nil
	case "instar":
		return openInstar(ctx, t, signers, fetch)
	}
	return nil, final(fmt.Errorf("launch ticket: its image is of format %q; this initrd knows ec2 and instar", t.Format))
}
