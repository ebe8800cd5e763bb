// Package systemd is what the agent has to do with systemd: what it tells it of
// itself, the units it asks it to start, stop, freeze and run tasks in, the lock
// against shutdown, and the units the agent itself is.
//
// In go words and names of units; out come changes of the system's state. The
// package talks to the notification socket, to the system bus and, for
// installing, to the directory of unit files.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/coreos/go-systemd/v22/util"
)

// Running reports whether systemd is the init of this machine.
func Running() bool { return util.IsRunningSystemd() }

// Notifier tells systemd how a service is, where there is one to tell.
type Notifier struct {
	told bool
	warn func(error)

	mu     sync.Mutex
	status string
}

// NewNotifier returns a Notifier; warn is told what could not be told.
func NewNotifier(warn func(error)) *Notifier {
	return &Notifier{told: os.Getenv("NOTIFY_SOCKET") != "", warn: warn}
}

// Told reports whether there is anybody to tell.
func (n *Notifier) Told() bool { return n.told }

func (n *Notifier) send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil && n.warn != nil {
		n.warn(fmt.Errorf("telling systemd: %w", err))
	}
}

// Ready says that requests are taken.
func (n *Notifier) Ready(status string) { n.send(daemon.SdNotifyReady + "\nSTATUS=" + oneLine(status)) }

// Status says what is done, in a line; the same twice is told once.
func (n *Notifier) Status(status string) {
	n.mu.Lock()
	same := n.status == status
	n.status = status
	n.mu.Unlock()
	if !same {
		n.send("STATUS=" + oneLine(status))
	}
}

// Stopping says that the end has begun.
func (n *Notifier) Stopping() { n.send(daemon.SdNotifyStopping) }

func oneLine(s string) string { return strings.NewReplacer("\n", " ", "\r", " ").Replace(s) }

// Alive keeps systemd's watchdog quiet until ctx ends, as long as check says
// that the service works: a service that hangs is not vouched for, and is
// restarted. It returns at once where no watchdog is asked for.
func (n *Notifier) Alive(ctx context.Context, check func(context.Context) error) error {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("reading systemd's watchdog: %w", err)
	}
	if every == 0 {
		return nil
	}
	tick := time.NewTicker(every / 2)
	defer tick.Stop()
	for {
		bounded, cancel := context.WithTimeout(ctx, every/2)
		err := check(bounded)
		cancel()
		switch {
		case err == nil:
			n.send(daemon.SdNotifyWatchdog)
		case ctx.Err() == nil && n.warn != nil:
			n.warn(fmt.Errorf("the watchdog is not told that all is well: %w", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Listeners are the unix sockets that systemd hands over; none if it hands
// over none. They are taken out of the environment.
func Listeners() ([]net.Listener, error) {
	lns, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking systemd's sockets: %w", err)
	}
	for _, ln := range lns {
		if _, ok := ln.(*net.UnixListener); !ok {
			err = errors.Join(err, errors.New("taking systemd's sockets: one is no unix stream socket: the agent must know who connects"))
		}
	}
	if err != nil {
		for _, ln := range lns {
			if ln != nil {
				ln.Close()
			}
		}
		return nil, err
	}
	for _, ln := range lns { // the socket is systemd's and outlives the agent
		ln.(*net.UnixListener).SetUnlinkOnClose(false)
	}
	return lns, nil
}
