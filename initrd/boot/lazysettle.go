package boot

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// What is fetched beside a boot takes the line and the processor from it: the disk
// is filled when the system has come to rest. One that never does is not waited
// for long.
const (
	// bootPatience is how long the image's system may take to be started.
	bootPatience = 120 * time.Second
	// settleTime is how long a system that rests must have done so, and
	// settlePatience how long it is waited for.
	settleTime     = 5 * time.Second
	settlePatience = 5 * time.Minute
	look           = time.Second
)

// booted waits until the image's system runs: the initrd's init is then gone.
func booted(ctx context.Context) {
	for begun := time.Now(); time.Since(begun) < bootPatience; {
		if _, err := os.Stat("/init"); err != nil || !nap(ctx) {
			return
		}
	}
}

// settled waits until the system rests. quiet is how long it has asked nothing of
// the disk; stat is the file with the kernel's figures.
func settled(ctx context.Context, quiet func() time.Duration, stat string) {
	r := rest{since: time.Now()}
	for begun := time.Now(); time.Since(begun) < settlePatience && nap(ctx); {
		t, err := processors(stat)
		if r.look(time.Now(), quiet(), t, err == nil) {
			return
		}
	}
}

// rest is what a system was seen to do.
type rest struct {
	since  time.Time // it rests, as far as was seen
	before processorTime
}

// look tells whether a system has rested for long enough: it asked nothing of the
// disk, and half of its processors' time was idle, each time it was looked at. A
// boot is at work with one or the other. Without figures the disk alone tells.
func (r *rest) look(now time.Time, quiet time.Duration, t processorTime, known bool) bool {
	busy := known && 2*(t.idle-r.before.idle) < t.all-r.before.all
	if known {
		r.before = t
	}
	if busy || quiet < look {
		r.since = now
	}
	return now.Sub(r.since) >= settleTime
}

// nap tells whether ctx still lasts after a moment.
func nap(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(look):
		return true
	}
}

// processorTime is that of all processors since the machine was started, in ticks.
type processorTime struct{ idle, all uint64 }

// processors reads the first line of /proc/stat (proc_stat(5)): user, nice, system,
// idle, iowait, irq, softirq, steal; guests' time is in user's.
func processors(stat string) (t processorTime, err error) {
	data, err := os.ReadFile(stat)
	if err != nil {
		return t, err
	}
	line, _, _ := strings.Cut(string(data), "\n")
	name, figures, _ := strings.Cut(line, " ")
	var v [8]uint64
	n, err := fmt.Sscan(figures, &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7])
	if name != "cpu" {
		return t, fmt.Errorf("%s begins with %.20q, not with the time of all processors", stat, line)
	}
	if err != nil {
		return t, fmt.Errorf("%s has %d figures of 8: %w", stat, n, err)
	}
	for i, n := range v {
		if t.all += n; i == 3 || i == 4 {
			t.idle += n
		}
	}
	return t, nil
}
