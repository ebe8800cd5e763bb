package task

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Limits are what a task may take of the machine. 0 is the default of
// [DefaultLimits], -1 no limit.
type Limits struct {
	// CPUWeight is the worker's share of CPUs that others want too, 1 to 10000;
	// what has no weight of its own has 100.
	CPUWeight int `json:"cpu-weight,omitempty" yaml:"cpu-weight"`
	// CPUQuota is in percent of one CPU.
	CPUQuota int `json:"cpu-quota,omitempty" yaml:"cpu-quota"`
	// IOWeight is the same for disks, where their scheduler knows weights.
	IOWeight int `json:"io-weight,omitempty" yaml:"io-weight"`
	// ReadShare is how much of the time the worker spends reading files, in percent.
	// It holds at any disk, and others' reads and writes hardly wait for it.
	ReadShare int `json:"read-share,omitempty" yaml:"read-share"`
	// ReadRate bounds reading from the volume's disk, in bytes a second.
	ReadRate int64 `json:"read-rate,omitempty" yaml:"read-rate"`
	// UploadRate bounds what is sent to the store, in bytes a second.
	UploadRate int64 `json:"upload-rate,omitempty" yaml:"upload-rate"`
	// Memory is where the kernel begins to reclaim the worker's, in bytes.
	Memory int64 `json:"memory,omitempty" yaml:"memory"`
	// Foreground keeps the worker out of the idle classes of CPU and disk, in
	// which it otherwise gets what nobody else wants.
	Foreground bool `json:"foreground,omitempty" yaml:"foreground"`
}

// DefaultLimits are those of a task for which nothing else is said: the worker
// gets what nobody else wants.
func DefaultLimits() Limits {
	return Limits{CPUWeight: 10, CPUQuota: -1, IOWeight: 10, ReadShare: 25, ReadRate: -1, UploadRate: -1, Memory: -1}
}

// Or fills what is not set from other limits.
func (l Limits) Or(o Limits) Limits {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set64 := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	set(&l.CPUWeight, o.CPUWeight)
	set(&l.CPUQuota, o.CPUQuota)
	set(&l.IOWeight, o.IOWeight)
	set(&l.ReadShare, o.ReadShare)
	set64(&l.ReadRate, o.ReadRate)
	set64(&l.UploadRate, o.UploadRate)
	set64(&l.Memory, o.Memory)
	l.Foreground = l.Foreground || o.Foreground
	return l
}

// Check reports a value out of range.
func (l Limits) Check() error {
	for _, w := range []struct {
		name string
		v    int64
		low  int64
		high int64
	}{
		{"cpu-weight", int64(l.CPUWeight), 1, 10000},
		{"cpu-quota", int64(l.CPUQuota), 1, 100 * 4096},
		{"io-weight", int64(l.IOWeight), 1, 10000},
		{"read-share", int64(l.ReadShare), 1, 100},
		{"read-rate", l.ReadRate, 64 << 10, 1 << 40},
		{"upload-rate", l.UploadRate, 16 << 10, 1 << 40},
		{"memory", l.Memory, 64 << 20, 1 << 50},
	} {
		if w.v != 0 && w.v != -1 && (w.v < w.low || w.v > w.high) {
			return fmt.Errorf("limits: %s %d: %d to %d, or -1 for no limit", w.name, w.v, w.low, w.high)
		}
	}
	return nil
}

// ioprioIdle is IOPRIO_CLASS_IDLE of ioprio_set(2), in its place.
const ioprioIdle = 3 << 13

// StepBack puts the calling process, all its threads, into the idle classes of
// CPU and disk: it then gets what nobody else wants. Systemd does so for units
// by itself; a worker that is a plain child does it at its start, before it has
// many threads.
func StepBack() error {
	const ioprioWhoProcess = 1
	seen := map[int]bool{}
	for again := true; again; { // a thread made meanwhile may be another's child
		again = false
		tids, err := threads()
		if err != nil {
			return fmt.Errorf("listing this process's threads: %w", err)
		}
		for _, tid := range tids {
			if seen[tid] {
				continue
			}
			seen[tid], again = true, true
			attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}
			if err := unix.SchedSetAttr(tid, &attr, 0); err != nil && err != unix.ESRCH {
				return fmt.Errorf("taking the CPU's idle class: %w", err)
			}
			if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, uintptr(tid), ioprioIdle); errno != 0 && errno != unix.ESRCH {
				return fmt.Errorf("taking the disk's idle class: %w", errno)
			}
		}
	}
	return nil
}
