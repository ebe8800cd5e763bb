package boot

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/initrd/lazyroot/netkeep"
)

// TestRename gives an interface that is up another name, and it has what it had.
func TestRename(t *testing.T) {
	runtime.LockOSThread() // the thread ends with the test
	check(t, unix.Unshare(unix.CLONE_NEWNET))
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "other"}))
	link, err := netlink.LinkByName("eth0")
	check(t, err)
	check(t, netlink.LinkSetUp(link))
	addr, err := netlink.ParseAddr("192.0.2.9/24")
	check(t, err)
	check(t, netlink.AddrAdd(link, addr))
	check(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP("192.0.2.1")}))
	before, err := netkeep.Take(link)
	check(t, err)
	check(t, rename(link, "ens3"))
	link, err = netlink.LinkByName("ens3")
	check(t, err)
	after, err := netkeep.Take(link)
	check(t, err)
	if link.Attrs().Flags&net.FlagUp == 0 || len(after.Addrs) != 1 || len(after.Routes) != 1 || after.Addrs[0] != before.Addrs[0] || after.Routes[0] != before.Routes[0] {
		t.Errorf("%+v, before: %+v", after, before)
	}
	if err := rename(link, "other"); err == nil {
		t.Error("it has another interface's name")
	}
	if link, err = netlink.LinkByName("ens3"); err != nil || link.Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("after what could not be done: %v", err)
	}
}

// TestInitrdEnded waits for the end of the initrd's init.
func TestInitrdEnded(t *testing.T) {
	proc := t.TempDir()
	for _, d := range []string{"self", "1"} {
		check(t, os.Mkdir(filepath.Join(proc, d), 0o755))
	}
	ours, systemd := filepath.Join(proc, "init"), filepath.Join(proc, "systemd")
	check(t, os.WriteFile(ours, nil, 0o755))
	check(t, os.WriteFile(systemd, nil, 0o755))
	check(t, os.Symlink(ours, filepath.Join(proc, "self/exe")))
	check(t, os.Symlink(ours, filepath.Join(proc, "1/exe")))
	ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel()
	if err := initrdEnded(ctx, proc); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while the initrd runs: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- initrdEnded(t.Context(), proc) }()
	check(t, os.Symlink(systemd, filepath.Join(proc, "1/new")))
	check(t, os.Rename(filepath.Join(proc, "1/new"), filepath.Join(proc, "1/exe")))
	check(t, <-done)
}
