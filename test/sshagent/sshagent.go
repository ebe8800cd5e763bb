// Package sshagent answers on a socket as an ssh-agent.
//
// What goes in: an agent, perhaps a keyring with keys from files. What comes out:
// the socket's path, for SSH_AUTH_SOCK. It touches a directory of the test's.
package sshagent

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Serve answers for an agent until the test ends.
func Serve(t testing.TB, a agent.Agent) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = agent.ServeAgent(a, c) // ends with an error when the client goes
			}()
		}
	}()
	return socket
}

// Add puts the private key of a file into a keyring.
func Add(t testing.TB, ring agent.Agent, file, comment string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParseRawPrivateKey(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := ring.Add(agent.AddedKey{PrivateKey: key, Comment: comment}); err != nil {
		t.Fatal(err)
	}
}
