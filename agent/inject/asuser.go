package inject

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asUser runs f with the filesystem identity of the user and of no other
// group: every permission is checked as for that user, and root's power over
// files is gone. f must stay on the goroutine it is called on.
//
// The identity is the thread's, set by raw system calls; the thread is never
// used again. Only the filesystem user changes: real and effective ids stay
// root's, so that the user can neither signal nor trace the thread.
func asUser(uid, gid int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Locked and not unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := becomeOnFiles(uid, gid); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func becomeOnFiles(uid, gid int) error {
	groups := [1]uint32{uint32(gid)}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&groups)), 0); errno != 0 {
		return fmt.Errorf("becoming user %d: setgroups: %w", uid, errno)
	}
	// Both calls answer the previous id and report no failure: asking again
	// with an impossible id tells what holds now.
	unix.RawSyscall(unix.SYS_SETFSGID, uintptr(gid), 0, 0)
	unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
	nowGID, _, _ := unix.RawSyscall(unix.SYS_SETFSGID, ^uintptr(0), 0, 0)
	nowUID, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, ^uintptr(0), 0, 0)
	if uint32(nowUID) != uint32(uid) || uint32(nowGID) != uint32(gid) {
		return fmt.Errorf("becoming user %d, group %d for file access: the kernel says %d, %d", uid, gid, nowUID, nowGID)
	}
	return nil
}
