package main

import (
	"os"
	"strconv"
	"strings"
	"unsafe"
)

// hideSecrets overwrites secrets among the program's arguments, so that ps(1)
// and /proc/PID/cmdline no longer show them. The runtime's strings are the
// kernel's memory for the arguments; the program works on copies (see main).
// Where the kernel does not say that an argument lies there, it stays.
func hideSecrets(secrets ...string) {
	from, to := argumentMemory()
	for _, s := range secrets {
		if s == "" {
			continue
		}
		for _, arg := range os.Args[min(1, len(os.Args)):] {
			i := strings.Index(arg, s)
			at := uintptr(unsafe.Pointer(unsafe.StringData(arg)))
			if i < 0 || at < from || at+uintptr(len(arg)) > to {
				continue
			}
			b := unsafe.Slice(unsafe.StringData(arg), len(arg))
			for j := range s {
				b[i+j] = 'x'
			}
		}
	}
}

// argumentMemory is where this process's arguments lie, by arg_start and
// arg_end of proc_pid_stat(5); 0, 0 when that cannot be told.
func argumentMemory() (from, to uintptr) {
	data, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return 0, 0
	}
	_, rest, ok := strings.Cut(string(data), ") ") // after the name, which may hold anything
	fields := strings.Fields(rest)
	const start, end = 48 - 3, 49 - 3 // the first field here is the third
	if !ok || len(fields) <= end {
		return 0, 0
	}
	a, errA := strconv.ParseUint(fields[start], 10, 64)
	b, errB := strconv.ParseUint(fields[end], 10, 64)
	if errA != nil || errB != nil {
		return 0, 0
	}
	return uintptr(a), uintptr(b)
}
