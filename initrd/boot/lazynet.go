package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/inroot"
	"github.com/instar-image/instar/initrd/lazyroot/netkeep"
)

// handOverNetwork leaves the network up for the server of the root, in a way
// that the image's system can take it over. What does not work of it is said.
func (m *machine) handOverNetwork(ctx context.Context) {
	if m.lazy == nil || m.net.link == nil {
		return
	}
	if err := m.nameInterface(ctx); err != nil {
		name := m.net.link.Attrs().Name
		m.say("network: warning: %s keeps its name, which may not be the one that the image's system knows: %v", name, err)
		if err := keepName(name, "/run"); err != nil {
			m.say("network: warning: telling udev that %s keeps its name: %v", name, err)
		}
	}
	if err := keepConfiguration(rootDir, "/run"); err != nil {
		m.say("network: warning: telling systemd-networkd to keep what there is: %v", err)
	}
}

// nameInterface gives the interface the name that the image's own udev gives
// it: that one cannot, for the interface is up. Who is asked is the image's
// udevadm, with the image's rules.
func (m *machine) nameInterface(ctx context.Context) error {
	old := m.net.link.Attrs().Name
	program := ""
	for _, p := range []string{"/usr/bin/udevadm", "/bin/udevadm", "/sbin/udevadm"} {
		if inRoot(rootDir, p) {
			program = p
			break
		}
	}
	if program == "" {
		return nil // who has no udev knows interfaces by the kernel's names
	}
	ctx, cancel := context.WithTimeout(ctx, m.config.scaled(udevPatience))
	defer cancel()
	name, err := askUdev(ctx, rootDir, program, old)
	if err != nil {
		return err
	}
	if name == "" || name == old {
		return nil
	}
	if len(name) > 15 || strings.ContainsAny(name, "/ \t") {
		return fmt.Errorf("udev names it %q", name)
	}
	if other, err := netlink.LinkByName(name); err == nil {
		if other.Attrs().Index != m.net.link.Attrs().Index {
			return fmt.Errorf("there is another %s", name)
		}
		// Udevadm has given it that name beside the one it has.
		if err := netlink.LinkDelAltName(m.net.link, name); err != nil {
			return fmt.Errorf("taking its other name %s away: %w", name, err)
		}
	}
	if err := rename(m.net.link, name); err != nil {
		return err
	}
	if m.net.link, err = netlink.LinkByIndex(m.net.link.Attrs().Index); err != nil {
		return err
	}
	m.say("network: %s is %s from now on, as the image's system names it", old, m.net.link.Attrs().Name)
	return nil
}

// rename gives an interface that is up another name. Linux before 6.2 does that
// only while it is down, which here is for a moment: connections do not notice.
// Nobody else may set it up meanwhile.
func rename(link netlink.Link, name string) error {
	err := netlink.LinkSetName(link, name)
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	state, err := netkeep.Take(link)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return err
	}
	err = netlink.LinkSetName(link, name)
	_, rerr := state.Restore()
	return errors.Join(err, rerr)
}

// initrdEnded returns when process 1 is another program than this one: until then
// the interface is the initrd's, which takes it down to rename it, and on a
// machine with much to do that takes longer than anybody is patient. proc is
// where /proc is seen.
func initrdEnded(ctx context.Context, proc string) error {
	own, err := os.Stat(filepath.Join(proc, "self/exe"))
	if err != nil {
		return err
	}
	for {
		init, err := os.Stat(filepath.Join(proc, "1/exe"))
		if err != nil {
			return err
		}
		if !os.SameFile(own, init) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// keepName tells udev, until the next boot, to leave an interface its name: one
// that is up it cannot rename, and systemd-networkd then waits for it for ever.
// The names that it would have had it gets beside.
func keepName(iface, run string) error {
	dir := filepath.Join(run, "systemd/network")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("# Written by Instar at boot: the root needs this interface, which is up.\n[Match]\nOriginalName=%s\n\n[Link]\nNamePolicy=keep\nAlternativeNamesPolicy=database onboard slot path mac\n", iface)
	return os.WriteFile(filepath.Join(dir, "00-instar-root.link"), []byte(text), 0o644)
}

// udevPatience is how long the image's udevadm may take, which comes from the
// store like all else.
const udevPatience = 3 * time.Minute

// askUdev runs udevadm in the root and returns the name it has for an interface,
// "" if it has none.
func askUdev(ctx context.Context, root, program, iface string) (name string, err error) {
	mounts := []mountPoint{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"sysfs", "/sys", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY},
		{"devtmpfs", "/dev", "", unix.MS_NOSUID},
		{"tmpfs", "/run", "mode=0755", unix.MS_NOSUID | unix.MS_NODEV},
	}
	var done []string
	defer func() {
		for _, at := range done {
			unix.Unmount(at, unix.MNT_DETACH)
		}
	}()
	for _, p := range mounts {
		at := root + p.at
		if st, err := os.Lstat(at); err != nil || !st.IsDir() {
			return "", fmt.Errorf("the root has no directory %s", p.at)
		}
		if err := unix.Mount(p.kind, at, p.kind, p.flags, p.data); err != nil {
			return "", fmt.Errorf("mounting %s for udevadm: %w", p.at, err)
		}
		done = append([]string{at}, done...)
	}
	cmd := exec.CommandContext(ctx, program, "test", "--action=add", "/sys/class/net/"+iface)
	cmd.Err = nil // it is there in the root
	cmd.Path = program
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("the image's udevadm: %w", err)
	}
	return udevName(string(out)), nil
}

// udevName finds in what "udevadm test" says how an interface is to be called:
// the property that the rule for names uses.
func udevName(out string) string {
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "ID_NET_NAME="); ok {
			return rest
		}
	}
	return ""
}

// keepConfiguration tells systemd-networkd, for each of the image's
// configurations, to leave what an interface has, until the next boot.
func keepConfiguration(root, run string) error {
	r, err := inroot.Open(root)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, dir := range []string{"/etc/systemd/network", "/usr/lib/systemd/network", "/lib/systemd/network"} {
		d, err := r.OpenDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		names, err := d.Readdirnames(10_000)
		d.Close()
		if err != nil && len(names) == 0 {
			continue // empty
		}
		for _, n := range names {
			if !strings.HasSuffix(n, ".network") || strings.HasPrefix(n, ".") {
				continue
			}
			at := filepath.Join(run, "systemd/network", n+".d")
			if err := os.MkdirAll(at, 0o755); err != nil {
				return err
			}
			const text = "# Written by Instar at boot: the root needs the network.\n[Network]\nKeepConfiguration=yes\n"
			if err := os.WriteFile(filepath.Join(at, "50-instar.conf"), []byte(text), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
