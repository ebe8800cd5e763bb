// Package freeport gives tests ports for servers that must be told one, because
// another program is told it too.
//
// Nothing is held: the port is free now, and lies outside the range from which
// the kernel gives ports to connections and to listeners that name none, so
// that no other part of a busy test run takes it meanwhile. A server that can say where it
// listens is better started at port 0.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"testing"
)

// Of registered ports, those below where Linux begins with ephemeral ones
// (net.ipv4.ip_local_port_range) and above where servers are usually found.
const first, end = 20000, 32768

// Port is a TCP and UDP port of the loopback address nobody has.
func Port(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := first + rand.IntN(end-first)
		address := Address(port)
		l, err := net.Listen("tcp", address)
		if err != nil {
			continue
		}
		u, err := net.ListenPacket("udp", address)
		if err == nil {
			err = u.Close()
		}
		if cerr := l.Close(); err == nil && cerr == nil {
			return port
		}
	}
	t.Fatal(fmt.Errorf("no port of %d to %d is free", first, end-1))
	return 0
}

// Address is a port's at the loopback address.
func Address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
