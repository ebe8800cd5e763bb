// Package freeport gives tests ports for servers that must be told one, because
// another program is told it too.
//
// The port is free now, and lies outside the range from which the kernel gives
// ports to connections and to listeners that name none, so that no other part of a busy
// test run takes it meanwhile; and it is not given again, to any process of the
// network namespace, until the test ends. A server that can say where it listens
// is better started at port 0.
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
		// An abstract socket, which nobody connects to, says that it is given.
		mark, err := net.Listen("unix", fmt.Sprint("@instar-freeport-", port))
		if err != nil {
			continue
		}
		if free(Address(port)) {
			t.Cleanup(func() { mark.Close() })
			return port
		}
		mark.Close()
	}
	t.Fatal(fmt.Errorf("no port of %d to %d is free", first, end-1))
	return 0
}

// free reports whether nobody has an address.
func free(address string) bool {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return false
	}
	u, err := net.ListenPacket("udp", address)
	if err == nil {
		err = u.Close()
	}
	return l.Close() == nil && err == nil
}

// Address is a port's at the loopback address.
func Address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
