package server

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/instar-image/instar/internal/serving"
)

// gate counts connections, and turns away what is too many: in all, of one
// instance, or of callers that are no instance, who share a part of their own.
// An instance that has an interface to itself can use as many source addresses
// as it likes: counting addresses would not hold it.
type gate struct {
	total, each, strangers int

	owner   func(from netip.Addr, l *Listen) string // the instance's id, "" if nobody's
	refused func()

	crowd serving.Crowd[string] // by owner
}

func (g *gate) enter(owner string) bool {
	most := g.each
	if owner == "" {
		most = g.strangers
	}
	return g.crowd.Enter(owner, most, g.total)
}

// admit lets a connection in, under watch.
func (g *gate) admit(c net.Conn, spec *Listen, w *watch) net.Conn {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil // no listener of ours makes others
	}
	var from netip.Addr
	if a, ok := tcp.RemoteAddr().(*net.TCPAddr); ok {
		from = a.AddrPort().Addr().Unmap()
	}
	owner := g.owner(from, spec)
	if !g.enter(owner) {
		tcp.SetLinger(0) // no state stays behind; a failure to set it costs only that
		g.refused()
		return nil
	}
	k := &counted{TCPConn: tcp, spec: spec, watch: w}
	w.add(k)
	k.leave = sync.OnceFunc(func() { w.remove(k); g.crowd.Leave(owner) })
	return k
}

// watch ends connections whose time is over. It looks at all of them now and
// then: a timer for each, set anew several times for every request, costs more
// than the answer.
type watch struct {
	patience time.Duration // with a peer that does not read
	now      atomic.Int64  // Unix nanoseconds, at the last look

	mu    sync.Mutex
	conns map[*counted]struct{}
}

// lookEvery is how late a connection may be ended.
const lookEvery = 100 * time.Millisecond

func newWatch(patience time.Duration) *watch {
	w := &watch{patience: patience, conns: make(map[*counted]struct{})}
	w.now.Store(time.Now().UnixNano())
	return w
}

func (w *watch) add(c *counted) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[c] = struct{}{}
}

func (w *watch) remove(c *counted) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c)
}

func (w *watch) run(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.look(time.Now().UnixNano())
		}
	}
}

func (w *watch) look(now int64) {
	w.now.Store(now)
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		read, write := c.readBy.Load(), c.writeBy.Load()
		if read != 0 && read < now || write != 0 && write < now {
			c.TCPConn.Close() // who reads or writes gets an error, and closes c
		}
	}
}

// counted is a connection that a gate let in, under watch.
type counted struct {
	*net.TCPConn
	spec  *Listen
	watch *watch
	leave func()

	readBy, writeBy atomic.Int64 // Unix nanoseconds; 0: no end
	aborted         bool         // a read is not to begin; of who serves
}

// Write gives up on a peer that takes nothing for as long as the watch says.
func (c *counted) Write(p []byte) (int, error) {
	c.writeBy.Store(c.watch.now.Load() + int64(c.watch.patience+lookEvery))
	n, err := c.TCPConn.Write(p)
	c.writeBy.Store(0)
	return n, err
}

// SetReadDeadline leaves ends to come to the watch. One in the past ends a read
// under way at once: so http.Server takes back the one it has in the background.
func (c *counted) SetReadDeadline(t time.Time) error {
	if !t.IsZero() && t.Unix() <= 1 {
		c.aborted = true
		return c.TCPConn.SetReadDeadline(t)
	}
	if t.IsZero() {
		c.readBy.Store(0)
	} else {
		c.readBy.Store(t.UnixNano())
	}
	if !c.aborted {
		return nil
	}
	c.aborted = false
	return c.TCPConn.SetReadDeadline(time.Time{})
}

// SetWriteDeadline does nothing: Write sees to it.
func (c *counted) SetWriteDeadline(time.Time) error { return nil }

func (c *counted) Close() error {
	c.leave()
	return c.TCPConn.Close()
}

type countedKey struct{}

// patient lets a handler take its time once a request is there: the end of
// reading it no longer counts. A body is still to be read in time.
func patient(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(countedKey{}).(*counted); ok && r.ContentLength == 0 {
			c.readBy.Store(0)
		}
		h.ServeHTTP(w, r)
	})
}
