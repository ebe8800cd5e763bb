package nbd

import (
	"encoding/binary"
	"net"
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
