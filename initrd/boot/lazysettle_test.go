package boot

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestRest: a disk is not begun to be filled beside a boot that computes, or that
// waits for the store, only beside a system that does neither for a while.
func TestRest(t *testing.T) {
	start := time.Unix(1000, 0)
	var ticks processorTime
	r := rest{since: start}
	second := 0
	// Each second the processors are idle for some of their 100 ticks.
	step := func(idle uint64, quiet time.Duration, known bool) bool {
		second++
		ticks.idle, ticks.all = ticks.idle+idle, ticks.all+100
		return r.look(start.Add(time.Duration(second)*time.Second), quiet, ticks, known)
	}
	for i := range 30 {
		if step(10, time.Minute, true) {
			t.Fatalf("a system that computes rests after %d s", i+1)
		}
	}
	for i := range 30 {
		if step(100, 0, true) {
			t.Fatalf("a system that waits for the disk rests after %d s", i+1)
		}
	}
	for i := range 4 {
		if step(90, time.Minute, true) {
			t.Fatalf("it rests after %d s", i+1)
		}
	}
	if step(10, time.Minute, true) {
		t.Error("it rests while it computes")
	}
	for i := 1; !step(50, time.Duration(i)*time.Second, true); i++ {
		if i > 5 {
			t.Fatal("a system that is half idle does not rest")
		}
	}
	r.since = start.Add(time.Duration(second) * time.Second)
	for i := 1; !step(0, time.Minute, false); i++ {
		if i > 5 {
			t.Fatal("a system of which no figures are known does not rest")
		}
	}
}

func TestProcessors(t *testing.T) {
	name := filepath.Join(t.TempDir(), "stat")
	for _, c := range []struct {
		text string
		want processorTime
		good bool
	}{
		{"cpu  3894 1 3500 1299 94 2 104 3 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n", processorTime{1393, 8897}, true},
		{"cpu  1 2 3\n", processorTime{}, false},
		{"intr 1 2 3 4 5 6 7 8\n", processorTime{}, false},
		{"", processorTime{}, false},
	} {
		check(t, os.WriteFile(name, []byte(c.text), 0o600))
		if got, err := processors(name); got != c.want || (err == nil) != c.good {
			t.Errorf("%q: %v, %v", c.text, got, err)
		}
	}
	if _, err := processors(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that is not there was read")
	}
	if now, err := processors("/proc/stat"); err != nil || now.all == 0 || now.idle > now.all {
		t.Errorf("this machine's: %v, %v", now, err)
	}
}
