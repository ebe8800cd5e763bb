package resident

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Who ends all processes of a system kills them a moment after asking them: see
// [Server.warned].

// maxInit is how much is read of one file that process 1 has mapped, in bytes.
const maxInit = 64 << 20

// ending is what the keeper knows of the system's end.
type ending struct {
	asked atomic.Pointer[time.Time] // when it was asked to end last
}

// role is how a server begins that goes on for another.
func (e *ending) role() string {
	switch asked := e.asked.Load(); {
	case asked == nil:
		return roleAgain
	case time.Since(*asked) < endingFor:
		return roleEnding
	}
	return roleCalm
}

// prepare prepares for the system's end each time that the keeper is asked to end.
func (e *ending) prepare() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGTERM)
	for range asked {
		now := time.Now()
		e.asked.Store(&now)
		// Each may wait for a store.
		go holdInit(".")
		unix.Sync()
		fmt.Fprintf(os.Stderr, "<5>instar: root: what was written is on the disk\n")
	}
}

// holdInit reads what process 1 has mapped, so that it is in memory when nobody
// serves the root any more: the kernel panics where process 1 cannot go on. proc is
// where /proc is seen. It is done as far as it goes.
func holdInit(proc string) (files int) {
	maps, err := os.Open(filepath.Join(proc, "1/maps"))
	if err != nil {
		return 0
	}
	defer maps.Close()
	seen := make(map[string]bool)
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		// ADDRESSES PERMISSIONS OFFSET DEVICE INODE NAME
		field := strings.Fields(lines.Text())
		if len(field) < 6 || field[4] == "0" || seen[field[3]+" "+field[4]] {
			continue
		}
		seen[field[3]+" "+field[4]] = true
		f, err := os.Open(filepath.Join(proc, "1/map_files", field[0]))
		if err != nil {
			continue
		}
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			if _, err := io.Copy(io.Discard, io.LimitReader(f, maxInit)); err == nil {
				files++
			}
		}
		f.Close()
	}
	return files
}
