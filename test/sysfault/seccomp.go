package sysfault

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// helperEnv marks the test binary run as the helper that becomes the program.
const helperEnv = "INSTAR_SYSFAULT"

// The structures and requests of linux/seccomp.h.
type notification struct {
	id   uint64
	pid  uint32
	_    uint32 // flags
	nr   int32
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

const (
	setModeFilter = 1
	newListener   = 1 << 3
	flagContinue  = 1
	retAllow      = 0x7fff0000
	retNotify     = 0x7fc00000
	notifRecv     = 0xc0502100
	notifSend     = 0xc0182101
)

func ioctl[T notification | response](fd int, request uintptr, arg *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// Helper must be the first call of TestMain in packages that use [Run]. In the
// test's own process it does nothing; in the helper process it does not return.
func Helper() {
	if os.Getenv(helperEnv) == "" {
		return
	}
	fmt.Fprintln(os.Stderr, "sysfault:", become(os.Args[1:]))
	os.Exit(125)
}

// become installs the filter on this thread, passes its listener to the test by
// the socket that is file 3, and replaces the process by the program.
func become(argv []string) error {
	program, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return s == helperEnv+"=1" })
	runtime.LockOSThread()
	filter := filter()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, newListener, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(fd)), nil, 0); err != nil {
		return fmt.Errorf("passing the listener: %w", err)
	}
	unix.CloseOnExec(3)
	return syscall.Exec(program, argv, env)
}

// filter notifies of the calls in [calls]; of openat only when it may create or
// truncate.
func filter() []unix.SockFilter {
	const offNr, offArg2 = 0, 16 + 2*8
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(code uint16, k uint32, jt, jf uint8) unix.SockFilter {
		return unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k}
	}
	f := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offNr),
		jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.SYS_OPENAT, 0, 4),
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offArg2),
		jump(unix.BPF_JMP|unix.BPF_JSET|unix.BPF_K, unix.O_CREAT|unix.O_TRUNC|unix.O_TMPFILE&^unix.O_DIRECTORY, 0, 1),
		stmt(unix.BPF_RET|unix.BPF_K, retNotify),
		stmt(unix.BPF_RET|unix.BPF_K, retAllow),
	}
	for nr := range calls {
		f = append(f,
			jump(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, uint32(nr), 0, 1),
			stmt(unix.BPF_RET|unix.BPF_K, retNotify))
	}
	return append(f, stmt(unix.BPF_RET|unix.BPF_K, retAllow))
}

// receive takes the listener from the helper.
func receive(socket int) (int, error) {
	buf, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(socket, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("receiving the listener: %w", err)
	}
	if n == 0 {
		return -1, errors.New("the helper ended before it passed the listener")
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return -1, err
	}
	if len(msgs) != 1 {
		return -1, errors.New("the helper passed no listener")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}
