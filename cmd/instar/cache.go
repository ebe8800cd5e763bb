package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache"
	"github.com/instar-image/instar/upload/cache/cacheclient"
)

// The cache that a host's guests share, and the ways to it.

func newCache(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "cache", Short: "keep a host's copies of what its guests read of a store",
		Long: strings.TrimSpace(`
Guests of one host mostly read the same pieces of a store. One process per host
fetches each of them once and hands it to all. docs/cache.md says how to set it
up, and what it can and cannot do to its guests.`),
		Example: `  instar cache serve --store s3://images/fleet --listen 192.168.7.1:9255 --allow 192.168.7.0/24`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q", "cache "+args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newCacheServe(a))
	return cmd
}

type cacheServeOptions struct {
	imageStore
	dir, admin, accessLog string
	size                  int64
	listen, allow         []string
	parallel, clients     int
}

// Where the cache's things are unless options say otherwise.
const (
	cacheDir    = "/var/cache/instar"
	cacheListen = "127.0.0.1:9255"
)

func newCacheServe(a *app) *cobra.Command {
	o := cacheServeOptions{dir: cacheDir, accessLog: "none"}
	const test = "cache"
	cmd := a.command("serve", "run the cache", `
Fetches packs and index objects of a store when a guest asks for the first time,
compares them with their names, which are digests, and hands them to all guests
by HTTP: GET /packs/HH/NAME and /index/HH/NAME, whole or by Range. What is asked
for comes first and is passed on while the rest of its pack is fetched, once
however many ask. The directory holds at most --size; what was not used for
longest goes. A full disk, a crash and a damaged file cost requests to the
store, no more.

It needs no key, and its guests need none for it: all it has is sealed, and
every reader verifies what it opens. What could be forged or grow old (heads,
manifests, keys, traces) is not cached; guests get that from the store. Clients
other than this machine's own are served if --allow names their network. The
credentials for the store stay here.`, `
  instar cache serve --store s3://images/fleet --size 100g
  instar cache serve --store s3://images/fleet --listen 192.168.7.1:9255 --allow 192.168.7.0/24 --admin 127.0.0.1:9256
  instar cache serve --store s3://images/fleet --listen unix:/run/instar/cache.sock`,
		func(ctx context.Context) error { return runCacheServe(ctx, a, &o) })
	f := flagsOf(cmd)
	o.addPlace(cmd, test)
	f.text(&o.dir, "dir", "", "keep objects in `DIR`; default "+cacheDir, ofUs, test)
	completeFiles(cmd, "dir")
	f.size(&o.size, "size", "", "keep at most `BYTES`, with k, m or g; default 20g", ofUs, test)
	f.list(&o.listen, "listen", "", "serve at `PLACE`, ADDRESS:PORT or unix:/PATH; default "+cacheListen, ofUs, test)
	f.list(&o.allow, "allow", "", "serve clients of `NETWORK`, as 192.168.7.0/24, too; may be repeated", ofUs, test)
	f.text(&o.admin, "admin", "", "serve /metrics and /healthz at `ADDRESS:PORT`", ofUs, test)
	f.text(&o.accessLog, "access-log", "", "append a line of JSON per request to `FILE`; '-' is standard error; default 'none'", ofUs, test)
	f.number(&o.parallel, "parallel", "", "make at most `N` requests to the store at once; default 16", ofUs, test)
	f.number(&o.clients, "max-connections", "", "let each client have at most `N` connections; default 256", ofUs, test)
	o.addService(a, cmd, test)
	return cmd
}

func runCacheServe(ctx context.Context, a *app, o *cacheServeOptions) (err error) {
	so := cache.ServeOptions{PerClient: o.clients, Log: zerolog.New(a.stderr).With().Timestamp().Logger()}
	for _, s := range o.allow {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return usagef("--allow %q: not a network, as 192.168.7.0/24: %w", s, err)
		}
		so.Allow = append(so.Allow, p.Masked())
	}
	objects, err := a.openImages(ctx, &o.imageStore, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, objects.Close()) }()
	c, err := cache.Open(cache.Options{Dir: o.dir, Limit: o.size, Store: objects, Parallel: o.parallel})
	if err != nil {
		return failf(exitFile, "%w", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if so.Listeners, err = o.listeners(ctx); err != nil {
		closeAll(so.Listeners)
		return err
	}
	if o.admin != "" {
		if so.Admin, err = (&net.ListenConfig{}).Listen(ctx, "tcp", o.admin); err != nil {
			closeAll(so.Listeners)
			return failf(exitFile, "listening at %s for metrics and health: %w", o.admin, err)
		}
	}
	access, err := openAccessLog(a, o.accessLog)
	if err != nil {
		closeAll(so.Listeners)
		return err
	}
	if f, ok := access.(io.Closer); ok && access != a.stderr {
		defer f.Close()
	}
	so.Cache, so.AccessLog = c, access
	return cache.Serve(ctx, so)
}

func closeAll(list []net.Listener) {
	for _, l := range list {
		l.Close() // nothing came by it
	}
}

// listeners opens the places to listen at, and takes those that systemd hands
// over.
func (o *cacheServeOptions) listeners(ctx context.Context) (list []net.Listener, err error) {
	given, err := activation.Listeners()
	if err != nil {
		return nil, failf(exitFile, "taking systemd's sockets: %w", err)
	}
	for _, l := range given {
		if l != nil {
			list = append(list, l)
		}
	}
	places := o.listen
	if len(places) == 0 && len(list) == 0 {
		places = []string{cacheListen}
	}
	for _, p := range places {
		path, isSocket := strings.CutPrefix(p, "unix:")
		if isSocket {
			l, err := listenSocket(ctx, path)
			if err != nil {
				return list, failf(exitFile, "listening at %s: %w", p, err)
			}
			list = append(list, l)
			continue
		}
		at, err := netip.ParseAddrPort(p)
		if err != nil {
			return list, usagef("--listen %q: neither ADDRESS:PORT, as %s, nor unix:/PATH", p, cacheListen)
		}
		if !at.Addr().IsLoopback() && len(o.allow) == 0 {
			return list, withHint(usagef("--listen %s: nobody there may use it", p), "--allow NETWORK says who may, as --allow 192.168.7.0/24.")
		}
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", p)
		if err != nil {
			return list, failf(exitFile, "listening at %s: %w", p, err)
		}
		list = append(list, l)
	}
	return list, nil
}

// listenSocket listens at a unix socket, in place of one that nobody listens at
// any more. Who may reach it is its directory's to say.
func listenSocket(ctx context.Context, path string) (net.Listener, error) {
	if err := freeSocket(ctx, path); err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// freeSocket takes away a socket that nobody listens at any more: a server that
// was killed left it. Whatever else is there stays, and is an error.
func freeSocket(ctx context.Context, path string) error {
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

// isCacheDir tells whether --cache names a directory.
func isCacheDir(s string) bool {
	return strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../")
}

// cached puts the cache of --cache before a store. One that cannot be used is
// done without.
func (a *app) cached(o *imageStore, objects upload.Store) (upload.Store, error) {
	if o.cache == "" {
		if o.cacheSize != 0 {
			return nil, errors.Join(usagef("--cache-size goes with --cache DIR"), objects.Close())
		}
		return objects, nil
	}
	var s *cache.Store
	if isCacheDir(o.cache) {
		c, err := cache.Open(cache.Options{Dir: o.cache, Limit: o.cacheSize, Store: objects})
		if errors.Is(err, cache.ErrInUse) {
			a.ui.Say("note: the cache %s is used by another process: going on without it", o.cache)
			return objects, nil
		}
		if err != nil {
			return nil, errors.Join(failf(exitFile, "--cache: %w", err), objects.Close())
		}
		s = cache.Wrap(objects, c)
	} else {
		if o.cacheSize != 0 {
			return nil, errors.Join(usagef("--cache-size is of a directory; %s has its own", o.cache), objects.Close())
		}
		c, err := cacheclient.New(o.cache)
		if err != nil {
			return nil, errors.Join(withHint(usagef("--cache: %w", err), "A directory begins with / or ./ here."), objects.Close())
		}
		s = cache.WrapClient(objects, c)
	}
	var once sync.Once
	s.OnFallback = func(key string, err error) {
		a.ui.Debug("read from the store, not by way of the cache", ui.Fields{"key": key, "error": err.Error()})
		once.Do(func() { a.ui.Say("note: not all comes by way of the cache %s: %v", o.cache, err) })
	}
	return s, nil
}
