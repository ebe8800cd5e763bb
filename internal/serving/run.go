package serving

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// Part is a server and a listener of its.
type Part struct {
	Server   *http.Server
	Listener net.Listener // Run closes it
	// EndRequests ends the contexts of the server's requests when the end
	// begins: of streams, and of those that wait for something else. The others'
	// requests are finished.
	EndRequests bool
}

// Options say what runs and how it ends.
type Options struct {
	Parts []Part
	// Beside are what runs as long as the parts do: each until its context
	// ends. An error of one ends all.
	Beside []func(context.Context) error
	// Grace is how long what is under way may take at the end. Whoever is left
	// then is cut off.
	Grace time.Duration
	// Notifier tells systemd; nil tells nobody.
	Notifier *Notifier
	// Status is what is told with readiness, a line.
	Status string
	// Alive says that the service works; nil: it does, as long as it runs.
	Alive func(context.Context) error
	// Ready, if not nil, is called once requests are served.
	Ready func()
}

// Run serves until ctx ends or something fails, then lets what is under way
// finish. It returns nil after an orderly end.
func Run(ctx context.Context, o Options) error {
	group, inner := errgroup.WithContext(ctx)
	var servers []*http.Server
	for _, p := range o.Parts {
		if p.EndRequests {
			p.Server.BaseContext = func(net.Listener) context.Context { return inner }
		}
		if !slices.Contains(servers, p.Server) {
			servers = append(servers, p.Server)
		}
	}
	for _, p := range o.Parts {
		group.Go(func() error {
			if err := p.Server.Serve(p.Listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serving at %s: %w", p.Listener.Addr(), err)
			}
			return nil
		})
	}
	o.Notifier.Ready(o.Status)
	for _, f := range o.Beside {
		group.Go(func() error {
			if err := f(inner); err != nil && (ctx.Err() == nil || !errors.Is(err, context.Canceled)) {
				return err
			}
			return nil
		})
	}
	group.Go(func() error { return o.Notifier.Alive(inner, o.Alive) })
	group.Go(func() error {
		<-inner.Done()
		o.Notifier.Stopping()
		stop(servers, o.Grace)
		return nil
	})
	if o.Ready != nil {
		o.Ready()
	}
	return group.Wait()
}

// stop ends the servers together, within the grace.
func stop(servers []*http.Server, grace time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	var group errgroup.Group
	for _, s := range servers {
		group.Go(func() error {
			if s.Shutdown(ctx) != nil {
				s.Close() // whoever is left is cut off; that listeners were closed already is no news
			}
			return nil
		})
	}
	_ = group.Wait() // none fails
}
