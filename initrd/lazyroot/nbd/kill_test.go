package nbd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
)

// killedDir tells a process of this test that it is the server, and where its
// disk, session and socket are.
const killedDir = "INSTAR_TEST_NBD_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(killedDir); dir != "" {
		if err := serveKilled(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func killedLayout() lazytest.Layout {
	return lazytest.Layout{Size: 4 << 20, Chunk: 64 << 10, Holes: 2, Seed: 8}
}

func killedIdentity() lazyroot.Identity {
	return lazyroot.Identity{Manifest: chunked.Name{8}, Size: int64(killedLayout().Size), Instance: "i-8", Secret: bytes.Repeat([]byte("s"), 32)}
}

// serveKilled serves until it is killed.
func serveKilled(dir string) error {
	// An image of the same bytes each time; its keys are others.
	s := lazytest.New(&testing.B{}, killedLayout())
	img, err := lazyroot.NewImage(s.Index, lazyroot.ImageOptions{})
	if err != nil {
		return err
	}
	disk, err := os.OpenFile(filepath.Join(dir, "disk"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	session, err := os.OpenFile(filepath.Join(dir, "session"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	id := killedIdentity()
	ctx := context.Background()
	d, err := lazyroot.Open(ctx, lazyroot.Options{Image: img, Disk: lazyroot.FileDisk(disk, lazyroot.DiskSize(id.Size)), Identity: id, Session: session})
	if err != nil {
		return err
	}
	go d.Hydrate(ctx, nil, lazyroot.Throttle{Idle: -1, Rate: 64 << 10})
	socket := filepath.Join(dir, "sock")
	if err := os.RemoveAll(socket); err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	return Serve(ctx, l, d, Options{}, nil)
}

// TestKills kills the server again and again while qemu writes and reads, which
// connects again and goes on.
func TestKills(t *testing.T) {
	kills := 100
	if raced {
		kills = 4
	}
	dir, err := os.MkdirTemp("/dev/shm", "instar-kills-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	id := killedIdentity()
	size := lazyroot.DiskSize(id.Size)
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, bytes.Repeat([]byte("old data"), int(size/8)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := lazyroot.Format(lazyroot.FileDisk(f, size), id); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "session"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var server *exec.Cmd
	start := func() {
		t.Helper()
		server = exec.Command(os.Args[0])
		server.Env = append(os.Environ(), killedDir+"="+dir)
		server.Stderr = os.Stderr
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		for range 3000 {
			if c, err := net.Dial("unix", dir+"/sock"); err == nil {
				c.Close()
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatal("the server does not listen")
	}
	kill := func() {
		if err := server.Process.Kill(); err != nil {
			t.Error(err)
		}
		server.Wait()
	}
	start()
	defer func() { kill() }()
	client := exec.Command("qemu-io", "--image-opts", "driver=nbd,server.type=unix,server.path="+dir+"/sock,reconnect-delay=60")
	in, err := client.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	client.Stdout, client.Stderr = &out, &out
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(lazytest.New(t, killedLayout()).Data)
	stop, fed := make(chan struct{}), make(chan int)
	var taken atomic.Int64 // of the commands, by qemu, but for those in the pipe
	var gone atomic.Bool   // qemu
	go func() {
		defer in.Close()
		r := rand.New(rand.NewPCG(1, 8))
		for n := 0; ; n++ {
			select {
			case <-stop:
				fed <- n
				return
			default:
			}
			off, length, b := r.IntN(len(want)/512-300)*512, (1+r.IntN(200))*512, 1+r.IntN(255)
			line := fmt.Sprintf("write -q -P %d %d %d\nread -q -P %d %d %d\n", b, off, length, b, off, length)
			switch r.IntN(12) {
			case 0:
				line += "flush\n"
			case 1:
				line, b = fmt.Sprintf("write -q -z %d %d\nread -q -P 0 %d %d\n", off, length, off, length), 0
			}
			if _, err := io.WriteString(in, line); err != nil {
				gone.Store(true)
				fed <- n
				return
			}
			taken.Add(1)
			for i := range length {
				want[off+i] = byte(b)
			}
		}
	}()
	for n := range kills {
		time.Sleep(20 * time.Millisecond)
		kill()
		before := taken.Load()
		start()
		// Qemu, which waits longer after each try, must not come too late for 60 s.
		for n%10 == 9 && !gone.Load() && taken.Load() == before {
			time.Sleep(10 * time.Millisecond)
		}
	}
	close(stop)
	n := <-fed
	if err := client.Wait(); err != nil {
		t.Errorf("qemu-io: %v", err)
	}
	if s := out.String(); strings.Contains(s, "failed") || strings.Contains(s, "rror") {
		t.Error(s[:min(len(s), 2000)])
	}
	if n < kills {
		t.Errorf("only %d writes", n)
	}
	run(t, "nbdcopy", "nbd+unix:///?socket="+dir+"/sock", dir+"/copy")
	got, err := os.ReadFile(dir + "/copy")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:len(want)], want) {
		t.Error("other bytes after the kills")
	}
	t.Logf("%d kills, %d writes", kills, n)
}
