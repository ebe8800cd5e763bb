// Package dm speaks to Linux's device mapper, as much of it as a root needs
// that moves from one device to another while it is in use: devices of linear
// targets, whose table is replaced between suspend and resume.
//
// In go an open control node and tables; what changes is the kernel's mapped
// devices. Nothing else is touched: device nodes and links are the caller's.
// The format is that of <linux/dm-ioctl.h>, version 4.
package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ControlPath is the control node, made by the kernel with the module dm_mod.
const ControlPath = "/dev/mapper/control"

// Sector is the unit of tables, in bytes.
const Sector = 512

// Limits of names and UUIDs, in bytes.
const (
	maxName = 127
	maxUUID = 128
)

// Commands of dm-ioctl.h, as numbers within its range of requests.
const (
	cmdCreate    = 3
	cmdRemove    = 4
	cmdSuspend   = 6
	cmdStatus    = 7
	cmdTableLoad = 9
	cmdTable     = 12
)

// Flags of dm-ioctl.h.
const (
	flagSuspend     = 1 << 1
	flagStatusTable = 1 << 4
	flagInactive    = 1 << 6
	flagSkipLockFS  = 1 << 10
	flagNoFlush     = 1 << 11
)

// headSize is sizeof(struct dm_ioctl), of which the last 7 bytes are padding.
const headSize = 312

// specSize is sizeof(struct dm_target_spec).
const specSize = 40

// Device is a mapped device's number.
type Device struct{ Major, Minor uint32 }

func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// Node is the name that the kernel gives the device below /dev and /sys/block.
func (d Device) Node() string { return fmt.Sprintf("dm-%d", d.Minor) }

// Linear maps Length bytes at Start of a mapped device to Offset of another
// device. All three are multiples of [Sector].
type Linear struct {
	Start, Length int64
	Target        Device
	Offset        int64
}

// Control is the device mapper. It may be used concurrently.
type Control struct{ f *os.File }

// New uses an open control node, which stays the caller's to close.
func New(control *os.File) *Control { return &Control{control} }

// Number is the number of the block device that f is an open node of.
func Number(f *os.File) (Device, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return Device{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Device{}, fmt.Errorf("%s is no block device", f.Name())
	}
	return Device{unix.Major(st.Rdev), unix.Minor(st.Rdev)}, nil
}

// Create makes a device without a table; it is suspended until the first
// [Control.Resume]. The UUID, which may be empty, is shown in sysfs: udev's
// rules know devices by its prefix.
func (c *Control) Create(name, uuid string) (Device, error) {
	if len(name) == 0 || len(name) > maxName || len(uuid) > maxUUID {
		return Device{}, fmt.Errorf("mapped device %q: the name has 1 to %d bytes, the UUID up to %d", name, maxName, maxUUID)
	}
	h, _, err := c.do(cmdCreate, header{name: name, uuid: uuid}, nil)
	if err != nil {
		return Device{}, fmt.Errorf("making the mapped device %s: %w", name, err)
	}
	return h.device, nil
}

// Load loads a table, which the next [Control.Resume] makes the device's. The
// targets' devices are claimed from now on: one that another has open
// exclusively is refused with EBUSY.
func (c *Control) Load(name string, table []Linear) error {
	data, err := encode(table)
	if err == nil {
		_, _, err = c.do(cmdTableLoad, header{name: name, targets: uint32(len(table))}, data)
	}
	if err != nil {
		return fmt.Errorf("loading a table for the mapped device %s: %w", name, err)
	}
	return nil
}

// Suspend ends when all requests that the device has passed on are answered;
// later ones wait for [Control.Resume]. Filesystems on it are not frozen: what
// they write waits too, and goes to where the next table says.
func (c *Control) Suspend(name string) error {
	if _, _, err := c.do(cmdSuspend, header{name: name, flags: flagSuspend | flagSkipLockFS | flagNoFlush}, nil); err != nil {
		return fmt.Errorf("suspending the mapped device %s: %w", name, err)
	}
	return nil
}

// Resume goes on, with the table that was loaded last.
func (c *Control) Resume(name string) error {
	if _, _, err := c.do(cmdSuspend, header{name: name}, nil); err != nil {
		return fmt.Errorf("resuming the mapped device %s: %w", name, err)
	}
	return nil
}

// Remove removes a device that nobody has open.
func (c *Control) Remove(name string) error {
	if _, _, err := c.do(cmdRemove, header{name: name}, nil); err != nil {
		return fmt.Errorf("removing the mapped device %s: %w", name, err)
	}
	return nil
}

// State is what the kernel knows of a device.
type State struct {
	Device    Device
	Open      int // how often it is open
	Suspended bool
	Loaded    bool // a table waits for Resume
}

// State asks for a device; [unix.ENXIO] is wrapped if there is none.
func (c *Control) State(name string) (State, error) {
	h, _, err := c.do(cmdStatus, header{name: name}, nil)
	if err != nil {
		return State{}, fmt.Errorf("asking for the mapped device %s: %w", name, err)
	}
	return State{h.device, int(h.open), h.flags&flagSuspend != 0, h.flags&flagInactive != 0}, nil
}

// Table is the device's table in use.
func (c *Control) Table(name string) ([]Linear, error) {
	h, data, err := c.do(cmdTable, header{name: name, flags: flagStatusTable}, make([]byte, 16<<10))
	var table []Linear
	if err == nil {
		table, err = decode(data, int(h.targets))
	}
	if err != nil {
		return nil, fmt.Errorf("reading the table of the mapped device %s: %w", name, err)
	}
	return table, nil
}

// header is struct dm_ioctl without what is always the same.
type header struct {
	name, uuid string
	flags      uint32
	targets    uint32
	open       int32
	device     Device
}

func (c *Control) do(cmd uintptr, h header, data []byte) (header, []byte, error) {
	b := make([]byte, headSize, headSize+len(data))
	le := binary.NativeEndian
	le.PutUint32(b[0:], 4) // version 4.0.0, the oldest that will do
	le.PutUint32(b[12:], uint32(headSize+len(data)))
	le.PutUint32(b[16:], headSize)
	le.PutUint32(b[20:], h.targets)
	le.PutUint32(b[28:], h.flags)
	copy(b[48:48+maxName], h.name)
	copy(b[176:176+maxUUID], h.uuid)
	b = append(b, data...)
	// _IOWR(0xfd, cmd, struct dm_ioctl)
	request := uintptr(3<<30 | headSize<<16 | 0xfd<<8 | cmd)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, c.f.Fd(), request, uintptr(unsafe.Pointer(&b[0])))
	if errno != 0 {
		return header{}, nil, errno
	}
	dev := le.Uint64(b[40:])
	out := header{
		flags: le.Uint32(b[28:]), targets: le.Uint32(b[20:]), open: int32(le.Uint32(b[24:])),
		device: Device{unix.Major(dev), unix.Minor(dev)},
	}
	return out, b[headSize:], nil
}

// encode makes the target specifications of a table, which has to be without
// gaps.
func encode(table []Linear) ([]byte, error) {
	if len(table) == 0 || len(table) > 1024 {
		return nil, fmt.Errorf("a table of %d targets: 1 to 1024 are possible", len(table))
	}
	var out []byte
	end := int64(0)
	for _, l := range table {
		if l.Start != end || l.Length <= 0 || l.Offset < 0 || (l.Start|l.Length|l.Offset)%Sector != 0 {
			return nil, fmt.Errorf("%d bytes at %d, from %d of %s: not sectors that follow each other", l.Length, l.Start, l.Offset, l.Target)
		}
		end += l.Length
		params := fmt.Sprintf("%s %d\x00", l.Target, l.Offset/Sector)
		size := (specSize + len(params) + 7) &^ 7
		spec := make([]byte, size)
		binary.NativeEndian.PutUint64(spec[0:], uint64(l.Start/Sector))
		binary.NativeEndian.PutUint64(spec[8:], uint64(l.Length/Sector))
		binary.NativeEndian.PutUint32(spec[20:], uint32(size))
		copy(spec[24:], "linear")
		copy(spec[specSize:], params)
		out = append(out, spec...)
	}
	return out, nil
}

var errTable = errors.New("the kernel's table is not one of linear targets")

// decode reads what a kernel says of a table. There, next counts from the
// first specification.
func decode(data []byte, targets int) ([]Linear, error) {
	var table []Linear
	at := 0
	for range targets {
		if at < 0 || at+specSize > len(data) {
			return nil, errTable
		}
		spec := data[at:]
		kind, _, _ := bytes.Cut(spec[24:specSize], []byte{0})
		params, _, ended := bytes.Cut(spec[specSize:], []byte{0})
		l := Linear{
			Start:  int64(binary.NativeEndian.Uint64(spec[0:])) * Sector,
			Length: int64(binary.NativeEndian.Uint64(spec[8:])) * Sector,
		}
		_, err := fmt.Sscanf(string(params), "%d:%d %d", &l.Target.Major, &l.Target.Minor, &l.Offset)
		if string(kind) != "linear" || !ended || err != nil {
			return nil, errTable
		}
		l.Offset *= Sector
		table = append(table, l)
		at = int(binary.NativeEndian.Uint32(spec[20:]))
	}
	return table, nil
}
