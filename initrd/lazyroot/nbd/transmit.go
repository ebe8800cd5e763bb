package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// connection is a client in transmission.
type connection struct {
	s       *server
	c       net.Conn
	agreed  session
	slots   chan struct{} // of requests that are local
	memory  *semaphore.Weighted
	limit   int64 // bytes of memory
	far     *queue
	buffers buffers

	mu  sync.Mutex // of writing
	bad error      // the first error of writing
}

// errGone: the connection ended without the client saying so.
var errGone = errors.New("the client is gone")

func (s *server) transmit(ctx context.Context, c net.Conn, agreed session) error {
	n := &connection{s: s, c: c, agreed: agreed, slots: make(chan struct{}, s.o.Requests), limit: s.o.Memory}
	n.far = newQueue(s.o.Requests, s.o.Memory/4)
	local, _ := s.dev.(Localizer)
	if s.dev.ReadOnly() { // it has no disk: nothing is local
		local = nil
	}
	if local != nil {
		n.limit = s.o.Memory / 2
	}
	n.memory = semaphore.NewWeighted(n.limit)
	// What is under way may end when ctx does; then it is cut off.
	inner, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	stop := context.AfterFunc(ctx, func() {
		c.SetReadDeadline(time.Now())
		time.AfterFunc(s.o.Shutdown, func() {
			cut()
			c.SetWriteDeadline(time.Now()) // of a client that does not read
		})
	})
	defer stop()
	var all sync.WaitGroup
	err := n.requests(inner, local, &all)
	if ctx.Err() == nil && (errors.Is(err, errGone) || errors.Is(err, errProtocol)) {
		cut() // nobody hears the answers
	}
	all.Wait()
	n.far.wait()
	if ctx.Err() != nil {
		return nil
	}
	if err == nil {
		n.mu.Lock()
		err = n.bad
		n.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("serve NBD: %w", err)
	}
	return nil
}

// requests reads requests until the client says that it goes.
func (n *connection) requests(ctx context.Context, local Localizer, all *sync.WaitGroup) error {
	in := bufio.NewReaderSize(n.c, 64<<10)
	for {
		var head [requestSize]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return fmt.Errorf("%w: %w", errGone, err)
		}
		r, err := parseRequest(&head)
		if err != nil {
			return err
		}
		if r.command == cmdDisc {
			return nil
		}
		errno := r.check(n.s.dev.Size(), n.s.dev.ReadOnly(), n.agreed.structured, n.agreed.allocation)
		if r.command == cmdWrite && errno != 0 {
			if _, err := io.CopyN(io.Discard, in, int64(r.length)); err != nil {
				return fmt.Errorf("%w: %w", errGone, err)
			}
		}
		if errno != 0 {
			n.fail(r, errno, "")
			continue
		}
		if local != nil && r.command != cmdFlush && !local.Local(int64(r.offset), int64(r.length), r.changes()) {
			err = n.later(ctx, r, in)
		} else {
			err = n.now(ctx, r, in, all)
		}
		if err != nil {
			return err
		}
	}
}

// now begins a request, when others have ended that it has to wait for.
func (n *connection) now(ctx context.Context, r request, in io.Reader, all *sync.WaitGroup) error {
	weight := min(r.weight(), n.limit)
	n.slots <- struct{}{}
	if err := n.memory.Acquire(ctx, weight); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	data, err := n.payload(r, in)
	if err != nil {
		return err
	}
	all.Go(func() {
		n.do(ctx, r, data)
		n.memory.Release(weight)
		<-n.slots
	})
	return nil
}

// later has a request begun when it is its turn among those that may have to
// wait long. What it is to write is read here: the next request is behind it.
func (n *connection) later(ctx context.Context, r request, in io.Reader) error {
	if err := n.far.admit(ctx, r); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	data, err := n.payload(r, in)
	if err != nil {
		return err
	}
	n.far.add(waiting{r: r, do: func() { n.do(ctx, r, data) }})
	return nil
}

// changes tells whether a request writes.
func (r *request) changes() bool {
	return r.command == cmdWrite || r.command == cmdTrim || r.command == cmdWriteZeroes
}

// cacheBytes is how much is read at a time of what is to be cached.
const cacheBytes = 1 << 20

// weight is how many bytes of memory carrying out a request takes.
func (r *request) weight() int64 {
	switch r.command {
	case cmdRead, cmdWrite:
		return int64(held(int(r.length)))
	case cmdCache:
		return int64(held(min(int(r.length), cacheBytes)))
	}
	return 0
}

// payload reads what a request writes; nil if it is another.
func (n *connection) payload(r request, in io.Reader) ([]byte, error) {
	if r.command != cmdWrite {
		return nil, nil
	}
	data := n.buffers.get(int(r.length))
	if _, err := io.ReadFull(in, data); err != nil {
		return nil, fmt.Errorf("%w: %w", errGone, err)
	}
	return data, nil
}

// do carries a request out and answers it. data is not used after it.
func (n *connection) do(ctx context.Context, r request, data []byte) {
	dev, off, length := n.s.dev, int64(r.offset), int64(r.length)
	defer func() { n.buffers.put(data) }()
	var err error
	switch r.command {
	case cmdRead:
		data = n.buffers.get(int(length))
		if err = dev.ReadAt(ctx, data, off); err == nil {
			n.data(r, data)
			return
		}
	case cmdWrite:
		err = dev.WriteAt(ctx, data, off)
	case cmdFlush:
		err = dev.Flush(ctx)
	case cmdTrim:
		err = dev.Discard(ctx, off, length)
	case cmdWriteZeroes:
		err = dev.WriteZeroes(ctx, off, length)
	case cmdCache:
		err = n.cache(ctx, off, length)
	case cmdBlockStatus:
		var b []byte
		if b, err = n.status(ctx, r); err == nil {
			n.reply(r, chunkStatus, b)
			return
		}
	}
	if err == nil && r.flags&cmdFUA != 0 && r.command != cmdRead && r.command != cmdCache {
		err = dev.Flush(ctx)
	}
	if err != nil {
		errno, ok := errors.AsType[unix.Errno](err)
		if !ok || errno != unix.ENOSPC && errno != unix.ENOMEM {
			errno = unix.EIO
		}
		n.fail(r, errno, err.Error())
		return
	}
	n.done(r)
}

// cache has the device read what will be wanted.
func (n *connection) cache(ctx context.Context, off, length int64) error {
	b := n.buffers.get(int(min(length, cacheBytes)))
	defer n.buffers.put(b)
	for length > 0 {
		k := min(length, int64(len(b)))
		if err := n.s.dev.ReadAt(ctx, b[:k], off); err != nil {
			return err
		}
		off, length = off+k, length-k
	}
	return nil
}

// maxExtents is how many ranges one answer tells of.
const maxExtents = 1024

// status tells which of a range is zero.
func (n *connection) status(ctx context.Context, r request) ([]byte, error) {
	m, ok := n.s.dev.(Mapper)
	if !ok {
		return nil, unix.EINVAL
	}
	b := binary.BigEndian.AppendUint32(nil, metaID)
	for at, end, i := int64(r.offset), int64(r.offset)+int64(r.length), 0; at < end && i < maxExtents; i++ {
		zero, to, err := m.NextZero(ctx, at, end)
		if err != nil {
			return nil, err
		}
		flags := uint32(0)
		if zero {
			flags = stateHole | stateZero
		}
		b = binary.BigEndian.AppendUint32(b, uint32(to-at))
		b = binary.BigEndian.AppendUint32(b, flags)
		if at = to; r.flags&cmdReqOne != 0 {
			break
		}
	}
	return b, nil
}

// write sends what belongs together. After an error the connection is of no
// use: the reader is told.
func (n *connection) write(parts ...[]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.bad != nil {
		return
	}
	b := slices.DeleteFunc(net.Buffers(parts), func(p []byte) bool { return len(p) == 0 })
	if _, err := b.WriteTo(n.c); err != nil {
		n.bad = err
		n.c.Close()
	}
}

func (n *connection) simple(r request, errno unix.Errno, data []byte) {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 16), magicSimple)
	b = binary.BigEndian.AppendUint32(b, number(errno))
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	n.write(b, data)
}

// number is an errno as the protocol has it.
func number(e unix.Errno) uint32 {
	switch e {
	case unix.EOVERFLOW:
		return 75
	case unix.ENOTSUP:
		return 95
	}
	return uint32(e)
}

func structured(r request, kind uint16, length int) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 32), magicStructured)
	b = binary.BigEndian.AppendUint16(b, replyDone)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// reply sends one structured chunk.
func (n *connection) reply(r request, kind uint16, data []byte) {
	n.write(structured(r, kind, len(data)), data)
}

func (n *connection) data(r request, data []byte) {
	if !n.agreed.structured {
		n.simple(r, 0, data)
		return
	}
	head := structured(r, chunkData, 8+len(data))
	n.write(binary.BigEndian.AppendUint64(head, r.offset), data)
}

func (n *connection) done(r request) {
	if !n.agreed.structured {
		n.simple(r, 0, nil)
		return
	}
	n.reply(r, chunkNone, nil)
}

// fail answers with an error, and why if the client can be told.
func (n *connection) fail(r request, errno unix.Errno, why string) {
	if !n.agreed.structured {
		n.simple(r, errno, nil)
		return
	}
	why = why[:min(len(why), maxName)]
	b := binary.BigEndian.AppendUint32(nil, number(errno))
	b = binary.BigEndian.AppendUint16(b, uint16(len(why)))
	n.reply(r, chunkError, append(b, why...))
}
