package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os/user"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/internal/serving"
)

// Role is what a caller may do; each includes those before it.
type Role int

// The roles.
const (
	Nobody Role = iota // may ask whether the agent is alive
	Viewer             // may look
	Admin              // may start, pause and cancel
)

func (r Role) String() string { return [...]string{"nobody", "viewer", "admin"}[r] }

// Policy says which role a caller has. Root, and the user the agent runs as,
// are Admin. Who may start a capture decides who can read it and as whom: an
// admin can read whatever the machine has.
type Policy struct {
	// AdminGroup and ViewGroup are names of groups; "" for none.
	AdminGroup, ViewGroup string

	// lookup finds a group's number, os/user's if nil.
	lookup func(name string) (uint32, error)
}

// peer is who is at the other end, by the kernel's word.
type peer struct {
	task.Caller
	groups []uint32 // all, the primary one among them
}

// role is what a peer may do. A group that does not exist gives nothing to anybody.
func (p Policy) role(q *peer, self uint32) Role {
	if q.UID == 0 || q.UID == self {
		return Admin
	}
	lookup := p.lookup
	if lookup == nil {
		lookup = groupNumber
	}
	in := func(name string) bool {
		if name == "" {
			return false
		}
		gid, err := lookup(name)
		return err == nil && slices.Contains(q.groups, gid)
	}
	switch {
	case in(p.AdminGroup):
		return Admin
	case in(p.ViewGroup):
		return Viewer
	}
	return Nobody
}

// groupNumber reads a group's number, which may be given as such.
func groupNumber(name string) (uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	return uint32(n), err
}

// maxGroups is the kernel's NGROUPS_MAX.
const maxGroups = 65536

// peerOf asks the kernel who connected. The answer is of the moment of
// connect(2) or, for a socket that systemd made, of the same.
func peerOf(c net.Conn) (*peer, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%T is no unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	var p peer
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		p.Caller = task.Caller{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}
		p.groups, err = peerGroups(fd)
		p.groups = append(p.groups, cred.Gid)
	})
	if err := errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("asking who connected: %w", err)
	}
	return &p, nil
}

// peerGroups is SO_PEERGROUPS of socket(7), Linux 4.13.
func peerGroups(fd uintptr) ([]uint32, error) {
	for n := 64; n <= maxGroups; n *= 4 {
		buf := make([]uint32, n)
		size := uint32(4 * n)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch errno {
		case 0:
			return buf[:size/4], nil
		case unix.ERANGE:
		default:
			return nil, errno
		}
	}
	return nil, unix.ERANGE
}

// peerKey is the context key of a connection's peer.
type peerKey struct{}

// Connections at once, so that no user keeps others out.
const (
	maxConns     = 256
	maxUserConns = 32 // of one user who is not root
)

// admit lets in who is known to the kernel, unless he has too many connections.
func (s *Server) admit(c net.Conn) net.Conn {
	p, err := peerOf(c)
	if err != nil {
		return nil
	}
	most, total := maxUserConns, maxConns
	if p.UID == 0 {
		most, total = math.MaxInt, math.MaxInt
	}
	if !s.crowd.Enter(p.UID, most, total) {
		return nil
	}
	return &peerConn{Conn: serving.OnClose(c, func() { s.crowd.Leave(p.UID) }), peer: p}
}

type peerConn struct {
	net.Conn
	peer *peer
}

func connContext(ctx context.Context, c net.Conn) context.Context {
	if p, ok := c.(*peerConn); ok {
		return context.WithValue(ctx, peerKey{}, p.peer)
	}
	return ctx
}
