package capture

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/instar-image/instar/bundle/filetree"
)

// slowDisk is a source of one file that takes its time for each read.
type slowDisk struct {
	data []byte
	each time.Duration
}

func (s slowDisk) Open(context.Context, filetree.ID) (filetree.File, error) { return slowFile{s}, nil }

type slowFile struct{ slowDisk }

func (f slowFile) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(f.each)
	return bytes.NewReader(f.data).ReadAt(p, off)
}
func (slowFile) Changed() (bool, error) { return false, nil }
func (slowFile) Close() error           { return nil }

// TestGentle: reading takes its share of the time and no more, however many
// read at once and at whatever speed the disk is; what is read stays the same.
func TestGentle(t *testing.T) {
	const reads = 8 // of gentleRead for each reader
	data := bytes.Repeat([]byte("0123456789abcde\n"), reads*gentleRead/16)
	for _, c := range []struct {
		percent, readers int
		each             time.Duration
	}{
		{25, 1, time.Millisecond},
		{25, 1, 100 * time.Microsecond},
		{25, 4, time.Millisecond},
		{1, 2, time.Millisecond},
		{99, 1, 10 * time.Millisecond},
		{50, 1, 3 * time.Second}, // more than is made up for
		{25, 3, 0},               // from memory
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGentle(slowDisk{data, c.each}, c.percent)
			begun := time.Now()
			var all sync.WaitGroup
			for range c.readers {
				all.Go(func() {
					f, err := g.Open(t.Context(), 0)
					if err != nil {
						t.Error(err)
						return
					}
					got := make([]byte, len(data))
					if n, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
						t.Errorf("%d bytes of %d: %v", n, len(data), err)
					}
				})
			}
			all.Wait()
			took := time.Since(begun)
			pause := min(time.Duration(float64(c.each)*g.pauses), gentleDebt)
			most := time.Duration(c.readers*reads) * (c.each + pause)
			least := time.Duration(c.readers*reads-c.readers)*pause - gentleLead - gentleNap // nobody waits after the last
			if took < least || took > most {
				t.Errorf("%d %%, %d readers, %v each: took %v, not %v to %v", c.percent, c.readers, c.each, took, least, most)
			}
		})
	}
}

// TestGentleEnds: who waits is let go with its context.
func TestGentleEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := errors.New("stopped")
		ctx, cancel := context.WithCancelCause(t.Context())
		g := newGentle(slowDisk{make([]byte, gentleRead), time.Second}, 1)
		f, err := g.Open(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, gentleRead)
		if _, err := f.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Millisecond, func() { cancel(stop) })
		if _, err := f.ReadAt(buf, 0); !errors.Is(err, stop) {
			t.Errorf("read: %v", err)
		}
		if _, err := g.Open(ctx, 0); !errors.Is(err, context.Canceled) && !errors.Is(err, stop) {
			t.Errorf("open: %v", err)
		}
	})
}
