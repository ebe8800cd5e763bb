package served

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
)

// Conn is a connection on which requests are made one after the other.
type Conn struct {
	net.Conn
	r *bufio.Reader
}

// Dial connects to a server, from an address of this machine's or nil.
func Dial(address string, from net.IP) (*Conn, error) {
	d := net.Dialer{}
	if from != nil {
		d.LocalAddr = &net.TCPAddr{IP: from}
	}
	c, err := d.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &Conn{c, bufio.NewReaderSize(c, 32<<10)}, nil
}

// Ask makes a request, given as it is on the wire, and returns the body of a
// 200, in buf if it fits. The answer must say its length.
func (c *Conn) Ask(request string, buf []byte) ([]byte, error) {
	if _, err := io.WriteString(c.Conn, request); err != nil {
		return nil, err
	}
	length, refused := -1, ""
	for first := true; ; first = false {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		switch {
		case first:
			if !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
				refused = string(bytes.TrimSpace(line))
			}
		case bytes.HasPrefix(line, []byte("Content-Length: ")):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[16:]))); err != nil {
				return nil, err
			}
		case len(line) == 2:
			if length < 0 {
				return nil, errors.New("an answer without a length")
			}
			if cap(buf) < length {
				buf = make([]byte, length)
			}
			if _, err := io.ReadFull(c.r, buf[:length]); err != nil {
				return nil, err
			}
			if refused != "" {
				return nil, fmt.Errorf("%s: %.1000s", refused, buf[:length])
			}
			return buf[:length], nil
		}
	}
}
