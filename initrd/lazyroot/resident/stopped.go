package resident

import (
	"fmt"
	"os"
	"os/signal"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// stoppedFor is how long one of these processes stays stopped.
const stoppedFor = time.Second

// sigevent is the kernel's struct sigevent, of 64 bytes (asm-generic/siginfo.h).
type sigevent struct {
	_      uint64
	signo  int32
	notify int32 // 0: SIGEV_SIGNAL, to the process
	_      [48]byte
}

// keepGoing lets nobody stop this process for longer than [stoppedFor]. Who ends all
// processes of a system stops them first, be they spared later or not (killall5 of
// sysvinit and kill_all of OpenRC do): what such a program then needs of the root
// would never come. The kernel continues a stopped process when a timer sends it
// SIGCONT.
func keepGoing() error {
	// Of a signal that means nothing to a process the kernel may send no second one.
	signal.Notify(make(chan os.Signal, 1), unix.SIGCONT)
	event := sigevent{signo: int32(unix.SIGCONT)}
	var id int32
	if _, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&id))); errno != 0 {
		return fmt.Errorf("making a timer: %w", errno)
	}
	each := unix.NsecToTimespec(stoppedFor.Nanoseconds())
	spec := unix.ItimerSpec{Interval: each, Value: each}
	if _, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("setting a timer: %w", errno)
	}
	return nil
}
