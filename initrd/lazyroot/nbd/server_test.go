package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

func device(t testing.TB, s *lazytest.Store, disk lazyroot.Disk) *lazyroot.Device {
	t.Helper()
	img, err := lazyroot.NewImage(s.Index, lazyroot.ImageOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o := lazyroot.Options{Image: img, Disk: disk, Volatile: true}
	d, err := lazyroot.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// serve serves a device on a unix socket and gives its URI.
func serve(t testing.TB, d Device, o Options) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, d, o, func(err error) {
			if err != nil && !errors.Is(err, errGone) {
				t.Errorf("a connection: %v", err)
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "nbd+unix:///" + o.Name + "?socket=" + path
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestClients reads, writes and asks with the clients there are.
func TestClients(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 6<<20 + 4096, Chunk: 256 << 10, Holes: 5, Seed: 1})
	uri := serve(t, device(t, s, lazytest.NewDisk(6<<20+4096, "")), Options{Name: "root", Description: "a test", MultiConn: true})
	var info struct {
		Exports []struct {
			Size        int64  `json:"export-size"`
			Name        string `json:"export-name"`
			Description string
			Contexts    []string
			Multi       bool `json:"can_multi_conn"`
			FUA         bool `json:"can_fua"`
			ReadOnly    bool `json:"is_read_only"`
			Maximum     int  `json:"block_size_maximum"`
		}
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	e := info.Exports[0]
	if e.Size != int64(len(s.Data)) || e.Name != "root" || e.Description != "a test" || !e.Multi || !e.FUA || e.ReadOnly || e.Maximum != MaxRequest || strings.Join(e.Contexts, " ") != "base:allocation" {
		t.Errorf("%+v", e)
	}
	if out := run(t, "nbdinfo", "--list", uri); !strings.Contains(out, `export="root"`) {
		t.Error(out)
	}
	dir := t.TempDir()
	// Several connections at a time, holes by block status.
	run(t, "nbdcopy", uri, dir+"/copy")
	if b, err := os.ReadFile(dir + "/copy"); err != nil || !bytes.Equal(b, s.Data) {
		t.Errorf("nbdcopy: %v", err)
	}
	want := bytes.Clone(s.Data)
	edit := func(off, n int, b byte) {
		for i := range n {
			want[off+i] = b
		}
	}
	edit(5000, 70_000, 0x41)
	edit(1<<20, 2<<20, 0)
	edit(4<<20+512, 1024, 0)
	edit(6<<20, 4096, 0x5a)
	out := run(t, "qemu-io", "-f", "raw", "-t", "none", "-c", "write -P 0x41 5000 70000", "-c", "read -P 0x41 5000 70000", "-c", "discard 1M 2M",
		"-c", "read -P 0 1M 2M", "-c", "write -z 4194816 1024", "-c", "write -f -P 0x5a 6M 4k", "-c", "flush", "-c", "read -P 0x5a 6M 4k", uri)
	if strings.Contains(out, "failed") {
		t.Error(out)
	}
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, dir+"/convert")
	if b, err := os.ReadFile(dir + "/convert"); err != nil || !bytes.Equal(b, want) {
		t.Errorf("qemu-img convert: %v", err)
	}
	// What is written by a copy into it.
	fresh := bytes.Repeat([]byte("0123456789abcdef"), len(want)/16)
	if err := os.WriteFile(dir+"/fresh", fresh, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "nbdcopy", dir+"/fresh", uri)
	run(t, "nbdcopy", uri, dir+"/back")
	if b, err := os.ReadFile(dir + "/back"); err != nil || !bytes.Equal(b, fresh) {
		t.Errorf("nbdcopy back: %v", err)
	}
}

// TestReadOnly refuses writes.
func TestReadOnly(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 1 << 20, Chunk: 64 << 10, Holes: 2, Seed: 2})
	img, err := lazyroot.NewImage(s.Index, lazyroot.ImageOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := lazyroot.Open(t.Context(), lazyroot.Options{Image: img})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	uri := serve(t, d, Options{})
	if out := run(t, "nbdinfo", uri); !strings.Contains(out, "is_read_only: true") {
		t.Error(out)
	}
	if out := run(t, "nbdinfo", "--map", "--totals", uri); !strings.Contains(out, "zero") {
		t.Error(out)
	}
	if out := run(t, "qemu-io", "-r", "-f", "raw", "-c", "read 100k 4k", uri); !strings.Contains(out, "read 4096/4096") {
		t.Error(out)
	}
	c := connect(t, uri, optStructuredReply)
	for i, x := range []struct {
		command uint16
		off     uint64
		n       uint32
		data    []byte
		errno   uint32
	}{
		{cmdWrite, 0, 4, []byte("abcd"), 1},
		{cmdTrim, 0, 512, nil, 1},
		{cmdWriteZeroes, 0, 512, nil, 1},
		{cmdRead, 1 << 20, 1, nil, 22},
		{cmdRead, 512, 1 << 20, nil, 22},
		{cmdRead, 0, 64 << 20, nil, 75},
		{cmdRead, 0, 0, nil, 22},
		{cmdBlockStatus, 0, 512, nil, 22}, // not agreed on
		{cmdDisc + 90, 0, 0, nil, 22},
		{cmdRead, 1<<64 - 1, 2, nil, 22},
	} {
		c.send(x.command, 0, uint64(i), x.off, x.n, x.data)
		if kind, p := c.chunk(uint64(i)); kind != chunkError || binary.BigEndian.Uint32(p) != x.errno {
			t.Errorf("%d: a chunk %d, %x", i, kind, p)
		}
	}
	c.send(cmdRead, 0, 70, 100_000, 16, nil)
	if kind, p := c.chunk(70); kind != chunkData || !bytes.Equal(p[8:], s.Data[100_000:100_016]) {
		t.Errorf("a chunk %d, %x", kind, p)
	}
}

// broken is a device whose reads fail.
type broken struct{ *lazyroot.Device }

var errBroken = errors.New("chunk 12 is nowhere")

func (broken) ReadAt(context.Context, []byte, int64) error { return errBroken }

// TestErrorsAreTold: the reason of an error goes to clients that can hear it.
func TestErrorsAreTold(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 1 << 20, Chunk: 64 << 10, Seed: 3})
	uri := serve(t, broken{device(t, s, nil)}, Options{})
	c := connect(t, uri, optStructuredReply)
	c.send(cmdRead, 0, 1, 0, 512, nil)
	if kind, p := c.chunk(1); kind != chunkError || binary.BigEndian.Uint32(p) != 5 || string(p[6:]) != errBroken.Error() {
		t.Errorf("a chunk %d, %q", kind, p)
	}
	c = connect(t, uri)
	c.send(cmdRead, 0, 1, 0, 512, nil)
	if errno, _ := c.reply(1, 512); errno != 5 {
		t.Errorf("errno %d", errno)
	}
}

// slow is a device whose reads wait.
type slow struct {
	*lazyroot.Device
	go_ chan struct{}
}

func (s slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	select {
	case <-s.go_:
		return s.Device.ReadAt(ctx, p, off)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TestTransmission serves without a handshake, out of order, and ends by DISC.
func TestTransmission(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 1 << 20, Chunk: 64 << 10, Seed: 4})
	d := slow{device(t, s, lazytest.NewDisk(1<<20, "")), make(chan struct{})}
	a, b := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- ServeTransmission(t.Context(), b, d, Options{}) }()
	c := &client{t: t, c: a}
	c.send(cmdRead, 0, 7, 4096, 512, nil)
	c.send(cmdWrite, cmdFUA, 8, 8192, 4, []byte("abcd"))
	if errno, _ := c.reply(8, 0); errno != 0 {
		t.Errorf("write: %d", errno)
	}
	close(d.go_)
	if errno, p := c.reply(7, 512); errno != 0 || !bytes.Equal(p, s.Data[4096:4096+512]) {
		t.Errorf("read: %d", errno)
	}
	c.send(99, 0, 9, 0, 0, nil)
	if errno, _ := c.reply(9, 0); errno != 22 {
		t.Errorf("an unknown command: %d", errno)
	}
	c.send(cmdDisc, 0, 0, 0, 0, nil)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestContextEnds: requests under way end, and nobody waits for the client.
func TestContextEnds(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 1 << 20, Chunk: 64 << 10, Seed: 4})
	d := slow{device(t, s, nil), make(chan struct{})}
	a, b := net.Pipe()
	defer a.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeTransmission(ctx, b, d, Options{}) }()
	c := &client{t: t, c: a}
	c.send(cmdRead, 0, 7, 4096, 512, nil)
	var wg sync.WaitGroup
	wg.Go(func() { readFull(a, 1<<20) })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// TestDeaf: a client that does not read its answers is not waited for.
func TestDeaf(t *testing.T) {
	s := lazytest.New(t, lazytest.Layout{Size: 1 << 20, Chunk: 64 << 10, Seed: 4})
	a, b := net.Pipe()
	defer a.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeTransmission(ctx, b, device(t, s, nil), Options{Shutdown: time.Millisecond}) }()
	c := &client{t: t, c: a}
	c.send(cmdRead, 0, 7, 4096, 512, nil)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
