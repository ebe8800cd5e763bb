package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Listen makes the agent's socket, in the place of one nobody serves. Everybody
// can connect to it; the policy decides what then.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the agent's socket: %w", err)
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return nil, fmt.Errorf("making the agent's socket %s: another agent uses it", path)
	case errors.Is(err, unix.ECONNREFUSED):
		// A file that is no socket refuses connections too.
		if fi, serr := os.Lstat(path); serr == nil && fi.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("making the agent's socket: %s is there, and is no socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("making the agent's socket: %w", err)
		}
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("making the agent's socket: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		ln.Close()
		return nil, fmt.Errorf("making the agent's socket: %w", err)
	}
	return ln, nil
}
