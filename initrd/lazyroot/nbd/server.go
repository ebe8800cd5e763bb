// Package nbd serves a block device over the NBD protocol: the fixed newstyle
// handshake, or transmission alone, as the Linux kernel wants it on a
// socket whose handshake somebody else did.
//
// In goes a [Device] and connections; out come its bytes. It touches nothing
// else, and does not log. The protocol is
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: simple and structured
// replies, flush, FUA, trim, write-zeroes, cache, and block status with
// base:allocation where the device is a [Mapper].
package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Device is what is served. Its methods are called concurrently, with ranges
// inside Size, which does not change; none is called but ReadAt and Flush if it is ReadOnly.
type Device interface {
	Size() int64
	ReadOnly() bool
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Flush returns when what was answered before is durable.
	Flush(ctx context.Context) error
	Discard(ctx context.Context, off, n int64) error
	WriteZeroes(ctx context.Context, off, n int64) error
}

// Mapper is a device that can tell which ranges of it are zero for certain.
type Mapper interface {
	// NextZero tells whether off is in such a range, and where that ends, at to at most.
	NextZero(ctx context.Context, off, to int64) (zero bool, end int64, err error)
}

// Localizer is a device that can tell which requests wait for nothing far away.
// Those are carried out however many others wait.
type Localizer interface {
	// Local tells whether a request, of a write or else of a read, needs nothing
	// but what is at hand. What is so stays so.
	Local(off, n int64, write bool) bool
}

// Options of a server. The zero value is usable.
type Options struct {
	// Name of the export, of at most 4096 bytes; "" too is answered with it.
	Name        string
	Description string // for people
	// Requests is how many of one client are under way at a time; 0 is 32. If the
	// device is a [Localizer], so many of those that are local, and so many of the
	// others, of which 16,384 more may wait.
	Requests int
	// Memory is how many bytes of it they may hold, together; 0 is 16 MiB. Of a
	// Localizer's half is for those that are local, a quarter for the others, and a
	// quarter for what clients want written that is not: when that is used up, nothing
	// more is read from the client. A request that is larger is alone.
	Memory int64
	// MultiConn tells clients that several connections see each other's
	// writes once flushed. It is true of every Device that is one for all of them.
	MultiConn bool
	// Shutdown is how long requests under way may take when the context ends;
	// then they are cut off. 0 cuts at once.
	Shutdown time.Duration
}

type server struct {
	dev Device
	o   Options
}

func newServer(dev Device, o Options) (*server, error) {
	if o.Requests <= 0 {
		o.Requests = 32
	}
	if o.Memory <= 0 {
		o.Memory = 16 << 20
	}
	if len(o.Name) > maxName || len(o.Description) > maxName {
		return nil, fmt.Errorf("serve NBD: name or description is longer than %d bytes", maxName)
	}
	return &server{dev, o}, nil
}

// flags are the transmission flags of the export.
func (s *server) flags(agreed session) uint16 {
	f := TransmissionFlags(s.dev, s.o)
	if agreed.structured {
		f |= flagSendDF
	}
	return f
}

// TransmissionFlags are what the kernel is told of a device that is served by
// [ServeTransmission].
func TransmissionFlags(dev Device, o Options) uint16 {
	f := uint16(flagHasFlags | flagSendFlush | flagSendCache)
	if dev.ReadOnly() {
		f |= flagReadOnly
	} else {
		f |= flagSendFUA | flagSendTrim | flagSendWriteZeroes
	}
	if o.MultiConn {
		f |= flagCanMultiConn
	}
	return f
}

// Serve serves a device to all who connect, until ctx ends, which is no error,
// or the listener fails. It closes the listener. gone, if it is not nil, is told how each connection
// ended: nil if the client said so.
func Serve(ctx context.Context, l net.Listener, dev Device, o Options, gone func(error)) error {
	s, err := newServer(dev, o)
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("serve NBD: %w", err)
		}
		all.Go(func() {
			err := s.client(ctx, c)
			if gone != nil {
				gone(err)
			}
		})
	}
}

// handshakeTime is how long a client may take to say what it wants.
const handshakeTime = 30 * time.Second

func (s *server) client(ctx context.Context, c net.Conn) error {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Now()) })
	c.SetDeadline(time.Now().Add(handshakeTime))
	agreed, err := s.handshake(c)
	if !stop() {
		return nil // ctx has ended
	}
	switch {
	case errors.Is(err, errAborted):
		return nil
	case err != nil:
		return fmt.Errorf("serve NBD: %w", err)
	}
	c.SetDeadline(time.Time{})
	return s.transmit(ctx, c, agreed)
}

// ServeTransmission serves a connection that is in transmission already, with
// simple replies and the flags of [TransmissionFlags], until the client says that it goes (nil), or it is gone,
// or ctx ends. It closes c and returns when no request is under way any more.
func ServeTransmission(ctx context.Context, c net.Conn, dev Device, o Options) error {
	s, err := newServer(dev, o)
	if err != nil {
		return errors.Join(err, c.Close())
	}
	defer c.Close()
	return s.transmit(ctx, c, session{})
}
