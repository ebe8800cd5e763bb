// Package netkeep keeps an interface as it is while the root depends on it.
//
// The image's own system takes the interface over while it boots, in its own
// way: some network managers begin by removing what they did not set up, and at
// a shutdown most remove all. Whoever does that may need the root for its next
// step, and the root needs the network. So what is removed is put back, as long
// as nothing else is in its place.
//
// In go a [State], taken while all was well; what changes is that interface's
// addresses and routes, and whether it is up. The interface is known by its
// number, whatever it is called.
package netkeep

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// State is what an interface has. It goes through JSON.
type State struct {
	Index  int
	MTU    int
	Addrs  []Addr
	Routes []Route
}

// Addr is an address with its prefix length, in CIDR's form.
type Addr struct{ CIDR string }

// Route is a route of the main table. Empty Dst is the default route of the
// gateway's family.
type Route struct {
	Dst, Gateway string
	Scope        int
	Flags        int
	IPv6         bool
}

// Take reads an interface's state: global addresses, and routes that somebody
// made and not the kernel.
func Take(link netlink.Link) (State, error) {
	a := link.Attrs()
	s := State{Index: a.Index, MTU: a.MTU}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := netlink.AddrList(link, family)
		if err != nil {
			return State{}, fmt.Errorf("reading the addresses of %s: %w", a.Name, err)
		}
		for _, addr := range addrs {
			if addr.IP.IsGlobalUnicast() {
				s.Addrs = append(s.Addrs, Addr{addr.IPNet.String()})
			}
		}
		routes, err := netlink.RouteList(link, family)
		if err != nil {
			return State{}, fmt.Errorf("reading the routes of %s: %w", a.Name, err)
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_KERNEL || r.Table != unix.RT_TABLE_MAIN || r.Type != unix.RTN_UNICAST || len(r.MultiPath) > 0 {
				continue
			}
			route := Route{Scope: int(r.Scope), Flags: r.Flags & int(netlink.FLAG_ONLINK), IPv6: family == netlink.FAMILY_V6}
			if r.Dst != nil && !isDefault(r.Dst) {
				route.Dst = r.Dst.String()
			}
			if r.Gw != nil {
				route.Gateway = r.Gw.String()
			}
			s.Routes = append(s.Routes, route)
		}
	}
	return s, nil
}

func isDefault(n *net.IPNet) bool {
	ones, _ := n.Mask.Size()
	return ones == 0
}

// downFor is how long the interface may be down before it is set up: who gives
// it another name takes it down for a moment.
const downFor = time.Second

// Restore puts back what is missing and tells what that was. A default route
// is not missing while there is any of its family; the interface is set up at
// once.
func (s State) Restore() (done []string, err error) {
	link, err := netlink.LinkByIndex(s.Index)
	if err != nil {
		return nil, fmt.Errorf("the interface of the root is gone: %w", err)
	}
	var errs []error
	put := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("putting back %s of %s: %w", what, link.Attrs().Name, err))
			return
		}
		done = append(done, what)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		put("that it is up", netlink.LinkSetUp(link))
	}
	have := make(map[string]bool)
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return done, err
	}
	for _, a := range addrs {
		have[a.IP.String()] = true
	}
	for _, a := range s.Addrs {
		addr, err := netlink.ParseAddr(a.CIDR)
		if err != nil {
			return done, err
		}
		if have[addr.IP.String()] {
			continue
		}
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		put("address "+a.CIDR, netlink.AddrReplace(link, addr))
	}
	for _, r := range s.Routes {
		there, err := r.there(s.Index)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if there {
			continue
		}
		route, err := r.netlink(s.Index)
		if err != nil {
			return done, err
		}
		put("route "+r.String(), netlink.RouteReplace(route))
	}
	return done, errors.Join(errs...)
}

func (r Route) String() string {
	s := r.Dst
	if s == "" {
		s = "default"
	}
	if r.Gateway != "" {
		s += " via " + r.Gateway
	}
	return s
}

func (r Route) family() int {
	if r.IPv6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// there tells whether the route, or one in its place, exists.
func (r Route) there(index int) (bool, error) {
	list, err := netlink.RouteList(nil, r.family())
	if err != nil {
		return false, err
	}
	for _, o := range list {
		if o.Table != unix.RT_TABLE_MAIN && o.Table != 0 {
			continue
		}
		if r.Dst == "" && (o.Dst == nil || isDefault(o.Dst)) {
			return true, nil
		}
		if o.Dst != nil && o.Dst.String() == r.Dst && o.LinkIndex == index {
			return true, nil
		}
	}
	return false, nil
}

func (r Route) netlink(index int) (*netlink.Route, error) {
	out := &netlink.Route{LinkIndex: index, Scope: netlink.Scope(r.Scope), Flags: r.Flags, Family: r.family()}
	if r.Dst != "" {
		_, dst, err := net.ParseCIDR(r.Dst)
		if err != nil {
			return nil, err
		}
		out.Dst = dst
	}
	if r.Gateway != "" {
		if out.Gw = net.ParseIP(r.Gateway); out.Gw == nil {
			return nil, fmt.Errorf("gateway %q is no address", r.Gateway)
		}
	}
	return out, nil
}

// settle is how long a change is let go on before it is looked at.
const settle = 20 * time.Millisecond

// Keep keeps the state until ctx ends. say is told what was put back.
func (s State) Keep(ctx context.Context, say func(format string, args ...any)) error {
	changes := make(chan struct{}, 1)
	if err := watch(ctx, changes); err != nil {
		return fmt.Errorf("watching the root's interface: %w", err)
	}
	var down time.Time // since when it is
	pause := settle
	for {
		link, err := netlink.LinkByIndex(s.Index)
		wait := time.Duration(0)
		switch {
		case err != nil:
			down = time.Time{}
		case link.Attrs().Flags&net.FlagUp == 0 && down.IsZero():
			down = time.Now()
			wait = downFor
		case link.Attrs().Flags&net.FlagUp == 0 && time.Since(down) < downFor:
			wait = downFor - time.Since(down)
		default:
			down = time.Time{}
			done, err := s.Restore()
			for _, what := range done {
				say("the root needs %s: put back %s", link.Attrs().Name, what)
			}
			if err != nil {
				say("warning: %v", err)
			}
			// Who removes it again and again is not fought without end.
			if len(done) > 0 || err != nil {
				pause = min(2*pause, 2*time.Second)
				wait = pause
			} else {
				pause = settle
			}
		}
		var again <-chan time.Time
		if wait > 0 {
			again = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again:
		case <-changes:
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(pause):
			}
		}
	}
}

// watch says on changes that something of the network changed.
func watch(ctx context.Context, changes chan<- struct{}) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV6_ROUTE
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return err
	}
	// A reader that looks up now and then whether it is still wanted.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		unix.Close(fd)
		return err
	}
	go func() {
		defer unix.Close(fd)
		buf := make([]byte, 32<<10)
		for ctx.Err() == nil {
			// What it says is not looked at, nor whether some of it was lost.
			_, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
					continue
				}
				return
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return nil
}
