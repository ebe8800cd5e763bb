package boot

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
)

// TraceFile is where a boot with instar.trace=record leaves what it read: a JSON
// object whose member ranges lists pairs of position and length.
const TraceFile = "/run/instar/trace.json"

// recorder notes what of the image is read, in the order of its first reading.
type recorder struct {
	f *os.File // opened while it could be

	mu     sync.Mutex
	seen   []uint64 // a bit for each block of the image
	ranges [][2]int64
	size   int64
	done   bool
}

// newRecorder opens a file for a trace of an image of size bytes.
func newRecorder(name string, size int64) (*recorder, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	blocks := (size + lazyroot.Block - 1) / lazyroot.Block
	return &recorder{f: f, seen: make([]uint64, (blocks+63)/64), size: size}, nil
}

// read notes a reading.
func (r *recorder) read(off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done {
		return
	}
	end := min(off+n, r.size)
	for at := off / lazyroot.Block * lazyroot.Block; at < end; at += lazyroot.Block {
		b := at / lazyroot.Block
		if r.seen[b/64]&(1<<(b%64)) != 0 {
			continue
		}
		r.seen[b/64] |= 1 << (b % 64)
		length := min(lazyroot.Block, r.size-at)
		if last := len(r.ranges) - 1; last >= 0 && r.ranges[last][0]+r.ranges[last][1] == at {
			r.ranges[last][1] += length
			continue
		}
		if len(r.ranges) == chunked.MaxRanges {
			r.done = true
			return
		}
		r.ranges = append(r.ranges, [2]int64{at, length})
	}
}

// after writes what was read when it was recorded for so long.
func (r *recorder) after(ctx context.Context, d time.Duration, say func(string, ...any)) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(d):
	}
	n, err := r.write()
	if err != nil {
		say("warning: %v", err)
		return
	}
	say("root: what the boot read is in %s: %d ranges", TraceFile, n)
}

// write ends the recording and writes it.
func (r *recorder) write() (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done = true
	text, err := json.Marshal(map[string][][2]int64{"ranges": r.ranges})
	if err == nil {
		_, err = r.f.Write(append(text, '\n'))
	}
	if cerr := r.f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return 0, fmt.Errorf("writing what the boot read: %w", err)
	}
	return len(r.ranges), nil
}
