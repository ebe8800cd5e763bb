package serving

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Given is a socket that systemd hands over.
type Given struct {
	net.Listener
	Name string // FileDescriptorName= of its unit, the unit's own if that gives none
}

// Activated takes the sockets that systemd hands over, in its order: none if
// it hands over none. They are taken out of the environment. Each must be of one
// of the networks, "tcp" or "unix", and listen for streams.
func Activated(networks ...string) ([]Given, error) {
	var given []Given
	var failed error
	for _, f := range activation.Files(true) {
		ln, err := net.FileListener(f) // a duplicate, that leaves a socket's file alone when it is closed
		err = errors.Join(err, f.Close())
		if ln != nil {
			given = append(given, Given{ln, f.Name()})
			if err == nil && !slices.Contains(networks, ln.Addr().Network()) {
				err = fmt.Errorf("it is of network %s", ln.Addr().Network())
			}
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("taking systemd's sockets: %s: ListenStream= is to name a place of network %v: %w", f.Name(), networks, err))
		}
	}
	if failed != nil {
		for _, g := range given {
			g.Close() // nothing came by it
		}
		return nil, failed
	}
	return given, nil
}

// Unix listens at a unix socket of a mode, which says who may connect, in the
// place of one that nobody serves any more: a server that was killed left it.
// Whatever else is there stays, and is an error.
func Unix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	if err := free(ctx, path); err != nil {
		return nil, err
	}
	// The socket's file gets the mode of the socket, less the umask: nobody
	// connects before it has its own.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var serr error
		err := c.Control(func(fd uintptr) { serr = unix.Fchmod(int(fd), uint32(mode.Perm())) })
		return errors.Join(err, serr)
	}}
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// free takes away a socket that nobody listens at any more.
func free(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is there already and is no socket: %w", path, fs.ErrExist)
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("somebody serves at %s already: %w", path, unix.EADDRINUSE)
	case !errors.Is(err, unix.ECONNREFUSED):
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
