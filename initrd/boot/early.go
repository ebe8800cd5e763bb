package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// mountPoint is a filesystem of the early namespace.
type mountPoint struct {
	kind, at, data string
	flags          uintptr
}

// earlyMounts is the namespace that the image's system inherits. /run may run
// programs: Instar's own lies there.
func earlyMounts() []mountPoint {
	return []mountPoint{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"sysfs", "/sys", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"devtmpfs", "/dev", "mode=0755", unix.MS_NOSUID},
		{"tmpfs", "/run", "mode=0755", unix.MS_NOSUID | unix.MS_NODEV},
		{"tmpfs", "/tmp", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	}
}

func (m *machine) mounts(context.Context) error {
	for _, p := range earlyMounts() {
		if err := os.MkdirAll(p.at, 0o755); err != nil {
			return err
		}
		// EBUSY: the kernel mounts /dev itself (CONFIG_DEVTMPFS_MOUNT).
		if err := unix.Mount(p.kind, p.at, p.kind, p.flags, p.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s on %s: %w", p.kind, p.at, err)
		}
	}
	return nil
}

func (m *machine) configure(context.Context) error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	c, err := readConfig(ConfigFile, string(cmdline))
	m.config = c
	if err != nil {
		// Nothing that was said wrongly is relied on, least of all what to do now.
		if c.Check() != nil {
			m.config = Config{Fail: Halt}.withDefaults()
		}
		return err
	}
	if m.handed, err = handedOver(HandoverFile); err != nil {
		return err
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	running := strings.TrimSpace(string(release))
	m.say("kernel %s", running)
	if c.KernelRelease != "" && c.KernelRelease != running {
		m.say("warning: the modules in this initrd are for kernel %s", c.KernelRelease)
	}
	return nil
}

// modules loads the initrd's modules in their order.
func (m *machine) modules(ctx context.Context) error { return m.loadList(ctx, ModulesFile) }

// loadList loads the modules that a file lists. One that has nothing to do
// here, or that the kernel refuses, is no reason to stop: what lacks then says
// so itself.
func (m *machine) loadList(ctx context.Context, file string) error {
	list, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	loaded, idle := 0, false
	for name := range strings.Lines(string(list)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		name = strings.TrimSpace(name)
		err := loadModule(name)
		switch {
		case err == nil:
			loaded++
		case errors.Is(err, unix.EEXIST):
		case errors.Is(err, unix.ENODEV):
			idle = true
		case errors.Is(err, unix.ENOENT) && idle:
			// It needs a module that had no device.
		default:
			m.say("warning: module %s: %v", name, err)
		}
		os.Remove(name) // its memory is of no more use
	}
	m.say("modules: %d loaded", loaded)
	return os.Remove(file)
}

func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(name, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE // Linux 5.17
	}
	params := ""
	if strings.HasPrefix(path.Base(name), "nbd.ko") {
		params = "nbds_max=1 max_part=0" // else there are 16, and partitions of them
	}
	return unix.FinitModule(int(f.Fd()), params, flags)
}
