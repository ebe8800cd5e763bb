package freeport

import (
	"net"
	"testing"
)

// TestPort: what is given can be listened at, is not in the kernel's range, and
// is not given again before the test ends.
func TestPort(t *testing.T) {
	given := map[int]bool{}
	for range 300 {
		port := Port(t)
		if port < first || port >= end || given[port] {
			t.Fatalf("port %d, of %d that are given", port, len(given))
		}
		given[port] = true
		l, err := net.Listen("tcp", Address(port))
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
}
