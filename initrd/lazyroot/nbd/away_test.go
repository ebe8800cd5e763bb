package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

// counting is a device that counts what its reads hold.
type counting struct {
	*lazyroot.Device
	reads, bytes, most atomic.Int64
}

func (c *counting) ReadAt(ctx context.Context, p []byte, off int64) error {
	c.reads.Add(1)
	for now, most := c.bytes.Add(int64(len(p))), c.most.Load(); now > most && !c.most.CompareAndSwap(most, now); most = c.most.Load() {
	}
	defer c.reads.Add(-1)
	defer c.bytes.Add(-int64(len(p)))
	return c.Device.ReadAt(ctx, p, off)
}

// TestStoreAway has 1,000 reads and some writes wait for a store that is down:
// what is on the disk is read and written all the same, and when the store is there
// again they are answered, each with what is right.
func TestStoreAway(t *testing.T) {
	const size, chunk, length = 32 << 20, 64 << 10, 32 << 10
	data := bytes.Repeat([]byte("what the image has here, and there \n"), size/36+1)[:size]
	for i := 0; i < size; i += 4096 {
		binary.BigEndian.PutUint64(data[i:], uint64(i))
	}
	s := lazytest.FromBytes(t, data, chunk)
	away := lazytest.NewFlaky(s, 1)
	img, err := lazyroot.NewImage(s.Index, lazyroot.ImageOptions{
		Sources: []lazyroot.NamedSource{{Name: "store", Source: away}}, Pause: time.Millisecond, Patience: time.Hour,
	})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := lazyroot.Open(t.Context(), lazyroot.Options{Image: img, Disk: lazytest.NewDisk(size, ""), Volatile: true})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	// A part of it comes before.
	p := make([]byte, 1<<20)
	if err := dev.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	for !dev.Local(0, 1<<20, false) {
		time.Sleep(time.Millisecond) // who reads does not wait for the disk
	}
	away.Down.Store(true)

	d := &counting{Device: dev}
	a, b := net.Pipe()
	done := make(chan error, 1)
	o := Options{Requests: 64, Memory: 4 << 20}
	go func() { done <- ServeTransmission(t.Context(), b, d, o) }()
	c := &client{t: t, c: a}
	const many = 1000
	place := func(i int) uint64 { return uint64(4<<20 + i*24<<10) }
	for i := range many {
		c.send(cmdRead, 0, uint64(i), place(i), length, nil)
	}
	// Of these blocks a part is to stay as the image has it.
	const parts = 20
	part := func(i int) uint64 { return uint64(2<<20 + i*8192 + 100) }
	for i := range parts {
		c.send(cmdWrite, 0, uint64(many+i), part(i), 5, []byte("parts"))
	}
	for i := range 500 {
		off, cookie := uint64(i*1000), uint64(10_000+i)
		text := bytes.Repeat([]byte{byte(i)}, 900)
		c.send(cmdWrite, cmdFUA, cookie, off, uint32(len(text)), text)
		if errno, _ := c.reply(cookie, 0); errno != 0 {
			t.Fatalf("local write %d: %d", i, errno)
		}
		copy(data[off:], text)
		c.send(cmdRead, 0, cookie, off/4096*4096, 64<<10, nil)
		if errno, p := c.reply(cookie, 64<<10); errno != 0 || !bytes.Equal(p, data[off/4096*4096:][:64<<10]) {
			t.Fatalf("local read %d: %d", i, errno)
		}
	}
	// What replaces all of its blocks needs no store either.
	fresh := bytes.Repeat([]byte("new "), 1024)
	c.send(cmdWrite, 0, 20_000, 3<<20, 4096, fresh)
	if errno, _ := c.reply(20_000, 0); errno != 0 {
		t.Errorf("write of a block: %d", errno)
	}
	c.send(cmdWriteZeroes, 0, 20_001, 3<<20+4096, 8192, nil)
	if errno, _ := c.reply(20_001, 0); errno != 0 {
		t.Errorf("zeroes: %d", errno)
	}
	c.send(cmdFlush, 0, 20_002, 0, 0, nil)
	if errno, _ := c.reply(20_002, 0); errno != 0 {
		t.Errorf("flush: %d", errno)
	}
	copy(data[3<<20:], fresh)
	clear(data[3<<20+4096 : 3<<20+4096+8192])
	if n, most := d.reads.Load(), d.most.Load(); n == 0 || n > int64(o.Requests) || most > o.Memory {
		t.Errorf("%d reads are under way, they held up to %d bytes", n, most)
	}

	away.Down.Store(false)
	for range many + parts {
		head, err := readFull(a, 16)
		if err != nil {
			t.Fatal(err)
		}
		errno, cookie := binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint64(head[8:])
		if errno != 0 {
			t.Fatalf("request %d: %d", cookie, errno)
		}
		if cookie >= many {
			copy(data[part(int(cookie-many)):], "parts")
			continue
		}
		p, err := readFull(a, length)
		if err != nil || !bytes.Equal(p, data[place(int(cookie)):][:length]) {
			t.Fatalf("read %d: other bytes, %v", cookie, err)
		}
	}
	for i := range parts {
		off := part(i) / 4096 * 4096
		c.send(cmdRead, 0, 1, off, 4096, nil)
		if errno, p := c.reply(1, 4096); errno != 0 || !bytes.Equal(p, data[off:off+4096]) {
			t.Errorf("write %d of a part: %d", i, errno)
		}
	}
	c.send(cmdDisc, 0, 0, 0, 0, nil)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAwayEnds: what waits for its turn ends with the client, and with the context.
func TestAwayEnds(t *testing.T) {
	for _, client := range []bool{true, false} {
		s := lazytest.New(t, lazytest.Layout{Size: 1 << 20, Chunk: 64 << 10, Seed: 4})
		d := slow{device(t, s, lazytest.NewDisk(1<<20, "")), make(chan struct{})}
		a, b := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- ServeTransmission(ctx, b, d, Options{Requests: 2}) }()
		var wg sync.WaitGroup
		for i := range 100 {
			a.Write(encode(cmdRead, 0, uint64(i), 4096, 512, nil))
		}
		if client {
			a.Close()
		} else {
			wg.Go(func() { readFull(a, 1<<20) })
			cancel()
		}
		if err := <-done; (err != nil) != client {
			t.Errorf("by the client %v: %v", client, err)
		}
		a.Close()
		wg.Wait()
		cancel()
	}
}
