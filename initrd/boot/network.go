package boot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// network is what the network step found.
type network struct {
	link netlink.Link // the interface in use; nil for net=none
	dns  []netip.Addr
}

// lease is what one interface is given.
type lease struct {
	address  *net.IPNet
	gateway  net.IP
	routes   []*dhcpv4.Route
	mtu      int
	dns      []netip.Addr
	from     string // who said so, for the console
	viaTable bool   // classless routes were given: the gateway is not used
}

func (m *machine) network(ctx context.Context) error {
	m.net = network{}
	if m.config.Net == "none" {
		m.say("network: none, as configured")
		return nil
	}
	if lo, err := netlink.LinkByName("lo"); err == nil {
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("setting up lo: %w", err)
		}
	}
	var links []netlink.Link
	err := until(ctx, func(context.Context) (err error) {
		links, err = m.candidates()
		return err
	})
	if err != nil {
		return err
	}
	for _, l := range links {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("setting up %s: %w", l.Attrs().Name, err)
		}
	}
	switch m.config.Net {
	case "static":
		err = m.static(ctx, links)
	case "ra":
		err = m.advertised(ctx, links)
	default:
		err = m.dhcp(ctx, links)
	}
	if err != nil {
		return err
	}
	configured, err := m.config.servers()
	if err != nil {
		return err
	}
	m.net.dns = append(configured, m.net.dns...)
	return m.resolver()
}

// candidates are the Ethernet interfaces that may be used.
func (m *machine) candidates() ([]netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing network interfaces: %w", err)
	}
	var found []netlink.Link
	var names []string
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || len(a.HardwareAddr) != 6 || l.Type() != "device" {
			continue
		}
		names = append(names, fmt.Sprintf("%s (%s)", a.Name, a.HardwareAddr))
		if m.config.matches(a.Name, a.HardwareAddr) {
			found = append(found, l)
		}
	}
	switch {
	case len(found) > 0:
		return found, nil
	case len(names) > 0:
		return nil, fmt.Errorf("no network interface %s: there are %s", m.config.Interface, strings.Join(names, ", "))
	}
	return nil, errors.New("no network interface: is its driver in the initrd?")
}

func (m *machine) static(ctx context.Context, links []netlink.Link) error {
	link := links[0]
	if len(links) > 1 {
		m.say("network: several interfaces, %s is used; instar.interface= names another", link.Attrs().Name)
	}
	prefix, err := netip.ParsePrefix(m.config.Address)
	if err != nil {
		return err
	}
	l := lease{address: ipNet(prefix), from: "as configured"}
	if m.config.Gateway != "" {
		l.gateway = net.ParseIP(m.config.Gateway)
	}
	if err := awaitCarrier(ctx, link); err != nil {
		return err
	}
	return m.apply(link, l)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func awaitCarrier(ctx context.Context, link netlink.Link) error {
	return until(ctx, func(context.Context) error {
		l, err := netlink.LinkByIndex(link.Attrs().Index)
		if err != nil {
			return err
		}
		if l.Attrs().RawFlags&unix.IFF_RUNNING == 0 {
			return fmt.Errorf("%s has no carrier", link.Attrs().Name)
		}
		return nil
	})
}

// advertised waits until the kernel has made an address from a router's
// advertisement.
func (m *machine) advertised(ctx context.Context, links []netlink.Link) error {
	return until(ctx, func(context.Context) error {
		for _, l := range links {
			addrs, err := netlink.AddrList(l, unix.AF_INET6)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				if a.IP.IsGlobalUnicast() && a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
					m.net.link = l
					m.say("network: %s %s (router advertisement)", l.Attrs().Name, a.IPNet)
					return nil
				}
			}
		}
		return errors.New("no address by IPv6 router advertisement")
	})
}

// dhcp asks on all links at once; the first lease is taken.
func (m *machine) dhcp(ctx context.Context, links []netlink.Link) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		link netlink.Link
		l    lease
		err  error
	}
	answers := make(chan answer, len(links))
	for _, link := range links {
		go func() {
			var l lease
			var refused error
			err := until(ctx, func(ctx context.Context) (err error) {
				l, err = m.askDHCP(ctx, link)
				if errors.Is(err, errRefused) {
					refused = err
				}
				return err
			})
			// What a server said tells more than the last try, which the
			// deadline cut short.
			if err != nil && refused != nil {
				err = refused
			}
			answers <- answer{link, l, err}
		}()
	}
	var errs []error
	for range links {
		a := <-answers
		if a.err == nil {
			return m.apply(a.link, a.l)
		}
		errs = append(errs, fmt.Errorf("%s: %w", a.link.Attrs().Name, a.err))
	}
	return errors.Join(errs...)
}

// errRefused: the DHCP server said no.
var errRefused = errors.New("refused (NAK)")

// askDHCP is one exchange with a DHCP server.
func (m *machine) askDHCP(ctx context.Context, link netlink.Link) (lease, error) {
	name := link.Attrs().Name
	current, err := netlink.LinkByIndex(link.Attrs().Index)
	if err != nil {
		return lease{}, err
	}
	if current.Attrs().RawFlags&unix.IFF_RUNNING == 0 {
		return lease{}, errors.New("no carrier")
	}
	client, err := nclient4.New(name, nclient4.WithTimeout(m.config.scaled(3*time.Second)), nclient4.WithRetry(1))
	if err != nil {
		return lease{}, fmt.Errorf("DHCP: %w", err)
	}
	defer client.Close()
	got, err := client.Request(ctx,
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier("instar")),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer,
			dhcpv4.OptionInterfaceMTU, dhcpv4.OptionClasslessStaticRoute))
	if err != nil {
		if nak, ok := errors.AsType[*nclient4.ErrNak](err); ok {
			return lease{}, fmt.Errorf("the DHCP server %s %w: %s", server(nak.Nak), errRefused, nak.Nak.Message())
		}
		if errors.Is(err, nclient4.ErrNoResponse) || errors.Is(err, context.DeadlineExceeded) {
			return lease{}, errors.New("no DHCP server answers")
		}
		return lease{}, fmt.Errorf("DHCP: %w", err)
	}
	return readLease(got.ACK)
}

func server(p *dhcpv4.DHCPv4) string {
	if p == nil {
		return "?"
	}
	if id := p.ServerIdentifier(); id != nil {
		return id.String()
	}
	return p.ServerIPAddr.String()
}

// readLease takes from an ACK what is used of it.
func readLease(ack *dhcpv4.DHCPv4) (lease, error) {
	ip := ack.YourIPAddr.To4()
	mask := ack.SubnetMask()
	if ip == nil || ip.IsUnspecified() {
		return lease{}, fmt.Errorf("the DHCP server %s gave no address", server(ack))
	}
	if mask == nil {
		mask = ip.DefaultMask()
	}
	if ones, bits := mask.Size(); bits != 32 || ones == 0 {
		return lease{}, fmt.Errorf("the DHCP server %s gave the netmask %s", server(ack), net.IP(mask))
	}
	l := lease{address: &net.IPNet{IP: ip, Mask: mask}, from: "DHCP from " + server(ack)}
	if routers := ack.Router(); len(routers) > 0 {
		l.gateway = routers[0]
	}
	if l.routes = ack.ClasslessStaticRoute(); len(l.routes) > 0 {
		l.viaTable = true // RFC 3442: the router option is then ignored
	}
	if mtu, err := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, ack.Options); err == nil && mtu >= 576 {
		l.mtu = int(mtu)
	}
	for _, ip := range ack.DNS() {
		if a, ok := netip.AddrFromSlice(ip.To4()); ok {
			l.dns = append(l.dns, a)
		}
	}
	return l, nil
}

// apply gives the interface what the lease says.
func (m *machine) apply(link netlink.Link, l lease) error {
	name := link.Attrs().Name
	if l.mtu > 0 {
		if err := netlink.LinkSetMTU(link, l.mtu); err != nil {
			m.say("warning: %s does not take the MTU %d: %v", name, l.mtu, err)
		}
	}
	addr := &netlink.Addr{IPNet: l.address}
	if l.address.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD // nothing else is up yet that would wait for it
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("giving %s the address %s: %w", name, l.address, err)
	}
	index := link.Attrs().Index
	if l.viaTable {
		for _, r := range l.routes {
			route := &netlink.Route{LinkIndex: index, Dst: r.Dest, Gw: r.Router}
			if r.Router.IsUnspecified() {
				route.Gw, route.Scope = nil, netlink.SCOPE_LINK
			}
			if err := netlink.RouteReplace(route); err != nil {
				m.say("warning: no route to %s by %s: %v", r.Dest, r.Router, err)
			}
		}
	} else if l.gateway != nil {
		// Onlink: a gateway outside the prefix is common in hosting.
		route := &netlink.Route{LinkIndex: index, Gw: l.gateway, Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("setting the gateway %s on %s: %w", l.gateway, name, err)
		}
	} else if l.address.IP.To4() != nil {
		// Without a gateway, link-local addresses are at least on the wire.
		_, linkLocal, err := net.ParseCIDR("169.254.169.254/32")
		if err == nil {
			err = netlink.RouteReplace(&netlink.Route{LinkIndex: index, Dst: linkLocal, Scope: netlink.SCOPE_LINK})
		}
		if err != nil {
			m.say("warning: no route to 169.254.169.254: %v", err)
		}
	}
	gateway := "no gateway"
	if l.gateway != nil {
		gateway = "gateway " + l.gateway.String()
	}
	m.net.link = link
	m.net.dns = l.dns
	m.say("network: %s %s, %s (%s)", name, l.address, gateway, l.from)
	return nil
}

// resolver writes the initrd's own resolv.conf.
func (m *machine) resolver() error {
	var b strings.Builder
	for _, a := range m.net.dns {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return os.WriteFile("/etc/resolv.conf", []byte(b.String()), 0o644)
}

// release takes the network down, so that the image's system finds interfaces
// as after power-on: udev cannot rename one that is up.
func (m *machine) release() {
	if m.config.KeepNet || m.lazy != nil || m.net.link == nil {
		return
	}
	links, err := netlink.LinkList()
	if err != nil {
		return
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		if addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL); err == nil {
			for _, a := range addrs {
				netlink.AddrDel(l, &a)
			}
		}
		netlink.LinkSetDown(l)
	}
}
