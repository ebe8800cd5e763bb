package server

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/instar-image/instar/internal/serving"
)

// Listen gives the sockets that the agent answers on: those that systemd hands
// over, else one it makes at path, in the place of one nobody serves. Everybody
// can connect to it; the policy decides what then.
func Listen(ctx context.Context, path string) ([]net.Listener, error) {
	given, err := serving.Activated("unix") // the kernel says who connects to these
	if err != nil {
		return nil, err
	}
	var lns []net.Listener
	for _, g := range given {
		lns = append(lns, g.Listener)
	}
	if len(lns) > 0 {
		return lns, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the agent's socket: %w", err)
	}
	ln, err := serving.Unix(ctx, path, 0o666)
	if err != nil {
		return nil, fmt.Errorf("making the agent's socket: %w", err)
	}
	return []net.Listener{ln}, nil
}
