package serving

import (
	"net"
	"sync"
)

// Gate is a listener of those connections that Admit lets in. The others are
// closed at once: who waits in the kernel's queue does not know why.
type Gate struct {
	net.Listener
	// Admit gives the connection that is served, c or one around it, or nil.
	// It is called by one goroutine for each listener.
	Admit func(c net.Conn) net.Conn
}

// Accept waits for the next connection that is let in.
func (g *Gate) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if in := g.Admit(c); in != nil {
			return in, nil
		}
		c.Close() // who is not let in gets no more than that
	}
}

// OnClose is c, with something done when it is closed, once.
func OnClose(c net.Conn, do func()) net.Conn { return &closing{c, sync.OnceFunc(do)} }

type closing struct {
	net.Conn
	do func()
}

func (c *closing) Close() error {
	c.do()
	return c.Conn.Close()
}

// Crowd counts connections by whose they are. The zero value is ready.
type Crowd[K comparable] struct {
	mu  sync.Mutex
	all int
	of  map[K]int
}

// Enter counts another of someone's, unless there are so many already: most of
// theirs, or total of all.
func (c *Crowd[K]) Enter(who K, most, total int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= total || c.of[who] >= most {
		return false
	}
	if c.of == nil {
		c.of = make(map[K]int)
	}
	c.all++
	c.of[who]++
	return true
}

// Leave takes one that entered away.
func (c *Crowd[K]) Leave(who K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.of[who]--; c.of[who] == 0 {
		delete(c.of, who)
	}
}
