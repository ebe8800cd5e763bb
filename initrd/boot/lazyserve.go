package boot

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/nbd"
	"github.com/instar-image/instar/initrd/lazyroot/netkeep"
	"github.com/instar-image/instar/initrd/lazyroot/resident"
	"github.com/instar-image/instar/metadata/ticket"
)

// lazyConfig is all that the server of a lazy root is told: it sees no file of
// the initrd, nor of the root.
type lazyConfig struct {
	Image     string
	Manifest  chunked.Name
	Index     chunked.Name // its root
	IndexSize int64
	IndexRoot []byte // the root's bytes, so that a server starts without the store
	Key       chunked.Key
	Size      int64 // of the image
	Instance  string

	Ticket   *ticket.Ticket
	Holder   string // of the ticket
	Metadata string
	AnyPort  bool
	Proxy    string
	CACert   []byte // the initrd's
	Signers  []byte // the initrd's; nil if it leaves them to the ticket
	Patience int
	DNS      []netip.Addr
	Network  *netkeep.State `json:",omitempty"`

	Record    bool // what the boot reads
	DiskSize  int64
	BlockSize int
	Trim      bool
}

func (c *lazyConfig) identity() lazyroot.Identity {
	return lazyroot.Identity{Manifest: c.Manifest, Size: c.Size, Instance: c.Instance, Secret: c.Key[:]}
}

// lazyConfig gathers what the server is told but the network.
func (m *machine) lazyConfig(img *instarImage, t *ticket.Ticket, client *ticket.Client, disk device) *lazyConfig {
	read := func(name string) []byte {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil // they were read before, if they are there
		}
		return data
	}
	c := &lazyConfig{
		Image: img.name, Manifest: img.manifest, Index: img.root.Name, IndexSize: img.root.Size, IndexRoot: img.rootObject,
		Key: img.key, Size: img.stream.Size(), Instance: m.instance.ID,
		Ticket: t, Holder: client.Holder(), Metadata: m.config.Metadata, AnyPort: m.config.AnyPort, Proxy: m.config.Proxy,
		Record: m.config.Trace != "", CACert: read(CAFile), Signers: read(SignersFile), Patience: m.config.Patience, DNS: m.net.dns, DiskSize: disk.Size, BlockSize: 512,
	}
	if n, err := sysNumber(disk.Name, "logical_block_size"); err == nil && n > 512 {
		c.BlockSize = int(n)
	}
	n, err := sysNumber(disk.Name, "discard_max_bytes")
	c.Trim = err == nil && n > 0
	return c
}

// sysNumber is a number that sysfs has of a disk's queue.
func sysNumber(disk, name string) (n int64, err error) {
	data, err := os.ReadFile("/sys/block/" + disk + "/queue/" + name)
	if err == nil {
		_, err = fmt.Sscan(string(data), &n)
	}
	return n, err
}

// Limits of the server.
const (
	// serverMemory is the Go heap's soft limit, in bytes.
	serverMemory = 24 << 20
	// chunkMemory is what of it holds chunks that were read.
	chunkMemory = 4 << 20
	// kernelRequests is how many requests the kernel has under way at a time: as
	// many reads may wait for the store, and what is on the disk is read beside.
	kernelRequests = 128
	// storePatience is how long a read waits for a store that does not answer.
	storePatience = 30 * time.Minute
	// Pauses after what could not be fetched.
	firstFillPause = 5 * time.Second
	lastFillPause  = 5 * time.Minute
	// recordFor is how long a boot is recorded; the disk is filled after that.
	recordFor = 3 * time.Minute
	// completePatience is how long the metadata server is waited for at the end.
	completePatience = time.Minute
)

// ServeRoot is the main function of the processes that a lazy root lies on:
// those for which [resident.Called].
func ServeRoot(ctx context.Context) error {
	debug.SetMemoryLimit(serverMemory)
	return resident.Main(ctx, serveRoot)
}

func serveRoot(ctx context.Context, s *resident.Server) error {
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "<5>instar: %s\n", printable(fmt.Sprintf(format, args...)))
	}
	text, err := io.ReadAll(io.NewSectionReader(s.Config, 0, 64<<20))
	if err != nil {
		return err
	}
	c := new(lazyConfig)
	if err := json.Unmarshal(text, c); err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	s.Index = nbdIndex
	c.resolve()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if c.Network != nil {
		go func() {
			if err := initrdEnded(ctx, "."); err != nil && ctx.Err() == nil {
				say("warning: when the initrd ends cannot be told: %v", err)
			}
			if err := c.Network.Keep(ctx, say); err != nil && ctx.Err() == nil {
				say("warning: %v", err)
			}
		}()
	}
	client, err := ticket.New(c.Metadata, ticket.Options{AnyPort: c.AnyPort, Timeout: time.Duration(c.Patience) * 30 * time.Second, Holder: c.Holder})
	if err != nil {
		return err
	}
	disk := lazyroot.FileDisk(s.Disk, c.DiskSize)
	var trace *recorder
	if c.Record && !s.Again() {
		if trace, err = newRecorder(TraceFile, c.Size); err != nil {
			return err
		}
	}
	dev, store, err := c.open(ctx, client, disk, s.Session, trace, say)
	if err != nil {
		return err
	}
	defer dev.Close()
	err = s.Run(ctx, resident.Export{
		Size: dev.Size(), BlockSize: c.BlockSize, Trim: c.Trim, Say: say,
		Serve: func(ctx context.Context, conn net.Conn) error {
			return nbd.ServeTransmission(ctx, conn, dev, nbd.Options{Requests: kernelRequests})
		},
		Fill: func(ctx context.Context) error {
			if store != nil {
				c.prefetch(ctx, dev, store.f, say)
			}
			if trace != nil {
				trace.after(ctx, recordFor, say)
			}
			return fill(ctx, dev, say)
		},
	})
	if err != nil {
		return err
	}
	ending, stop := context.WithTimeout(ctx, completePatience)
	defer stop()
	if err := until(ending, client.Complete); err != nil {
		say("warning: %v", err)
	}
	return nil
}

// resolve makes names be resolved by the servers that the initrd knew.
func (c *lazyConfig) resolve() {
	var d net.Dialer
	next := 0
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		if len(c.DNS) == 0 {
			return nil, errors.New("there is no DNS server")
		}
		next++
		return d.DialContext(ctx, network, net.JoinHostPort(c.DNS[next%len(c.DNS)].String(), "53"))
	}}
}

// open opens the device: of a disk that is complete without the image, and then
// there is no store.
func (c *lazyConfig) open(ctx context.Context, client *ticket.Client, disk lazyroot.Disk, session *os.File, trace *recorder, say func(string, ...any)) (dev *lazyroot.Device, store *packSource, err error) {
	o := lazyroot.Options{Disk: disk, Identity: c.identity(), Session: session}
	if trace != nil {
		o.OnRead = trace.read
	}
	record, err := lazyroot.StateOf(disk, disk.Size())
	if err != nil {
		return nil, nil, fmt.Errorf("reading the disk: %w", err)
	}
	if record.State != lazyroot.Complete {
		pool := x509.NewCertPool()
		if len(c.CACert) > 0 && !pool.AppendCertsFromPEM(c.CACert) {
			return nil, nil, errors.New("the initrd's certificates are none")
		}
		hc, err := storeClient(pool, c.Ticket.CACert, c.Proxy)
		if err != nil {
			return nil, nil, err
		}
		store = &packSource{f: &fetcher{
			client: hc, stall: time.Duration(c.Patience) * 30 * time.Second, say: say, access: &access{client: client, t: c.Ticket},
		}, kept: map[chunked.Name][]byte{c.Index: c.IndexRoot}}
		index, err := chunked.OpenIndex(ctx, store, c.Index, c.IndexSize, c.Key)
		if err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", c.Image, err)
		}
		o.Image, err = lazyroot.NewImage(index, lazyroot.ImageOptions{
			Sources: c.sources(store, say), Patience: storePatience, Memory: chunkMemory,
			Alarm: func(a lazyroot.Alarm) { say("root: ALARM: %s: %v", a.Source, a.Err) },
		})
		if err != nil {
			return nil, nil, fmt.Errorf("image %s: %w", c.Image, err)
		}
	}
	dev, err = lazyroot.Open(ctx, o)
	return dev, store, err
}

// maxPrefetch is how much of a trace is fetched without regard to what the
// system does meanwhile, in bytes: one that names more is of no boot.
const maxPrefetch = 256 << 20

// firstOf gives ranges up to so many bytes.
func firstOf(ranges []chunked.Range, left int64) iter.Seq[chunked.Range] {
	return func(yield func(chunked.Range) bool) {
		for _, r := range ranges {
			r.Length = min(r.Length, left)
			if r.Length <= 0 || !yield(r) {
				return
			}
			left -= r.Length
		}
	}
}

// prefetch fetches what a boot of the image is known to read, by the image's
// trace. That is only a hint: without it nothing is amiss.
func (c *lazyConfig) prefetch(ctx context.Context, dev *lazyroot.Device, f *fetcher, say func(string, ...any)) {
	object, err := f.object(ctx, "boot trace", chunked.TraceKey(c.Image, c.Manifest), chunked.MaxTrace, func([]byte) bool { return true })
	if notThere(err) {
		return
	}
	var t *chunked.Trace
	if err == nil {
		t, err = c.openTrace(object)
	}
	if err == nil {
		err = dev.Prefetch(ctx, firstOf(t.Ranges, maxPrefetch))
	}
	if err != nil {
		say("root: what a boot reads is not fetched before it is asked for: %v", err)
		return
	}
	say("root: what a boot reads is here, by a trace of %d ranges", len(t.Ranges))
}

// openTrace verifies a trace as the image's manifest was.
func (c *lazyConfig) openTrace(object []byte) (t *chunked.Trace, err error) {
	lists, err := trustedBy(c.Signers, c.Ticket.Signers)
	if err != nil {
		return nil, err
	}
	for _, list := range lists {
		if t, _, err = chunked.OpenTrace(object, list, c.Image, c.Manifest); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// fill brings the whole image to the disk, the filesystem's metadata first,
// however long the store takes.
func fill(ctx context.Context, dev *lazyroot.Device, say func(string, ...any)) error {
	// A server that is started again when all is there keeps nobody waiting.
	if dev.Stats().State != lazyroot.Complete {
		booted(ctx)
		settled(ctx, func() time.Duration { return dev.Stats().SinceRequest }, "stat")
	}
	began := time.Now()
	for pause := firstFillPause; ; pause = min(2*pause, lastFillPause) {
		err := dev.Hydrate(ctx, metadataFirst(ctx, dev), lazyroot.Throttle{})
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		say("root: not all of the image is on the disk: %v; trying again in %v", err, pause)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
	n := dev.Stats()
	say("root: all of the image is on the disk, after %v; %d reads waited for a fetch, of %d KiB together", time.Since(began).Round(time.Millisecond), n.Demand, n.DemandBytes>>10)
	return nil
}
