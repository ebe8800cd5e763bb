package launch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// QEMU's router makes each connection of the guest one of QEMU's own, from this
// machine's network. So that the guest finds metadata at its usual address
// without this machine having that address, and finds there its own and never
// this machine's, QEMU's calls of connect(2) are answered by seccomp's user
// notification (seccomp_unotify(2)): for that address the socket is exchanged
// for one end of a pair, whose other end the metadata server serves. No
// privilege is needed, no port is open to other users of this machine, and all
// other connections are QEMU's own as before.

// Where the guest finds metadata.
var (
	metadataAddress  = netip.MustParseAddrPort("169.254.169.254:80")
	metadataAddress6 = netip.MustParseAddrPort("[fd00:ec2::254]:80")
)

// The structures and the request of linux/seccomp.h that x/sys lacks.
type notification struct {
	id   uint64
	pid  uint32
	_    uint32 // flags
	_    int32  // number
	_    uint32 // architecture
	_    uint64 // instruction pointer
	args [6]uint64
}

type response struct {
	id    uint64
	_     int64 // value to return
	errno int32
	flags uint32
}

type addFD struct {
	id           uint64
	flags        uint32
	source       uint32
	target       uint32
	targetOFlags uint32
}

const (
	notifAddFD = 0x40182103
	goOn       = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE
)

func ioctl[T notification | response | addFD](fd int, request uintptr, arg *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// filterConnect has connect(2) of this thread, and of the programs it starts,
// answered through the descriptor it returns.
func filterConnect() (int, error) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("no_new_privs: %w", err)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_CONNECT, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

// process is a started program.
type process struct {
	ended    chan error
	listener int // -1: connections are not redirected, for the reason refused
	refused  error
}

// start starts the program that build makes, told whether its connections are
// redirected. It is killed when this process ends, however that ends.
func start(build func(redirected bool) *exec.Cmd) (*process, error) {
	p := &process{ended: make(chan error, 1)}
	started := make(chan error, 1)
	go func() {
		// The filter is the thread's, and so is the tie between the two
		// processes: the thread waits for the program and is not used again.
		runtime.LockOSThread()
		p.listener, p.refused = filterConnect()
		cmd := build(p.refused == nil)
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		err := cmd.Start()
		started <- err
		if err == nil {
			p.ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		if p.listener >= 0 {
			unix.Close(p.listener)
		}
		return nil, err
	}
	return p, nil
}

// redirect answers the program's connections until ctx ends; those to the
// metadata address are accepted by accepted.
func (p *process) redirect(ctx context.Context, accepted *pairs) error {
	defer unix.Close(p.listener)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(wake)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-stopped
		}
	}()
	for {
		fds := []unix.PollFd{{Fd: int32(p.listener), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if fds[1].Revents != 0 || fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 {
			return nil
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			continue
		}
		var n notification
		if err := ioctl(p.listener, unix.SECCOMP_IOCTL_NOTIF_RECV, &n); err != nil {
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
				continue // the caller is gone
			}
			return err
		}
		r := p.answer(&n, accepted)
		if err := ioctl(p.listener, unix.SECCOMP_IOCTL_NOTIF_SEND, &r); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
}

// answer decides on one call of connect(2).
func (p *process) answer(n *notification, accepted *pairs) response {
	r := response{id: n.id}
	to, ok := destination(n)
	if !ok || to != metadataAddress && to != metadataAddress6 {
		r.flags = goOn
		return r
	}
	if err := p.exchange(n, accepted); err != nil {
		r.errno = -int32(unix.ENETUNREACH)
	}
	return r
}

// destination reads the address that connect(2) was called with.
func destination(n *notification) (netip.AddrPort, bool) {
	b := make([]byte, unix.SizeofSockaddrInet6)
	size := min(n.args[2], uint64(len(b)))
	if size < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}, false
	}
	b = b[:size]
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	got, err := unix.ProcessVMReadv(int(n.pid), local, []unix.RemoteIovec{{Base: uintptr(n.args[1]), Len: len(b)}}, 0)
	if err != nil || got != len(b) {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port), true
	case unix.AF_INET6:
		if len(b) < 24 {
			return netip.AddrPort{}, false
		}
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])).Unmap(), port), true
	}
	return netip.AddrPort{}, false
}

// exchange puts one end of a pair in place of the caller's socket.
func (p *process) exchange(n *notification, accepted *pairs) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pair[0])
	ours := os.NewFile(uintptr(pair[1]), "metadata")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return err
	}
	a := addFD{id: n.id, flags: unix.SECCOMP_ADDFD_FLAG_SETFD, source: uint32(pair[0]), target: uint32(n.args[0]), targetOFlags: unix.O_CLOEXEC}
	if err := ioctl(p.listener, notifAddFD, &a); err != nil {
		c.Close()
		return err
	}
	return accepted.put(c)
}

// pairs is a listener whose connections are given to it.
type pairs struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPairs() *pairs {
	return &pairs{conns: make(chan net.Conn, 16), closed: make(chan struct{})}
}

func (l *pairs) put(c net.Conn) error {
	select {
	case l.conns <- guestConn{c}:
		return nil
	case <-l.closed:
		return errors.Join(net.ErrClosed, c.Close())
	}
}

func (l *pairs) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pairs) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pairs) Addr() net.Addr { return net.TCPAddrFromAddrPort(metadataAddress) }

// guestConn is a connection of the guest: it counts as one of this machine, as
// QEMU's router would have made it.
type guestConn struct{ net.Conn }

func (guestConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(metadataAddress) }

func (guestConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 0} }
