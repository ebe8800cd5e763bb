package machine

import (
	"context"
	"fmt"
	"net"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/instar-image/instar/bundle/keys"
)

// onlyAgentKey signs with the one key that the agent has and that can sign.
func (m *Machine) onlyAgentKey(ctx context.Context) (keys.Signer, error) {
	if m.o.AgentSocket == "" {
		return nil, fmt.Errorf("%w: SSH_AUTH_SOCK is not set", keys.ErrAgent)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", m.o.AgentSocket)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keys.ErrAgent, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	list, err := agent.NewClient(conn).List()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keys.ErrAgent, err)
	}
	var only ssh.PublicKey
	for _, k := range list {
		key, err := ssh.ParsePublicKey(k.Blob)
		if err != nil || keys.CheckSigningKey(key) != nil {
			continue // not of a kind that signs
		}
		if only != nil {
			return nil, fmt.Errorf("%w: it has several; name the public key's file of the one that is meant", keys.ErrAgentKey)
		}
		only = key
	}
	if only == nil {
		return nil, fmt.Errorf("%w: it has none that signs; add one with ssh-add", keys.ErrAgentKey)
	}
	return keys.AgentSigner(ctx, m.o.AgentSocket, only)
}
