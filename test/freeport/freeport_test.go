package freeport

import (
	"net"
	"testing"
)

// TestPort: what is given can be listened at, and is not in the kernel's range.
func TestPort(t *testing.T) {
	for range 20 {
		port := Port(t)
		if port < first || port >= end {
			t.Fatalf("port %d", port)
		}
		l, err := net.Listen("tcp", Address(port))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // so that it is not given again
	}
}
