package resident

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/initrd/lazyroot/dm"
	"github.com/instar-image/instar/initrd/lazyroot/knbd"
)

// MapName is the first mapped device: the whole image. [PartName] are those of
// its partitions.
const MapName = "instar-root"

// MapUUID begins the UUID of every mapped device, which udev's rules see.
const MapUUID = "INSTAR-"

// maxParts is how many partitions there can be mapped devices for.
const maxParts = 128

// PartName is the mapped device of the partition n, from 1.
func PartName(n int) string { return fmt.Sprintf("%s%d", MapName, n) }

// deadFor is how long requests wait for a server that was killed. The keeper
// needs a moment.
const deadFor = 3 * time.Minute

// timer is how soon a request that a killed server had taken is sent to the
// next one. A request that takes longer for another reason is named in the
// kernel's log by it.
const timer = 5 * time.Second

// Server is the serving process.
type Server struct {
	Files
	Index int // N of /dev/nbdN

	again     bool // goes on for another
	ending    bool // that was asked to end a moment ago
	calm      bool // or longer ago, and the system goes on
	connected bool
}

// Again tells whether this server goes on for one that was killed.
func (s *Server) Again() bool { return s.again }

// Export is what is served, and how.
type Export struct {
	Size      int64
	BlockSize int // logical, as of the disk that comes in its place
	Trim      bool
	// Serve answers the requests that come by the connection until it ends.
	Serve func(ctx context.Context, c net.Conn) error
	// Fill returns when every byte is on the disk and what is written goes
	// straight to it.
	Fill func(ctx context.Context) error
	// Say is told what happens, as lines of text.
	Say func(format string, args ...any)
}

// Run connects the device, serves it, and returns when the disk has taken its
// place. An error means that it is to be called again, in a new process.
func (s *Server) Run(ctx context.Context, e Export) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	claim, err := s.claim()
	if err != nil {
		return err
	}
	defer claim.Close()
	conn, err := s.connect(ctx, e)
	if err != nil {
		return err
	}
	defer conn.Close()
	served := make(chan error, 1)
	go func() { served <- e.Serve(ctx, conn) }()
	filled := make(chan error, 1)
	s.connected = true
	if !s.again {
		s.ready.WriteString(readyWord)
	}
	s.ready.Close()
	go func() { filled <- e.Fill(ctx) }()
	go s.warned(ctx, e.Say)
	select {
	case err := <-served:
		return fmt.Errorf("the kernel ended the connection: %w", orEOF(err))
	case err = <-filled:
	}
	if err != nil {
		return err
	}
	claim.Close()
	began := time.Now()
	if err := s.handOver(); err != nil {
		return err
	}
	e.Say("the root is on the local disk, which took its place in %v", time.Since(began).Round(time.Millisecond))
	if err := knbd.Disconnect(s.Index); err != nil {
		return err
	}
	<-served
	s.unload(ctx)
	return nil
}

// Who ends all processes of a system asks first, and kills a moment later.
const (
	// endingFor is how long after being asked the server takes it that the system ends.
	endingFor = time.Minute
	// endingPatience is how long requests then wait for an answer, and again for
	// a server: nobody starts it again.
	endingPatience = 5 * time.Second
)

// warned makes the best of a system's end that does not spare this process: some
// inits kill all there is before the root is read-only. What the system asks for
// after that fails soon instead of keeping the machine from going down. The keeper
// has what was written before made durable: a thread that waits for this very
// process would keep it from dying, and the kernel from seeing that it is dead.
func (s *Server) warned(ctx context.Context, say func(string, ...any)) {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGTERM)
	defer signal.Stop(asked)
	for ending := s.ending; ; ending = false {
		if !ending { // else the one before was asked
			select {
			case <-ctx.Done():
				return
			case <-asked:
			}
			if err := s.hurried(); err != nil {
				say("warning: %v", err)
			}
			say("the root's server was asked to end, and stays")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(endingFor):
		}
		if err := s.unhurried(); err != nil {
			say("warning: %v", err)
		}
	}
}

// hurried has requests wait as they do while the system ends.
func (s *Server) hurried() error { return knbd.Hurry(s.Index, endingPatience, endingPatience) }

// unhurried has requests wait as they do while the system runs, but for the
// timer, which is the kernel's own then: to set it is to wait for all requests
// that are under way, on Linux 6.11 and later, and some may be waiting for this
// process.
func (s *Server) unhurried() error { return knbd.Hurry(s.Index, deadFor, 0) }

func orEOF(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// claim opens the disk a second time, so that nobody else can use it.
func (s *Server) claim() (*os.File, error) {
	f, err := os.OpenFile(fmt.Sprintf("self/fd/%d", s.Disk.Fd()), os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		// After the hand-over was begun it is the mapped device's.
		if s.again && errors.Is(err, unix.EBUSY) {
			return os.Open("self/fd/0")
		}
		return nil, fmt.Errorf("claiming the disk: %w", err)
	}
	return f, nil
}

// connect gives the kernel its end of a new pair of sockets.
func (s *Server) connect(ctx context.Context, e Export) (net.Conn, error) {
	kernel, server, err := knbd.Pair()
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	defer server.Close()
	config := knbd.Config{Index: s.Index, Size: e.Size, BlockSize: e.BlockSize, Flags: knbd.FlagFlush | knbd.FlagFUA, DeadFor: deadFor}
	if e.Trim {
		config.Flags |= knbd.FlagTrim
	}
	if s.again {
		err = s.reconnect(ctx, kernel)
		if errors.Is(err, unix.EINVAL) { // killed before it was connected
			err = knbd.Connect(kernel, config)
		} else if err == nil {
			// What the one before may have said to the kernel, or not any more.
			var herr error
			switch {
			case s.ending:
				herr = s.hurried()
			case s.calm:
				herr = s.unhurried()
			}
			if herr != nil {
				e.Say("warning: %v", herr)
			}
		}
	} else if err = knbd.Connect(kernel, config); err == nil {
		err = knbd.SetTimer("/sys", s.Index, timer)
	}
	if err != nil {
		return nil, err
	}
	return net.FileConn(server)
}

func (s *Server) reconnect(ctx context.Context, kernel *os.File) error {
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := knbd.Reconnect(kernel, s.Index)
		// The kernel sees the old connection's end when it next looks.
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// handOver puts the disk in the nbd device's place, below each mapped device.
// It may have been begun before, in a process that was killed.
func (s *Server) handOver() error {
	disk, err := dm.Number(s.Disk)
	if err != nil {
		return err
	}
	control := dm.New(s.Control)
	for n := range maxParts + 1 {
		name := MapName
		if n > 0 {
			name = PartName(n)
		}
		state, err := control.State(name)
		if errors.Is(err, unix.ENXIO) {
			continue
		}
		if err != nil {
			return err
		}
		if err := s.moveMap(control, name, state, disk); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) moveMap(control *dm.Control, name string, state dm.State, disk dm.Device) error {
	table, err := control.Table(name)
	if err != nil {
		return err
	}
	if len(table) > 0 && table[0].Target == disk {
		if state.Suspended {
			return control.Resume(name)
		}
		return nil
	}
	for i := range table {
		table[i].Target = disk
	}
	if err := control.Load(name, table); err != nil {
		return err
	}
	if err := control.Suspend(name); err != nil {
		return err
	}
	// All that was answered is on the disk; nothing of it may stay behind in
	// what the kernel remembers of the disk.
	if err := s.settle(); err != nil {
		return errors.Join(err, control.Resume(name))
	}
	return control.Resume(name)
}

func (s *Server) settle() error {
	if err := s.Disk.Sync(); err != nil {
		return fmt.Errorf("flushing the disk: %w", err)
	}
	if err := unix.IoctlSetInt(int(s.Disk.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("flushing the disk: %w", err)
	}
	return nil
}

// unload removes the driver, which goes once the device is nobody's. It may be
// another's too, and then stays.
func (s *Server) unload(ctx context.Context) {
	for range 20 {
		if err := unix.DeleteModule("nbd", unix.O_NONBLOCK); err == nil || errors.Is(err, unix.ENOENT) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(250 * time.Millisecond):
		}
	}
}
