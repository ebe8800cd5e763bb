package metadata

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// connection is what is known of the connection a request came on.
type connection struct {
	conn     net.Conn
	peer     netip.AddrPort
	listener string
	iface    string

	// The neighbour is looked up at most once a second: connections outlive
	// an address's change of owner.
	macAt  time.Time
	mac    string
	macErr error

	proven proven // of the requests, which come one after the other
}

type connKey struct{}

// ConnContext gives requests the connection they came on: who is at its other
// end, and the name of the listener and of the interface that it is bound to
// ("" if it has none). It is for http.Server's ConnContext.
func ConnContext(ctx context.Context, c net.Conn, listener, iface string) context.Context {
	k := &connection{conn: c, listener: listener, iface: iface}
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		p := a.AddrPort()
		k.peer = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	return context.WithValue(ctx, connKey{}, k)
}

// Owner returns the id of the instance that a connection from an address on a
// listener belongs to, by address and listener alone; "" if it is nobody's.
func (h *Handler) Owner(from netip.Addr, listener, iface string) string {
	if in := h.source.Instances().find(from, listener, iface, from.Zone()); in != nil {
		return in.ID
	}
	return ""
}

// identify finds the instance that calls, from the connection alone.
func (e *exchange) identify() bool {
	var listener, iface string
	if e.conn, _ = e.r.Context().Value(connKey{}).(*connection); e.conn != nil {
		e.rep.Caller, listener, iface = e.conn.peer, e.conn.listener, e.conn.iface
	} else if p, err := netip.ParseAddrPort(e.r.RemoteAddr); err == nil {
		e.rep.Caller = netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	e.rep.Listener = listener
	addr := e.rep.Caller.Addr()
	e.in = e.h.source.Instances().find(addr, listener, iface, addr.Zone())
	if e.in == nil {
		e.rep.Note = "no instance has this caller"
		return false
	}
	want := e.in.Caller.MAC
	if want == "" {
		return true
	}
	if got, err := e.neighbour(iface, addr); err != nil || got != want {
		e.rep.Note = "the caller's MAC address is not instance " + e.in.ID + "'s"
		if err != nil {
			e.rep.Note += ": " + err.Error()
		}
		e.in = nil
		return false
	}
	return true
}

func (e *exchange) neighbour(iface string, addr netip.Addr) (string, error) {
	if e.h.near == nil || e.conn == nil {
		return "", errors.New("the neighbour table cannot be asked")
	}
	if iface == "" {
		iface = addr.Zone()
	}
	c := e.conn // whose requests come one after the other
	if e.rep.Start.Sub(c.macAt) >= time.Second {
		c.mac, c.macErr = e.h.near.MAC(iface, addr.WithZone(""))
		c.macAt = e.rep.Start
	}
	return c.mac, c.macErr
}

// setHopLimit sets how many routers the connection's packets may pass, plus one.
func (c *connection) setHopLimit(n int) error {
	sc, ok := c.conn.(syscall.Conn)
	if !ok {
		return errors.New("not a connection of the kernel's")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		if c.peer.Addr().Is4() {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, n)
		} else {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, n)
		}
	})
	return errors.Join(err, serr)
}
