package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/internal/serving"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/cache"
	"github.com/instar-image/instar/upload/cache/cacheclient"
)

// The cache that a host's guests share, and the ways to it.

func newCache(a *app) *cobra.Command {
	cmd := branch("cache", "keep a host's copies of what its guests read of a store", `
Guests of one host mostly read the same pieces of a store. One process per host
fetches each of them once and hands it to all. docs/cache.md says how to set it
up, and what it can and cannot do to its guests.`, `
  instar cache serve --store s3://images/fleet --listen 192.168.7.1:9255 --allow 192.168.7.0/24`)
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
	f.text(&o.admin, "admin", "", "serve /metrics, /healthz and /readyz at `ADDRESS:PORT`", ofUs, test)
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
		return errors.Join(err, closeAll(so.Listeners))
	}
	if o.admin != "" {
		if so.Admin, err = (&net.ListenConfig{}).Listen(ctx, "tcp", o.admin); err != nil {
			return errors.Join(failf(exitFile, "listening at %s for metrics and health: %w", o.admin, err), closeAll(so.Listeners))
		}
	}
	access, done, err := openAccessLog(a, o.accessLog)
	if err != nil {
		return errors.Join(err, closeAll(so.Listeners))
	}
	defer done()
	so.Cache, so.AccessLog = c, access
	return cache.Serve(ctx, so)
}

// closeAll closes listeners by which nothing came.
func closeAll(list []net.Listener) error {
	var err error
	for _, l := range list {
		err = errors.Join(err, l.Close())
	}
	return err
}

// listeners opens the places to listen at, and takes those that systemd hands
// over.
func (o *cacheServeOptions) listeners(ctx context.Context) (list []net.Listener, err error) {
	given, err := serving.Activated("tcp", "unix")
	if err != nil {
		return nil, failf(exitFile, "%w", err)
	}
	for _, g := range given {
		list = append(list, g.Listener)
	}
	places := o.listen
	if len(places) == 0 && len(list) == 0 {
		places = []string{cacheListen}
	}
	for _, p := range places {
		l, err := o.open(ctx, p)
		if err != nil {
			return list, err
		}
		list = append(list, l)
	}
	return list, nil
}

// open listens at a place. Who may reach a socket is its directory's to say.
func (o *cacheServeOptions) open(ctx context.Context, place string) (l net.Listener, err error) {
	if path, ok := strings.CutPrefix(place, "unix:"); ok {
		l, err = serving.Unix(ctx, path, 0o666)
	} else {
		at, perr := netip.ParseAddrPort(place)
		if perr != nil {
			return nil, usagef("--listen %q: neither ADDRESS:PORT, as %s, nor unix:/PATH", place, cacheListen)
		}
		if !at.Addr().IsLoopback() && len(o.allow) == 0 {
			return nil, withHint(usagef("--listen %s: nobody there may use it", place), "--allow NETWORK says who may, as --allow 192.168.7.0/24.")
		}
		l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", place)
	}
	if err != nil {
		return nil, failf(exitFile, "listening at %s: %w", place, err)
	}
	return l, nil
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
