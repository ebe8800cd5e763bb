package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/internal/serving"
)

// Listen is a place to listen at.
type Listen struct {
	// Name is what records call the listener; default: Interface, else Address.
	Name string
	// Address is "HOST:PORT". IPv6 addresses stand in brackets.
	Address string
	// Interface, if given, is the only one that requests are taken from
	// (SO_BINDTODEVICE); the address need not be there yet.
	Interface string
}

// ParseListen reads "[NAME=]HOST[:PORT][@INTERFACE]". The port is 80 if not given.
func ParseListen(s string) (Listen, error) {
	var l Listen
	rest := s
	if name, after, ok := strings.Cut(rest, "="); ok {
		l.Name, rest = name, after
		if name == "" {
			return l, fmt.Errorf("listener %q: the name before '=' is empty", s)
		}
	}
	rest, l.Interface, _ = strings.Cut(rest, "@")
	if strings.HasSuffix(s, "@") || len(l.Interface) >= unix.IFNAMSIZ {
		return l, fmt.Errorf("listener %q: %q is not an interface", s, l.Interface)
	}
	if a, err := netip.ParseAddr(strings.Trim(rest, "[]")); err == nil {
		l.Address = netip.AddrPortFrom(a, 80).String()
	} else if p, err := netip.ParseAddrPort(rest); err == nil {
		l.Address = p.String()
	} else {
		return l, fmt.Errorf("listener %q: %q is not ADDRESS or ADDRESS:PORT, as 169.254.169.254:80 or [fd00:ec2::254]:80", s, rest)
	}
	if l.Name == "" {
		l.Name = l.Interface
	}
	if l.Name == "" {
		l.Name = l.Address
	}
	return l, nil
}

// open listens.
func (l Listen) open(ctx context.Context) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		if l.Interface == "" {
			return nil
		}
		var serr error
		err := c.Control(func(fd uintptr) {
			serr = unix.BindToDevice(int(fd), l.Interface)
			if network == "tcp6" {
				serr = errors.Join(serr, unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1))
			} else {
				serr = errors.Join(serr, unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1))
			}
		})
		return errors.Join(err, serr)
	}}
	network := "tcp"
	if a, err := netip.ParseAddrPort(l.Address); err == nil && a.Addr().Is4() {
		network = "tcp4" // 0.0.0.0 means IPv4 alone
	}
	ln, err := lc.Listen(ctx, network, l.Address)
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		host, _, _ := net.SplitHostPort(l.Address)
		return nil, fmt.Errorf("listening at %s: no interface has the address: run 'ip address add %s dev lo', or name the interface after an '@': %w", l.Address, host, err)
	case errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("listening at %s: there is no interface %s: %w", l.Address, l.Interface, err)
	case err != nil:
		return nil, fmt.Errorf("listening at %s: %w", l.Address, err)
	}
	return ln, nil
}

// activated returns the sockets that systemd hands over, named as in their
// unit, and takes them out of the environment.
func activated() ([]net.Listener, []Listen, error) {
	given, err := serving.Activated("tcp")
	if err != nil {
		return nil, nil, err
	}
	var lns []net.Listener
	var specs []Listen
	for _, g := range given {
		spec := Listen{Name: g.Name, Address: g.Addr().String()}
		raw, err := g.Listener.(syscall.Conn).SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) {
				// BindToDevice= of the unit; none gives "".
				dev, derr := unix.GetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
				if derr == nil {
					spec.Interface = dev
				}
			})
		}
		lns, specs = append(lns, g.Listener), append(specs, spec)
		if err != nil {
			return lns, nil, fmt.Errorf("taking systemd's sockets: %w", err)
		}
	}
	return lns, specs, nil
}
