package resident

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestHoldInit reads each file once that process 1 has mapped.
func TestHoldInit(t *testing.T) {
	proc := t.TempDir()
	if err := os.MkdirAll(filepath.Join(proc, "1/map_files"), 0o755); err != nil {
		t.Fatal(err)
	}
	if n := holdInit(proc); n != 0 {
		t.Errorf("%d files without maps", n)
	}
	const maps = `00400000-004c9000 r-xp 00000000 08:01 123 /bin/busybox
006c9000-006cb000 rw-p 000c9000 08:01 123 /bin/busybox
7f0000000000-7f0000001000 r-xp 00000000 08:01 124 /lib/a name with blanks.so
7f0000002000-7f0000003000 r-xp 00000000 08:01 125 /lib/gone.so (deleted)
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
7f0000006000-7f0000007000 rw-s 00000000 00:05 7 /dev/null
`
	for name, text := range map[string]string{
		"maps": maps, "map_files/00400000-004c9000": "program", "map_files/7f0000000000-7f0000001000": "library",
	} {
		if err := os.WriteFile(filepath.Join(proc, "1", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/dev/null", filepath.Join(proc, "1/map_files/7f0000006000-7f0000007000")); err != nil {
		t.Fatal(err)
	}
	if n := holdInit(proc); n != 2 {
		t.Errorf("%d files", n)
	}
}

// TestRole: a server that goes on for another is told whether the system ends.
func TestRole(t *testing.T) {
	var e ending
	if got := e.role(); got != roleAgain {
		t.Errorf("never asked: %s", got)
	}
	for ago, want := range map[time.Duration]string{0: roleEnding, endingFor / 2: roleEnding, endingFor + time.Second: roleCalm} {
		at := time.Now().Add(-ago)
		e.asked.Store(&at)
		if got := e.role(); got != want {
			t.Errorf("asked %v ago: %s, not %s", ago, got, want)
		}
	}
}
