package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/u-root/u-root/pkg/mount"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject"
	"github.com/instar-image/instar/agent/inject/inroot"
)

// rootDir is where the root is mounted before it becomes /.
const rootDir = "/root"

// rootDisk is the device the root lies on.
type rootDisk struct {
	device
}

// spec is how fstab names the root.
func (d *rootDisk) spec() string {
	if d.UUID != "" {
		return "UUID=" + d.UUID
	}
	return d.path()
}

// root mounts the root, from wherever it is to come.
func (m *machine) root(ctx context.Context) error {
	if m.config.Root == "ticket" {
		return m.ticketRoot(ctx)
	}
	return m.localRoot(ctx)
}

// localRoot waits for the device that is configured and mounts it.
func (m *machine) localRoot(ctx context.Context) error {
	var found []device
	told := ""
	err := until(ctx, func(context.Context) error {
		list, err := listDevices("/sys/class/block", "/dev")
		if err != nil {
			return err
		}
		if found = chooseRoots(list, m.config.Root); len(found) > 0 {
			return nil
		}
		var names []string
		for _, d := range list {
			names = append(names, strings.TrimSpace(fmt.Sprintf("%s %s %s", d.path(), d.Kind, d.UUID)))
		}
		err = fmt.Errorf("no device %s: there are %s", m.config.Root, strings.Join(names, ", "))
		if err.Error() != told {
			told = err.Error()
			m.say("waiting for the root: %v", err)
		}
		return err
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range found {
		err := m.mountRoot(ctx, d)
		if err == nil {
			if m.config.Grow {
				m.grow(d)
			}
			return nil
		}
		errs = append(errs, err)
		unix.Unmount(rootDir, unix.MNT_DETACH)
	}
	return errors.Join(errs...)
}

// chooseRoots are the devices that may be the root which spec names: with
// "auto" all that have a filesystem for one.
func chooseRoots(list []device, spec string) []device {
	if spec != "auto" {
		if d, ok := findDevice(list, spec); ok {
			return []device{d}
		}
		return nil
	}
	var found []device
	for _, d := range list {
		switch d.Kind {
		case "ext2", "ext3", "ext4", "xfs", "btrfs":
			found = append(found, d)
		}
	}
	return found
}

// mountRoot mounts a device's filesystem on rootDir.
func (m *machine) mountRoot(ctx context.Context, d device) error {
	switch d.Kind {
	case "":
		return final(fmt.Errorf("%s has no filesystem that is known", d.path()))
	case kindUnfinished:
		return final(fmt.Errorf("%s has a root that is not all there yet: instar.root=ticket goes on with it", d.path()))
	case "ext2", "ext3", "ext4", "xfs", "btrfs":
	default:
		return final(fmt.Errorf("%s holds %s, which is no root", d.path(), d.Kind))
	}
	if err := os.MkdirAll(rootDir, 0o755); err != nil {
		return err
	}
	kind := d.Kind
	if strings.HasPrefix(kind, "ext") {
		kind = "ext4" // which mounts the older ones too
	}
	if err := m.loadList(ctx, ModulesFile+"."+kind); err != nil {
		return err
	}
	if err := unix.Mount(d.path(), rootDir, kind, 0, m.config.RootFlags); err != nil {
		if errors.Is(err, unix.ENODEV) {
			err = fmt.Errorf("%w: the kernel does not know %s: is its module in the initrd?", err, kind)
		}
		return final(fmt.Errorf("mounting %s (%s): %w", d.path(), d.Kind, err))
	}
	if !inRoot(rootDir, m.config.Init) {
		return final(fmt.Errorf("%s is no root: it has no %s; instar.init= names another program", d.path(), m.config.Init))
	}
	m.disk = &rootDisk{d}
	m.say("root: %s, %s %s", d.path(), d.Kind, d.UUID)
	return nil
}

// inject makes the root this instance's own. What fails of it does not stop
// the boot: a machine without one key is better than none; it is told.
func (m *machine) inject(ctx context.Context) error {
	if m.instance.ID == "" {
		return nil
	}
	list, err := listDevices("/sys/class/block", "/dev")
	if err != nil {
		return err
	}
	if m.lazy != nil {
		mapped, err := m.lazy.devices()
		if err != nil {
			return err
		}
		list = append(list, mapped...)
	}
	res, err := inject.Apply(ctx, inject.Options{
		Root: rootDir, Run: "/run", Program: "/init", RootSpec: m.disk.spec(),
		Present: func(spec string) bool { _, ok := findDevice(list, spec); return ok },
		Report: func(line string, warn bool) {
			if warn {
				line = "warning: " + line
			}
			m.say("inject: %s", line)
		},
	}, m.instance)
	if err != nil {
		if ctx.Err() != nil || res == nil {
			return err
		}
		for line := range strings.Lines(err.Error()) {
			m.say("inject: NOT DONE: %s", strings.TrimSpace(line))
		}
	}
	return nil
}

// switchRoot hands over to the system in the root.
func (m *machine) switchRoot(ctx context.Context) error {
	// SwitchRoot deletes the old root's files: only ever those of an initramfs.
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return err
	}
	if st.Type != unix.RAMFS_MAGIC && st.Type != unix.TMPFS_MAGIC {
		return final(fmt.Errorf("/ is not an initramfs (filesystem type %#x)", st.Type))
	}
	init := m.config.Init
	m.handOverNetwork(ctx)
	m.release()
	unix.Unmount("/tmp", unix.MNT_DETACH)
	m.say("switching to the image's %s", init)
	unix.Sync()
	if err := mount.SwitchRoot(rootDir, init); err != nil {
		return final(fmt.Errorf("switching to the root: %w", err))
	}
	return final(errors.New("switching to the root came back"))
}

// inRoot tells whether name is a file in the root directory, links resolved
// inside it.
func inRoot(root, name string) bool {
	r, err := inroot.Open(root)
	if err != nil {
		return false
	}
	defer r.Close()
	f, err := r.OpenFile(name)
	if err != nil {
		return false
	}
	f.Close()
	return true
}
