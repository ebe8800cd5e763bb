package boot

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/journal"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/metadata/ticket"
)

// rootStep is the journal's name for a root that was written whole.
const rootStep = "root"

// ticketRoot writes the image that the launch ticket names to the disk, unless
// it is there already for this instance, and mounts it.
func (m *machine) ticketRoot(ctx context.Context) error {
	disk, err := m.awaitDisk(ctx)
	if err != nil {
		return err
	}
	if m.ownRoot(ctx, disk) {
		m.say("root: it is this instance's already: nothing is fetched")
		return nil
	}
	if what := content(disk); what != "" && m.config.Disk == "" {
		return final(fmt.Errorf("%s holds %s: it is overwritten only if instar.disk=%s says so", disk.path(), what, disk.path()))
	}
	client, err := ticket.New(m.config.Metadata, ticket.Options{AnyPort: m.config.AnyPort, Timeout: m.config.scaled(30 * time.Second)})
	if err != nil {
		return err
	}
	t, err := m.claim(ctx, client)
	if err != nil {
		return err
	}
	manifest, key, iv, err := openTicket(t, m.instance.ID)
	if err != nil {
		return final(err)
	}
	m.say("root: %s, %d MiB in %d parts, for %s", manifest.Name, manifest.Size>>20, len(manifest.Parts), disk.path())
	if disk.Size < manifest.Size {
		return final(fmt.Errorf("%s has %d bytes, the image %d", disk.path(), disk.Size, manifest.Size))
	}
	if err := m.writeImage(ctx, disk, client, t, manifest, key, iv); err != nil {
		return err
	}
	if err := m.mountWritten(ctx, disk); err != nil {
		return err
	}
	if err := m.noteRoot(t.ManifestSHA256); err != nil {
		return err
	}
	if err := client.Complete(ctx); err != nil {
		m.say("warning: %v", err)
	}
	return nil
}

// awaitDisk waits for the disk that is configured, else for any that can be
// written.
func (m *machine) awaitDisk(ctx context.Context) (disk device, err error) {
	err = until(ctx, func(context.Context) error {
		list, err := listDevices("/sys/class/block", "/dev")
		if err != nil {
			return err
		}
		for _, d := range list {
			if d.path() == m.config.Disk || m.config.Disk == "" && d.Disk && !d.ReadOnly {
				disk = d
				return nil
			}
		}
		if m.config.Disk != "" {
			return fmt.Errorf("no device %s to write the root to", m.config.Disk)
		}
		return errors.New("no disk to write the root to: is its driver in the initrd?")
	})
	return disk, err
}

// partsOf are the devices that are the disk or its partitions.
func partsOf(disk device) ([]device, error) {
	list, err := listDevices("/sys/class/block", "/dev")
	if err != nil {
		return nil, err
	}
	var found []device
	for _, d := range chooseRoots(list, "auto") {
		if d.Name == disk.Name || !d.Disk && strings.HasPrefix(d.Name, disk.Name) {
			found = append(found, d)
		}
	}
	return found, nil
}

// ownRoot mounts a root of the disk if the journal in it says that it was
// written, whole, for this very instance.
func (m *machine) ownRoot(ctx context.Context, disk device) bool {
	found, err := partsOf(disk)
	if err != nil {
		return false
	}
	for _, d := range found {
		if m.mountRoot(ctx, d) != nil {
			unix.Unmount(rootDir, unix.MNT_DETACH)
			continue
		}
		if m.rootNoted() {
			return true
		}
		unix.Unmount(rootDir, unix.MNT_DETACH)
		m.disk = nil
	}
	return false
}

func (m *machine) rootNoted() bool {
	if _, err := os.Lstat(rootDir + "/var/lib/instar/journal"); err != nil {
		return false
	}
	j, err := inject.OpenJournal(rootDir)
	if err != nil {
		m.say("warning: %v", err)
		return false
	}
	defer j.Close()
	return j.State(m.instance.ID, rootStep) == journal.Finished
}

// noteRoot records that the root is whole, and from which manifest.
func (m *machine) noteRoot(manifest string) error {
	j, err := inject.OpenJournal(rootDir)
	if err != nil {
		return err
	}
	defer j.Close()
	// An image captured from this very instance has its records in it.
	if err := j.Again(m.instance.ID, rootStep); err != nil {
		return err
	}
	return j.End(m.instance.ID, rootStep, false, "manifest "+manifest)
}

// content says what a disk holds, "" for nothing that is known.
func content(d device) string {
	if d.Kind != "" {
		return "a " + d.Kind + " filesystem"
	}
	f, err := os.Open(d.path())
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, 1024)
	if _, err := io.ReadFull(f, b); err == nil && (b[510] == 0x55 && b[511] == 0xaa || string(b[512:520]) == "EFI PART") {
		return "a partition table"
	}
	return ""
}

// claim asks for the ticket until it is given or refused for good.
func (m *machine) claim(ctx context.Context, client *ticket.Client) (t *ticket.Ticket, err error) {
	told := ""
	err = until(ctx, func(ctx context.Context) error {
		t, err = client.Claim(ctx)
		if s, ok := errors.AsType[*ticket.StatusError](err); ok && s.Status < 500 && s.Status != 429 {
			return final(err)
		}
		if err != nil && err.Error() != told {
			told = err.Error()
			m.say("root: waiting: %v", err)
		}
		return err
	})
	return t, err
}

// openTicket checks what the ticket says before anything is done with it. The
// manifest returned is the one whose signature verified.
func openTicket(t *ticket.Ticket, id string) (m *ec2.Manifest, key, iv ec2.BlockKey, err error) {
	bad := func(format string, args ...any) (*ec2.Manifest, ec2.BlockKey, ec2.BlockKey, error) {
		return nil, ec2.BlockKey{}, ec2.BlockKey{}, fmt.Errorf("launch ticket: "+format, args...)
	}
	switch {
	case t.InstanceID != id:
		return bad("it is of instance %q, this is %s", t.InstanceID, id)
	case t.Format != "ec2":
		return bad("its image is of format %q; this initrd knows ec2", t.Format)
	case len(t.ManifestBytes) == 0:
		return bad("it has no manifest")
	case len(t.Objects) == 0:
		return bad("it has no URLs of the image's parts: give the metadata server credentials to presign with")
	}
	if sum := sha256.Sum256(t.ManifestBytes); !strings.EqualFold(hex.EncodeToString(sum[:]), t.ManifestSHA256) {
		return bad("its manifest has another SHA-256 than it says: %x", sum)
	}
	cert, err := keys.ParseCertificate([]byte(t.Certificate))
	if err != nil {
		return bad("the bundler's certificate: %w", err)
	}
	pub, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return bad("the bundler's certificate has no RSA key")
	}
	if m, err = ec2.ParseManifest(t.ManifestBytes); err != nil {
		return bad("%w", err)
	}
	if _, err := m.CheckTrust(ec2.Trust{Keys: []*rsa.PublicKey{pub}}); err != nil {
		return bad("%w", err)
	}
	if key, err = ec2.ParseBlockKey(t.Key); err != nil {
		return bad("the bundle's key: %w", err)
	}
	if iv, err = ec2.ParseBlockKey(t.IV); err != nil {
		return bad("the bundle's initialisation vector: %w", err)
	}
	return m, key, iv, nil
}

// writeImage fetches, verifies and writes the image.
func (m *machine) writeImage(ctx context.Context, disk device, client *ticket.Client, t *ticket.Ticket, manifest *ec2.Manifest, key, iv ec2.BlockKey) error {
	httpClient, err := storeClient(t.CACert)
	if err != nil {
		return final(err)
	}
	var mu sync.Mutex // covers t.Objects and last
	done, last := int64(0), time.Now()
	f := &fetcher{
		client: httpClient, stall: m.config.scaled(30 * time.Second), say: m.say,
		urls: func(name string) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			if u := t.Objects[name]; u != "" {
				return u, nil
			}
			return "", fmt.Errorf("the ticket has no URL for part %s", name)
		},
		renew: func(ctx context.Context, old string) error {
			mu.Lock()
			defer mu.Unlock()
			for _, u := range t.Objects {
				if u == old {
					fresh, err := client.Claim(ctx)
					if err == nil {
						t.Objects = fresh.Objects
					}
					return err
				}
			}
			return nil // another part's renewal came first
		},
		got: func(n int) {
			done += int64(n)
			if time.Since(last) > 5*time.Second || done == manifest.BundledSize {
				last = time.Now()
				m.say("root: %d of %d KiB fetched", done>>10, manifest.BundledSize>>10)
			}
		},
	}
	out, err := os.OpenFile(disk.path(), os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return final(fmt.Errorf("opening the disk: %w", err))
	}
	defer out.Close()
	r := f.reader(ctx, manifest.Parts)
	defer r.Close()
	if err := writeDisk(ctx, out, manifest, key, iv, r); err != nil {
		return fmt.Errorf("writing the root to %s: %w", disk.path(), err)
	}
	return nil
}

// writeDisk writes the image in r over out. The beginning, without which
// nothing can be mounted or found, is written last: after all has been
// verified and is on the disk.
func writeDisk(ctx context.Context, out *os.File, manifest *ec2.Manifest, key, iv ec2.BlockKey, r io.Reader) error {
	held := &heldOutput{Output: ec2.NewDeviceOutput(out), head: make([]byte, min(manifest.Size, headSize))}
	if _, err := out.WriteAt(make([]byte, len(held.head)), 0); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	digest := manifest.Digest
	if err := ec2.UnbundleStream(ctx, ec2.StreamOptions{Key: key, IV: iv, Size: manifest.Size, SHA1: &digest}, r, held); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	if _, err := out.WriteAt(held.head, 0); err != nil {
		return err
	}
	return out.Sync()
}

// headSize covers the superblocks of the filesystems known, btrfs' at 64 KiB
// being the last, and partition tables.
const headSize = 1 << 20

// heldOutput keeps the first bytes to itself and passes zeros on for them.
type heldOutput struct {
	ec2.Output
	head []byte
	at   int64
}

func (h *heldOutput) Write(p []byte) (int, error) {
	n := 0
	if h.at < int64(len(h.head)) {
		n = copy(h.head[h.at:], p)
		if _, err := h.Output.Write(make([]byte, n)); err != nil {
			return 0, err
		}
		h.at += int64(n)
		p = p[n:]
	}
	if len(p) == 0 {
		return n, nil
	}
	k, err := h.Output.Write(p)
	h.at += int64(k)
	return n + k, err
}

func (h *heldOutput) Skip(n int64) error {
	h.at += n
	return h.Output.Skip(n)
}

// mountWritten mounts the root of a disk that has just been written, in a
// partition if the image has a partition table.
func (m *machine) mountWritten(ctx context.Context, disk device) error {
	if disk.Disk {
		if f, err := os.Open(disk.path()); err == nil {
			// EINVAL where there are no partitions to read again.
			unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
			f.Close()
		}
	}
	found, err := partsOf(disk)
	if err != nil {
		return err
	}
	errs := []error{fmt.Errorf("the image on %s has no root in it", disk.path())}
	for _, d := range found {
		err := m.mountRoot(ctx, d)
		if err == nil {
			m.grow(d)
			return nil
		}
		errs = append(errs, err)
		unix.Unmount(rootDir, unix.MNT_DETACH)
	}
	return final(errors.Join(errs...))
}
