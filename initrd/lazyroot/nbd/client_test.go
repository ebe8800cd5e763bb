package nbd

import (
	"encoding/binary"
	"net"
	"strings"
	"testing"
)

// client is the half of the protocol that a test needs.
type client struct {
	t testing.TB
	c net.Conn
}

func encode(command, flags uint16, cookie, off uint64, n uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return append(binary.BigEndian.AppendUint32(b, n), data...)
}

func (c *client) send(command, flags uint16, cookie, off uint64, n uint32, data []byte) {
	c.t.Helper()
	if _, err := c.c.Write(encode(command, flags, cookie, off, n, data)); err != nil {
		c.t.Fatal(err)
	}
}

// reply reads the simple reply to a request, which must be the next.
func (c *client) reply(cookie uint64, n int) (errno uint32, data []byte) {
	c.t.Helper()
	b, err := readFull(c.c, 16)
	if err != nil {
		c.t.Fatal(err)
	}
	if m, k := binary.BigEndian.Uint32(b), binary.BigEndian.Uint64(b[8:]); m != magicSimple || k != cookie {
		c.t.Fatalf("a reply %08x to %d, not to %d", m, k, cookie)
	}
	if errno = binary.BigEndian.Uint32(b[4:]); errno == 0 {
		if data, err = readFull(c.c, n); err != nil {
			c.t.Fatal(err)
		}
	}
	return errno, data
}

// connect does the handshake with a server at a unix socket, asking for the options.
func connect(t testing.TB, uri string, options ...uint32) *client {
	t.Helper()
	_, path, _ := strings.Cut(uri, "socket=")
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &client{t: t, c: conn}
	if _, err := readFull(conn, 18); err != nil {
		t.Fatal(err)
	}
	b := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	for _, o := range options {
		b = append(b, option(o, nil)...)
	}
	b = append(b, option(optGo, make([]byte, 6))...)
	if _, err := conn.Write(b); err != nil {
		t.Fatal(err)
	}
	for {
		head, err := readFull(conn, 20)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readFull(conn, int(binary.BigEndian.Uint32(head[16:]))); err != nil {
			t.Fatal(err)
		}
		if binary.BigEndian.Uint32(head[8:]) == optGo && binary.BigEndian.Uint32(head[12:]) == repAck {
			return c
		}
	}
}

func option(n uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, n)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// chunk reads the structured reply to a request, which must be the next.
func (c *client) chunk(cookie uint64) (kind uint16, data []byte) {
	c.t.Helper()
	b, err := readFull(c.c, 20)
	if err != nil {
		c.t.Fatal(err)
	}
	if m, k := binary.BigEndian.Uint32(b), binary.BigEndian.Uint64(b[8:]); m != magicStructured || k != cookie {
		c.t.Fatalf("a reply %08x to %d, not to %d", m, k, cookie)
	}
	if data, err = readFull(c.c, int(binary.BigEndian.Uint32(b[16:]))); err != nil {
		c.t.Fatal(err)
	}
	return binary.BigEndian.Uint16(b[6:]), data
}
