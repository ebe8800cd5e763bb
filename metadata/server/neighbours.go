package server

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/metadata"
)

// Neighbours returns a lookup in the kernel's neighbour table (RTM_GETNEIGH).
func Neighbours() metadata.Neighbours { return neighbours{} }

type neighbours struct{}

func (neighbours) MAC(iface string, addr netip.Addr) (string, error) {
	index := 0
	if iface != "" {
		link, err := netlink.LinkByName(iface)
		if err != nil {
			return "", fmt.Errorf("looking up the interface %s: %w", iface, err)
		}
		index = link.Attrs().Index
	}
	family := unix.AF_INET6
	if addr.Is4() {
		family = unix.AF_INET
	}
	list, err := netlink.NeighList(index, family)
	if err != nil {
		return "", fmt.Errorf("reading the neighbour table: %w", err)
	}
	mac := ""
	for _, n := range list {
		// Only what the kernel has confirmed, or an operator has set.
		const known = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT
		a, ok := netip.AddrFromSlice(n.IP)
		if !ok || a.Unmap() != addr || n.State&known == 0 {
			continue
		}
		got := n.HardwareAddr.String()
		if mac != "" && got != mac {
			return "", fmt.Errorf("%s has two MAC addresses on two interfaces: name the interface, as in --listen 169.254.169.254@br0", addr)
		}
		mac = got
	}
	if mac == "" {
		return "", fmt.Errorf("%s is not in the neighbour table", addr)
	}
	return mac, nil
}
