package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/dm"
	"github.com/instar-image/instar/initrd/lazyroot/knbd"
	"github.com/instar-image/instar/initrd/lazyroot/netkeep"
	"github.com/instar-image/instar/initrd/lazyroot/resident"
	"github.com/instar-image/instar/metadata/ticket"
)

// LazyModulesFile lists the modules of a root that comes lazily.
const LazyModulesFile = ModulesFile + ".lazy"

// nbdIndex is N of the /dev/nbdN below the root, which is nbdPath.
const (
	nbdIndex = 0
	nbdPath  = "/dev/nbd0"
)

// errNotLazy is wrapped where an image or a disk cannot be used lazily: nothing
// was changed.
var errNotLazy = errors.New("it cannot be booted lazily")

// lazyRoot is a root whose server runs.
type lazyRoot struct {
	server *resident.Process
	maps   []string // mapped devices, the whole disk first
	disk   device   // below them
	parts  []partition
}

// mode is how the ticket's image comes to the disk: as configured, else as the
// ticket says.
func (m *machine) mode(t *ticket.Ticket) ticket.Mode {
	switch {
	case m.config.Lazy != "":
		return m.config.Lazy
	case t.Mode != "":
		return t.Mode
	}
	return ticket.Eager
}

// unfinished tells what a lazy root on the disk has got to.
func unfinished(disk device) (lazyroot.Record, error) {
	f, err := os.Open(disk.path())
	if err != nil {
		return lazyroot.Record{}, err
	}
	defer f.Close()
	return lazyroot.StateOf(f, disk.Size)
}

// settleLazy boots a disk that was filled while the system ran before: it has
// all of the image, and is this instance's.
func (m *machine) settleLazy(ctx context.Context, disk device, r lazyroot.Record) error {
	m.say("root: all of it was brought to %s while the system ran: nothing is fetched", disk.path())
	if err := m.mountWritten(ctx, disk); err != nil {
		return err
	}
	if err := m.noteRoot(r.Manifest.String()); err != nil {
		return err
	}
	root := m.disk.device
	// The filesystem can grow over the tail once that is gone.
	if err := unix.Unmount(rootDir, 0); err != nil {
		return fmt.Errorf("unmounting the root: %w", err)
	}
	m.disk = nil
	if err := clearTail(disk); err != nil {
		return err
	}
	if err := m.mountRoot(ctx, root); err != nil {
		return err
	}
	m.grow(root)
	return nil
}

// clearTail makes a disk one that is not a lazy root's.
func clearTail(disk device) error {
	f, err := os.OpenFile(disk.path(), os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("opening the disk: %w", err)
	}
	defer f.Close()
	return lazyroot.Clear(lazyroot.FileDisk(f, disk.Size))
}

// startLazy has the image served from the store and mounts it. record is what
// the disk's tail said.
func (m *machine) startLazy(ctx context.Context, disk device, img image, t *ticket.Ticket, client *ticket.Client, record lazyroot.Record) (err error) {
	instar, ok := img.(*instarImage)
	if !ok {
		return final(fmt.Errorf("%w: an EC2 bundle is one stream, of which no part can be read alone", errNotLazy))
	}
	if m.config.Kexec != "" {
		return final(fmt.Errorf("%w: instar.kexec would end the root's server", errNotLazy))
	}
	size, err := lazyroot.DeviceSize(disk.Size, instar.stream.Size())
	if err != nil {
		return final(fmt.Errorf("%w: %s: %w", errNotLazy, disk.path(), err))
	}
	begun := record.State == lazyroot.Filling && record.Instance == m.instance.ID && record.Manifest == instar.manifest
	if !begun {
		if err := mappable(instar.stream.ReaderAt(ctx, chunked.MaxChunk), instar.stream.Size()); err != nil {
			return err
		}
	}
	if err := m.loadList(ctx, LazyModulesFile); err != nil {
		return err
	}
	control, err := os.OpenFile(dm.ControlPath, os.O_RDWR, 0)
	if err != nil {
		return final(fmt.Errorf("%w: the kernel has no device mapper: are the modules dm-mod and nbd in the initrd? (%w)", errNotLazy, err))
	}
	defer control.Close()
	if _, err := os.Stat(nbdPath); err != nil {
		return final(fmt.Errorf("%w: the kernel has no NBD: is the module nbd in the initrd? (%w)", errNotLazy, err))
	}
	f, err := os.OpenFile(disk.path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return fmt.Errorf("opening the disk: %w", err)
	}
	defer f.Close()
	c := m.lazyConfig(instar, t, client, disk)
	if begun {
		m.say("root: going on where the last boot ended")
	} else if err := lazyroot.Format(lazyroot.FileDisk(f, disk.Size), c.identity()); err != nil {
		return fmt.Errorf("taking %s for the root: %w", disk.path(), err)
	}
	l := &lazyRoot{disk: disk}
	defer func() {
		if err != nil {
			l.stop()
		}
	}()
	if m.net.link != nil {
		state, err := netkeep.Take(m.net.link)
		if err != nil {
			return err
		}
		c.Network = &state
	}
	if err := l.serve(ctx, c, f, control); err != nil {
		return err
	}
	if err := l.mapDevices(dm.New(control), size); err != nil {
		return err
	}
	if err := m.mountLazy(ctx, l); err != nil {
		return err
	}
	if err := writeRules(l); err != nil {
		return err
	}
	m.lazy = l
	m.grow(m.disk.device)
	return nil
}

// serve starts the server.
func (l *lazyRoot) serve(ctx context.Context, c *lazyConfig, disk, control *os.File) error {
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	config, err := resident.Memory("configuration", text)
	if err != nil {
		return err
	}
	defer config.Close()
	session, err := resident.Memory("session", nil)
	if err != nil {
		return err
	}
	defer session.Close()
	// Of more than ten lines in five seconds the kernel would drop the rest, an alarm
	// perhaps. Where its parameters say how it is to be, that is not changed.
	os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0)
	log, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	spared, err := spared()
	if err != nil {
		return err
	}
	defer spared.Close()
	l.server, err = resident.Start(ctx, resident.Files{Config: config, Disk: disk, Control: control, Session: session, Spared: spared}, log)
	return err
}

// spared tells Debian's scripts that end all processes of a system without systemd
// which ones to leave alone.
func spared() (*os.File, error) {
	const dir = "/run/sendsigs.omit.d"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(dir+"/instar-root", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
}

// partitionsOf are the partitions of an image, none if it is one filesystem.
func partitionsOf(r io.ReaderAt, size int64) ([]partition, error) {
	remembered := &readError{ReaderAt: r}
	fs, err := probe(remembered)
	if err != nil {
		return nil, fmt.Errorf("reading the image: %w", err)
	}
	if fs.Kind != "" {
		return nil, nil
	}
	list, err := readPartitions(remembered, size)
	switch {
	case remembered.err != nil:
		return nil, fmt.Errorf("reading the image: %w", remembered.err)
	case err != nil:
		return nil, final(fmt.Errorf("the image's partition table: %w", err))
	}
	return list, nil
}

// readError tells what could not be read from what was read and is of no use.
type readError struct {
	io.ReaderAt
	err error
}

func (r *readError) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.ReaderAt.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// mappable says, before the disk is taken, why an image cannot be mapped.
func mappable(r io.ReaderAt, size int64) error {
	_, err := partitionsOf(r, size)
	if errors.Is(err, errFinal) {
		return final(fmt.Errorf("%w: %w", errNotLazy, err))
	}
	return err
}

// mapDevices makes the mapped devices: of the disk, and of each partition in
// its table, since the kernel looks for none in a mapped device.
func (l *lazyRoot) mapDevices(control *dm.Control, size int64) error {
	nbd, err := os.Open(nbdPath)
	if err != nil {
		return err
	}
	defer nbd.Close()
	target, err := dm.Number(nbd)
	if err != nil {
		return err
	}
	if l.parts, err = partitionsOf(nbd, size); err != nil {
		return err
	}
	whole := partition{Length: size}
	for _, p := range append([]partition{whole}, l.parts...) {
		name := resident.MapName
		if p.Number > 0 {
			name = resident.PartName(p.Number)
		}
		d, err := control.Create(name, resident.MapUUID+name)
		if err != nil {
			return err
		}
		l.maps = append(l.maps, name)
		if err := control.Load(name, []dm.Linear{{Length: p.Length, Target: target, Offset: p.Start}}); err != nil {
			return err
		}
		if err := control.Resume(name); err != nil {
			return err
		}
		link := filepath.Join(filepath.Dir(dm.ControlPath), name)
		os.Remove(link) // of a former try
		if err := os.Symlink("../"+d.Node(), link); err != nil {
			return err
		}
	}
	return nil
}

// devices are the mapped devices with what is in them.
func (l *lazyRoot) devices() ([]device, error) {
	var list []device
	for i, name := range l.maps {
		d := device{Name: "mapper/" + name, Disk: i == 0}
		if i > 0 {
			p := l.parts[i-1]
			d.PartUUID, d.PartLabel = p.UUID, p.Label
		}
		f, err := os.Open(d.path())
		if err != nil {
			return nil, err
		}
		d.filesystem, err = probe(f)
		if err == nil {
			d.Size, err = f.Seek(0, 2)
		}
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", d.path(), err)
		}
		list = append(list, d)
	}
	return list, nil
}

// mountLazy mounts the first mapped device that has a root in it.
func (m *machine) mountLazy(ctx context.Context, l *lazyRoot) error {
	list, err := l.devices()
	if err != nil {
		return err
	}
	errs := []error{errors.New("the image has no root in it")}
	for _, d := range chooseRoots(list, "auto") {
		err := m.mountRoot(ctx, d)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		unix.Unmount(rootDir, unix.MNT_DETACH)
	}
	return final(errors.Join(errs...))
}

// stop takes a root that was not booted away again.
func (l *lazyRoot) stop() {
	unix.Unmount(rootDir, unix.MNT_DETACH)
	if control, err := os.OpenFile(dm.ControlPath, os.O_RDWR, 0); err == nil {
		for _, name := range l.maps {
			dm.New(control).Remove(name)
		}
		control.Close()
	}
	if l.server != nil {
		l.server.Stop()
	}
	knbd.Disconnect(nbdIndex)
}

// rules tells udev what the root lies on. The disk and the nbd device show the
// same filesystem as the mapped device, or will: only that one has names, and is
// a device for systemd. That it is in use is said in place of dmsetup, which
// did not make it.
func (l *lazyRoot) rules() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Written by Instar at boot: the root is filled from an image's store.
SUBSYSTEM!="block", GOTO="instar_end"
ACTION=="remove", GOTO="instar_end"
KERNEL=="nbd%[1]d|%[2]s|%[2]s[0-9]*|%[2]sp[0-9]*", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1", ENV{SYSTEMD_READY}="0", OPTIONS:="nowatch"
KERNEL!="dm-*", GOTO="instar_end"
ATTR{dm/uuid}!="%[3]s*", GOTO="instar_end"
ENV{DM_UDEV_PRIMARY_SOURCE_FLAG}="1"
SYMLINK+="mapper/$attr{dm/name}"
IMPORT{builtin}="blkid"
ENV{ID_FS_USAGE}=="filesystem|other", ENV{ID_FS_UUID_ENC}=="?*", SYMLINK+="disk/by-uuid/$env{ID_FS_UUID_ENC}"
ENV{ID_FS_USAGE}=="filesystem|other", ENV{ID_FS_LABEL_ENC}=="?*", SYMLINK+="disk/by-label/$env{ID_FS_LABEL_ENC}"
`, nbdIndex, l.disk.Name, resident.MapUUID)
	for _, p := range l.parts {
		if p.UUID != "" {
			fmt.Fprintf(&b, "ATTR{dm/name}==%q, SYMLINK+=%q\n", resident.PartName(p.Number), "disk/by-partuuid/"+p.UUID)
		}
		if plain(p.Label) {
			fmt.Fprintf(&b, "ATTR{dm/name}==%q, SYMLINK+=%q\n", resident.PartName(p.Number), "disk/by-partlabel/"+p.Label)
		}
	}
	b.WriteString("LABEL=\"instar_end\"\n")
	return b.String()
}

// plain tells whether a label is of characters that mean nothing to udev.
func plain(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == "" && strings.Trim(s, ".") != ""
}

func writeRules(l *lazyRoot) error {
	const dir = "/run/udev/rules.d"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(dir+"/54-instar-root.rules", []byte(l.rules()), 0o644)
}
