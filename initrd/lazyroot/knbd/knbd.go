// Package knbd makes a block device of a socket, by Linux's nbd driver: the
// kernel sends the transmission phase's requests of the NBD protocol to it, and
// whoever holds the other end answers them.
//
// In go a socket's end and what the device is to be; what changes is the
// kernel's /dev/nbdN. It is asked by generic netlink (<linux/nbd-netlink.h>),
// without a handshake and without a process that waits in the kernel.
package knbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Flags of the NBD protocol that the kernel's client understands.
const (
	FlagHasFlags = 1 << 0 // always
	FlagReadOnly = 1 << 1
	FlagFlush    = 1 << 2
	FlagFUA      = 1 << 3
	FlagTrim     = 1 << 5
)

// Commands and attributes of nbd-netlink.h.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDeadConn    = 8

	sockItem = 1
	sockFD   = 1

	destroyOnDisconnect = 1 << 0
)

// Config is what a device is to be.
type Config struct {
	Index     int   // N of /dev/nbdN, which is made if it is not there
	Size      int64 // bytes, a multiple of BlockSize
	BlockSize int   // logical, 512 to 4096
	Flags     uint64
	// DeadFor is how long requests wait for [Reconnect] when the server is
	// gone, before they fail; whole seconds.
	DeadFor time.Duration
}

// Pair makes a connected pair of sockets: one for the kernel, one for the
// server.
func Pair() (kernel, server *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a pair of sockets: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "nbd client"), os.NewFile(uintptr(fds[1]), "nbd server"), nil
}

// Connect makes the device. The kernel holds the socket from then on. The
// device goes away by itself after [Disconnect].
func Connect(kernel *os.File, c Config) error {
	err := ask(cmdConnect, c.Index, func(r *nl.NetlinkRequest) {
		put(r, attrSize, uint64(c.Size))
		put(r, attrBlockSize, uint64(c.BlockSize))
		put(r, attrServerFlags, FlagHasFlags|c.Flags)
		put(r, attrClientFlags, destroyOnDisconnect)
		put(r, attrDeadConn, uint64(c.DeadFor/time.Second))
		sockets(r, kernel)
	})
	if err != nil {
		return fmt.Errorf("connecting nbd%d: %w", c.Index, err)
	}
	return nil
}

// Reconnect gives the device another socket in place of the one whose other end
// was closed. Requests that were not answered are sent again, those already
// under way when the kernel's timer for them ends: see [SetTimer].
// [unix.ENOSPC] is wrapped while the kernel has not yet seen the old one end.
func Reconnect(kernel *os.File, index int) error {
	if err := ask(cmdReconfigure, index, func(r *nl.NetlinkRequest) { sockets(r, kernel) }); err != nil {
		return fmt.Errorf("reconnecting nbd%d: %w", index, err)
	}
	return nil
}

// Disconnect ends the device: the server gets a request to disconnect. Nobody
// may use the device any more.
func Disconnect(index int) error {
	if err := ask(cmdDisconnect, index, func(*nl.NetlinkRequest) {}); err != nil {
		return fmt.Errorf("disconnecting nbd%d: %w", index, err)
	}
	return nil
}

// Hurry changes how long requests wait: new ones for [Reconnect] when the server
// is gone ([Config.DeadFor]), and those under way for their answer until they
// take the connection for dead and are sent again; that is 0 for ever, as it is after
// [Connect], and sets the timer of [SetTimer] too. Whole seconds.
func Hurry(index int, deadFor, answer time.Duration) error {
	err := ask(cmdReconfigure, index, func(r *nl.NetlinkRequest) {
		put(r, attrTimeout, uint64(answer/time.Second))
		put(r, attrDeadConn, uint64(deadFor/time.Second))
	})
	if err != nil {
		return fmt.Errorf("changing how long nbd%d waits for its server: %w", index, err)
	}
	return nil
}

// SetTimer sets after how long the kernel looks after an unanswered request,
// and again and again: one whose connection was replaced is then sent anew, of
// another it logs that it may be stuck. The kernel's default is 30 s. From Linux
// 6.11 on it returns when no request is under way any more, and holds new ones
// back until then: it is for a device that nobody uses yet.
func SetTimer(sys string, index int, d time.Duration) error {
	name := fmt.Sprintf("%s/block/nbd%d/queue/io_timeout", sys, index)
	return os.WriteFile(name, fmt.Appendf(nil, "%d", d.Milliseconds()), 0)
}

func ask(cmd uint8, index int, more func(*nl.NetlinkRequest)) error {
	family, err := netlink.GenlFamilyGet("nbd")
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = errors.New("the kernel has no nbd: is its module loaded?")
		}
		return err
	}
	r := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	r.AddData(&nl.Genlmsg{Command: cmd, Version: 1})
	r.AddData(nl.NewRtAttr(attrIndex, binary.NativeEndian.AppendUint32(nil, uint32(index))))
	more(r)
	_, err = r.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

func put(r *nl.NetlinkRequest, attr int, v uint64) {
	r.AddData(nl.NewRtAttr(attr, binary.NativeEndian.AppendUint64(nil, v)))
}

func sockets(r *nl.NetlinkRequest, f *os.File) {
	list := nl.NewRtAttr(unix.NLA_F_NESTED|attrSockets, nil)
	list.AddRtAttr(unix.NLA_F_NESTED|sockItem, nil).AddRtAttr(sockFD, binary.NativeEndian.AppendUint32(nil, uint32(f.Fd())))
	r.AddData(list)
}
