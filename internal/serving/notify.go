package serving

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
)

// Notifier tells systemd how a service is, as sd_notify(3) has it, where there
// is a systemd to tell. A nil one tells nobody. Its methods may be called
// concurrently.
type Notifier struct {
	log zerolog.Logger

	mu     sync.Mutex
	status string
}

// NewNotifier returns a Notifier; what cannot be told goes to the log.
func NewNotifier(log zerolog.Logger) *Notifier { return &Notifier{log: log} }

// Told reports whether there is anybody to tell.
func (n *Notifier) Told() bool { return n != nil && os.Getenv("NOTIFY_SOCKET") != "" }

func (n *Notifier) send(state string) {
	if n == nil {
		return
	}
	if _, err := daemon.SdNotify(false, state); err != nil {
		n.log.Warn().Err(err).Msg("telling systemd")
	}
}

// fresh notes the status, and reports whether it was another before.
func (n *Notifier) fresh(status string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	was := n.status
	n.status = status
	return was != status
}

// Ready says that requests are taken, and what is done, in a line.
func (n *Notifier) Ready(status string) {
	if n == nil {
		return
	}
	state := daemon.SdNotifyReady
	if n.fresh(status) {
		state += "\nSTATUS=" + oneLine(status)
	}
	n.send(state)
}

// Status says what is done, in a line; the same twice is told once.
func (n *Notifier) Status(status string) {
	if n != nil && n.fresh(status) {
		n.send("STATUS=" + oneLine(status))
	}
}

// Stopping says that the end has begun.
func (n *Notifier) Stopping() { n.send(daemon.SdNotifyStopping) }

func oneLine(s string) string { return strings.NewReplacer("\n", " ", "\r", " ").Replace(s) }

// Alive keeps systemd's watchdog quiet until ctx ends, as long as check says
// that the service works: one that hangs is not vouched for, and is restarted.
// A nil check says so always. Alive returns at once where no watchdog is asked
// for.
func (n *Notifier) Alive(ctx context.Context, check func(context.Context) error) error {
	if n == nil {
		return nil
	}
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
		if err := bounded(ctx, every/2, check); err == nil {
			n.send(daemon.SdNotifyWatchdog)
		} else if ctx.Err() == nil {
			n.log.Warn().Err(err).Msg("systemd's watchdog is not told that all is well")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func bounded(ctx context.Context, most time.Duration, check func(context.Context) error) error {
	if check == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	return check(ctx)
}
