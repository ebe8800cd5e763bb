package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/journal"
	"github.com/instar-image/instar/initrd/eager"
	"github.com/instar-image/instar/initrd/lazyroot"
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
	lazy, err := unfinished(disk)
	if err != nil {
		return fmt.Errorf("reading the disk: %w", err)
	}
	begun := lazy.State != lazyroot.None && lazy.Instance == m.instance.ID
	if begun && lazy.State == lazyroot.Complete {
		return m.settleLazy(ctx, disk, lazy)
	}
	if mayMount(lazy, m.instance.ID) && m.ownRoot(ctx, disk) {
		m.say("root: it is this instance's already: nothing is fetched")
		return nil
	}
	taken := content(disk)
	if lazy.State == lazyroot.Filling {
		taken = "the unfinished root of instance " + lazy.Instance
	}
	refused := final(fmt.Errorf("%s holds %s: it is overwritten only if instar.disk=%s says so", disk.path(), taken, disk.path()))
	if m.config.Disk != "" {
		taken = ""
	}
	// What this instance began and did not end may look like anything.
	if taken != "" && !begun && !claimedBefore(disk, m.instance.ID) {
		return refused
	}
	client, err := m.ticketClient()
	if err != nil {
		return err
	}
	t, err := m.claim(ctx, client)
	if err != nil {
		return err
	}
	pool, err := rootCAs()
	if err != nil {
		return err
	}
	httpClient, err := storeClient(pool, t.CACert, m.config.Proxy)
	if err != nil {
		return final(err)
	}
	img, err := openTicket(ctx, t, m.instance.ID, SignersFile, &fetcher{
		client: httpClient, stall: m.config.scaled(30 * time.Second), say: m.say, access: &access{client: client, t: t},
	})
	if err != nil {
		return err
	}
	id := img.identity(m.instance.ID)
	m.say("root: %s, for %s", img.about(), disk.path())
	if disk.Size < id.Size {
		return final(fmt.Errorf("%s has %d bytes, the image %d", disk.path(), disk.Size, id.Size))
	}
	if mode := m.mode(t); mode != ticket.Eager || begun {
		if begun && lazy.Manifest != id.Manifest && m.config.Disk == "" {
			return refused
		}
		err := m.startLazy(ctx, disk, img, t, client, lazy)
		// What the system wrote into a root that was begun is not given up.
		if begun || !errors.Is(err, errNotLazy) || mode != ticket.LazyOrEager {
			return err
		}
		m.say("root: %v: all of it is written before the boot, as that may be", err)
	}
	if lazy.State != lazyroot.None {
		if err := clearTail(disk); err != nil {
			return err
		}
	}
	err = onDisk(disk, func(medium eager.Medium) error {
		state, err := eager.StateOf(medium, id)
		switch {
		case err != nil:
			return err
		case state == eager.Whole:
			m.say("root: it was written, whole, before: nothing is fetched")
			return nil
		case state == eager.Foreign && taken != "":
			return refused
		}
		return eager.Write(ctx, medium, id, img)
	})
	if err != nil {
		return fmt.Errorf("writing the root to %s: %w", disk.path(), err)
	}
	if err := m.settle(ctx, disk, id, t.ManifestSHA256); err != nil {
		return err
	}
	if err := client.Complete(ctx); err != nil {
		m.say("warning: %v", err)
	}
	return nil
}

// mayMount tells whether what lies in front of the tail may be mounted to see
// whose it is. What this instance began to fill may look whole, if the power was
// cut between its head and the word that it is complete; but the next filling
// takes the head from the tail again, and what a mount replayed is gone with it.
func mayMount(r lazyroot.Record, instance string) bool {
	return r.State != lazyroot.Filling || r.Instance != instance
}

// ticketClient is a client that goes on, within this boot, with what the one
// before it claimed: for the metadata server each holder is a claim more.
func (m *machine) ticketClient() (*ticket.Client, error) {
	client, err := ticket.New(m.config.Metadata, ticket.Options{
		AnyPort: m.config.AnyPort, Timeout: m.config.scaled(30 * time.Second), Holder: m.holder,
	})
	if err == nil {
		m.holder = client.Holder()
	}
	return client, err
}

// settle mounts a root that was written, whole, and notes in it that it is
// this instance's; only then does the disk's own record go.
func (m *machine) settle(ctx context.Context, disk device, id eager.Image, manifest string) error {
	if err := m.mountWritten(ctx, disk); err != nil {
		return err
	}
	if err := m.noteRoot(manifest); err != nil {
		return err
	}
	root := m.disk.device
	// The record, and what was spooled behind the image, go while nothing is
	// mounted and before the filesystem grows over it.
	if err := unix.Unmount(rootDir, 0); err != nil {
		return fmt.Errorf("unmounting the new root: %w", err)
	}
	m.disk = nil
	if err := onDisk(disk, func(medium eager.Medium) error { return eager.Clear(medium, id) }); err != nil {
		return err
	}
	if err := m.mountRoot(ctx, root); err != nil {
		return err
	}
	m.grow(root)
	return nil
}

// onDisk opens a disk for its own use.
func onDisk(disk device, use func(eager.Medium) error) error {
	f, err := os.OpenFile(disk.path(), os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("opening the disk: %w", err)
	}
	defer f.Close()
	return use(eager.Device(f, disk.Size))
}

func claimedBefore(disk device, instance string) bool {
	f, err := os.Open(disk.path())
	if err != nil {
		return false
	}
	defer f.Close()
	return eager.Claimed(eager.Device(f, disk.Size), instance)
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
			m.grow(d) // should the power have been cut just before
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
		if _, ok := errors.AsType[*ticket.InvalidError](err); ok {
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
			return nil
		}
		errs = append(errs, err)
		unix.Unmount(rootDir, unix.MNT_DETACH)
	}
	return final(errors.Join(errs...))
}
